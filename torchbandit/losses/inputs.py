"""What every loss asks of its inputs: metadata only, so without a sync."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def check_float(name: str, x: Tensor, shape: torch.Size, device: torch.device, like: str) -> None:
    """Raise ValueError unless `x` is float32 (or float64) of this shape on this device.

    Half precision is refused: a difference of bf16 log-probs is mostly rounding.
    """
    if x.shape != shape or x.dtype not in FLOATS or x.device != device:
        raise ValueError(
            f"{name}: must be float32 {list(shape)} on {device} like {like}, got {_tell(x)}; "
            "reduce in float32 and cut every tensor of a microbatch alike"
        )


def check_mask(mask: Tensor, num_dims: int = 2) -> None:
    """Raise ValueError unless `mask` is bool with `num_dims` axes."""
    if mask.dtype != torch.bool or mask.dim() != num_dims:
        axes = ["*"] * num_dims
        raise ValueError(
            f"mask: must be bool [{', '.join(axes)}], got {_tell(mask)}; build it with responses.stop_mask"
        )


def check_tokens(mask: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless the mask is bool [B, T] and every tensor float of its shape; None is passed over."""
    check_mask(mask)
    for name, x in tensors.items():
        if x is not None:
            check_float(name, x, mask.shape, mask.device, "mask")


def is_finite(x: Tensor) -> Tensor:
    """torch.isfinite, which is four kernels, in two."""
    return x - x == 0


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is True, else 0; the gradient outside it is 0 too, even where `x` is NaN."""
    return torch.where(mask, x, 0.0)


def share(total: Tensor, denominator: Tensor | float | None, default: Tensor) -> Tensor:
    """`total / denominator`; a denominator of 0 (nothing to learn from) gives 0, as the total is 0 then."""
    divisor = default if denominator is None else denominator
    if isinstance(divisor, Tensor):
        divisor = torch.where(divisor > 0, divisor, 1)
    return total / divisor


def _tell(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
