"""A chart of the lines: the ratio to the best peer, and the percentage of the ceiling."""

from __future__ import annotations

from collections.abc import Sequence

from torchbandit.bench.frame import Line


def plot(lines: Sequence[Line], path: str) -> None:
    """Write the chart; the ending of `path` says in which format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{line.bench}: {line.work}" for line in lines]
    figure = Figure(figsize=(11, 1 + 0.4 * max(len(lines), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    ratios = [line.best.ratio if line.best else 0.0 for line in lines]
    for axis, values, form in ((left, ratios, "{:.2f} x"), (right, [line.percent or 0.0 for line in lines], "{:.0f}%")):
        bars = axis.barh(names, values, color="#4c72b0")
        axis.bar_label(bars, [form.format(value) if value else "" for value in values], padding=3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    left.invert_yaxis()
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("times the best peer's rate")
    right.set_xlabel("percent of the ceiling")
    figure.savefig(path, dpi=150)
