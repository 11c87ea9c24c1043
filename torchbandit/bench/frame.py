"""What all benchmarks share: the clock, the limits of this machine, the lines, and what was left out."""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from torchbandit.bench.environment import environment
from torchbandit.bench.memory import peak_bytes
from torchbandit.bench.peers import installed
from torchbandit.testing.host_copy import count_host_copies


class Times(NamedTuple):
    """Seconds of a call: the median, and the quickest and slowest of the calls counted."""

    median: float
    low: float
    high: float


@dataclass
class Peer:
    """A peer's rate on the same work; `ratio` is ours over it."""

    name: str
    rate: float
    ratio: float


@dataclass
class Line:
    """One work, measured.

    Args:
        bench, work: which benchmark, and on what.
        rate, unit: the median, in rows or tokens a second; `low` and `high` are the spread.
        ceiling: what bounds the rate, and `percent` of it.
        peers: the same work by others; `best` is the quickest.
        peak_gb: of the device, above what lay there before; None where it was not measured.
        host_syncs: copies to the host in one call; None where it was not counted.
        notes: what a reader must know to compare fairly.
        more: further numbers.
    """

    bench: str
    work: str
    rate: float
    unit: str
    low: float
    high: float
    percent: float | None = None
    ceiling: str = ""
    peers: list[Peer] = field(default_factory=list)
    peak_gb: float | None = None
    host_syncs: int | None = None
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Peer | None:
        return max(self.peers, key=lambda peer: peer.rate, default=None)

    def text(self) -> str:
        parts = [f"{self.work}: {short(self.rate)} {self.unit} ({short(self.low)} to {short(self.high)})"]
        if self.percent is not None:
            parts.append(f"{self.percent:.3g}% of {self.ceiling}")
        if self.best is not None:
            parts.append(f"{self.best.ratio:.3g} x {self.best.name}, the best peer")
        parts += [f"{p.ratio:.3g} x {p.name}" for p in self.peers if p is not self.best]
        if self.peak_gb is not None:
            few = self.peak_gb < 0.1
            parts.append(f"peak {self.peak_gb * 1e3:.3g} MB" if few else f"peak {self.peak_gb:.3g} GB")
        if self.host_syncs is not None:
            parts.append(f"{self.host_syncs} host syncs")
        lines = [f"{self.bench:8} {'; '.join(parts)}"]
        lines += [f"{'':8} {key}: {short(value)}" for key, value in self.more.items()]
        return "\n".join(lines + [f"{'':8} note: {note}" for note in self.notes])


