"""The steps of a run, of either engine: step, report, save when it is due, and end as it should, whatever ends it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from torchbandit.learn.metrics import Metrics
from torchbandit.train import report
from torchbandit.train.options import TrainOptions
from torchbandit.train.signals import STOPS, Interrupted, say, stop_signals


class Engine(Protocol):
    """What an engine does for the loop."""

    @property
    def steps_done(self) -> int:
        """Of the whole run."""

    def step(self) -> Metrics:
        """Take one step."""

    def undo(self) -> bool:
        """Go back to before a step that has failed; False where that cannot be, since it had begun to learn."""

    def save(self) -> None:
        """Write the checkpoint; OSError where that fails."""

    def any_rank(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether a process has it up; the same on all of them."""


def run_steps(engine: Engine, options: TrainOptions, out: Path, accelerator: Accelerator) -> None:
    """Train until all steps are done and saved.

    The first checkpoint comes after the run's first step, the others as `Saves` says.

    Raises:
        Interrupted: a signal came; the step was finished and a checkpoint written.
        OSError: a file could not be written; the former checkpoint is whole.
    """
    main = accelerator.is_main_process
    with stop_signals(patient=True) as seen, contextlib.ExitStack() as stack:
        saves = Saves(options, engine.steps_done)
        with saves.told():
            reporter = (
                stack.enter_context(report.Reporter(out, steps=options.steps, done=engine.steps_done)) if main else None
            )

        def save() -> None:
            with saves.told():
                if reporter is not None:
                    reporter.flush()  # a checkpoint never counts steps that metrics.jsonl could lose
                engine.save()
            saves.note(engine.steps_done)

        def stops() -> list[bool]:
            return [number in seen for number in STOPS]

        while engine.steps_done < options.steps:
            try:
                metrics = engine.step()
            except Exception:
                if engine.steps_done > saves.last and engine.undo():
                    save()
                if saves.last and main:
                    say(f"step {engine.steps_done + 1} failed; the checkpoint of step {saves.last} is whole")
                raise
            trouble: OSError | None = None
            if reporter is not None:
                try:
                    reporter(metrics)
                except OSError as error:
                    trouble = error
            if options.log_with:
                accelerator.log(
                    {name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"])
                )
            done = engine.steps_done
            # One reduction for all that ranks must agree on. The main process has the clock.
            *stopped, due, failed = engine.any_rank([*stops(), main and saves.due(done), trouble is not None])
            if failed:
                with saves.told():
                    raise trouble or OSError("metrics.jsonl: the main process could not write it")
            if due or any(stopped) or done == options.steps:
                save()
                stopped = engine.any_rank(stops())  # a signal may have come while it was written
            if any(stopped):
                number = signal.Signals(STOPS[stopped.index(True)])
                raise Interrupted(
                    f"{number.name}: stopped after step {done} of {options.steps}; the checkpoint is written, go on "
                    "with the same command and --resume",
                    number,
                )


class Saves:
    """When a checkpoint is due: after the first step, then by steps and by minutes, whichever comes first.

    Args:
        options: `save_every` and `save_minutes`; with both 0 the end of the run is saved alone.
        done: steps done before, which the checkpoint has that the run goes on from.
    """

    def __init__(self, options: TrainOptions, done: int) -> None:
        self.last = done
        self._every, self._seconds = options.save_every, 60 * options.save_minutes
        self._since = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether to save after step `done`."""
        if not self._every and not self._seconds:
            return False
        by_steps = bool(self._every) and done % self._every == 0
        by_clock = bool(self._seconds) and time.monotonic() - self._since >= self._seconds
        return by_steps or by_clock or self.last == 0

    def note(self, done: int) -> None:
        """A checkpoint of step `done` was written."""
        self.last, self._since = done, time.monotonic()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say with an OSError what is left, and what to do."""
        try:
            yield
        except OSError as error:
            left = (
                f"The checkpoint of step {self.last} is whole: make room, then go on with the same command and --resume"
                if self.last else "There is no checkpoint yet: make room, then begin again"
            )  # fmt: skip
            raise OSError(f"{error}. {left}") from error
