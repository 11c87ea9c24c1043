"""Parquet, Arrow, and what the `datasets` package reads: folders of save_to_disk, and the hub."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchbandit.read.row import Row, shown

EXTRA = "pip install torchbandit[data]"
BATCH = 1024
"""Rows that become Python objects at a time."""


def read_parquet(file: io.BufferedIOBase, name: str, path: Path | None) -> Iterator[Row]:
    """The rows of a Parquet file; `path` where it lies on the disk as it is, else it is held in memory."""
    parquet = _import("pyarrow.parquet", name, "Parquet")
    arrow = _import("pyarrow", name, "Parquet")
    try:
        table = parquet.ParquetFile(path if path is not None else arrow.BufferReader(file.read()))
        yield from _rows((batch for batch in table.iter_batches(BATCH)), name)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: must be a whole Parquet file ({shown(str(error))}); fetch it again") from error


def read_arrow(file: io.BufferedIOBase, name: str, path: Path | None) -> Iterator[Row]:
    """The rows of an Arrow IPC file (Feather too) or stream."""
    arrow = _import("pyarrow", name, "Arrow")
    try:
        source = arrow.memory_map(str(path)) if path is not None else arrow.BufferReader(file.read())
        try:
            opened = arrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except arrow.ArrowInvalid:
            source.seek(0)
            batches = arrow.ipc.open_stream(source)
        yield from _rows((piece for batch in batches for piece in _pieces(batch)), name)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: must be a whole Arrow file ({shown(str(error))}); fetch it again") from error


def read_saved(folder: Path, split: str | None, option: str) -> Iterator[Row]:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    datasets = _import("datasets", str(folder), "a saved dataset")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes of it
        raise ValueError(
            f"{folder}: cannot be read as a saved dataset ({shown(str(error))}); check {option}"
        ) from error
    yield from _dataset(loaded, str(folder), split)


def read_hub(name: str, config: str | None, split: str | None, option: str) -> Iterator[Row]:
    """A dataset of the hub, by way of its cache."""
    whole = ":".join(filter(None, (name, config, split)))
    datasets = _import("datasets", whole, "no file or folder of this machine, so a dataset of the hub: it")
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the network, the cache, the hub, the builder: no class in common
        raise ValueError(
            f"{whole}: cannot be read: no such file or folder, and as a dataset of the hub (name:split or "
            f"name:config:split): {shown(str(error).partition(chr(10))[0])}; check {option}"
        ) from error
    yield from _dataset(loaded, whole, None)


def _dataset(loaded: Any, name: str, split: str | None) -> Iterator[Row]:
    splits = list(loaded) if isinstance(loaded, dict) else []
    if split is None and len(splits) > 1:
        raise ValueError(f"{name}: must be one split, got {', '.join(splits)}; write {name}:{splits[0]}")
    if isinstance(loaded, dict):
        if split is not None and split not in loaded:
            raise ValueError(f"{name}: has no split {split!r}, but {', '.join(splits)}")
        loaded = loaded[split or splits[0]]
    elif split is not None:
        raise ValueError(f"{name}: has no splits, got {split!r}; leave it out")
    # As Arrow: no picture is decoded, and no format that was saved with the dataset applies.
    yield from _rows(loaded.with_format("arrow").iter(BATCH), name)


def _rows(batches: Iterable[Any], name: str) -> Iterator[Row]:
    at = 0
    for batch in batches:
        for values in batch.to_pylist():
            yield Row(f"{name}[{at}]", values)
            at += 1


def _pieces(batch: Any) -> Iterator[Any]:
    return (batch.slice(at, BATCH) for at in range(0, batch.num_rows, BATCH))


def _import(module: str, name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name}: {what} needs {module.partition('.')[0]}: {EXTRA}") from error
