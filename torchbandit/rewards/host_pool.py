"""Worker processes that call a string function, with a limit on every call.

Written here rather than taken from a library for three properties together: a worker is a bare interpreter, so it
imports neither torch nor the user's script (multiprocessing's "spawn" runs `__main__` again, "fork" copies a process
with CUDA and threads in it); each worker has two pipes of its own and no lock in common, so that it can be killed at
any moment; and it ends when the parent does, however the parent ends: an idle one at the end of its pipe, a busy one
at an alarm of the kernel. POSIX only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from torchbandit.rewards.host_worker import NOTHING, Outcome

START_S = 120.0
"""How long a worker may take to import the function's module."""
GRACE_S = 2.0
"""A worker ends itself that long after its limit, if the parent has not done so."""


class Rows(NamedTuple):
    """What the function is called with; lists of one length."""

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list[Any]]

    def take(self, rows: list[int]) -> tuple[list[str], list[str], dict[str, list[Any]]]:
        """Some of the rows, as a plain tuple: a worker that unpickled this class would import all of torch."""
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return [self.prompts[i] for i in rows], [self.completions[i] for i in rows], columns


class Worker:
    """One process and its two pipes."""

    def __init__(self, pickled_fn: bytes, timeout_s: float) -> None:
        task_read, task_write = os.pipe()
        result_read, result_write = os.pipe()
        script = str(Path(__file__).with_name("host_worker.py"))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", script, str(task_read), str(result_write), str(timeout_s + GRACE_S)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a function's prints must not land in a command's output
                pass_fds=(task_read, result_write),
                start_new_session=True,  # Ctrl-C reaches the parent alone, and a kill reaches the worker's children
            )
        except BaseException:
            os.close(task_write)
            os.close(result_read)
            raise
        finally:
            os.close(task_read)
            os.close(result_write)
        self.tasks, self.results = Connection(task_write, readable=False), Connection(result_read, writable=False)
        self.ready = False
        self.rows: list[int] | None = None  # the rows it is at
        self.deadline = time.monotonic() + START_S
        self.tasks.send(sys.path)
        self.tasks.send_bytes(pickled_fn)

    @property
    def busy(self) -> bool:
        return not self.ready or self.rows is not None

    def kill(self) -> int:
        """End the process and its children; its exit status."""
        if self.process.returncode is None:  # not reaped yet, so that its process group is still its own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def disconnect(self) -> None:
        self.tasks.close()
        self.results.close()


