"""What a model will take on the device, before anything is read of it, against what is free there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from torchbandit.models import quantize
from torchbandit.models.spec import ModelSpec


def weight_bytes(skeleton: nn.Module, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of a model's weights.

    Args:
        skeleton: the architecture; its parameters may be on the meta device. Tied ones count once.
        dtype: of what is not quantised.
    """
    # Experts count in full: they are loaded as they are, and made small where they lie.
    taken = {f"{name}.weight" for name in quantize.inside_layers(skeleton)} if quantization else set()
    bits = 0.0
    for name, weight in skeleton.named_parameters():
        plain = weight.numel() * dtype.itemsize * 8
        if name not in taken or quantization is None:
            bits += plain
        else:
            scales = 0 if quantization == "nf4" else weight.shape[0] * 32
            bits += weight.numel() * quantize.BITS[quantization] + scales
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    return int(bits / 8) + buffers


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None


def check_fits(spec: ModelSpec, skeleton: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model that will not fit, while nothing is lost yet.

    Counts the weights, and the largest tensor once more (it is there twice while it is converted). What a forward pass
    takes is not in it.

    Raises:
        ValueError: with the numbers, and the next smaller precision that fits.
    """
    free = free_bytes(device)
    if free is None:
        return
    spare = max((w.numel() for w in skeleton.parameters()), default=0) * dtype.itemsize
    needed = weight_bytes(skeleton, dtype, spec.quantization) + spare
    if needed <= free:
        return
    short = str(dtype).removeprefix("torch.")
    told = f"model {spec.path}: its weights take {_gib(needed)} in {spec.quantization or short}, and {device} has " \
           f"{_gib(free)} free"  # fmt: skip
    for precision, advice, smaller in _smaller(spec, skeleton, dtype, device):
        if smaller + spare < needed:
            fits = "" if smaller + spare <= free else ", and that does not fit either"
            told += f"; the next smaller precision is {precision} ({_gib(smaller + spare)}: {advice}{fits})"
            break
    raise ValueError(f"{told}; or free memory on {device}, or take a smaller model")


def _smaller(
    spec: ModelSpec, skeleton: PreTrainedModel, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, str, int]]:
    """(precision, how to ask for it, bytes), from the largest down."""
    found = []
    if dtype.itemsize > 2 and spec.quantization is None:
        found.append(("bfloat16", 'dtype="bfloat16"', weight_bytes(skeleton, torch.bfloat16)))
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    for kind in quantize.SMALLER:
        if kind == spec.quantization or quantize.why_not(kind, device) is not None:
            continue
        asked = replace(spec, quantization=kind)
        size = weight_bytes(skeleton, half, kind)
        found.append((kind, f'quantization="{asked.quantization}", dtype="{str(half).removeprefix("torch.")}"', size))
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"
