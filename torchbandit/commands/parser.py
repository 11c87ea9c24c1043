"""The parser of a command, and its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from torchbandit.commands.command import Command, UsageError, options_class
from torchbandit.commands.fields import MISSING, Option, check_value, describe, flag, show
from torchbandit.commands.layout import Layout


def build_parser(name: str, command: Command, layout: Layout) -> ArgumentParser:
    """The parser of the command of this name."""
    first = f"[{command.first.upper()}] " if command.first else ""
    parser = ArgumentParser(
        prog=f"torchbandit {name}", description=describe(options_class(command))[0], exit_on_error=False,
        allow_abbrev=False, formatter_class=_Help, usage=f"torchbandit {name} {first}[options]",
    )  # fmt: skip
    parser.add_argument("--config", type=str, help="YAML file whose keys are the options below; arguments win.")
    parser.add_argument(
        "--print-config", action="store_true", help="Print all options as YAML, which --config reads, and run nothing."
    )
    for group in layout.groups:
        place = parser.add_argument_group(group.title, group.about or None) if group.title else parser
        for option in group.options:
            _add(place, option)
    return parser


def _add(place: Any, option: Option) -> None:
    shared: dict[str, Any] = {
        "help": _with_null(option), "default": None if option.default is MISSING else option.default,
    }  # fmt: skip
    if option.hint is bool:
        place.add_argument(option.flag, action=ActionYesNo(yes_prefix="", no_prefix="no-"), nargs="?", **shared)
    elif get_origin(option.hint) is list:
        place.add_argument(option.flag, type=get_args(option.hint)[0], nargs="+", **shared)
    else:
        place.add_argument(option.flag, type=option.hint, **shared)


def _with_null(option: Option) -> str:
    """The help, which names a default of null where the docstring does not, and the type where there is none."""
    text = option.help or f"{show(option.hint)}."
    return f"{text} (default: null)" if option.default is None and "Default:" not in text else text


class _Help(DefaultHelpFormatter):
    """Keeps the paragraphs of a description, and says of a default only what it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_Help, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, [], argparse.SUPPRESS) or action.dest in ("help", "print_config")
        return text if silent else f"{text} (default: %(default)s)"


def flags(layout: Layout) -> set[str]:
    """What may follow the command: each option's name, and `--no-…` of those that are true or false."""
    plain = {option.flag for option in layout.options.values()}
    negated = {flag(f"no_{option.name}") for option in layout.options.values() if option.hint is bool}
    return plain | negated | {"--config", "--print-config", "--help"}


def parse(parse: Callable[[], Any], options: dict[str, Option], where: str = "") -> dict[str, Any]:
    """What was given, by name; a value of another type is told in one line.

    Args:
        where: the config file that it stands in; empty for arguments.
    """

    def shown(name: str) -> str:
        return f"{where}{name}" if where else flag(name)

    try:
        values = dict(vars(parse()))
    except ArgumentError as error:
        text = str(error)
        key, value = re.search(r'Parser key "(\w+)"', text), re.search(r"(?:Got|Given) value: (.*)", text)
        truth = re.search(r"argument --([\w-]+)/.*invalid _boolean_type value: '?(.*?)'?$", text)
        if truth:
            raise UsageError(f"--{truth[1]}: must be true or false, got {truth[2]}") from error
        if key and value and key[1] in options:
            got = "null" if value[1] == "None" else value[1]
            raise UsageError(f"{shown(key[1])}: must be {show(options[key[1]].hint)}, got {got}") from error
        raise UsageError(where + " ".join(text.split())) from error
    for name, value in values.items():
        if name in options:
            check_value(options[name], value, shown(name))
    return values
