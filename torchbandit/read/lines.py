"""JSONL, JSON arrays, text and documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain

from torchbandit.read.row import Row, as_row, shown

BOM = "\ufeff"


def decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Each line, with its end. A line ends at a newline byte and at nothing else: U+2028 and its like are text.

    Raises:
        ValueError: names the line and column that is not UTF-8.
    """
    for number, raw in enumerate(file, 1):
        try:
            yield raw.decode().removeprefix(BOM)
        except UnicodeDecodeError as error:
            got = shown(raw.strip().decode("utf-8", "replace"))
            raise ValueError(
                f"{name}:{number}: must be one JSON object in UTF-8 or text in UTF-8, got {got} ({error.reason} at "
                f"column {error.start + 1})"
            ) from error


def read_jsonl(file: Iterable[bytes], name: str) -> Iterator[Row]:
    """One JSON object a line; blank lines are skipped."""
    for number, text in enumerate(decoded(file, name), 1):
        if text.strip():
            try:
                value = json.loads(text.rstrip())
            except (ValueError, RecursionError) as error:
                raise _not_json(f"{name}:{number}", text, error) from error
            yield as_row(f"{name}:{number}", value)


def read_json(file: Iterable[bytes], name: str) -> Iterator[Row]:
    """An array of objects; or objects one after another, on one line or several. It is held in memory as a whole."""
    text = "".join(decoded(file, name))
    at, line, counted = _skip(text, 0), 1, 0
    is_array = text[at : at + 1] == "["
    at = _skip(text, at + is_array)
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(f"{name}:{error.lineno}", _line(text, error.pos), error) from error
        except (ValueError, RecursionError) as error:
            raise _not_json(f"{name}:{line}", _line(text, at), error) from error
        yield as_row(f"{name}:{line}", value)
        at = _skip(text, at)
        if is_array and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif is_array and text[at : at + 1] != "]":
            why = "must have a comma between two rows" if at < len(text) else "must end with ]; is the file whole?"
            raise ValueError(
                f"{name}:{text.count(chr(10), 0, at) + 1}: the array {why}, got {shown(_line(text, at))!r}"
            )
    if is_array and text[at + 1 :].strip():
        raise ValueError(f"{name}: must hold one array, got {shown(text[at + 1 :].strip())!r} behind its end")


def read_text(file: Iterable[bytes], name: str, key: str) -> Iterator[Row]:
    """A text a line; blank lines are skipped."""
    for number, text in enumerate(decoded(file, name), 1):
        if text.strip():
            yield _text(f"{name}:{number}", key, [text])


def read_documents(file: Iterable[bytes], name: str, key: str) -> Iterator[Row]:
    """Documents parted by blank lines."""
    document: list[str] = []
    for number, text in enumerate(chain(decoded(file, name), [""]), 1):
        if text.strip():
            document.append(text)
        elif document:
            yield _text(f"{name}:{number - len(document)}", key, document)
            document = []


_DECODER = json.JSONDecoder()


def _text(where: str, key: str, parts: list[str]) -> Row:
    """A row of text; the source text of a JSON object is nobody's prompt or document."""
    if parts[0].lstrip().startswith("{"):
        try:
            json.loads(parts[0])
        except (ValueError, RecursionError):
            pass
        else:
            raise ValueError(f"{where}: must be text, as the name says, got a JSON object; name the file .jsonl")
    return Row(where, {key: "\n".join(part.rstrip("\r\n") for part in parts)})


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line(text: str, at: int) -> str:
    return text[text.rfind("\n", 0, at) + 1 :][:200].partition("\n")[0]


def _not_json(where: str, text: str, error: Exception) -> ValueError:
    why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return ValueError(f"{where}: must be one JSON object in UTF-8, got {shown(text.strip())} ({why})")
