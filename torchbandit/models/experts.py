"""Experts as small weights: what a layer holds as one tensor for all of its experts, and quantisers of linear layers
pass over (trap 35): most of the weights of a mixture.

A layer's experts are made plain when they run, all of a tensor at a time, and dropped after it.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from torchbandit.models.spec import Quantization

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BLOCK = 64  # nf4: weights that share a scale


class _Rows(nn.Module):
    """[E, out, in] as int8 or float8 with a scale a row."""

    def __init__(self, dtype: torch.dtype, small: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.small = dtype, small
        self.peak = 127.0 if small == torch.int8 else float(torch.finfo(small).max)

    def forward(self, small: Tensor, scale: Tensor) -> Tensor:
        return small.to(self.dtype) * scale.to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = (weight.float().abs().amax(-1, keepdim=True) / self.peak).clamp_min(1e-12)
        scaled = weight.float() / scale
        return (scaled.round() if self.small == torch.int8 else scaled).to(self.small), scale


class _Nf4(nn.Module):
    """[E, out, in] as nf4: two weights a byte, a scale for `BLOCK` of them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dtype, self.shape = weight.dtype, weight.shape
        self.library: Any = importlib.import_module("bitsandbytes.functional")

    def forward(self, packed: Tensor, absmax: Tensor) -> Tensor:
        code = self.library.get_4bit_type("nf4", device=packed.device)
        state = self.library.QuantState(
            absmax, shape=self.shape, code=code, blocksize=BLOCK, quant_type="nf4", dtype=self.dtype
        )
        return cast(Tensor, self.library.dequantize_4bit(packed, state))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        packed, state = self.library.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax

    def __deepcopy__(self, memo: dict[int, Any]) -> _Nf4:
        return self  # nothing in it changes, and a library cannot be copied


def inside(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, name) of each tensor of a repeated layer that holds the matrices of several experts."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for module in layer.modules():
                for name, weight in module.named_parameters(recurse=False):
                    if weight.dim() == 3 and weight.is_floating_point() and not isinstance(module, _CONVOLUTIONS):
                        found[id(weight)] = (module, name)
    return list(found.values())


def quantise(model: PreTrainedModel, kind: Quantization) -> None:
    """Make the experts of `model` small, tensor by tensor, where they are."""
    for module, name in inside(model):
        weight = cast(nn.Parameter, getattr(module, name)).requires_grad_(False)
        small = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind)
        how = _Nf4(weight) if small is None else _Rows(weight.dtype, small)
        # unsafe: what comes out is near the weight, not equal to it, which the check would compute a second time.
        parametrize.register_parametrization(module, name, how, unsafe=True)
