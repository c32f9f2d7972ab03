"""Drawing of a plan as SVG: one bar per dimension, one lane per rank, colored where the rank owns it."""

from collections.abc import Sequence
from html import escape

from model.planning import RankPlan

_WIDTH, _LEFT, _TOP, _GAP = 900, 210, 60, 34
_DIMENSIONS = {
    "query heads": "heads",
    "key-value heads": "kv_heads",
    "hidden rows": "hidden_rows",
    "intermediate rows": "intermediate_rows",
    "vocabulary rows": "vocab_rows",
}
"""Maps labels to fields of RankPlan."""


def draw_plan(plans: Sequence[RankPlan], title: str) -> str:
    """Return an SVG document. Hovering over a bar shows rank and range."""
    lane = max(4, min(16, 240 // len(plans)))
    parts, y = [], _TOP
    for words, field in _DIMENSIONS.items():
        full = max(getattr(plan, field)[1] for plan in plans)
        parts.append(_text(12, y + lane * len(plans) / 2 + 4, f"{words} ({full})"))
        for plan in plans:
            start, stop = getattr(plan, field)
            x, width = _LEFT + _WIDTH * start / full, _WIDTH * (stop - start) / full
            label = f"rank {plan.rank}: {words} {start} to {stop}"
            colour = f"hsl({360 * plan.rank // len(plans)} 60% 55%)"
            parts.append(
                f'<rect x="{x:.2f}" y="{y + lane * plan.rank}" width="{width:.2f}" height="{lane - 1}" fill="{colour}">'
                f"<title>{escape(label)}</title></rect>"
            )
            if lane >= 12:
                parts.append(_text(x + 4, y + lane * plan.rank + lane - 4, str(plan.rank), size=10))
        y += lane * len(plans) + _GAP
    for plan in plans:
        words = f"rank {plan.rank}: {plan.weight_bytes / 1e9:.2f} GB of weights, peak {plan.peak_bytes / 1e9:.2f} GB"
        parts.append(_text(12, y, words))
        y += 18
    size = f'width="{_LEFT + _WIDTH + 20}" height="{y + 10}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
    return "\n".join((head, '<rect width="100%" height="100%" fill="white"/>', _text(12, 28, title, size=18), *parts, "</svg>")) + "\n"


def _text(x: float, y: float, words: str, size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(words)}</text>'
