"""One data file: decompressed, and what its name and its first bytes say it is."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

Format = Literal["json", "jsonl", "csv", "tsv", "text", "parquet", "arrow"]

FORMATS: dict[str, Format] = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".csv": "csv", ".tsv": "tsv",
    ".tab": "tsv", ".txt": "text", ".text": "text", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow",
    ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
"""By the ending of a name, in any case."""
COMPRESSED = (".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
PEEK = 1 << 14
"""Bytes at the start that are looked at to tell a format."""
FOREIGN = {
    b"PK\x03\x04": "a zip archive (or an Excel table); unpack it, or save it as CSV",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"FEA1": "a Feather file of version 1; write it again as Parquet",
    b"\x93NUMPY": "a NumPy array; write it as JSONL or Parquet",
    b"\x89HDF": "an HDF5 file; write it as JSONL or Parquet",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"\x80\x04\x95": "a pickle, which is not opened; write it as JSONL or Parquet",
}


class Opened(NamedTuple):
    """The bytes of a file from the start, decompressed, and what the name says of them."""

    name: str
    file: io.BufferedReader
    head: bytes
    named: Format | None
    raw_is_plain: bool  # as it lies on the disk


@contextmanager
def opened(path: str | Path, option: str) -> Iterator[Opened]:
    """Open a file, or stdin for `-`. It is read once, from front to back.

    Raises:
        ValueError: it cannot be opened, ends in the middle of its compression, or is of a kind that is not read.
        ImportError: it is compressed with zstd, and nothing here can undo that.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    try:
        raw = cast(IO[bytes], sys.stdin.buffer) if str(path) == "-" else open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}; check {option}") from error
    try:
        file, head = _whole(raw)
        plain = True
        for magic, opener in _COMPRESSIONS.items():
            if head.startswith(magic):
                (file, head), plain = _whole(opener(file, name)), False
                break
        for magic, kind in FOREIGN.items():
            if head.startswith(magic):
                raise ValueError(f"{name}: cannot be read: it is {kind}")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what a Windows shell writes
            file, head = _whole(io.BytesIO(file.read().decode("utf-16").encode("utf-8", "surrogatepass")))
        yield Opened(name, file, head, _named(path), plain)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: its compression is broken or ends too early ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: must be text in UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror or error}; check {option}") from error
    finally:
        if raw is not getattr(sys.stdin, "buffer", None):
            raw.close()


def _named(path: str | Path) -> Format | None:
    endings = [ending.lower() for ending in Path(path).suffixes]
    while endings and endings[-1] in COMPRESSED:
        endings.pop()
    return FORMATS.get(endings[-1]) if endings else None


class _Joined(io.RawIOBase):
    """A head that was read already, and the rest of its stream."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._read = head, getattr(rest, "read1", rest.read)  # a pipe gives what it has by now

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        part = self._head[: len(into)] if self._head else self._read(len(into))
        self._head = self._head[len(part) :]
        into[: len(part)] = part
        return len(part)


def _whole(raw: Any) -> tuple[io.BufferedReader, bytes]:
    """A stream with its first bytes, which a pipe gives but once."""
    head = b""
    while len(head) < PEEK and (part := raw.read(PEEK - len(head))):
        head += part
    return io.BufferedReader(_Joined(head, raw), 1 << 17), head


def _zstd(file: IO[bytes], name: str) -> Any:
    """Python's own from 3.14 on, else a package that can."""
    ways: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("compression.zstd", lambda zstd: zstd.open(file)),
        ("zstandard", lambda zstd: zstd.ZstdDecompressor().stream_reader(file, read_across_frames=True)),
        ("pyarrow", lambda arrow: arrow.CompressedInputStream(file, "zstd")),
    )
    for module, call in ways:
        try:
            return call(importlib.import_module(module))
        except ImportError:
            continue
    raise ImportError(f"{name}: zstd needs Python 3.14, zstandard or pyarrow: pip install torchbandit[data]")


_COMPRESSIONS: dict[bytes, Callable[[IO[bytes], str], Any]] = {
    b"\x1f\x8b": lambda file, name: gzip.GzipFile(fileobj=file),
    b"BZh": lambda file, name: bz2.BZ2File(file),
    b"\xfd7zXZ\x00": lambda file, name: lzma.LZMAFile(file),  # noqa: SIM115 (closed with the file)
    b"]\x00\x00": lambda file, name: lzma.LZMAFile(file),  # noqa: SIM115 (closed with the file)
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""By the first bytes, whatever the name says."""
