"""A row of a data file, and the place where it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Named values, and where a user finds them: `pairs.jsonl:7` (lines count from 1) or `pairs.parquet[6]`."""

    where: str
    values: dict[str, Any]


class Cell(str):
    """A cell of a CSV or TSV file: text, which may stand for a number (see `prompts/columns.py`)."""

    __slots__ = ()


def as_row(where: str, value: Any) -> Row:
    """A row, if `value` is an object.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: must be one JSON object, a row with named values, got {type(value).__name__} {shown(value)}"
        )
    return Row(where, dict(value))


def check_text(value: Any, where: str, key: str) -> None:
    """Refuse half a character (a lone surrogate, which JSON can spell and UTF-8 cannot) anywhere in a value.

    Raises:
        ValueError: names the place, the key and the surrogate.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key!r} holds half a character, the lone surrogate \\u{ord(text[error.start]):04x}, which is "
            "no text that a tokenizer could read or a file hold; mend or drop the row"
        ) from None


def shown(value: Any) -> str:
    """A value in a message, cut to 80 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 80 else text[:77] + "..."