class Job:
    """Rows on their way through the pool, driven by a thread of their own."""

    def __init__(self, work: Callable[[Job], list[Outcome]]) -> None:
        self.cancelled = threading.Event()
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="host-reward", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Job], list[Outcome]]) -> None:
        try:
            self._outcomes = work(self)
        except BaseException as error:
            self._error = error

    def result(self) -> list[Outcome]:
        """Wait for the outcomes, in the order of the rows.

        Raises:
            RuntimeError: workers do not start any more.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcomes

    def cancel(self) -> None:
        self.cancelled.set()
        if threading.current_thread() is not self._thread:  # a garbage collection may close the pool from there
            self._thread.join()


class WorkerPool:
    """`num_workers` processes that hold the same function.

    Args:
        pickled_fn: the function, pickled by reference to its module.
        timeout_s: limit on one call of the function; a worker that passes it is killed and replaced.
    Raises:
        ValueError: a worker cannot import the function.
    """

    def __init__(self, pickled_fn: bytes, num_workers: int, timeout_s: float) -> None:
        self._pickled_fn, self._timeout_s = pickled_fn, timeout_s
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._closed = False
        self._job: Job | None = None
        self._workers: list[Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(Worker(pickled_fn, timeout_s))
            wait([self._workers[0].results], START_S)
            self._greet(self._workers[0])
        except BaseException:
            self.close()
            raise

    def submit(self, rows: Rows, chunk_size: int) -> Job:
        """Start on the rows and return at once. One job runs at a time; a former one is given up."""
        if self._job is not None:
            self._job.cancel()
        self._job = Job(lambda job: self._work(job, rows, chunk_size))
        return self._job

    def close(self) -> None:
        """Kill every worker and wait for its end; harmless to call twice."""
        if os.getpid() != self._owner:  # a forked copy of this object has no right to the processes
            return
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        if self._job is not None:
            self._job.cancel()
        for worker in self._workers:
            worker.disconnect()
        self._workers = []

    def _work(self, job: Job, rows: Rows, chunk_size: int) -> list[Outcome]:
        count = len(rows.prompts)
        outcomes: list[Outcome] = [(NOTHING, "cancelled", "")] * count
        todo = deque(list(range(i, min(i + chunk_size, count))) for i in range(0, count, chunk_size))
        while not job.cancelled.is_set() and (todo or any(worker.rows is not None for worker in self._workers)):
            for at, worker in enumerate(self._workers):
                if not worker.busy and worker.process.poll() is not None:  # killed from outside while idle
                    worker = self._replace(at)
                if todo and not worker.busy:
                    self._give(worker, todo.popleft(), rows)
            busy = [worker for worker in self._workers if worker.busy]
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            done = wait([worker.results for worker in busy], timeout=min(max(patience, 0.0), 0.2))
            for at, worker in enumerate(self._workers):
                late = worker.busy and time.monotonic() >= worker.deadline
                if not worker.ready:
                    if late or worker.results in done:
                        self._greet(worker)
                    continue
                if worker.results in done:
                    answer = self._answer(worker)
                elif late:
                    answer = (NOTHING, "timeout", f"a call took more than {self._timeout_s:g} s")
                else:
                    continue
                finished, worker.rows = worker.rows, None
                if isinstance(answer, tuple) and answer[1] in ("timeout", "died") and not job.cancelled.is_set():
                    self._replace(at)
                assert finished is not None
                if isinstance(answer, list):
                    for row, outcome in zip(finished, answer, strict=True):
                        outcomes[row] = outcome
                elif len(finished) > 1:  # one bad row must not spoil the others
                    todo.extend([row] for row in finished)
                else:
                    outcomes[finished[0]] = answer
        if job.cancelled.is_set():
            self._drop_busy()
        return outcomes

    def _give(self, worker: Worker, chunk: list[int], rows: Rows) -> None:
        worker.rows, worker.deadline = chunk, time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):  # it died just now: its results end too, which the loop sees
            worker.tasks.send(rows.take(chunk))

    def _answer(self, worker: Worker) -> list[Outcome] | Outcome:
        try:
            answer: list[Outcome] | Outcome = worker.results.recv()
            return answer
        except (EOFError, OSError):
            if worker.kill() == -signal.SIGALRM:
                return NOTHING, "timeout", f"a call took more than {self._timeout_s:g} s"
            return NOTHING, "died", f"the worker process ended during a call, with status {worker.process.returncode}"

    def _greet(self, worker: Worker) -> None:
        """Take a new worker's first message: None, or why it cannot import the function."""
        try:
            problem = worker.results.recv() if worker.results.poll() else f"it took more than {START_S:g} s"
        except (EOFError, OSError):
            problem = f"the process ended with status {worker.kill()}"
        if problem is not None:
            raise ValueError(f"a worker process cannot import the function: {problem}")
        worker.ready = True

    def _replace(self, at: int) -> Worker:
        self._workers[at].kill()
        self._workers[at].disconnect()
        with self._lock:  # so that close() misses no process
            if self._closed:
                raise RuntimeError("the worker pool is closed")
            self._workers[at] = Worker(self._pickled_fn, self._timeout_s)
        return self._workers[at]

    def _drop_busy(self) -> None:
        """A cancelled job leaves no worker with half a task."""
        for at, worker in enumerate(self._workers):
            if worker.rows is not None and not self._closed:
                self._replace(at)
