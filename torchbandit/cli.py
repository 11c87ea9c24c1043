"""The command line. Options are the fields of one dataclass a command, and so are the keys of its `--config` file.

Nothing heavy is imported before a command is known and its options are read: help and typing errors are instant.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader

from torchbandit import __version__


class Command(NamedTuple):
    help: str
    options: str  # module:dataclass; importing it must be cheap
    run: Callable[[Any], int]
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict  # fills in what depends on what was given
    first: str | None = None  # the option that may be given first, without its name


def _train_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Without a policy of one's own: the demo."""
    from torchbandit.train.options import demo_defaults

    return given if given.get("policy") is not None else demo_defaults(given) | given


def _train(options: Any) -> int:
    from torchbandit.train import folder
    from torchbandit.train.signals import Interrupted

    if folder.launched_rank() == 0:  # before models, or torch, are loaded for nothing
        folder.check(Path(options.out), options.resume)
    # Both engines take the same options and leave the same files.
    train = importlib.import_module(f"torchbandit.{'rllib' if options.engine == 'rllib' else 'train'}.run").train
    try:
        train(options)
    except Interrupted as stopped:
        return _fail(stopped, 128 + stopped.number, "")
    return 0


def _score(options: Any) -> int:
    from torchbandit.score.run import main as score

    score(options)
    return 0


def _pull(options: Any) -> int:
    from torchbandit.pull import pull

    pull(options)
    return 0


def _profile(options: Any) -> int:
    from torchbandit.profile.run import main as profile

    profile(options)
    return 0


def _bench(options: Any) -> int:
    from torchbandit.bench.run import bench

    bench(options)
    return 0


COMMANDS = {
    "train": Command(
        "Train a language model; without options, the demo.", "torchbandit.train.options:TrainOptions", _train,
        _train_defaults,
    ),
    "score": Command(
        "Score the prompt/response pairs of a JSONL file.", "torchbandit.score.options:ScoreOptions", _score
    ),
    "profile": Command(
        "What a reward model and a reference lose, and save, in each precision.",
        "torchbandit.profile.options:ProfileOptions", _profile,
    ),
    "bench": Command(
        "Measure the package beside its peers and the hardware's limits.", "torchbandit.bench.options:BenchOptions",
        _bench, first="what",
    ),
    "pull": Command("Fetch models into the hub's cache ahead of a run.", "torchbandit.pull:PullOptions", _pull),
}  # fmt: skip


