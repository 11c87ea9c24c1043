"""One field per option of `torchbandit bench`; the same names are the keys of `--config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

What = Literal["step", "score", "generate", "rllib", "train", "all"]
BENCHMARKS: tuple[What, ...] = ("step", "score", "generate", "rllib", "train")


@dataclass
class BenchOptions:
    """Measure the package beside its peers and the hardware's limits, in one run.

    What cannot be measured here is left out by name, with the reason. Outputs are checked before anything is timed: a
    fast wrong answer ends the run. The last line is JSON.

    Args:
        what: Which benchmark; may be given first, without its name: torchbandit bench step.
        json: File for the results, as in the last line.
        plot: File for a chart of the ratios to the best peer.
        peers: YAML file that overrides the peers' settings, as the first lines print them.
        tiny: Small shapes, which show that everything runs and no speed.
        profile: Print the kernels that rows of score and train spend their time in.
        rows: Names of rows of score, generate or train, to measure these alone.
    """

    what: What = "all"
    json: str | None = None
    plot: str | None = None
    peers: str | None = None
    tiny: bool = False
    profile: bool = False
    rows: list[str] = field(default_factory=list)
