"""Writes the tables of docs/models-and-formats.md from the registries of families and formats: `python scripts/support_page.py`.

Text between the two marks is replaced; the rest of the page is written by hand.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.checkpoint.formats import FORMATS  # noqa: E402
from model.decoder.llama import list_plain_features  # noqa: E402
from model.spec.architecture import Architecture  # noqa: E402
from model.spec.config import build_config  # noqa: E402
from model.spec.families import list_architectures  # noqa: E402

PAGE = ROOT / "docs" / "models-and-formats.md"
START, END = "<!-- tables: start -->", "<!-- tables: end -->"
_SIZES = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32, "vocab_size": 64}
_SIZES |= {"pad_token_id": 0, "head_dim": 32}


def render_tables() -> str:
    """Both tables as Markdown."""
    return "\n".join([*_render_families(), "", *_render_formats(), ""])


def _render_families() -> Iterator[str]:
    yield from ("### Families", "", f"| family | {' | '.join(FORMATS)} | in PyTorch instead of native kernels |")
    yield "|---|" + "---|" * (len(FORMATS) + 1)
    for name, family in list_architectures().items():
        cells = ["yes" if one.reads(family) else "-" for one in FORMATS.values()]
        yield f"| {name} | {' | '.join(cells)} | {', '.join(_list_plain(family)) or '-'} |"


def _list_plain(family: Architecture) -> list[str]:
    config = build_config({**_SIZES, "model_type": family.model_type})
    return list(list_plain_features(config))


def _render_formats() -> Iterator[str]:
    yield from (
        "### Formats",
        "",
        "| `--from` | format | weights in the file | in memory | `tandem quantize` | written by |",
        "|---|---|---|---|---|---|",
    )
    for key, one in FORMATS.items():
        written = f"`{one.written_by}`" if one.written_by else "-"
        yield f"| {key} | {one.name} | {one.weights} | {one.memory} | {'yes' if one.quantizes else '-'} | {written} |"


def main() -> None:
    """Replace the text between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n{render_tables()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
