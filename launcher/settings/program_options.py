"""Options of `tandem run`, and which words of its command line belong to the program."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_type_hints

from launcher.settings.msrun_options import MSRUN_HELP, MsrunOptions
from launcher.settings.option_declarations import CLUSTER, OUTPUT, PARALLELISM, PROGRAM, also, argument, list_flags, option
from launcher.settings.options import MAX_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOptions(MsrunOptions):
    """Options of `tandem run`."""

    words: Annotated[
        tuple[str, ...],
        argument(metavar="SCRIPT", help="Python file, followed by its own arguments; with -m, the arguments only."),
    ] = ()
    module: Annotated[
        str | None, option("--module", "-m", metavar="NAME", help="Run this module as the program, as python -m does.", panel=PROGRAM)
    ] = None
    workers: Annotated[
        int | None,
        option("--workers", "-n", help="Number of ranks. Default: MS_WORKER_NUM, then 1.", panel=PARALLELISM, min=1),
        also("--worker_num"),
    ] = None
    max_restarts: Annotated[
        int, option("--max-restarts", help="Maximum restarts of the program after a rank failure. Default: 0.", panel=PARALLELISM, min=0)
    ] = 0
    timeout_seconds: Annotated[
        float,
        option(
            "--timeout",
            help="Seconds that a rank waits for another in a step of a model. Default: 300.",
            panel=PARALLELISM,
            above=0,
            max=MAX_SECONDS,
        ),
        also("--cluster_time_out"),
    ] = 300.0
    log_dir: Annotated[
        Path | None,
        option("--log-dir", help="Folder of the ranks' logs, worker_N.log. Default: output/log.", panel=OUTPUT),
        also("--log_dir"),
    ] = None
    local_workers: Annotated[int | None, option("--local_worker_num", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    node_rank: Annotated[int | None, option("--node_rank", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    bind_cores: Annotated[str | None, option("--bind_core", metavar="True|False", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    master_addr: Annotated[str | None, option("--master_addr", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None
    master_port: Annotated[int | None, option("--master_port", help=MSRUN_HELP, panel=CLUSTER, hidden=True)] = None


def separate_program(arguments: Sequence[str]) -> list[str]:
    """Insert `--` before the words of `tandem run` that belong to the program, so that they pass through unchanged.

    tandem's options stand before SCRIPT or directly after it; the first other word after SCRIPT, and all that follow, are the program's.
    """
    flags = {flag for hint in get_type_hints(ProgramOptions, include_extras=True).values() for flag in list_flags(hint)}
    own, script, position, has_module = list[str](), list[str](), 0, False
    while position < len(arguments):
        word = arguments[position]
        name, equals, _ = word.partition("=")
        if word == "--":
            position += 1
            break
        if name in flags or (word[:2] in flags and not word.startswith("--")):
            count = 1 if (equals and name in flags) or word not in flags else 2
            has_module = has_module or name in ("-m", "--module") or word.startswith("-m")
            own += arguments[position : position + count]
            position += count
        elif word.startswith("-") and not script and not has_module:
            own.append(word)  # --help, or an unknown option
            position += 1
        elif not script and not has_module:
            script.append(word)
            position += 1
        else:
            break
    program = [*script, *arguments[position:]]
    return [*own, "--", *program] if program else own
