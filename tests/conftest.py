"""What every test may count on: one thread, the same random numbers, and a process as the one before it found it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Processes that tests start (Ray's workers, other ranks) import from this folder too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
# Ray reads its variables when it is imported. A folder of our own, or it joins a cluster that it finds in /tmp/ray;
# what neighbours take of the memory is no reason to kill an actor, and a slow start on a busy machine is no failure.
folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: paths of sockets end at some 100 characters
atexit.register(shutil.rmtree, folder, ignore_errors=True)
os.environ |= {
    "RAY_TMPDIR": folder,
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_raylet_start_wait_time_s": "200",
    "RAY_worker_register_timeout_seconds": "200",
    "RAY_USAGE_STATS_ENABLED": "0",
}
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run side by side, a file stays in one process: it has fixtures of its own and calls that it compiled.

    All that starts a Ray cluster is one group: a second one beside it would wait for cores that are not there.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        clusters = item.path.name.startswith("test_rllib") or "rllib" in item.name or "stock" in item.name
        item.add_marker(pytest.mark.xdist_group("ray" if clusters else item.path.stem))


def process() -> dict[str, Any]:
    """What a test could leave changed behind it. Libraries set variables of their own."""
    return {f"${name}": value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "garbage collection": gc.isenabled(),
        "folder": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No test depends on another: neither on the numbers that it drew, nor on what it changed or compiled."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # RLlib turns it on for a whole process where a config has a seed
    if "torch._dynamo" in sys.modules:  # a function is compiled anew only so many times in a process
        torch._dynamo.reset()
    before, path = process(), list(sys.path)
    yield
    sys.path[:] = path  # the command line adds the folder that it is called in
    now = process()
    changed = {name: (value, now.get(name)) for name, value in before.items() if now.get(name) != value}
    assert not changed, f"the test left the process changed, from and to: {changed}"
