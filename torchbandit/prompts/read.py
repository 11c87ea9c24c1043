"""JSONL files and datasets to prompts and columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchbandit.prompts.tokenise import Where

Columns = Mapping[str, Sequence[Any] | Tensor]
_NUMBERS = {bool, int, float}


class Records(NamedTuple):
    prompts: list[Any]
    columns: dict[str, list[Any]]
    where: Where


def read_jsonl(path: str | Path, prompt_key: str, columns: Sequence[str] | None) -> Records:
    """Prompts and columns of a file of one JSON object a line; blank lines are skipped.

    Raises:
        ValueError: names the file and the line.
    """
    rows: list[Any] = []
    lines: list[int] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                    got = line.strip().decode("utf-8", "replace")
                    raise ValueError(
                        f"{path}:{number}: must be one JSON object in UTF-8, got "
                        f"{got if len(got) < 80 else got[:77] + '...'} ({error})"
                    ) from error
                lines.append(number)
    except OSError as error:
        raise ValueError(f"{path}: the prompt file cannot be read: {error.strerror}; check the path") from error
    if not rows:
        raise ValueError(f'{path}: must hold at least one line like {{"{prompt_key}": "..."}}, got an empty file')
    return from_rows(rows, prompt_key, columns, lambda i: f"{path}:{lines[i]}")


def read_dataset(dataset: Iterable[Mapping[str, Any]], prompt_key: str, columns: Sequence[str] | None) -> Records:
    """Prompts and columns of a `datasets.Dataset`, or of any iterable of dicts."""

    def where(i: int) -> str:
        return f"row {i}"

    names = getattr(dataset, "column_names", None)
    if isinstance(names, Mapping):
        raise ValueError(f"dataset: must be one split, got a dict of splits {list(names)}; pick one, dataset['train']")
    if isinstance(names, list) and hasattr(dataset, "select_columns") and hasattr(dataset, "__len__"):
        wanted = [prompt_key, *(columns if columns is not None else (n for n in names if n != prompt_key))]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"dataset: must have a column {missing[0]!r}, got {names}")
        table = dataset.select_columns(wanted)[:]  # one read by column: many times as fast as row by row
        prompts = list(table.pop(prompt_key))
        if not prompts:
            raise ValueError("dataset: must hold at least one row, got none")
        return Records(prompts, {name: list(values) for name, values in table.items()}, where)
    rows = list(dataset)
    if not rows:
        raise ValueError("dataset: must hold at least one row, got none")
    return from_rows(rows, prompt_key, columns, where)


def from_rows(rows: list[Any], prompt_key: str, columns: Sequence[str] | None, where: Where) -> Records:
    """Turn rows into prompts and columns; every row must have every column.

    Args:
        columns: keys that travel with the prompt; None takes all.
    """
    names = dict.fromkeys(columns or ())
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where(i)}: must be an object with the key {prompt_key!r}, got {type(row).__name__}")
        if prompt_key not in row:
            raise ValueError(f"{where(i)}: must have the key {prompt_key!r}, got {list(row)}; see prompt_key")
        if columns is None:
            names.update(dict.fromkeys(row))
    names.pop(prompt_key, None)
    table: dict[str, list[Any]] = {name: [] for name in names}
    for i, row in enumerate(rows):
        for name, values in table.items():
            if name not in row:
                raise ValueError(
                    f"{where(i)}: must have the column {name!r} that other rows have, got {list(row)}; "
                    "add it, or name the columns you need with columns=[...]"
                )
            values.append(row[name])
    return Records([row[prompt_key] for row in rows], table, where)


def split_columns(columns: Columns, num: int, where: Where) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Tell the columns that become tensors from those that stay on the host.

    Numbers become a tensor: all bool -> bool, all int -> int64, otherwise float32; lists of numbers, of one length,
    get further dimensions. A column without any number (strings, null, objects, lists of them) stays a list.

    Raises:
        ValueError: a column has another length than there are prompts, mixes kinds, or is ragged.
    """
    tensors: dict[str, Tensor] = {}
    host: dict[str, list[Any]] = {}
    for name, given in columns.items():
        length = 0 if isinstance(given, Tensor) and not given.dim() else len(given)
        if length != num:
            raise ValueError(f"column {name!r}: must have one value a prompt, {num}, got {length}")
        if isinstance(given, Tensor):
            tensors[name] = given.detach().cpu()
            continue
        values = [v.tolist() if hasattr(v, "tolist") else v for v in given]  # array scalars, rows of arrays
        kinds = _leaf_kinds(values)
        if not kinds & _NUMBERS:
            host[name] = values
        elif kinds in ({bool}, {int}, {float}, {int, float}):
            tensors[name] = _tensor(name, values, kinds, where)
        else:
            raise _mixed(name, values, kinds, where)
    return tensors, host


def _leaf_kinds(values: Sequence[Any]) -> set[type]:
    kinds: set[type] = set(map(type, values))
    if kinds & {list, tuple}:
        kinds |= _leaf_kinds([leaf for value in values if isinstance(value, list | tuple) for leaf in value])
    return kinds - {list, tuple}


def _tensor(name: str, values: list[Any], kinds: set[type], where: Where) -> Tensor:
    dtype = {bool: torch.bool, int: torch.int64}.get(next(iter(kinds)), torch.float32)
    try:
        return torch.tensor(values, dtype=torch.float32 if len(kinds) > 1 else dtype)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        shapes = [_shape(value) for value in values]
        odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is None:
            raise ValueError(f"column {name!r}: cannot become a tensor: {error}; write it as strings") from error
        raise ValueError(
            f"{where(odd)}: column {name!r} must have one shape in every row, {shapes[0]} as in {where(0)}, "
            f"got {shapes[odd]}; pad it, write it as strings, or leave it out with columns=[...]"
        ) from error


def _shape(value: Any) -> list[int]:
    return [len(value), *(_shape(value[0]) if value else [])] if isinstance(value, list | tuple) else []


def _mixed(name: str, values: list[Any], kinds: set[type], where: Where) -> ValueError:
    loose = [{float if kind is int else kind for kind in _leaf_kinds([value])} for value in values]
    odd = next((i for i, row in enumerate(loose) if row != loose[0]), 0)
    found = "/".join(sorted("null" if kind is type(None) else kind.__name__ for kind in kinds))
    return ValueError(
        f"{where(odd)}: column {name!r} must hold one kind of value in every row, got {values[odd]!r} "
        f"(the column mixes {found}); make it all numbers or all strings, or leave it out with columns=[...]"
    )
