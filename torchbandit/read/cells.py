"""CSV and TSV, by the standard library's reader, which is told to be strict."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import chain

from torchbandit.read.lines import decoded
from torchbandit.read.row import Cell, Row

FIELD_LIMIT = 2**31 - 1
"""Characters of a cell; the standard library's own limit is 131072."""


def read_cells(file: Iterable[bytes], name: str, delimiter: str | None) -> Iterator[Row]:
    """The rows below a header; a cell may be quoted, and hold newlines then. Blank lines are skipped.

    Args:
        delimiter: None takes the comma, or the semicolon or tab of a header without a comma.
    Raises:
        ValueError: names the line: another number of cells than the header has, a quote that is not closed, a name
            that the header has twice, bytes that are not UTF-8.
    """
    csv.field_size_limit(FIELD_LIMIT)
    lines = decoded(file, name)
    blank, first = 0, next(lines, "")
    while first and not first.strip():
        blank, first = blank + 1, next(lines, "")
    chosen = delimiter or next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(chain([first], lines), delimiter=chosen, strict=True)
    start = blank + 1
    try:
        header = _header(next(reader, []), f"{name}:{start}")
        start = blank + reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{name}:{start}: must have {len(header)} cells, as the header has ({', '.join(header)}), got "
                    f"{len(cells)}; quote a cell that holds {chosen!r} or a newline"
                )
            if cells:
                yield Row(f"{name}:{start}", dict(zip(header, map(Cell, cells), strict=True)))
            start = blank + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}:{start}: cannot be read as a row of cells ({error}); check its quotes") from error


def _header(cells: list[str], where: str) -> list[str]:
    # An index that pandas wrote has no name; it gets the one that pandas gives it.
    header = [cell or f"Unnamed: {i}" for i, cell in enumerate(cells)]
    twice = [cell for i, cell in enumerate(header) if cell in header[:i]]
    if twice:
        raise ValueError(f"{where}: the header must name each column once, got {twice[0]!r} twice")
    return header
