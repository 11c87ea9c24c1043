"""The figures as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Column(NamedTuple):
    title: str
    kind: str
    key: str
    show: Callable[[float], str]


COLUMNS = (
    Column("RM bytes", "reward_model", "bytes", lambda x: _size(x)),
    Column("RM tokens/s", "reward_model", "tokens_per_s", lambda x: f"{x:,.0f}"),
    Column("correlation", "reward_model", "correlation", lambda x: f"{x:.5f}"),
    Column("flipped pairs", "reward_model", "flipped_pairs", lambda x: f"{x:.2%}"),
    Column("ref. bytes", "reference", "bytes", lambda x: _size(x)),
    Column("ref. tokens/s", "reference", "tokens_per_s", lambda x: f"{x:,.0f}"),
    Column("log-prob error, mean", "reference", "mean_error", lambda x: f"{x:.4f}"),
    Column("log-prob error, max", "reference", "max_error", lambda x: f"{x:.3f}"),
    Column("KL bias, nats a row", "reference", "kl_bias", lambda x: f"{x:+.4f}"),
)


def table(found: dict[str, Any]) -> str:
    """Markdown: a line for each precision, and under it what was measured and what was left out."""
    columns = [c for c in COLUMNS if found[c.kind] is not None]
    rows = [["precision", *(c.title for c in columns)]]
    for precision, kinds in found["results"].items():
        values = (kinds.get(c.kind, {}).get(c.key) for c in columns)
        shown = ["" if value is None else c.show(value) for c, value in zip(columns, values, strict=True)]
        rows.append([precision, *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        f"{found['rows']} rows of {found['source']}, {found['tokens']} tokens, {found['pairs']} pairs; compared with "
        f"{found['baseline']}. {found['device']}, {versions}, {found['date']}.",
    ]
    lines += [f"Left out: {precision}: {why}." for precision, why in found["left_out"].items()]
    return "\n".join(lines)


def picture(found: dict[str, Any], path: str) -> None:
    """One small bar chart for each column, in the format that the ending of `path` names.

    Raises:
        ValueError: the ending is no format of pictures.
    """
    from matplotlib.figure import Figure

    columns = [c for c in COLUMNS if found[c.kind] is not None]
    figure = Figure(figsize=(3.2 * min(len(columns), 5), 2.8 * -(-len(columns) // 5)), layout="constrained")
    for at, column in enumerate(columns, 1):
        axes = figure.add_subplot(-(-len(columns) // 5), min(len(columns), 5), at)
        values = {p: kinds.get(column.kind, {}).get(column.key) for p, kinds in found["results"].items()}
        title, show = column.title, column.show
        if column.key == "correlation":  # what is lost of it: whole correlations would all look alike
            title, show = "1 - correlation", lambda x: f"{x:.1e}"
            values = {precision: None if value is None else 1 - value for precision, value in values.items()}
        known = {precision: value for precision, value in values.items() if value is not None}
        bars = axes.bar(list(known), list(known.values()), color="#4477aa")
        axes.bar_label(bars, [show(value) for value in known.values()], fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        axes.spines[["top", "right", "left"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ValueError(f"plot: {path}: must end in .png, .svg or .pdf ({error})") from error


def _size(num_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
