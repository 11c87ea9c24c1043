"""`torchbandit score`."""

from __future__ import annotations

from typing import Any

from torchbandit.commands.command import Command


def run(options: Any) -> int:
    from torchbandit.score.run import main

    main(options)
    return 0


SCORE = Command("Score the prompt/response pairs of a file.", "torchbandit.score.options:ScoreOptions", run)
