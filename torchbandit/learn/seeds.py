"""Every seed of a run, from one: the same for each engine, so that they do the same work."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed of its own for each purpose, 0 to 2**32 - 1: neighbouring seeds and purposes share nothing."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def sampling_seed(seed: int, rank: int = 0, *, evaluation: bool = False) -> int:
    """Of the generator from which a rank (or an env runner) samples tokens."""
    return derived_seed(seed, "evaluation" if evaluation else "sampling", rank)


def minibatch_order(num_groups: int, epochs: int, seed: int, step: int) -> list[Tensor]:
    """The order in which a step's groups go into minibatches: one permutation an epoch, int64 on the CPU.

    It follows from seed and step alone: nothing is kept, so a resumed run has nothing to restore, and all ranks and
    learners agree.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", step))
    return [torch.randperm(num_groups, generator=generator) for _ in range(epochs)]
