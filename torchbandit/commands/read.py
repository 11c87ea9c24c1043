"""From arguments and a config file to a command's options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from torchbandit.commands.command import Command, UsageError, options_class
from torchbandit.commands.config import check_table, dump, read_table
from torchbandit.commands.fields import MISSING, Option, flag
from torchbandit.commands.layout import Layout, check_known, lay_out
from torchbandit.commands.parser import build_parser, flags, parse


class Request(NamedTuple):
    """Args:
    options: the command's dataclass.
    print_config: the YAML to print, where it was asked for.
    """

    options: Any
    print_config: str | None


def read(name: str, command: Command, argv: Sequence[str]) -> Request:
    """What a command was asked to do; arguments win over the config file.

    Raises:
        ValueError: an unknown option (with the nearest known one, or the algorithms that have it), or a value that
            does not fit.
    """
    argv = list(argv)
    if argv and command.first is not None and not argv[0].startswith("-"):
        argv = [flag(command.first), *argv]
    early = _early(argv)
    table = {} if early.config is None else read_table(early.config)
    layout = lay_out(command, _algorithm(early, table) if command.algorithm else None)
    parser = build_parser(name, command, layout)
    accepted = flags(layout)
    for token in argv:
        shown = token.partition("=")[0]
        if token.startswith("--") and shown not in accepted:
            more = f"; torchbandit {name} --help lists all"
            check_known(command, layout, shown[2:].replace("-", "_"), shown, more)
    given = parse(lambda: parser.parse_args(argv, defaults=False), layout.options)
    wants_print = given.pop("print_config", False)
    if given.pop("config", None) is not None:
        given = check_table(early.config, table, command, layout, parser) | given
    options = _make(name, command, layout, given)
    return Request(options, _print(layout, parser, options) if wants_print else None)


def _early(argv: list[str]) -> argparse.Namespace:
    """The two options that decide which others there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--algo")
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # a value is missing; the whole parser says so
        return argparse.Namespace(config=None, algo=None)


def _algorithm(early: argparse.Namespace, table: dict[str, Any]) -> str | None:
    named = table.get("algo") if early.algo is None else early.algo
    if early.algo is None and "algo" in table and not isinstance(named, str):
        raise UsageError(f"{early.config}: algo: must be text, got {'null' if named is None else named}")
    return named


def _make(name: str, command: Command, layout: Layout, given: dict[str, Any]) -> Any:
    """The command's dataclass."""
    cls = options_class(command)
    if command.algorithm:
        given["algo_options"] = {own: given.pop(own) for own in layout.own if own in given}
    given = command.complete(given)
    there = given | given.get("algo_options", {})
    for option in layout.options.values():
        if option.default is MISSING and option.name not in there:
            raise UsageError(f"{option.flag}: must be given{_by(option, layout)}; see torchbandit {name} --help")
    return cls(**given)


def _by(option: Option, layout: Layout) -> str:
    return f" with {layout.algo}" if option.name in layout.own else ""


def _print(layout: Layout, parser: ArgumentParser, options: Any) -> str:
    """All options as they came out, as the parser reads them back: an int where the type is float becomes one."""
    own = options.algo_options if layout.own else {}
    values = {name: own[name] if name in own else getattr(options, name) for name in layout.options}
    return dump(layout, parse(lambda: parser.parse_object(values, defaults=False), layout.options))