class UsageError(ValueError):
    """A command line or config file that cannot be read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, without the program's name; None takes the process's.
    Returns:
        exit code: 0; 1 where the system refused (a full disk); 2 for what the user can put right, with one message;
        130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"torchbandit {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(f"command: must be {_one_of(COMMANDS)}, got {argv[0]!r}{_nearest(argv[0], COMMANDS)}")
        options = read_options(argv[0], argv[1:])
        with warnings.catch_warnings():
            # A warning for the user is a sentence, not a place in our source.
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            return COMMANDS[argv[0]].run(options)
    except ValueError as error:
        return _fail(error, 2)
    except ImportError as error:
        if "torchbandit[" not in str(error):  # only an extra that is not installed is the user's to put right
            raise
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as stopped:
        return _fail(stopped if stopped.args else "interrupted", 128 + getattr(stopped, "number", 2))


def read_options(command: str, argv: Sequence[str]) -> Any:
    """The options of a command, from its arguments and its config file; arguments win.

    Returns:
        the command's dataclass.
    Raises:
        ValueError: an unknown option (with the nearest known one), or a value that does not fit.
    """
    cls = _options_class(command)
    parser, hints = _parser(command, cls), get_type_hints(cls)
    if argv and COMMANDS[command].first is not None and not argv[0].startswith("-"):
        argv = [_option(str(COMMANDS[command].first)), *argv]
    known = [_option(field.name) for field in dataclasses.fields(cls)] + ["--config", "--help"]
    accepted = {text for action in parser._actions for text in action.option_strings}
    for token in argv:
        option = token.partition("=")[0]
        if token.startswith("--") and option not in accepted:
            near = _nearest(option, known) or f"; torchbandit {command} --help lists all"
            raise UsageError(f"unknown option {option}{near}")
    given = _values(parser, hints, lambda: parser.parse_args(list(argv), defaults=False))
    config = given.pop("config", None)
    if config is not None:
        given = _read_config(config, parser, hints) | given
    given = COMMANDS[command].complete(given)
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in given:
            raise UsageError(f"{_option(field.name)}: must be given; see torchbandit {command} --help")
    return cls(**given)


def _options_class(command: str) -> type:
    module, _, name = COMMANDS[command].options.partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert isinstance(cls, type)
    return cls


def _parser(command: str, cls: type) -> ArgumentParser:
    about, helps = _docs(cls)
    parser = ArgumentParser(
        prog=f"torchbandit {command}", description=about, exit_on_error=False, allow_abbrev=False,
        formatter_class=_Help, usage=_usage(command),
    )  # fmt: skip
    parser.add_argument("--config", type=str, help="YAML file whose keys are the options below; arguments win.")
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, option = hints[field.name], _option(field.name)
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        shared: dict[str, Any] = {
            "help": helps.get(field.name, ""),
            "default": None if made is dataclasses.MISSING else made,
        }
        if hint is bool:
            parser.add_argument(option, action=ActionYesNo(yes_prefix="", no_prefix="no-"), nargs="?", **shared)
        elif get_origin(hint) is list:
            parser.add_argument(option, type=get_args(hint)[0], nargs="+", **shared)
        else:
            parser.add_argument(option, type=hint, **shared)
    return parser


def _usage(command: str) -> str:
    first = COMMANDS[command].first
    return f"torchbandit {command} {f'[{first.upper()}] ' if first else ''}[options]"


class _Help(DefaultHelpFormatter):
    """Keeps the paragraphs of a description, and says of a default only what it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_Help, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if action.default in (None, [], argparse.SUPPRESS) else f"{text} (default: %(default)s)"


def _docs(cls: type) -> tuple[str, dict[str, str]]:
    """What a dataclass says of itself, and, of each field, what it and its bases say under Args."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        about, _, args = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.MULTILINE):
            helps[name] = " ".join(text.split())
    return about.strip(), helps


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_config(path: str, parser: ArgumentParser, hints: dict[str, Any]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        table = get_loader("yaml")(text) if text.strip() else {}
    except Exception as error:
        raise UsageError(f"{path}: must be YAML; {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise UsageError(f"{path}: must hold one option a line, `key: value`, got {type(table).__name__}")
    table = {str(key).replace("-", "_"): value for key, value in table.items()}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{path}: unknown option {key}{_nearest(key, hints)}")
        if get_origin(hints[key]) is list and not isinstance(value, list):
            table[key] = [value]
    return _values(parser, hints, lambda: parser.parse_object(table, defaults=False), f"{path}: ")


def _values(parser: ArgumentParser, hints: dict[str, Any], parse: Callable[[], Any], where: str = "") -> dict[str, Any]:
    """What was given, by name; a value of another type is told in one line."""
    try:
        return dict(vars(parse()))
    except ArgumentError as error:
        text = str(error)
        key = re.search(r'Parser key "(\w+)"', text)
        value = re.search(r"(?:Got|Given) value: (.*)", text)
        if key and value and key[1] in hints:
            option = key[1] if where else _option(key[1])
            text = f"{option}: must be {_show(hints[key[1]])}, got {value[1]}"
        raise UsageError(where + " ".join(text.split())) from error


def _show(hint: Any) -> str:
    """A type as a user reads it: `int or null`, `ppo or rloo or grpo`."""
    if get_origin(hint) is list:
        return f"one or more of {_show(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(map(_show, get_args(hint)))
    words: dict[Any, str] = {str: "text", float: "a finite number", bool: "true or false", type(None): "null"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _one_of(names: Iterable[str]) -> str:
    return " or ".join(names)


def _overview() -> str:
    lines = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    return f"usage: torchbandit COMMAND [options]\n\n{lines}\n\nOptions of a command: torchbandit COMMAND --help"


def _fail(error: object, code: int, kind: str = "error: ") -> int:
    with contextlib.suppress(OSError):  # the terminal is gone; the exit code still tells
        print(f"{kind}{error}", file=sys.stderr)
    return code
