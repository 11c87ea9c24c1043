"""Variable-length attention with its log-sum-exp, forward and backward, as two ops that compilers leave whole.

On CUDA in 16 bits these are our own kernels (kernels.py, kernels_backward.py), which take half the time of torch's
flash attention on rows of some hundred tokens, for heads up to 64 and of 128; with a sliding window, or other heads,
they are torch's. A CPU takes segment after segment (varlen_cpu.py); what is left, padded blocks (varlen_blocks.py).

Axis letters: Nq, Nk tokens of queries and keys laid end to end; H heads; K key-value heads; D head size; n segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchbandit.scoring import varlen_blocks, varlen_cpu
from torchbandit.scoring.packs import size_of


@torch.library.custom_op("torchbandit::varlen_forward", mutates_args=())
def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor,
    causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each segment's queries to its keys.

    Args:
        query: [Nq, H, D]; key, value: [Nk, K, D]; starts_q, starts_k: [n + 1] int32.
        longest_q, longest_k: size carriers: at least the longest segment.
        causal: the i-th query of a segment sees its first i keys; starts_q and starts_k are one.
        window: with causal, keys at most this many back, itself included; 0 for all.
    Returns:
        ([Nq, H, D], log-sum-exp [H, Nq] float32, or float64 as the query).
    """
    if query.shape[0] == 0 or key.shape[0] == 0:
        none = query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=_precision(query))
        return torch.zeros_like(query), none
    if causal and not window and _has_own_kernel(query):
        from torchbandit.scoring import kernels  # Triton exists with CUDA alone

        none = starts_q[:1]
        return kernels.packed_attention(query, key, value, starts_q, size_of(longest_q), 0, 0, none, none, scale)
    if _has_kernel(query):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts_q, starts_k, size_of(longest_q), size_of(longest_k), 0.0, causal, False,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if causal else -1,
        )  # fmt: skip
        # Where a query has no key the kernel says +inf; the log of an empty sum is -inf. It lays its output out as the
        # query is laid out, and gradients likewise; compilers were promised plain rows.
        return out.contiguous(), lse if causal else lse.masked_fill(lse == torch.inf, -torch.inf)
    if query.device.type == "cpu":
        return varlen_cpu.forward(query, key, value, starts_q, starts_k, causal, scale, window)
    sizes = size_of(longest_q), size_of(longest_k)
    return varlen_blocks.forward(query, key, value, starts_q, starts_k, *sizes, causal, scale, window)


@varlen_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor,
    causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    Nq, H, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((H, Nq), dtype=_precision(query))


