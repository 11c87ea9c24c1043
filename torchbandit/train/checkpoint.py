"""Checkpoints: written whole or not at all, read with `weights_only=True`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FREE = {"steps", "out", "name", "resume", "save_every", "log_with", "num_samples", "device", "places"}
"""Options that a resumed run may have otherwise; all others decide what the run computes."""


def save(directory: Path, policy: nn.Module, state: dict[str, Any], options: Mapping[str, Any], rank: int = 0) -> None:
    """Write `directory` (rank 0: weights, state and options; others: their state alone).

    It is written beside its final name and then renamed, so that a full disk or a kill leaves the last one whole.
    Every rank must call it; rank 0's call is the last.

    Args:
        state: tensors and plain values.
    Raises:
        OSError: the disk is full or not writable; the former checkpoint is still there.
    """
    fresh = directory.with_name(directory.name + ".new")
    fresh.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(state, fresh / f"rank{rank}.pt")
        if rank != 0:
            return
        # Tied weights share storage, which safetensors refuses: one name of each is enough.
        seen: set[int] = set()
        weights = {}
        for name, weight in policy.state_dict().items():
            if weight.data_ptr() not in seen or weight.numel() == 0:
                weights[name] = weight.contiguous()
            seen.add(weight.data_ptr())
        save_file(weights, fresh / "policy.safetensors")
        (fresh / "options.json").write_text(json.dumps(dict(options), indent=1), encoding="utf-8")
    except BaseException as error:
        free = shutil.disk_usage(fresh).free
        shutil.rmtree(fresh, ignore_errors=True)
        # torch and safetensors wrap a full disk in errors of their own, which do not say so.
        if isinstance(error, Exception):
            told = f"checkpoint: could not be written to {directory}, {free / 1e6:.0f} MB are free there: {error}"
            raise OSError(told) from error
        raise
    put_in_place(fresh, directory)


def put_in_place(fresh: Path, directory: Path) -> None:
    """Rename a whole checkpoint to its final name; whenever this is killed, there is one that `find` finds."""
    stale = directory.with_name(directory.name + ".old")
    shutil.rmtree(stale, ignore_errors=True)
    if directory.exists():
        os.replace(directory, stale)
    os.replace(fresh, directory)
    shutil.rmtree(stale, ignore_errors=True)


def find(directory: Path, options: Mapping[str, Any], free: Collection[str] = FREE) -> dict[str, Any]:
    """Make sure that a checkpoint is there and is this run's; what its options.json holds.

    Args:
        free: options that may differ.
    Raises:
        ValueError: there is none, or it is another run's (the options that differ are named).
    """
    if not directory.exists():
        stale = directory.with_name(directory.name + ".old")
        if not stale.exists():
            raise ValueError(
                f"resume: no checkpoint at {directory}; drop --resume to begin a run, or name its folder with --out"
            )
        os.replace(stale, directory)
    try:
        saved: dict[str, Any] = json.loads((directory / "options.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"resume: the checkpoint at {directory} is damaged ({error}); begin a new run") from error
    differing = {
        name: (saved[name], value) for name, value in options.items()
        if name not in free and name in saved and saved[name] != json.loads(json.dumps(value))
    }  # fmt: skip
    if differing:
        told = "; ".join(f"{name} was {old!r}, is now {new!r}" for name, (old, new) in differing.items())
        raise ValueError(
            f"resume: the checkpoint at {directory} is another run's: {told}. Use its options, or a new --out"
        )
    return saved


def load(directory: Path, policy: nn.Module, options: Mapping[str, Any], rank: int = 0) -> dict[str, Any]:
    """Fill the policy's weights and return this rank's state.

    Raises:
        ValueError: there is no checkpoint, it is damaged, or it is another run's (the options that differ are named).
    """
    find(directory, options)
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
