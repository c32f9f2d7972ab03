"""Declaration of a command's options as fields of a frozen dataclass: name, aliases, type, choices, help, panel and default.

`takes` derives a typer command's signature from such a class, and imports the command's module only when it runs.
"""

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Optional, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from parallel.errors import ConfigError

MODEL, GENERATION, PARALLELISM, MEMORY, CLUSTER = "Model", "Generation", "Parallelism", "Memory", "Cluster"
OUTPUT, SERVER, QUANTIZATION, DATA, PROGRAM = "Output", "Server", "Quantization", "Data", "Program"
PANELS = ("Arguments", PROGRAM, MODEL, QUANTIZATION, DATA, GENERATION, SERVER, PARALLELISM, MEMORY, CLUSTER, OUTPUT, "Other")
"""Help panels, in display order."""
_FLAGS_WIDTH = 34
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


@dataclass(frozen=True, slots=True)
class Aliases:
    """Alternative spellings of an option, accepted but not shown in the help."""

    flags: tuple[str, ...]


def option(
    *flags: str,
    help: str,
    panel: str,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    hidden: bool = False,
) -> Any:
    """Declare an option. The help text includes the default, since most defaults are determined after parsing.

    `min` and `max` are inclusive, `above` is exclusive. `hidden`: accepted, but not shown in the help.
    """
    declared: Any = typer.Option(
        *flags, help=help, rich_help_panel=panel, metavar=metavar, min=min, max=max, show_default=False, hidden=hidden
    )
    declared.above = above
    return declared


def argument(*, metavar: str, help: str, is_first: bool = False) -> Any:
    """Declare a positional argument. `is_first`: it stands before those of the base classes."""
    declared: Any = typer.Argument(metavar=metavar, help=help, show_default=False)
    declared.is_first = is_first
    return declared


def also(*flags: str) -> Aliases:
    """Declare alternative spellings of an option; `--on/--off` for a switch."""
    return Aliases(flags)


class DeclaredCommand(TyperCommand):
    """Command whose options may have aliases, and whose help lists options by panel, mostly one per line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the panels."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                panels.setdefault("Arguments", []).append((parameter.metavar or record[0], record[1]))
            else:
                panel = getattr(parameter, "rich_help_panel", None) or "Other"
                panels.setdefault(panel, []).append((_describe_flags(parameter), getattr(parameter, "help", None) or ""))
        for panel, rows in sorted(panels.items(), key=lambda item: PANELS.index(item[0])):
            with formatter.section(panel):
                formatter.write_dl(rows, col_max=_FLAGS_WIDTH)

    def make_parser(self, ctx: Any) -> Any:
        """Add the aliases to the parser."""
        parser = super().make_parser(ctx)
        aliases: dict[str, Aliases] = getattr(self.callback, "aliases", {})
        for parameter in self.params:
            if parameter.name in aliases:
                hidden = copy.copy(parameter)
                pairs = [flag.partition("/") for flag in aliases[parameter.name].flags]
                hidden.opts = [on for on, _, _ in pairs]
                hidden.secondary_opts = [off for _, _, off in pairs if off]
                hidden.add_to_parser(parser, ctx)
        return parser


def _describe_flags(parameter: Any) -> str:
    """Format as `-n, --workers N`; a switch with its opposite."""
    short = [flag for flag in parameter.opts if not flag.startswith("--")]
    flags = ", ".join([*short, *(flag for flag in parameter.opts if flag not in short)])
    if parameter.secondary_opts:
        flags += f"/{parameter.secondary_opts[0]}"
    return f"{flags} {parameter.metavar}" if parameter.metavar else flags


def takes(options: type, run: str, prepare: Callable[[Any], Any]) -> Callable[[Callable[[], None]], Callable[..., None]]:
    """Give a command the options of a dataclass; `prepare` validates them, then `module:function` receives them as one value."""
    assert is_dataclass(options)
    hints = get_type_hints(options, include_extras=True)
    declared = [field for field in fields(options) if find_metadata(hints[field.name], typer.models.ParameterInfo)]
    declared.sort(key=lambda field: not getattr(find_metadata(hints[field.name], typer.models.ArgumentInfo), "is_first", False))
    parameters = []
    for field in declared:
        default = inspect.Parameter.empty if field.default is MISSING else None if field.default == () else field.default
        annotation = _as_typer_reads_it(hints[field.name])
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default))

    def decorate(command: Callable[[], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            said = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            for field in declared:
                if field.default == () and said[field.name] is None:
                    said[field.name] = ()
            made = options(**said)
            check_values(made)
            prepared = prepare(made)
            module, _, function = run.partition(":")
            getattr(importlib.import_module(module), function)(prepared)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.aliases = {field.name: found for field in declared if (found := find_metadata(hints[field.name], Aliases))}  # type: ignore[attr-defined]
        return call

    return decorate


def find_metadata(hint: Any, kind: type) -> Any:
    """Return the metadata of type `kind` in an annotation."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, kind):
            return part
    return None


