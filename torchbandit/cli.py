"""The command line. Options are the fields of one dataclass a command, and so are the keys of its `--config` file.

Nothing heavy is imported before a command is known and its options are read: help and typing errors are instant.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torchbandit import __version__
from torchbandit.commands.bench import BENCH
from torchbandit.commands.command import Command, UsageError, fail
from torchbandit.commands.layout import nearest
from torchbandit.commands.profile import PROFILE
from torchbandit.commands.pull import PULL
from torchbandit.commands.read import read
from torchbandit.commands.score import SCORE
from torchbandit.commands.train import TRAIN

COMMANDS: dict[str, Command] = {"train": TRAIN, "score": SCORE, "profile": PROFILE, "bench": BENCH, "pull": PULL}


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
            known = " or ".join(COMMANDS)
            raise UsageError(f"command: must be {known}, got {argv[0]!r}{nearest(argv[0], COMMANDS)}")
        command = COMMANDS[argv[0]]
        with warnings.catch_warnings():
            # A warning for the user is a sentence, not a place in our source.
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            options, config = read(argv[0], command, argv[1:])
            if config is not None:
                print(config, end="")
                return 0
            return command.run(options)
    except ValueError as error:
        return fail(error, 2)
    except ImportError as error:
        if "torchbandit[" not in str(error):  # only an extra that is not installed is the user's to put right
            raise
        return fail(error, 2)
    except OSError as error:
        return fail(error, 1)
    except KeyboardInterrupt as stopped:
        return fail(stopped if stopped.args else "interrupted", 128 + getattr(stopped, "number", 2))


def read_options(command: str, argv: Sequence[str]) -> Any:
    """The options of a command, from its arguments and its config file; arguments win.

    Returns:
        the command's dataclass.
    Raises:
        ValueError: an unknown option (with the nearest known one), or a value that does not fit.
    """
    return read(command, COMMANDS[command], argv).options


def _overview() -> str:
    lines = "\n".join(f"  {name:<10}{command.help}" for name, command in COMMANDS.items())
    return f"usage: torchbandit COMMAND [options]\n\n{lines}\n\nOptions of a command: torchbandit COMMAND --help"
