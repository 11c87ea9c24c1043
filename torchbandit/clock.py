"""Seconds a stage takes, without waiting for the device while the step runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Times the stages of one step.

    On CUDA a stage is bracketed by events and read after the step has ended, since a wait in between would cost what
    it measures. Elsewhere work is synchronous and the wall clock will do.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.setdefault(stage, []).append((first, last))
        else:
            start = time.perf_counter()
            yield
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Seconds by stage, `rest` (all that was in no stage) and `total`; on CUDA call it after a sync."""
        seconds = dict(self._seconds)
        for stage, pairs in self._events.items():
            seconds[stage] = sum(first.elapsed_time(last) for first, last in pairs) / 1000
        total = time.perf_counter() - self._start
        return seconds | {"rest": max(0.0, total - sum(seconds.values())), "total": total}
