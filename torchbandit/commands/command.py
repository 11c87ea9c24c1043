"""What a command is."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class UsageError(ValueError):
    """A command line or config file that cannot be read."""


class Command(NamedTuple):
    """Args:
    help: one line.
    options: module:dataclass of its options; importing it must be cheap.
    run: takes the dataclass, returns the exit code.
    complete: fills in what depends on what was given.
    first: the option that may be given first, without its name.
    groups: names of options under the headings of the help; those that are in none come first.
    elsewhere: fields that are no options here, and what to say of them.
    algorithm: whether the options of the algorithm that `algo` names are options too; they are gathered in
        `algo_options`.
    """

    help: str
    options: str
    run: Callable[[Any], int]
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
    first: str | None = None
    groups: Mapping[str, Sequence[str]] = {}
    elsewhere: Mapping[str, str] = {}
    algorithm: bool = False


def options_class(command: Command) -> type:
    """The dataclass of a command's options."""
    module, _, name = command.options.partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert isinstance(cls, type)
    return cls


def fail(error: object, code: int, kind: str = "error: ") -> int:
    """Say it on stderr; returns the exit code."""
    with contextlib.suppress(OSError):  # the terminal is gone; the exit code still tells
        print(f"{kind}{error}", file=sys.stderr)
    return code
