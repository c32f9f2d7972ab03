"""A `tandem serve` for the time of a test: started, waited for until /health says ok, ended by SIGTERM; or one that runs already."""

import argparse
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from http_client import Address
from tandem_bench import OWN_COMMAND, BenchError, build_environment, find_reason

STOP_SECONDS = 60.0
"""A server that lives so long after SIGTERM is killed."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    address: Address
    process: "subprocess.Popen[bytes] | None" = None
    """None: somebody else has started it."""

    def has_ended(self) -> bool:
        """Whether a server that was started here is gone."""
        return self.process is not None and self.process.poll() is not None

    def stop(self) -> int | None:
        """Exit code after SIGTERM; None when there is none: it had to be killed, or it is not ours."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which server."""
    parser.add_argument("--url", help="of a server that runs, http://127.0.0.1:8000")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="start `tandem serve` with it, instead of --url")
    parser.add_argument("--workers", type=int, default=2, help="ranks of the server to start")
    parser.add_argument("--start-seconds", type=float, default=600, help="until it has to answer")
    parser.add_argument("--tandem", default=OWN_COMMAND, help="command that starts it (default: this checkout)")
    parser.add_argument("more", nargs="*", help="behind --: more options of `tandem serve`")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what contradicts itself."""
    if bool(options.url) == bool(options.checkpoint):
        parser.error("give either --url or --checkpoint")
    if options.url and options.more:
        parser.error(f"{' '.join(options.more)}: only a server that is started here takes options, and --url names another")
    if options.url:
        try:
            Address.parse(options.url)
        except ValueError as error:
            parser.error(str(error))


@contextmanager
def open_server(options: argparse.Namespace) -> Iterator[Server]:
    """The server that the options name, ready. Raises BenchError."""
    try:
        api_key = options.api_key_file.read_text(encoding="utf-8").strip() if options.api_key_file else None
    except OSError as error:
        raise BenchError(f"{options.api_key_file} cannot be read: {error.strerror}") from None
    if options.url:
        yield Server(Address.parse(options.url, api_key))
        return
    port = find_free_port()
    command = [*shlex.split(options.tandem), "serve", "--checkpoint", str(options.checkpoint.resolve()), "--workers", str(options.workers)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-key-file", str(options.api_key_file.resolve())] if options.api_key_file else []
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "server.log"
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [*command, *options.more],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=build_environment(),
                )
        except OSError as error:
            raise BenchError(f"{command[0]} cannot be started: {error.strerror}") from None
        server = Server(Address("127.0.0.1", port, api_key=api_key), process)
        try:
            wait_until_healthy(server, options.start_seconds, log)
            yield server
        finally:
            server.stop()


def wait_until_healthy(server: Server, seconds: float, log: Path) -> None:
    """Until /health answers 200. Raises BenchError, with what the server said last."""
    deadline = time.monotonic() + seconds
    while not is_healthy(server.address):
        if server.has_ended():
            assert server.process is not None
            raise BenchError(f"the server ended with exit code {server.process.returncode}: {read_reason(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"the server was not ready after {seconds:g} s: {read_reason(log)}")
        time.sleep(0.1)


def read_reason(log: Path) -> str:
    """What tells most of the end of a log."""
    return find_reason(log.read_text(encoding="utf-8", errors="replace"))


def is_healthy(address: Address) -> bool:
    """Whether GET /health answers 200 now."""
    connection = HTTPConnection(address.host, address.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def find_free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
