"""The work of `torchbandit bench`: measure what is asked for, say what was left out, write it down."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from torchbandit.bench.environment import environment
from torchbandit.bench.frame import Frame, last_line, short
from torchbandit.bench.options import BENCHMARKS, BenchOptions
from torchbandit.bench.peers import installed, read_settings


def bench(options: BenchOptions) -> dict[str, Any]:
    """Run the benchmarks of `options.what`.

    Returns:
        what the last line holds: environment, limits, the peers' settings, lines, and what was left out with the
        reason.
    Raises:
        AssertionError: an output is not what it must be; nothing after it is measured.
        ValueError: an option or the peers' file is not what it must be.
    """
    if options.rows and options.what == "all":
        raise ValueError("rows: belong to one benchmark; name it, as in torchbandit bench score --rows rm")
    rank = int(os.environ.get("RANK", "0"))  # under accelerate launch: a GPU each, and one of them speaks
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with redirect_stdout(StringIO()) if rank else nullcontext():
        return _bench(options, write=not rank)


def _bench(options: BenchOptions, write: bool) -> dict[str, Any]:
    frame = Frame(options.tiny, read_settings(options.peers), options.rows)
    frame.profile = options.profile
    print("environment:", short({k: v for k, v in environment().items() if v is not None}))
    for name, part in frame.settings.items():
        print(f"peer {name} ({installed(name) or 'not installed'}): {short(part) or 'no settings'}")
    print("limits:", short({k: f"{v / 1e12:.3g}e12" for k, v in frame.limits().items()}), flush=True)
    if options.tiny:
        print("tiny: every shape below is a stand-in, and no figure a speed")
    for name in BENCHMARKS if options.what == "all" else (options.what,):
        run: Callable[[Frame], None] = import_module(f"torchbandit.bench.{name}").run
        try:
            run(frame)
        except ImportError as error:
            if options.what != "all":
                raise
            frame.leave_out(name, " ".join(str(error).split()))
        gc.collect()  # the models of one benchmark are not the next one's peak
        if frame.cuda:
            torch.cuda.empty_cache()
    result = frame.result()
    if write and options.plot is not None:
        from torchbandit.bench.plot import plot

        plot(frame.lines, options.plot)
    if write and options.json is not None:
        Path(options.json).write_text(last_line(result) + "\n", encoding="utf-8")
    print(last_line(result))
    return result
