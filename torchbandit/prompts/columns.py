"""Columns that travel with the prompts: which become tensors, and which stay as they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbandit.prompts.records import Columns
from torchbandit.read import Cell

_NUMBERS = ({bool}, {int}, {float}, {int, float})
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def split_columns(columns: Columns, num: int) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Every column as it stands, and as a tensor those that are numbers of one shape in every row.

    All bool -> bool, all int -> int64, otherwise float32; lists of numbers, of one length, get further dimensions. A
    column of anything else, or of lists of several lengths, or with a None, has no tensor. A column of CSV cells is
    one of numbers where each cell is written as Python writes that number: `7` and `0.5`, but not `007` or `0.50`,
    which may well be text.

    Returns:
        tensors [num, ...] on the CPU, by name; and lists of num values, of every column that was not a tensor.
    Raises:
        ValueError: a column has another length than there are prompts.
    """
    tensors: dict[str, Tensor] = {}
    lists: dict[str, list[Any]] = {}
    for name, given in columns.items():
        length = 0 if isinstance(given, Tensor) and not given.dim() else len(given)
        if length != num:
            raise ValueError(f"column {name!r}: must have one value a prompt, {num}, got {length}")
        if isinstance(given, Tensor):
            tensors[name] = given.detach().cpu()
            continue
        values = [v.tolist() if hasattr(v, "tolist") else v for v in given]  # array scalars, rows of arrays
        if any(type(v) is Cell for v in values):
            values = _of_cells(values)
        lists[name] = values
        tensor = _tensor(values)
        if tensor is not None:
            tensors[name] = tensor
    return tensors, lists


def _of_cells(values: list[Any]) -> list[Any]:
    numbers = [_number(v) if type(v) is Cell else None for v in values]
    if all(number is not None for number in numbers):
        return numbers
    return [str(v) if type(v) is Cell else v for v in values]


def _number(cell: str) -> int | float | None:
    if len(cell) > 32 or not _NUMBER.fullmatch(cell):
        return None
    number = float(cell) if "." in cell or "e" in cell else int(cell)
    return number if str(number) == cell else None


def _tensor(values: list[Any]) -> Tensor | None:
    kinds = _leaf_kinds(values)
    if kinds not in _NUMBERS:
        return None
    dtype = {bool: torch.bool, int: torch.int64}.get(next(iter(kinds)), torch.float32)
    try:
        return torch.tensor(values, dtype=torch.float32 if len(kinds) > 1 else dtype)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # ragged, nested unevenly, beyond 64 bits
        return None


def _leaf_kinds(values: Sequence[Any]) -> set[type]:
    kinds: set[type] = set(map(type, values))
    if kinds & {list, tuple}:
        kinds |= _leaf_kinds([leaf for value in values if isinstance(value, list | tuple) for leaf in value])
    return kinds - {list, tuple}
