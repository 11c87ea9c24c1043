"""Run by test_survival.py: a process that has imported everything and forks command lines, as starting takes seconds.

A line of JSON asks for a run, `{"argv", "log", "first", "tty", "env"}`, answered by its process id, or for the exit
code of one, `{"wait"}`. `first` is code that the run executes before its command line, to have itself killed somewhere.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import transformers.models.llama.modeling_llama

import torchbandit.cli
import torchbandit.train.run  # noqa: F401

torch.set_num_threads(1)


def run(argv: list[str], log: str, first: str = "", tty: str = "", env: dict[str, str] | None = None) -> int:
    os.environ |= env or {}
    os.setsid()  # a session of its own, whose first terminal is its controlling one
    out = os.open(tty or log, os.O_RDWR if tty else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(out, number)
    exec(first, {})
    return torchbandit.cli.main(argv)


def main() -> None:
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            sys.exit(run(**asked))


if __name__ == "__main__":
    assert transformers.models.llama.modeling_llama
    main()
