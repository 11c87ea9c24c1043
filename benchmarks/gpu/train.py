"""A whole GRPO step, ours beside TRL's; the same as `torchbandit bench train`.

python benchmarks/gpu/train.py                          # both
python benchmarks/gpu/train.py --rows ours --profile    # and the kernels of a step
python benchmarks/gpu/train.py --tiny                   # a smoke test on the CPU
accelerate launch --multi_gpu --num_processes 2 benchmarks/gpu/train.py --rows ours
"""

from __future__ import annotations

import sys

from torchbandit.bench.train import Work
from torchbandit.cli import main

__all__ = ["Work"]  # engines.py takes its sizes from here

if __name__ == "__main__":
    sys.exit(main(["bench", "train", *sys.argv[1:]]))
