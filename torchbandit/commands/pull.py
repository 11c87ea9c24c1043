"""`torchbandit pull`."""

from __future__ import annotations

from typing import Any

from torchbandit.commands.command import Command


def run(options: Any) -> int:
    from torchbandit.pull import pull

    pull(options)
    return 0


PULL = Command("Fetch models into the hub's cache ahead of a run.", "torchbandit.pull:PullOptions", run)
