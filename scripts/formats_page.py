"""Writes the tables of docs/formats.md from the tables in the code: `python scripts/formats_page.py`.

What lies between the two marks is replaced; the rest of the page is written by hand.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.checkpoint.gguf_metadata import GGUF_KEYS  # noqa: E402
from model.checkpoint.meta_params import META_KEYS  # noqa: E402
from model.spec.config_keys import CONFIG_KEYS, OTHER_MODELS  # noqa: E402
from model.spec.families import list_architectures  # noqa: E402
from model.spec.key_table import KeyTable  # noqa: E402
from model.spec.quantization_keys import (  # noqa: E402
    ARGUMENT_KEYS,
    AUTO_ROUND_KEYS,
    AWQ_KEYS,
    COMPRESSED_KEYS,
    FBGEMM_KEYS,
    FLOAT8_KEYS,
    GPTQ_KEYS,
    GROUP_KEYS,
    MODELOPT_FILE_KEYS,
    MODELOPT_KEYS,
    OTHER_METHODS,
)
from model.spec.rope_scaling import READ_KEYS  # noqa: E402

PAGE = ROOT / "docs" / "formats.md"
START, END = "<!-- tables: start -->", "<!-- tables: end -->"
TABLES = (
    *(CONFIG_KEYS, COMPRESSED_KEYS, GROUP_KEYS, ARGUMENT_KEYS, GPTQ_KEYS, AWQ_KEYS),
    *(AUTO_ROUND_KEYS, FLOAT8_KEYS, FBGEMM_KEYS, MODELOPT_KEYS, MODELOPT_FILE_KEYS, GGUF_KEYS, META_KEYS),
)


def render_tables() -> str:
    """All tables as Markdown."""
    others = [family.keys for family in list_architectures().values() if family.keys is not CONFIG_KEYS]
    lines = [line for table in (CONFIG_KEYS, *map(_subtract, others), *TABLES[1:]) for line in _render(table)]
    lines += ["### rope_scaling and rope_parameters", "", "| rope_type | keys that are read |", "|---|---|"]
    lines += [f"| {_code([kind])} | {_code(keys) or 'none'} |" for kind, keys in READ_KEYS.items()]
    lines += ["", "### Recognized and refused", ""]
    lines += [f"`quant_method`: {_code(OTHER_METHODS)}.", "", f"`model_type`, besides every other unknown one: {_code(OTHER_MODELS)}.", ""]
    return "\n".join(lines)


def read_page(text: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    before, _, rest = text.partition(START)
    inner, _, after = rest.partition(END)
    return before, inner, after


def _render(table: KeyTable) -> Iterator[str]:
    yield from (f"### {table.name}", "", "| what becomes of it | keys |", "|---|---|")
    if table.read:
        yield f"| read | {_code(table.read)} |"
    rows = (("required to be", table.fixed), ("ignored, as in transformers; reported unless", table.ignored))
    for words, keys in rows:
        for key, allowed in sorted(keys.items()):
            values = " or ".join(["null", *(f"`{value!r}`" for value in allowed)])
            yield f"| {words} {values} | `{key}` |"
    if table.harmless or table.harmless_prefixes:
        yield f"| harmless | {_code([*sorted(table.harmless), *(prefix + '*' for prefix in table.harmless_prefixes)])} |"
    yield ""


def _subtract(table: KeyTable) -> KeyTable:
    """What a family's table says otherwise than that of Llama."""
    base = CONFIG_KEYS
    return KeyTable(
        name=f"{table.name}: other than llama",
        read=table.read - base.read,
        fixed={key: value for key, value in table.fixed.items() if base.fixed.get(key) != value or key not in base.fixed},
        ignored={key: value for key, value in table.ignored.items() if base.ignored.get(key) != value or key not in base.ignored},
        harmless=table.harmless - base.harmless,
    )


def _code(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in (names if isinstance(names, list) else sorted(names)))


def main() -> None:
    """Replace what is between the marks."""
    before, _, after = read_page(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(f"{before}{START}\n{render_tables()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