@torch.library.custom_op("torchbandit::varlen_backward", mutates_args=())
def varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `varlen_forward`; `out` and `lse` may be those of attention over more keys than are given here.

    Args:
        grad, out: [Nq, H, D]; lse: [H, Nq]; the rest as above.
    Returns:
        gradients of query [Nq, H, D], key and value [Nk, K, D].
    """
    if query.shape[0] == 0 or key.shape[0] == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if causal and not window and _has_own_kernel(query):
        from torchbandit.scoring import kernels_backward as kernels

        none = starts_q[:1]
        return kernels.packed_attention_backward(
            grad, query, key, value, out, lse, starts_q, size_of(longest_q), 0, 0, none, none, scale
        )
    if _has_kernel(query):
        unused = torch.zeros(2, dtype=torch.uint64, device=query.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, out.contiguous(), lse.contiguous(), starts_q, starts_k,
            size_of(longest_q), size_of(longest_k), 0.0, causal, unused, unused,
            scale=scale, window_size_left=window - 1 if window else -1, window_size_right=0 if causal else -1,
        )  # fmt: skip
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    if query.device.type == "cpu":
        return varlen_cpu.backward(grad, query, key, value, out, lse, starts_q, starts_k, causal, scale, window)
    sizes = size_of(longest_q), size_of(longest_k)
    return varlen_blocks.backward(grad, query, key, value, out, lse, starts_q, starts_k, *sizes, causal, scale, window)


@varlen_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor, causal: bool, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.custom_op("torchbandit::shared_forward", mutates_args=())
def shared_forward(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor, prompts: Tensor, responses: Tensor,
    starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a line of prompts and then responses: of each segment to itself, causal, and of each group's
    responses to the prompt that they share.

    Args:
        query: [N, H, D]; key, value: [N, K, D]: the whole line; starts, longest: of its segments.
        prompts, responses: size carriers, p and r tokens.
        starts_q: over response tokens; starts_k: over prompt tokens; the rest as in `varlen_forward`.
    Returns:
        ([N, H, D], log-sum-exp [H, N] float32, or float64 as the query).
    """
    p, r = size_of(prompts), size_of(responses)
    if _has_own_kernel(query):
        from torchbandit.scoring import kernels

        return kernels.packed_attention(query, key, value, starts, size_of(longest), p, r, starts_q, starts_k, scale)
    out, lse = varlen_forward(query, key, value, starts, starts, longest, longest, True, scale, 0)
    far, far_lse = varlen_forward(
        query[p : p + r], key[:p], value[:p], starts_q, starts_k, longest_q, longest_k, False, scale, 0
    )
    near, near_lse = out[p : p + r], lse[:, p : p + r]
    # Two softmaxes over parts of the keys make the whole one, weighted by their log-sum-exps.
    weight = torch.sigmoid(far_lse - near_lse).t().unsqueeze(-1)
    merged = (near * (1 - weight) + far * weight).to(out.dtype)
    whole = torch.logaddexp(near_lse, far_lse)
    return torch.cat((out[:p], merged, out[p + r :])), torch.cat((lse[:, :p], whole, lse[:, p + r :]), 1)


@shared_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor, prompts: Tensor, responses: Tensor,
    starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    N, H, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((H, N), dtype=_precision(query))


# The ops cut the line up inside: compilers would compute a slice that goes into an op a second time, rotary embedding
# and all.
@torch.library.custom_op("torchbandit::shared_backward", mutates_args=())
def shared_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: Tensor,
    prompts: Tensor, responses: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `shared_forward`: those of query [N, H, D], key and value [N, K, D].

    Given the whole output and its log-sum-exp, a backward over a part of the keys gives that part's share.
    Source: Dao et al. 2022 (FlashAttention), appendix B; Liu et al. 2023 (Ring Attention).
    """
    p, r = size_of(prompts), size_of(responses)
    if _has_own_kernel(query):
        from torchbandit.scoring import kernels_backward as kernels

        return kernels.packed_attention_backward(
            grad, query, key, value, out, lse, starts, size_of(longest), p, r, starts_q, starts_k, scale
        )
    dq, dk, dv = varlen_backward(grad, query, key, value, out, lse, starts, starts, longest, longest, True, scale, 0)
    far_dq, far_dk, far_dv = varlen_backward(
        grad[p : p + r], query[p : p + r], key[:p], value[:p], out[p : p + r], lse[:, p : p + r],
        starts_q, starts_k, longest_q, longest_k, False, scale, 0,
    )  # fmt: skip
    for whole, part in ((dq[p : p + r], far_dq), (dk[:p], far_dk), (dv[:p], far_dv)):
        whole += part
    return dq, dk, dv


@shared_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, starts: Tensor, longest: Tensor,
    prompts: Tensor, responses: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: Tensor, longest_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _has_kernel(query: Tensor) -> bool:
    D = query.shape[-1]
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= 256


def _has_own_kernel(query: Tensor) -> bool:
    # They pad a head to a power of two: one of 65 to 127 would cost as much as one of 128, which torch's does not ask.
    return _has_kernel(query) and (query.shape[-1] <= 64 or query.shape[-1] == 128)


def _precision(query: Tensor) -> torch.dtype:
    """Of the log-sum-exp."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
