"""The choices that losses and advantages take, and their checks: plain values, read without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Literal["token", "response", "response_token", "product"]
ClipAs = Literal["min", "weight", "mask"]
Mean = Literal["token", "response", "width", "sum"]
Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]
KLEstimator = Literal["k1", "k2", "k3"]
LossKLEstimator = Literal["k1", "k2", "k3", "weighted_k3"]
Loss = tuple["Tensor", dict[str, "Tensor"]]
"""A scalar with gradient, and metrics: scalars without."""
CHOICES = {"ratio": Ratio, "clip_as": ClipAs, "mean": Mean, "baseline": Baseline, "scale": Scale}


def log_bounds(clip: float | None, clip_high: float | None) -> tuple[float, float]:
    """(log(1 - clip), log(1 + clip_high)); ValueError for a clip that is not positive."""
    high = clip if clip_high is None else clip_high
    for name, number in (("clip", clip), ("clip_high", high)):
        if number is not None and not number > 0:
            raise ValueError(f"{name}: must be above 0, got {number}; 0.2 is usual, None is no bound")
    low = -math.inf if clip is None or clip >= 1 else math.log1p(-clip)
    return low, math.inf if high is None else math.log1p(high)


def check_dual_clip(dual_clip: float | None, clip_as: ClipAs = "min") -> None:
    """ValueError unless it is None or above 1, and the clip is PPO's."""
    if dual_clip is None:
        return
    if not dual_clip > 1:
        raise ValueError(f"dual_clip: must be above 1, or None, got {dual_clip}; 3 is usual")
    if clip_as != "min":
        raise ValueError(f'dual_clip: bounds the surrogate of clip_as="min", got clip_as={clip_as!r}; leave it out')


def check_choices(**choices: str) -> None:
    """ValueError for a choice that there is not."""
    for name, value in choices.items():
        known = get_args(CHOICES[name])
        if value not in known:
            raise ValueError(f"{name}: must be {' or '.join(map(repr, known))}, got {value!r}")


def check_cap(cap: float, beyond: str = "truncate") -> None:
    """ValueError unless a cap on importance weights leaves something, and `beyond` is known."""
    if beyond not in ("truncate", "mask"):
        raise ValueError(f'beyond: must be "truncate" or "mask", got {beyond!r}')
    least = 1.0 if beyond == "mask" else 0.0
    if not cap > least:
        raise ValueError(f"cap: must be above {least:g} to {beyond} importance weights, got {cap}; 2 is usual")
