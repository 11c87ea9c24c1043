"""Scores and log-probs beside transformers padded and sorted; the same as `torchbandit bench score`.

python benchmarks/gpu/score.py                          # the whole table
python benchmarks/gpu/score.py --rows rm groups         # some rows
python benchmarks/gpu/score.py --rows ref --profile     # and the kernels of a pass
python benchmarks/gpu/score.py --tiny                   # a smoke test on the CPU
"""

from __future__ import annotations

import sys

from torchbandit.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "score", *sys.argv[1:]]))
