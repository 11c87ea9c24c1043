"""The output of `score`: JSON lines that any reader takes, in a file that is whole or not there."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

from torchbandit.read import Row

NOT_JSON = "NaN or infinity in the input, which JSON has not: null"


@contextmanager
def whole_output(name: str) -> Iterator[TextIO]:
    """A file that takes its name when the block ends without an error; `-` is stdout, a pipe is written to."""
    path = Path(name)
    if name == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with open(path, "w", encoding="utf-8") as file:
            yield file
        return
    path = path.resolve()  # a link stays one
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(fresh, "w", encoding="utf-8") as file:
            yield file
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def as_json(row: Row, scores: dict[str, float | None], counts: Counter[str]) -> str:
    """A row and its scores as one line of JSON.

    Raises:
        ValueError: a value (of Parquet, say) that JSON has no form for.
    """

    def other(value: Any) -> Any:
        if isinstance(value, (date, time)):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value)
        raise ValueError(f"{row.where}: holds a value that JSON has not, of type {type(value).__name__}; leave it out")

    values = row.values | scores
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, default=other)
    except ValueError:
        line = json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, default=other)
        counts[NOT_JSON] += 1
        return line


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
