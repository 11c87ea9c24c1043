"""What a worker process of HostReward runs: calls a string function, never touches the device.

Started by host_pool.py as a script, so the process imports the standard library and the function's own module, and
neither torch nor the user's `__main__`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Outcome = tuple[float, str | None, str]
"""Value (NaN if there is none), reason for its absence, and an example to show."""

NOTHING = math.nan
LARGEST = 3.4e38  # of float32; NaN compares False


def check(value: object) -> Outcome:
    """A function's result for one row, as a finite float or with the reason why not."""
    if value is None:
        return NOTHING, "none", "the function returned None"
    if not isinstance(value, (str, bytes)):
        try:
            number = float(value)  # type: ignore[arg-type]  # bool, int, float, and scalars of numpy or torch
            if abs(number) <= LARGEST:
                return number, None, ""
        except (TypeError, ValueError, OverflowError):
            pass
    return NOTHING, "bad value", f"the function returned {value!r:.200}"


def call(
    fn: Callable[..., Any], prompts: list[str], completions: list[str], columns: dict[str, list[Any]]
) -> list[Outcome] | Outcome:
    """Call `fn` on some rows: an outcome for each, or one for the call that failed as a whole.

    Where `fn` is an `async def`, or returns a list of awaitables, they are awaited together.
    """
    try:
        values = fn(prompts, completions, **columns)
        if inspect.isawaitable(values) or any(map(inspect.isawaitable, values := list(values))):
            values = asyncio.run(_awaited(values))
    except BaseException as error:  # sys.exit() in a function is its failure, not the worker's end
        return _failure(error)
    if len(values) != len(prompts):
        return NOTHING, "wrong length", f"the function returned {len(values)} values for {len(prompts)} rows"
    return [_failure(value) if isinstance(value, BaseException) else check(value) for value in values]


def _failure(error: BaseException) -> Outcome:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error}"[:200] + f" ({frame.filename}, line {frame.lineno})"
    return NOTHING, type(error).__name__, text


async def _awaited(values: Any) -> list[Any]:
    """What an `async def` returns, with each value that is awaitable awaited beside the others.

    A value that raises is its exception: it is that row's failure and no other's.
    """
    rows: list[Any] = list(await values if inspect.isawaitable(values) else values)
    waiting = [i for i, value in enumerate(rows) if inspect.isawaitable(value)]
    outcomes = await asyncio.gather(*(rows[i] for i in waiting), return_exceptions=True)
    for i, outcome in zip(waiting, outcomes, strict=True):
        rows[i] = outcome
    return rows


def _arm(seconds: float) -> None:
    """Let the kernel end this process after `seconds` (0: never), even inside C code that holds the interpreter's
    lock. The parent is quicker; this is for the case that the parent is gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    read_fd, write_fd, limit = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    tasks, results = Connection(read_fd, writable=False), Connection(write_fd, readable=False)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to handle: it ends its step first
        signal.signal(number, signal.SIG_IGN)
    sys.path[:] = tasks.recv()
    try:
        fn = pickle.loads(tasks.recv_bytes())
    except Exception as error:
        results.send(f"{type(error).__name__}: {error}")
        return
    results.send(None)
    try:
        while True:
            rows = tasks.recv()
            _arm(limit)
            answer = call(fn, *rows)
            _arm(0)
            results.send(answer)
    except (EOFError, BrokenPipeError):  # the parent closed the pool, or died
        os._exit(0)


if __name__ == "__main__":
    main()
