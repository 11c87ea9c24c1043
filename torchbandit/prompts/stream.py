"""Which prompts come next: an endless stream of draws, seeded, sharded and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchbandit.prompts.prompt_set import PromptSet


class PromptStream:
    """Draws without end: epoch e is a permutation of the N prompts that `seed` and e alone decide.

    Draw number d of the stream is place `d % N` of epoch `d // N`, on every rank alike. Ranks take turns: with
    `world_size` W, rank r takes draws r, r + W, r + 2W, ... So an epoch is covered exactly once by all ranks
    together, and a batch may straddle epochs. The cursor counts the draws of all ranks, and is a Python int: nothing
    is read back from the device.

    Args:
        prompts: a PromptSet, or the number of prompts.
        seed: of the permutations.
        device: where the draws live; None takes the PromptSet's, or the CPU.
    """

    def __init__(self, prompts: PromptSet | int, seed: int = 0, *, device: torch.device | str | None = None) -> None:
        if isinstance(prompts, PromptSet):
            self.num_prompts, self._fingerprint = len(prompts), prompts.fingerprint
            self.device = prompts.device if device is None else torch.device(device)
        else:
            self.num_prompts, self._fingerprint = prompts, 0
            self.device = torch.device("cpu" if device is None else device)
        if self.num_prompts < 1:
            raise ValueError(f"prompts: must be at least 1, got {self.num_prompts}")
        self.seed = seed
        self.draws = 0
        self.rank, self.world_size = 0, 1
        self._cached: tuple[int, int, Tensor] | None = None  # seed, epoch, its permutation on the device

    @property
    def epoch(self) -> int:
        """Whole epochs drawn by all ranks together."""
        return self.draws // self.num_prompts

    def next(self, num: int) -> tuple[Tensor, Tensor]:
        """The next `num` draws of this rank; every rank must ask for as many.

        Returns:
            prompt_id [num] int64, rows of the PromptSet, and group_id [num] int64, the draw's number: unique over
            steps and ranks. Both on the device, without a sync.
        Raises:
            ValueError: `num` is below 1 or above the number of prompts.
        """
        if not 1 <= num <= self.num_prompts:
            raise ValueError(
                f"num_prompts: must be 1 to {self.num_prompts}, the number of prompts there are, got {num}; "
                "lower num_prompts, raise group_size, or give more prompts"
            )
        draw, stride = self.draws + self.rank, self.world_size
        group_id = torch.arange(draw, draw + num * stride, stride, device=self.device)
        pieces: list[Tensor] = []
        missing = num
        while missing:
            epoch, place = divmod(draw, self.num_prompts)
            pieces.append(self._permutation(epoch)[place::stride][:missing])
            missing -= pieces[-1].shape[0]
            draw += pieces[-1].shape[0] * stride
        self.draws += num * stride
        return torch.cat(pieces), group_id

    def shard(self, rank: int, world_size: int) -> None:
        """Take every `world_size`-th draw from now on, beginning with the `rank`-th.

        All ranks must stand at the same draw, as after their making or after loading one checkpoint; so a run may go
        on with another number of processes and still cover each epoch once.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: must be 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.rank, self.world_size = rank, world_size

    def state_dict(self) -> dict[str, int]:
        """Python ints alone; the same on every rank, so one rank's copy serves all."""
        return {
            "seed": self.seed,
            "draws": self.draws,
            "num_prompts": self.num_prompts,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken, with its seed; rank and world size stay as they are.

        Raises:
            ValueError: the state is of other prompts.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise ValueError(f"state: must have the key {missing[0]!r}, got {list(state)}; is it of a PromptStream?")
        for key, have in (("num_prompts", self.num_prompts), ("fingerprint", self._fingerprint)):
            if state[key] != have:
                raise ValueError(
                    f"state: {key} must be {have}, as of these prompts, got {state[key]}; resume with the prompt "
                    "file, tokenizer and max_length of that run, or begin a new run"
                )
        self.seed, self.draws = state["seed"], state["draws"]

    def _permutation(self, epoch: int) -> Tensor:
        if self._cached is None or self._cached[:2] != (self.seed, epoch):
            # Hashed, since the CPU generator takes 32 bits of a seed and seed + epoch would make runs overlap; drawn
            # on the CPU, since a CUDA generator gives other numbers and a run must go on on any device.
            digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=4).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            permutation = torch.randperm(self.num_prompts, generator=generator)
            if self.device.type == "cuda":
                permutation = permutation.pin_memory()  # a copy from pageable memory would wait for the stream
            self._cached = self.seed, epoch, permutation.to(self.device, non_blocking=True)
        return self._cached[2]
