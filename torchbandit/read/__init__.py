"""Rows of data files, for everything that takes one: prompts, pretraining text, `score`, `profile`.

source.py     what a name stands for: a file, a folder, a glob, stdin, a dataset of the hub
opened.py     one file: decompressed, and what its name and its first bytes say it is
lines.py      JSONL, JSON arrays, text, documents
cells.py      CSV and TSV
arrow.py      Parquet, Arrow, and what `datasets` reads
row.py        a row and the place where it stands
"""

from __future__ import annotations

from torchbandit.read.row import Cell, Row, check_text, shown
from torchbandit.read.source import is_stream, rows

__all__ = ["Cell", "Row", "check_text", "is_stream", "rows", "shown"]
