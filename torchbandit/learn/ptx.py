"""Pretraining batches of any source: a corpus file, token tensors, or a function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchbandit.corpus import Corpus


class PtxData:
    """Endless pretraining batches on the learner's device, each learner taking its turn.

    Args:
        source: a corpus file (see `Corpus.from_file`); (ids [M, L] int64, mask [M, L] bool); or a function
            `device -> iterable of (ids, mask)`, which says itself how many rows a batch has and, in several learners,
            which of them are this process's (torch.distributed is up by then). It is begun again where it ends. If
            the iterable has a state_dict and load_state_dict, it resumes exactly.
        max_length: longest row of a corpus file.
    Raises:
        ValueError: the source is none of these, or holds nothing.
    """

    def __init__(self, source: Any, tokenizer: Any, max_length: int, seed: int, device: torch.device) -> None:
        self._corpus: Corpus | None = None
        self._batches: Any = None
        if isinstance(source, (str, Path)):
            self._corpus = Corpus.from_file(source, tokenizer, max_length=max_length, seed=seed, device=device)
        elif isinstance(source, tuple) and len(source) == 2:
            self._corpus = Corpus(source[0].to(device), source[1].to(device), seed=seed)
        elif callable(source):
            self._batches = source(device)
            self._iterator: Iterator[Any] = iter(self._batches)
        else:
            raise ValueError(
                "ptx_data: must be a corpus file, ids [M, L] (or ids and mask), or a function of the device that "
                f"returns batches, got {type(source).__name__}"
            )

    def shard(self, rank: int, world_size: int) -> None:
        """Take turns with the other learners; a function's batches are its own affair."""
        if self._corpus is not None:
            self._corpus.shard(rank, world_size)

    def next(self, num: int) -> tuple[Tensor, Tensor]:
        """ids [num, L] int64 and mask [num, L] bool; of a function, as many rows as it gives."""
        if self._corpus is not None:
            return self._corpus.next(num)
        batch = next(self._iterator, None)
        if batch is None:
            self._iterator = iter(self._batches)
            batch = next(self._iterator, None)
        if batch is None:
            raise ValueError("ptx_data: the function's iterable must give batches whenever it is begun, got none")
        ids, mask = batch if isinstance(batch, (tuple, list)) else (batch, torch.ones_like(batch, dtype=torch.bool))
        return ids, mask

    def state_dict(self) -> dict[str, Any]:
        """The place in the data; empty for a function whose iterable has no state."""
        owner = self._corpus if self._corpus is not None else self._batches
        return dict(owner.state_dict()) if hasattr(owner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        owner = self._corpus if self._corpus is not None else self._batches
        if state and hasattr(owner, "load_state_dict"):
            owner.load_state_dict(state)
            if self._batches is not None:
                self._iterator = iter(self._batches)
