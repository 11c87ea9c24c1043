"""The keys of a bandit batch, and masked arithmetic over them.

Axis legend, used by every file of the package:
    B   rows of a batch: num_prompts * group_size; siblings of a prompt are contiguous
    P   prompt width (left-padded), the longest prompt of the set
    T   response width (right-padded), `max_new_tokens`
    N   prompts of a PromptSet
    G   group size
    V   vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDictBase
    from torch import Tensor

# torch is imported where it is used: options that name these keys are read without it.
Key = str | tuple[str, ...]

PROMPT: Final = ("tokens", "prompt")
PROMPT_MASK: Final = ("masks", "prompt")
PROMPT_ID: Final = "prompt_id"
GROUP_ID: Final = "group_id"
COLUMNS: Final = "columns"
RESPONSE: Final = ("tokens", "response")
RESPONSE_MASK: Final = ("masks", "response")
LOG_PROBS: Final = ("log_probs", "response")
SAMPLER_LOG_PROBS: Final = ("log_probs", "sampler")
FINISHED: Final = "finished"
TEMPERATURE: Final = "temperature"
VALUES: Final = "values"
REWARD: Final = ("next", "reward")
TOKEN_REWARD: Final = ("next", "token_reward")
REWARD_TERMS: Final = ("next", "reward_terms")
REF_LOG_PROBS: Final = ("next", "ref_log_probs", "response")
UNSCORABLE: Final = ("next", "unscorable")
DONE: Final = ("next", "done")
TERMINATED: Final = ("next", "terminated")
TRUNCATED: Final = ("next", "truncated")

Reduce = Callable[["Tensor"], "Tensor"]
"""Sums a tensor over all processes. `None` wherever it is optional means one process."""


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is True; NaN and inf under a False mask do not count.

    Args:
        x: any float tensor.
        mask: bool, of x's shape.
        dim: the axis to sum over; None sums everything.
    Returns:
        x's dtype; a scalar tensor for `dim=None`.
    """
    import torch

    kept = torch.where(mask, x, x.new_zeros(()))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True; 0 where nothing is.

    Shapes as in `masked_sum`.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, reduce: Reduce | None = None, eps: float = 1e-8) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 over the True entries; 0 elsewhere.

    Args:
        x: float tensor; mask: bool, the same shape.
        reduce: sums over processes, so that every rank whitens by the same two numbers.
        eps: added to the variance, which is the biased one.
    """
    import torch

    count, total = mask.sum().to(x.dtype), masked_sum(x, mask)
    if reduce is not None:
        count, total = reduce(torch.stack((count, total))).unbind()
    count = count.clamp(min=1)
    centred = x - total / count
    squares = masked_sum(centred.square(), mask)
    if reduce is not None:
        squares = reduce(squares)
    return torch.where(mask, centred * torch.rsqrt(squares / count + eps), x.new_zeros(()))


def resolved(device: str | torch.device) -> torch.device:
    """A device as tensors report it: "cuda" is "cuda:0", which an indexless one would never equal.

    Raises:
        ValueError: torch does not know it, or this machine or build of torch has none.
    """
    import torch

    try:
        return torch.empty((), device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"device: must be one that torch can use here, got {str(device)!r} ({line}); use cpu or cuda"
        ) from error


def longer_than(limit: int, prompt_mask: Tensor, response_mask: Tensor) -> Tensor:
    """[B] bool: rows of more real tokens than `limit`, from [B, P] and [B, T] bool."""
    return prompt_mask.sum(1) + response_mask.sum(1) > limit


def show(key: Key) -> str:
    """A key as users write it: `("masks","response")`."""
    return f'"{key}"' if isinstance(key, str) else "(" + ",".join(f'"{part}"' for part in key) + ")"


def require(
    td: TensorDictBase,
    key: Key,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | None = None,
    hint: str = "",
) -> Tensor:
    """Fetch `key` and check its metadata alone, so without a sync.

    Args:
        shape: the expected shape; -1 takes any length.
        device: expected device; None takes any.
        hint: what to do, the end of the message.
    Raises:
        ValueError: the key is missing, or its shape, dtype or device differs.
    """
    from torch import Tensor

    value = td.get(key, None)
    if (
        isinstance(value, Tensor)
        and value.dtype == dtype
        and (device is None or value.device == device)
        and len(shape) == value.dim()
        and all(n in (-1, m) for n, m in zip(shape, value.shape, strict=True))
    ):
        return value
    want = f"{str(dtype).removeprefix('torch.')} {['*' if n < 0 else n for n in shape]}".replace("'", "")
    where = "" if device is None else f" on {device}"
    tail = f"; {hint}" if hint else ""
    if not isinstance(value, Tensor):
        raise ValueError(f"{show(key)}: must be {want}{where}, got no such key{tail}")
    got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    raise ValueError(f"{show(key)}: must be {want}{where}, got {got}{tail}")
