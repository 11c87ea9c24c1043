"""Statistics that a pipeline keeps on the device: running moments of a term, an adaptive KL coefficient.

Every update is a fixed sequence of device operations: no branch on a value, so no sync. A row that may not count is
left out through its mask, and an update with an all-False mask changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchbandit.batch import Reduce, masked_sum


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class RunningNormalizer:
    """Shifts and scales values by the mean and deviation of all values seen so far, this batch included.

    Batches are merged by count, mean and sum of squared deviations, which loses no digits when the mean is large.
    With `reduce` the batch of all ranks is merged at once, so every rank holds the same numbers, and those are the
    numbers that one process with the whole batch would hold.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
        variances", equation 2.1.
    """

    def __init__(self, device: torch.device, eps: float = 1e-8) -> None:
        zero = torch.zeros((), dtype=statistics_dtype(device), device=device)
        self.count, self.mean, self.squares, self.eps = zero, zero, zero, eps

    def update(self, x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> None:
        """Merge the values under `mask`.

        Args:
            x: float, any shape; mask: bool, x's shape.
            reduce: sums over processes.
        """
        x = x.to(self.count.dtype)
        count, total = mask.sum().to(x.dtype), masked_sum(x, mask)
        if reduce is not None:
            count, total = reduce(torch.stack((count, total))).unbind()
        mean = total / count.clamp(min=1)
        squares = masked_sum((x - mean).square(), mask)
        if reduce is not None:
            squares = reduce(squares)
        both = self.count + count
        share = count / both.clamp(min=1)
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * self.count * share
        self.mean = self.mean + shift * share
        self.count = both

    def __call__(self, x: Tensor, mask: Tensor, reduce: Reduce | None = None) -> Tensor:
        """Update, then normalise: x's shape and dtype; 0 outside the mask."""
        self.update(x, mask, reduce)
        return self.normalized(x, mask)

    def normalized(self, x: Tensor, mask: Tensor) -> Tensor:
        """By the statistics as they are: x's shape and dtype; 0 outside the mask."""
        scale = torch.rsqrt(self.squares / self.count.clamp(min=1) + self.eps)
        wide = x.to(self.mean.dtype)  # a 0-dim float64 would not promote x, and a large mean would lose its digits
        return ((wide - self.mean) * scale).to(x.dtype).masked_fill(~mask, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count.clone(), "mean": self.mean.clone(), "squares": self.squares.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.count, self.mean, self.squares = (_like(state[k], self.count) for k in ("count", "mean", "squares"))


class AdaptiveCoefficient:
    """A KL coefficient that seeks a target KL: it grows where the KL is above, shrinks where it is below.

    The relative error of a batch's mean KL is clipped to ±0.2, and n rows multiply the coefficient by
    1 + error * min(n / horizon, 1). The bound keeps it positive: a batch of more than 5 horizons would turn it around.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2; the gain
        n / horizon is that of their published code.
    """

    def __init__(self, initial: float, target: float, horizon: float, device: torch.device) -> None:
        self.value = torch.full((), initial, dtype=torch.float32, device=device)
        self.target, self.horizon = target, horizon

    def update(self, kl: Tensor, mask: Tensor, reduce: Reduce | None = None) -> None:
        """Move the coefficient by one batch.

        Args:
            kl: [B] float, nats a row; mask: [B] bool, the rows that count.
            reduce: sums over processes.
        """
        dtype = statistics_dtype(self.value.device)
        count, total = mask.sum().to(dtype), masked_sum(kl.to(dtype), mask)
        if reduce is not None:
            count, total = reduce(torch.stack((count, total))).unbind()
        error = ((total / count.clamp(min=1) - self.target) / self.target).clamp(-0.2, 0.2)
        gain = (count / self.horizon).clamp(max=1.0)
        self.value = (self.value * (1.0 + error * gain)).to(self.value.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"coef": self.value.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.value = _like(state["coef"], self.value)


def _like(value: Tensor, other: Tensor) -> Tensor:
    return torch.as_tensor(value).to(device=other.device, dtype=other.dtype).clone()
