"""The server's listening socket and its API keys."""

import socket
from pathlib import Path

from launcher.host.loopback import is_loopback
from parallel.errors import ConfigError
from parallel.regular_file import MAX_KEY_BYTES, read_text


def read_keys(host: str, key_file: Path | None, *, insecure: bool) -> tuple[bytes, ...]:
    """Read the API keys. Raises ConfigError for a file without keys, and if other hosts could connect without one."""
    if key_file is None:
        if not is_loopback(host) and not insecure:
            raise ConfigError(f"--host {host} can be reached by other hosts and needs an API key: give --api-key-file or --insecure")
        return ()
    try:
        text = read_text(key_file, MAX_KEY_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {key_file} cannot be read: {getattr(error, 'strerror', error)}") from None
    keys = tuple(line.strip().encode() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {key_file} holds no key: write one per line")
    if any(character <= 32 or character > 126 for key in keys for character in key):
        raise ConfigError(
            f"--api-key-file {key_file} holds a key with whitespace or non-ASCII characters, which an HTTP header cannot carry"
        )
    return keys


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises ConfigError if the address is not local or the port is in use."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} is not an address of this host: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port or --host") from None
    return listener
