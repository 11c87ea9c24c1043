"""The options that the fields of a dataclass are: their types, their defaults, what the docstring says of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torchbandit.commands.command import UsageError

MISSING = dataclasses.MISSING


class Option(NamedTuple):
    name: str  # of the field, and of the key in YAML
    hint: Any
    default: Any  # MISSING: it must be given
    help: str

    @property
    def flag(self) -> str:
        return flag(self.name)


def flag(name: str) -> str:
    """`--max-new-tokens` of `max_new_tokens`."""
    return f"--{name.replace('_', '-')}"


def options_of(cls: type) -> list[Option]:
    """One option a field of a dataclass, in their order.

    Raises:
        NameError: a type is named that is not there.
    """
    helps, hints = describe(cls)[1], get_type_hints(cls)
    return [
        Option(field.name, hints[field.name], _default(field), helps.get(field.name, ""))
        for field in dataclasses.fields(cls)
        if field.init
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def describe(cls: type) -> tuple[str, dict[str, str]]:
    """What a dataclass says of itself, and, of each field, what it and its bases say under Args."""
    helps: dict[str, str] = {}
    about = ""
    for base in reversed(cls.__mro__):
        text = base.__doc__ or ""
        if text.startswith(f"{base.__name__}("):  # the signature that dataclass writes where there is none
            text = ""
        about, _, args = inspect.cleandoc(text).partition("\nArgs:\n")
        for name, told in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE):
            helps[name] = " ".join(told.split())
    return about.strip(), helps


def show(hint: Any) -> str:
    """A type as a user reads it: `int or null`, `ppo or rloo or grpo`."""
    origin = get_origin(hint)
    if origin in (list, tuple):
        return f"one or more of {show(get_args(hint)[0])}" if get_args(hint) else "a list"
    if origin is dict or hint is dict:
        return "keys and values, as {a: 1}"
    if get_args(hint):
        return " or ".join(map(show, get_args(hint)))
    words: dict[Any, str] = {
        str: "text", float: "a finite number", bool: "true or false", type(None): "null", Any: "anything",
    }  # fmt: skip
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def show_value(value: Any) -> str:
    return "null" if value is None else str(value)


def is_plain(hint: Any) -> bool:
    """Whether a command line and YAML can give a value of this type."""
    origin = get_origin(hint)
    if origin is Literal:
        return True
    if origin in (Union, types.UnionType, list, tuple, dict):
        return all(part is Ellipsis or is_plain(part) for part in get_args(hint))
    return hint in (int, float, str, bool, type(None), Any, list, dict)


def check_value(option: Option, value: Any, name: str) -> None:
    """UsageError for null where the type has none, and for a number that is not finite; a default always passes.

    The parser takes null for any type, and `.nan` for a number.
    """
    if value is option.default:
        return
    takes_null = option.hint in (None, type(None), Any) or type(None) in get_args(option.hint)
    finite = not isinstance(value, float) or math.isfinite(value)
    if (value is None and not takes_null) or not (finite or value == option.default):
        raise UsageError(f"{name}: must be {show(option.hint)}, got {show_value(value)}")
