"""Pictures of measurements, PNG or SVG by the file's ending. Knows figures and words, not where they come from.

Needs matplotlib, which nothing else here does: pip install 'tandem-launcher[bench]'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import Spread

OWN_COLOURS = ("#1b6ca8", "#5fa8d3", "#0b3954", "#98c1d9")
PEER_COLOURS = ("#d98324", "#8f9779", "#a23e48", "#6d597a")


@dataclass(frozen=True, slots=True)
class Bar:
    """One program's figure of one metric."""

    metric: str
    name: str
    value: Spread
    is_own: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    simulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes with curves, both logarithmic."""

    title: str
    x_label: str
    lines: Sequence[Line]


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files. Exits with how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("a picture needs matplotlib: pip install 'tandem-launcher[bench]', or leave out --png") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_bars(bars: Sequence[Bar], title: str, path: Path) -> None:
    """A group of bars for each metric; whiskers from least to most."""
    pyplot = load_pyplot()
    metrics, names = list(dict.fromkeys(bar.metric for bar in bars)), list(dict.fromkeys(bar.name for bar in bars))
    figure, all_axes = pyplot.subplots(1, len(metrics), figsize=(1.5 + 3.2 * len(metrics), 3.8), squeeze=False)
    own = [name for name in names if any(bar.is_own for bar in bars if bar.name == name)]
    colours = {name: OWN_COLOURS[index % len(OWN_COLOURS)] for index, name in enumerate(own)}
    rest = [name for name in names if name not in own]
    colours |= {name: PEER_COLOURS[index % len(PEER_COLOURS)] for index, name in enumerate(rest)}
    for axes, metric in zip(all_axes[0], metrics, strict=True):
        for bar in (bar for bar in bars if bar.metric == metric):
            value, x = bar.value, names.index(bar.name)
            whiskers = [[value.median - value.least], [value.most - value.median]]
            axes.bar(x, value.median, color=colours[bar.name], yerr=whiskers, capsize=3)
            label = f"{value.median:,.0f}" if value.median >= 100 else f"{value.median:.3g}"
            axes.annotate(label, (x, value.most), textcoords="offset points", xytext=(0, 3), ha="center", fontsize=8)
        axes.set_title(metric.replace("@", ", batch "), fontsize=10)
        axes.set_xticks([])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel("tokens/s")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06 + 0.05 * (len(names) + 1) // 2, 1, 1))
    _save(pyplot, figure, path)


def draw_panels(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Panels in two columns; what is simulated is dashed."""
    pyplot = load_pyplot()
    rows = (len(panels) + 1) // 2
    figure, all_axes = pyplot.subplots(rows, 2, figsize=(10, 3.4 * rows), squeeze=False)
    for axes in all_axes.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(all_axes.flat, panels, strict=False):
        for line in panel.lines:
            xs, ys = zip(*sorted(line.points), strict=True)
            axes.plot(xs, ys, "o--" if line.simulated else "o-", markersize=4, label=line.label, alpha=0.8 if line.simulated else 1)
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in panel.lines for x, _ in line.points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(pyplot.matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label, fontsize=9)
        axes.set_ylabel("tokens/s", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