def list_flags(hint: Any) -> list[str]:
    """Return all spellings of an option; of a switch, those that turn it on."""
    info, aliases = find_metadata(hint, typer.models.OptionInfo), find_metadata(hint, Aliases)
    # typer takes the first flag for a default until it has read the annotation.
    flags = [info.default, *(info.param_decls or ())] if info is not None else []
    return [str(flag).partition("/")[0] for flag in (*flags, *(aliases.flags if aliases is not None else ()))]


def check_values(options: Any, names: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for a value outside an option's choices or limits. `names` maps fields to their names in messages."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        info, value = find_metadata(hint, typer.models.OptionInfo), getattr(options, name)
        if info is None or value is None:
            continue
        flag = (names or {}).get(name, list_flags(hint)[0])
        choices = _list_choices(hint.__origin__)
        if choices and value not in choices:
            words = [word for word in choices if word != "None"]  # Golden Stick's spelling of none
            needed = f"one of {', '.join(words)}" if len(words) > 2 else " or ".join(words)
            raise ConfigError(f"{flag} is {value!r}, but has to be {needed}{_suggest(value, choices)}")
        if not _is_within(value, info):
            unit = " seconds" if name.endswith("_seconds") else ""
            raise ConfigError(f"{flag} is {value}, but has to be {_describe_limits(info)}{unit}")


def _is_within(value: Any, info: Any) -> bool:
    return (
        (info.min is None or value >= info.min) and (info.max is None or value <= info.max) and (info.above is None or value > info.above)
    )


def _describe_limits(info: Any) -> str:
    if info.min is not None and info.max is not None:
        return f"from {info.min:.12g} to {info.max:.12g}"
    limits = (("above", info.above), ("at least", info.min), ("at most", info.max))
    return " and ".join(f"{words} {limit:.12g}" for words, limit in limits if limit is not None)


def _suggest(value: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _list_choices(kind: Any) -> tuple[str, ...]:
    """Return the values of a Literal, or of `Literal | None`."""
    literal = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return get_args(literal) if literal is not None else ()


def _as_typer_reads_it(hint: Any) -> Any:
    """Convert a type for typer: variable-length tuples, which it does not support, to lists; a union to its first type, the command line's.

    Choices and limits are left to `check_values`, whose messages name both values.
    """
    kind, info = hint.__origin__, copy.copy(find_metadata(hint, typer.models.ParameterInfo))
    parts = [part for part in get_args(kind) if part is not NoneType]
    choices = _list_choices(kind)
    is_list = get_origin(kind) is tuple
    plain = str if choices else parts[0] if parts else kind
    if not info.metavar:
        words = "|".join(choices)
        info.metavar = _METAVARS[plain] if not choices else words if len(words) < _FLAGS_WIDTH - 6 else "NAME"
    if hasattr(info, "min"):
        info.min = info.max = None
    if is_list:
        return Annotated[Optional[list.__class_getitem__(plain)], info]  # noqa: UP045
    return Annotated[Optional[plain] if NoneType in get_args(kind) else plain, info]  # noqa: UP045
