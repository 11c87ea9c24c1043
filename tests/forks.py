"""Run by test_survival.py: a process that has imported everything and forks command lines, as starting takes seconds.

A line of JSON asks for a run, `{"argv", "log", "first", "tty", "env"}`, answered by its process id, or for the exit
code of one, `{"wait"}`. `first` is code that the run executes before its command line, to have itself killed somewhere.
With `"here"` the run is this process's own: what it loads for the first time is there for the forks after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState

from torchbandit import cli
from torchbandit.train import report

torch.set_num_threads(1)
report.write_curve = lambda *_: None


def fork(argv: list[str], log: str, first: str = "", tty: str = "", env: dict[str, str] | None = None) -> int:
    os.environ |= env or {}
    AcceleratorState._reset_state(reset_partial_state=True)
    os.setsid()  # a session of its own, whose first terminal is its controlling one
    out = os.open(tty or log, os.O_RDWR if tty else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(out, number)
    exec(first, {})
    return cli.main(argv)


def main() -> None:
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        elif "here" in asked:
            with contextlib.redirect_stdout(sys.stderr):
                code = cli.main(asked["argv"])
            print(code, flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            code = 1
            try:
                code = fork(**asked)
                if "tty" in asked:
                    sys.exit(code)  # as a process ends by itself, to the last flush
            finally:
                if "tty" not in asked:  # taking the interpreter down takes longer than the run
                    sys.stdout.flush()
                    os._exit(code)


if __name__ == "__main__":
    main()
