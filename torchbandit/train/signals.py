"""Signals that end a run: the first one lets the step end and a checkpoint be written, a second one does not."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from tqdm import tqdm

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, a scheduler's warning, a closed terminal."""
FORWARDED_S = 2.0
"""A launcher hands a signal on to its processes, which may have had it from the terminal or scheduler already."""


class Interrupted(Exception):
    """A signal came: the step was finished and a checkpoint written."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StoppedAtOnce(KeyboardInterrupt):
    """A signal came outside of training, or a second one: nothing more was written."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def stop_signals(patient: bool) -> Iterator[list[int]]:
    """Handle the signals that end a run, as long as the block lasts.

    Args:
        patient: collect the first one, so that the step can end, and let the second raise; else the first raises.
    Returns:
        the numbers of the signals that came.
    Raises:
        StoppedAtOnce: see `patient`; the one after it has the system's own way, which no cleaning up can hold up.
    """
    seen: list[int] = []
    raised: list[StoppedAtOnce] = []
    first_s = 0.0
    launched = int(os.environ.get("WORLD_SIZE") or 1) > 1

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first_s
        if number == getattr(signal, "SIGHUP", None):
            mute_closed_streams()
        if patient and not seen:
            seen.append(number)
            first_s = time.monotonic()
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more to stop now\n")
            return
        if patient and launched and time.monotonic() - first_s < FORWARDED_S:
            return
        for other in former:
            signal.signal(other, signal.SIG_DFL)
        told = f"interrupted by {signal.Signals(number).name}; what was saved before is whole, --resume goes on there"
        raised.append(StoppedAtOnce(told, number))
        raise raised[0]

    former = {}
    try:
        for number in STOPS:
            # What was to be ignored (nohup, a shell's background job) goes on being so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, where Python refuses handlers
        former = {}
    try:
        yield seen
    except KeyboardInterrupt as error:
        # Ray, waiting in its own code, makes a plain one of ours, which says neither why nor which signal.
        if raised and error is not raised[0]:
            raise raised[0] from error
        raise
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hangup_ignored() -> Iterator[None]:
    """Processes that are started within do not end with the terminal; whoever has started them ends them."""
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, former)


def say(text: str) -> None:
    """Print beside the progress bar. A terminal that is gone is no reason to end a run."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        mute_closed_streams(sys.stdout)


def mute_closed_streams(*closed: object) -> None:
    """Send what is still printed, by anyone, nowhere: to a terminal that has been closed, or to `closed` streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file at all, as under a test's capture
            number = stream.fileno()
            try:
                if stream not in closed:
                    os.write(number, b"")
                    continue
            except OSError:
                pass
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
