"""An algorithm by its name in `ALGORITHMS`, or a user's own: as `package.module:Class`, a class or an instance."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar, get_origin

from torchbandit.learn import ALGORITHMS
from torchbandit.learn.algorithm import Algorithm


def find_algorithm(algo: str | type[Algorithm] | Algorithm | None) -> type[Algorithm]:
    """The class.

    Args:
        algo: a key of `ALGORITHMS`, `package.module:Class`, imported with the current folder on the path, a class or
            an instance.
    Raises:
        ValueError: there is none of this name (the nearest is named), it cannot be imported (why), or is no Algorithm.
    """
    if algo is None:
        raise ValueError(f"algo: must be {', '.join(ALGORITHMS)}, or a class of your own, got none")
    if not isinstance(algo, str):
        cls = algo if isinstance(algo, type) else type(algo)
        return check_algorithm_class(cls, cls.__name__)
    name = algo
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "or package.module:Class for one of your own"
        raise ValueError(f"algo: must be {', '.join(ALGORITHMS)}, got {name!r}; {hint}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except AttributeError:
        raise ValueError(f"algo: module {module_name!r} has no {attribute!r}") from None
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ValueError(
            f"algo: {module_name!r} cannot be imported ({type(error).__name__}: {error}); run where it can, or "
            "install it"
        ) from error
    return check_algorithm_class(found, name)


def check_algorithm_class(found: Any, name: str) -> type[Algorithm]:
    """ValueError unless it is a dataclass that derives from `Algorithm` and has `targets` and `loss`."""
    if not isinstance(found, type) or not issubclass(found, Algorithm):
        raise ValueError(f"algo: {name!r} must be a subclass of torchbandit.learn.Algorithm, got {found!r}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"algo: {name!r} must define {' and '.join(missing)}; see torchbandit.learn.Algorithm")
    own = {key: hint for key, hint in vars(found).get("__annotations__", {}).items() if not _is_class_var(hint)}
    bare = [key for key in own if key not in {field.name for field in dataclasses.fields(found)}]
    if bare:
        raise ValueError(
            f"algo: {name!r} declares {bare[0]!r}, which is no option of it; decorate the class with "
            "@dataclass(frozen=True)"
        )
    return found


def _is_class_var(hint: Any) -> bool:
    if isinstance(hint, str):
        return hint.startswith(("ClassVar", "typing.ClassVar"))
    return hint is ClassVar or get_origin(hint) is ClassVar


def name_of(algo: str | type[Algorithm] | Algorithm) -> str:
    """What an algorithm is called: as it was named, else its name in `ALGORITHMS`, else its class's."""
    if isinstance(algo, str):
        return algo
    cls = algo if isinstance(algo, type) else type(algo)
    return next((name for name, known in ALGORITHMS.items() if known is cls), cls.__name__)


def options_of(algo: str | type[Algorithm] | Algorithm) -> list[str]:
    """The names of an algorithm's own options."""
    return [field.name for field in dataclasses.fields(find_algorithm(algo))]


def make_algorithm(algo: str | type[Algorithm] | Algorithm | None, options: dict[str, Any]) -> Algorithm:
    """The algorithm with these options; those of an instance are its own where they are not given.

    Raises:
        ValueError: `algo` leads to none, it has no such option (those that have it are named), or a value is refused.
    """
    cls = find_algorithm(algo)
    assert algo is not None
    own = options_of(cls)
    for option in options:
        if option not in own:
            raise ValueError(unknown_option(option, name_of(algo), own))
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in options and not isinstance(algo, Algorithm):
            raise ValueError(f"{field.name}: must be given for {name_of(algo)}, which has no default for it")
    return dataclasses.replace(algo, **options) if isinstance(algo, Algorithm) else cls(**options)


def check_groups(algo: str | Algorithm, group_size: int, *, refill: bool) -> None:
    """ValueError where an algorithm, or dynamic sampling, has too few responses of a prompt to compare."""
    least = find_algorithm(algo).least_group_size
    if group_size < least:
        raise ValueError(f"group_size: must be at least {least} for {name_of(algo)}, got {group_size}")
    if refill and group_size < 2:
        raise ValueError(f"refill: compares the rewards of a group, so group_size must be at least 2, got {group_size}")


def unknown_option(option: str, name: str, own: list[str]) -> str:
    """Why an algorithm refuses an option: who has it, or what comes nearest."""
    owners = owners_of(option)
    if owners:
        return f"{option}: is no option of {name}; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
    near = difflib.get_close_matches(option, own, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(own) or 'none'}"
    return f"{option}: is no option of {name}; {hint}"


def owners_of(option: str) -> list[str]:
    """The names of the algorithms that have an option."""
    return [name for name, cls in ALGORITHMS.items() if option in {field.name for field in dataclasses.fields(cls)}]
