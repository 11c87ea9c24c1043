"""A command's options under headings, with those of the chosen algorithm, and what is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from torchbandit.commands.command import Command, UsageError, options_class
from torchbandit.commands.fields import Option, describe, flag, is_plain, options_of, show

ALWAYS = ("config", "print_config", "help")


class Group(NamedTuple):
    title: str  # empty: no heading
    about: str
    options: list[Option]


class Layout(NamedTuple):
    """Args:
    groups: in the order of the help and of a printed config.
    algo: the name of the chosen algorithm, where the command has one.
    own: names of that algorithm's own options.
    """

    groups: list[Group]
    algo: str | None
    own: list[str]

    @property
    def options(self) -> dict[str, Option]:
        return {option.name: option for group in self.groups for option in group.options}


def lay_out(command: Command, algo: str | None = None) -> Layout:
    """The options of a command.

    Args:
        algo: the algorithm that was asked for; None: the default one.
    Raises:
        ValueError: there is no such algorithm, or it has options that no command line can give.
    """
    rest = {option.name: option for option in options_of(options_class(command))}
    for name in command.elsewhere:
        del rest[name]
    taken = [*rest, *command.elsewhere, *ALWAYS]
    if command.algorithm and algo is None:
        algo = str(rest["algo"].default)
    groups, own = [], list[str]()
    for title, names in command.groups.items():
        groups.append(Group(title, "", [rest.pop(name) for name in names if name in rest]))
        if command.algorithm and algo is not None and "algo" in names:
            groups.append(_own_group(algo, taken))
            own = [option.name for option in groups[-1].options]
    return Layout([Group("", "", list(rest.values())), *groups], algo, own)


def _own_group(algo: str, taken: list[str]) -> Group:
    """The options of an algorithm."""
    from torchbandit.learn.find import find_algorithm

    cls = find_algorithm(algo)
    try:
        options = options_of(cls)
    except NameError as error:
        raise UsageError(f"algo: the type of an option of {algo!r} cannot be read: {error}; import it there") from error
    for option in options:
        if option.name in taken:
            raise UsageError(
                f"algo: {algo!r} has an option {option.name}, which torchbandit train has already; rename it"
            )
        if not is_plain(option.hint):
            raise UsageError(
                f"algo: option {option.name} of {algo!r} must be of a type that YAML has (int, float, str, bool, "
                f"Literal, list, dict, None), got {show(option.hint)}; change it, or use BanditTrainer"
            )
    return Group(f"options of {algo}", _about(cls), options)


def _about(cls: Any) -> str:
    """What the help says of an algorithm: its first line, and what it wants of a run."""
    text = describe(cls)[0].partition("\n\n")[0]
    where, estimator = cls.kl_default
    critic = "a value head" if cls.needs_critic else "none"
    wants = (
        f"Responses a prompt: {cls.default_group_size}, at least {cls.least_group_size}. Critic: {critic}. "
        f"KL: {estimator}, in {where}."
    )
    return f"{' '.join(text.split())}\n\n{wants}" if text else wants


def check_known(command: Command, layout: Layout, name: str, shown: str, hint: str = "") -> None:
    """UsageError for an option that is none: of another algorithm, given elsewhere, or unknown (the nearest is named).

    Args:
        name: as a field is named.
        shown: as the user wrote it.
        hint: what to say where nothing is near.
    """
    if name in layout.options:
        return
    if name in command.elsewhere:
        raise UsageError(f"{name}: is no option of the command line; {command.elsewhere[name]}")
    if layout.algo is not None:
        from torchbandit.learn.find import owners_of, unknown_option

        if owners_of(name):
            raise UsageError(unknown_option(name, layout.algo, layout.own))
    as_flag = shown.startswith("--")
    known = [flag(name) if as_flag else name for name in layout.options]
    known += [flag(name) for name in ALWAYS] if as_flag else []
    raise UsageError(f"unknown option {shown}{nearest(shown, known) or hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
