"""`torchbandit bench`."""

from __future__ import annotations

from typing import Any

from torchbandit.commands.command import Command


def run(options: Any) -> int:
    from torchbandit.bench.run import bench

    bench(options)
    return 0


BENCH = Command(
    "Measure the package beside its peers and the hardware's limits.", "torchbandit.bench.options:BenchOptions", run,
    first="what",
)  # fmt: skip
