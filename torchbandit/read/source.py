"""What a name stands for: a file, a folder, a glob, stdin, a saved dataset, a dataset of the hub."""

from __future__ import annotations

import glob
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from torchbandit.read.arrow import read_arrow, read_hub, read_parquet, read_saved
from torchbandit.read.cells import read_cells
from torchbandit.read.lines import read_documents, read_json, read_jsonl, read_text
from torchbandit.read.opened import COMPRESSED, FORMATS, PEEK, Format, Opened, opened
from torchbandit.read.row import Row

_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?::([\w.+%\[\]:-]+))?")
_SPLIT = re.compile(r"(?:^|[/._-])(train|test|validation|valid|val|dev|eval)(?=[/._-])", re.IGNORECASE)
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
_ABOUT = re.compile(
    r"(readme|license|licence)\b.*|.*\.(md|py|yaml|yml|lock)|dataset_infos?\.json|[._].*", re.IGNORECASE
)


def rows(source: str | Path, *, option: str, key: str, documents: bool = False) -> Iterator[Row]:
    """The rows of JSONL, JSON, CSV, TSV, Parquet, Arrow and text files, compressed (gzip, bz2, xz, zstd) or not.

    Args:
        source: a file (or a pipe), a folder of files, a glob, `-` for stdin, a folder of `save_to_disk`, or a dataset
            of the hub; `name:split` where there are several splits.
        option: what the user calls the source, for messages.
        key: of the text in a text file; and the column by which CSV is known from text where no name says so.
        documents: text files hold documents parted by blank lines, not a text a line.
    Raises:
        ValueError: names the file, and the line and column where there are some.
        ImportError: names the package that is missing.
    """
    name = str(source)
    if name == "-":
        yield from _file(name, option, key, documents)
        return
    path = Path(name).expanduser()
    if path.is_dir():
        yield from _folder(path, None, option, key, documents)
    elif path.exists():
        yield from _file(path, option, key, documents)
    elif glob.has_magic(name) and not _HUB.fullmatch(name):
        found = sorted(each for each in glob.glob(str(path), recursive=True) if not Path(each).is_dir())
        if not found:
            raise ValueError(f"{name}: cannot be read: no file matches; check {option}")
        for each in found:
            yield from _file(each, option, key, documents)
    else:
        base, colon, split = name.rpartition(":")
        hub = _HUB.fullmatch(name)
        if colon and Path(base).expanduser().is_dir():
            yield from _folder(Path(base).expanduser(), split, option, key, documents)
        elif colon and Path(base).expanduser().exists():
            raise ValueError(
                f"{name}: only a folder or a dataset of the hub has splits, and {base} is a file; name it alone"
            )
        elif hub is None or name.startswith(".") or _ending(Path(hub[1])) in FORMATS or _beside(path):
            raise ValueError(f"{name}: cannot be read: No such file or directory; check {option}")
        else:
            config, split = (hub[2], hub[3]) if hub[3] else (None, hub[2])
            yield from read_hub(hub[1], config, split, option)


def _beside(path: Path) -> bool:
    """Whether a folder of that name is here, so that a path was meant and no hub id."""
    return path.parent != Path(".") and path.parent.is_dir()


def is_stream(source: str | Path) -> bool:
    """Whether the source can be read but once: stdin, or a pipe."""
    path = Path(source)
    return str(source) == "-" or (path.exists() and not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)))


def _folder(folder: Path, split: str | None, option: str, key: str, documents: bool) -> Iterator[Row]:
    if any((folder / mark).is_file() for mark in _SAVED):
        yield from read_saved(folder, split, option)
        return
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    within = {path: path.relative_to(folder) for path in files}
    files = [path for path in files if not any(_ABOUT.fullmatch(part) for part in within[path].parts)]
    odd = [str(within[path]) for path in files if _ending(path) not in FORMATS]
    if odd:
        raise ValueError(
            f"{folder}: must hold data files alone ({', '.join(FORMATS)}), got {', '.join(odd[:3])}; name the files "
            f"with a glob; check {option}"
        )
    splits = {path: match[1].lower() if (match := _SPLIT.search(str(within[path]))) else None for path in files}
    names = sorted({each or "(no split)" for each in splits.values()})
    if split is not None:
        files = [path for path in files if splits[path] == split.lower()]
        if not files:
            raise ValueError(f"{folder}: has no file of a split {split!r}, but {', '.join(names) or 'nothing'}")
    elif len(names) > 1:
        raise ValueError(
            f"{folder}: must be one split, got files of {', '.join(names)}; write {folder}:train, or a glob"
        )
    if not files:
        raise ValueError(f"{folder}: must hold data files ({', '.join(FORMATS)}), got none; check {option}")
    for path in files:
        yield from _file(path, option, key, documents)


def _ending(path: Path) -> str:
    endings = [ending.lower() for ending in path.suffixes]
    return next((ending for ending in reversed(endings) if ending not in COMPRESSED), "")


def _file(path: str | Path, option: str, key: str, documents: bool) -> Iterator[Row]:
    with opened(path, option) as file:
        kind = file.named if file.named not in (None, "json", "jsonl") else _told(file, key)
        on_disk = Path(path) if not is_stream(path) and file.raw_is_plain else None
        if kind == "jsonl":
            yield from read_jsonl(file.file, file.name)
        elif kind == "json":
            yield from read_json(file.file, file.name)
        elif kind in ("csv", "tsv"):
            yield from read_cells(file.file, file.name, "\t" if kind == "tsv" else None)
        elif kind == "parquet":
            yield from read_parquet(file.file, file.name, on_disk)
        elif kind == "arrow":
            yield from read_arrow(file.file, file.name, on_disk)
        elif documents:
            yield from read_documents(file.file, file.name, key)
        else:
            yield from read_text(file.file, file.name, key)


def _told(file: Opened, key: str) -> Format:
    """The format by the first bytes; a name of the JSON family says that it is one of the two."""
    head = file.head.removeprefix(b"\xef\xbb\xbf")
    first, newline, _ = head.lstrip().partition(b"\n")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if first[:1] == b"[":
        return "json"
    if file.named == "jsonl" or first[:1] == b"{":
        # An object over several lines ends its first line early; a long line is one of JSONL.
        by_line = _is_json(first) if newline or file.named == "json" else len(head) >= PEEK - 3
        return "jsonl" if file.named == "jsonl" or by_line else "json"
    if file.named == "json":
        return "json"
    for kind, mark in (("tsv", b"\t"), ("csv", b","), ("csv", b";")):
        if key.encode() in [cell.strip(b' \r"') for cell in first.split(mark)] and mark in first:
            return "tsv" if kind == "tsv" else "csv"
    if b"\0" in head:
        raise ValueError(f"{file.name}: cannot be read: its bytes are no text, and no format that is known")
    return "text"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
