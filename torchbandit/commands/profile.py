"""`torchbandit profile`."""

from __future__ import annotations

from typing import Any

from torchbandit.commands.command import Command


def run(options: Any) -> int:
    from torchbandit.profile.run import main

    main(options)
    return 0


PROFILE = Command(
    "What a reward model and a reference lose, and save, in each precision.",
    "torchbandit.profile.options:ProfileOptions", run,
)  # fmt: skip