class Frame:
    """Where a run measures.

    Args:
        tiny: small shapes: does it run.
        settings: of the peers, as `peers.read_settings` gives them.
        rows: names of rows to measure alone; empty takes all.
    """

    def __init__(
        self, tiny: bool = False, settings: Mapping[str, dict[str, Any]] | None = None, rows: Iterable[str] = ()
    ) -> None:
        self.tiny, self.settings, self.rows = tiny, dict(settings or {}), tuple(rows)
        self.profile = False
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.lines: list[Line] = []
        self.left_out: dict[str, str] = {}

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def setting(self, peer: str, name: str) -> Any:
        return self.settings[peer][name]

    def chosen(self, rows: Sequence[str]) -> list[str]:
        """The rows of a benchmark that were asked for.

        Raises:
            ValueError: a name is none of them.
        """
        if unknown := sorted(set(self.rows) - set(rows)):
            raise ValueError(f"rows: must be of {', '.join(rows)}, got {', '.join(unknown)}")
        return [name for name in rows if not self.rows or name in self.rows]

    def has(self, peer: str, work: str) -> bool:
        """Whether a peer is installed; if not, it is left out by name."""
        if installed(peer) is None:
            self.leave_out(f"{work}: {peer}", "not installed")
            return False
        return True

    def leave_out(self, what: str, why: str) -> None:
        if what not in self.left_out:
            print(f"left out: {what}: {why}", flush=True)
        self.left_out[what] = why

    def add(self, line: Line) -> None:
        print(line.text(), flush=True)
        self.lines.append(line)

    # --- measuring ---------------------------------------------------------------------------------------------------

    def alternate(
        self, calls: Mapping[str, Callable[[], Any]], *, device: torch.device | None = None, repeats: int = 30,
        warm: int = 3,
    ) -> dict[str, Times]:  # fmt: skip
        """Time calls in turns, so that a busy moment of the machine hits all of them alike.

        On a CPU it is the thread's own seconds that count: waiting for a core that others hold is not the work's.
        """
        device = device or self.device
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(warm + (2 if self.tiny else repeats)):
            for name, call in calls.items():
                self.wait(device)
                begin = clock()
                call()
                self.wait(device)
                if i >= warm:
                    taken[name].append(clock() - begin)
        return {name: Times(statistics.median(s), min(s), max(s)) for name, s in taken.items()}

    def time(self, call: Callable[[], Any], repeats: int = 5, warm: int = 1) -> Times:
        """Wall seconds of a call on the run's device."""
        taken = []
        for i in range(warm + (1 if self.tiny else repeats)):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            if i >= warm:
                taken.append(time.perf_counter() - begin)
        return Times(statistics.median(taken), min(taken), max(taken))

    def wait(self, device: torch.device | None = None) -> None:
        if (device or self.device).type == "cuda":
            torch.cuda.synchronize()

    def peak_gb(self, call: Callable[[], Any], device: torch.device | None = None) -> float:
        """Call, and tell the GB above what lay there before: see `peak_bytes`."""
        return peak_bytes(call, device or self.device) / 1e9

    def host_syncs(self, call: Callable[[], Any]) -> int:
        """Times that the host waits for the device, or on a CPU would.

        Told by torch's sync debug mode on CUDA; on a CPU by the operators that would wait there.
        """
        if not self.cuda:
            with count_host_copies() as seen:
                call()
            return len(seen)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # Not "synchronizing" alone: to be told that this mode is a prototype is no wait.
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    # --- limits ------------------------------------------------------------------------------------------------------

    def limits(self) -> dict[str, float]:
        """Of this machine, in this run: bytes a second copied and read, and products of one large square matrix."""
        if not hasattr(self, "_limits"):
            big = self.cuda and not self.tiny
            copy, wide = self.copy_rate(self.device), torch.zeros(2**30 if big else 2**22, device=self.device)
            self._limits = {
                "copy_bytes_s": copy, "read_bytes_s": max(wide.nbytes / self.quickest(wide.sum), copy),
                "matmul_flop_s": self.matmul([(8192, 8192) if big else (256, 256)], 8192 if big else 256),
            }  # fmt: skip
        return self._limits

    def quickest(self, call: Callable[[], Any]) -> float:
        """Seconds of a call among many: a limit is what was reached once, and launches are not to count in it."""
        return self.time(lambda: [call() for _ in range(10)], warm=2).low / 10

    def copy_rate(self, device: torch.device) -> float:
        """Bytes a second of a copy within this device, read and written."""
        size = 2**32 if device.type == "cuda" and not self.tiny else 2**24
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / self.quickest(lambda: target.copy_(source))

    def matmul(self, shapes: Iterable[tuple[int, int]], rows: int) -> float:
        """FLOP a second of [rows, m] @ [m, n], one after the other, for all (m, n): a model's own shapes."""
        seconds, flop = 0.0, 0
        made: dict[tuple[int, int], float] = {}
        for m, n in shapes:
            if (m, n) not in made:
                a, b = (torch.randn(*s, device=self.device).to(self.dtype) for s in ((rows, m), (m, n)))
                out = torch.empty(rows, n, device=self.device, dtype=self.dtype)
                made[m, n] = self.quickest(partial(torch.mm, a, b, out=out))
            seconds += made[m, n]
            flop += 2 * rows * m * n
        return flop / seconds

    # --- the whole ---------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """All that was found, for JSON."""
        lines = [asdict(line) | {"best": asdict(line.best) if line.best else None} for line in self.lines]
        return {
            "environment": environment() | {"tiny": self.tiny}, "limits": getattr(self, "_limits", {}),
            "peers": {name: {"version": installed(name), **part} for name, part in self.settings.items()},
            "lines": lines, "left_out": self.left_out,
        }  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: on a busy machine a second one makes small gathers many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_heap() -> bool:
    """Let glibc keep what is freed, so that no call pays the system for pages; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 2**25))


def short(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {short(part)}" for key, part in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.4g}"


def last_line(result: Mapping[str, Any]) -> str:
    return json.dumps(result, allow_nan=False)
