"""Rows of a `datasets.Dataset`, or of any iterable of dicts. The package itself is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchbandit.read import Row, shown


def dataset_rows(dataset: Any, wanted: Sequence[str] | None) -> Iterator[Row]:
    """The rows, named `row 0`, `row 1`, ...

    Args:
        dataset: one split, or an iterable of dicts.
        wanted: columns to read, of those that there are; None reads all.
    Raises:
        ValueError: it is a dict of splits, or a row is no table.
    """
    names = getattr(dataset, "column_names", None)
    if isinstance(names, Mapping):
        raise ValueError(f"dataset: must be one split, got a dict of splits {list(names)}; pick one, dataset['train']")
    if isinstance(names, list) and hasattr(dataset, "select_columns") and hasattr(dataset, "__len__"):
        known = [name for name in dict.fromkeys(names if wanted is None else wanted) if name in names]
        table = dataset.select_columns(known)[:]  # one read by column: many times as fast as row by row
        for i in range(len(dataset)):
            yield Row(f"row {i}", {name: table[name][i] for name in known})
        return
    for i, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i}: must be a dict, got {type(row).__name__} {shown(row)}")
        yield Row(f"row {i}", dict(row))
