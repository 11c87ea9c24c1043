"""Checkpoints of the local engine: weights as safetensors, state read with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchbandit.train import folder
from torchbandit.train.folder import FREE as FREE  # what may differ at a resume, of both engines


def save(
    directory: Path, policy: nn.Module, state: dict[str, Any], options: Mapping[str, Any], rank: int = 0, keep: int = 1
) -> None:
    """Write `directory` (rank 0: weights, state and options; others: their state alone), see `folder.write`.

    Every rank must call it; rank 0's call is the last.

    Args:
        state: tensors and plain values; `steps_done` names the checkpoint.
        keep: checkpoints to keep, this one included.
    Raises:
        OSError: the disk is full or not writable; the former checkpoint is still there.
    """
    step = int(state.get("steps_done", 0))
    if rank != 0:
        with folder.fresh_folder(directory) as fresh:
            torch.save(state, fresh / f"rank{rank}.pt")
            folder.seal(fresh, [fresh / f"rank{rank}.pt"], step, rank)
        return

    def fill(fresh: Path) -> None:
        torch.save(state, fresh / "rank0.pt")
        # Tied weights share storage, which safetensors refuses: one name of each is enough.
        seen: set[int] = set()
        weights = {}
        for name, weight in policy.state_dict().items():
            if weight.data_ptr() not in seen or weight.numel() == 0:
                weights[name] = weight.contiguous()
            seen.add(weight.data_ptr())
        save_file(weights, fresh / "policy.safetensors")

    folder.write(directory, fill, step, options, keep)


def load(directory: Path, policy: nn.Module, options: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Fill the policy's weights and return this rank's state.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or it is another run's (the options that differ are named).
    """
    folder.find(directory, options)
    try:
        path = directory / f"rank{rank}.pt"
        if not path.exists():
            raise ValueError(
                f"resume: {path} is missing; resume with the number of processes that wrote the checkpoint"
            )
        state = torch.load(path, weights_only=True, map_location="cpu")
        weights = load_file(directory / "policy.safetensors")
    except Exception as error:  # what a damaged file makes torch and safetensors raise has no common class
        if isinstance(error, ValueError) and str(error).startswith("resume:"):
            raise
        raise ValueError(f"resume: the checkpoint at {directory} is damaged ({error}); begin a new run") from error
    try:
        missing, unexpected = policy.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"resume: the checkpoint at {directory} is of another model: {error}") from None
    own = policy.state_dict()
    there = {own[name].data_ptr() for name in weights if name in own}
    untied = [name for name in missing if own[name].data_ptr() not in there]
    if untied or unexpected:
        raise ValueError(
            f"resume: the checkpoint at {directory} is of another model: {(untied + list(unexpected))[:3]} differ"
        )
    assert isinstance(state, dict)
    return state
