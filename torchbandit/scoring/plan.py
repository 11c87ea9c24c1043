"""How the rows of a batch are laid out for a forward pass: made once a step, used by every model.

A pack is one forward call. Packed, its rows lie end to end in one line of tokens; padded, each row is a line of its
own, aligned left. Where a row's tokens stand is always told by masks, so prompts may be padded on either side.

Axis letters beside batch.py's: S = P + T columns; R rows of a pack; N tokens of a pack; M predictions of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Packing = bool | Literal["auto"]

ALIGN = 64
"""Packed lines are filled up to a multiple of this, so that kernels' alignment guards hold for every pack."""


@dataclass(frozen=True)
class Pack:
    """One forward call. All tensors live on the batch's device; index tensors are int64.

    Args:
        source: [lines, W] where in the flattened [B, S] table each token comes from.
        positions: [lines, W] position ids, counted over real tokens.
        predict: [M] where in the flattened lines stands the token that predicts.
        target: [M] where in the flattened [B, S] table stands what it predicts.
        slot: [M] where in the flattened [B, T] result it belongs; B * T for what is to be dropped.
        row: [M] its row of the batch.
        last: [R] where in the flattened lines a row's last real token stands; `rows`: [R] rows of the batch.
        segments: None for padded lines, else what variable-length attention needs.
    """

    source: Tensor
    positions: Tensor
    predict: Tensor
    target: Tensor
    slot: Tensor
    row: Tensor
    last: Tensor
    rows: Tensor
    segments: Segments | None = None


@dataclass(frozen=True)
class Segments:
    """Where sequences begin in one packed line.

    Args:
        starts: [n + 1] int32 cumulative lengths of all segments (of responses and prompts alike when shared).
        longest: a tensor of as many (unused) bytes as the longest segment has tokens: its size carries a number into
            a compiled graph without specialising it, and without a copy to read it back.
        shared: with shared prompts, the second attention: responses of a group to the prompt that they share.
    """

    starts: Tensor
    longest: Tensor
    shared: SharedPrompt | None = None


@dataclass(frozen=True)
class SharedPrompt:
    """The prompts of a pack stand first in its line, then the responses, those of a group in a row.

    Args:
        prompts: a size carrier (see `Segments.longest`): tokens of all prompts.
        starts_q: [groups + 1] int32, over response tokens; starts_k: [groups + 1] int32, over prompt tokens.
        longest_q, longest_k: size carriers.
    """

    prompts: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest_q: Tensor
    longest_k: Tensor


@dataclass
class Plan:
    """The layout of one batch. Made by `make_plan`; read by scoring alone, except for `metrics`."""

    prompt_mask: Tensor
    response_mask: Tensor
    group_size: int
    token_budget: int
    packing: bool
    prompt_lengths: list[int] | None
    response_lengths: list[int] | None
    columns: Tensor
    prompt_length: Tensor
    length: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    _packs: dict[str, list[Pack]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.response_mask.shape[0]

    def padded(self) -> list[Pack]:
        """Rows in lines of their own, aligned left; sorted by length where the host knows lengths."""
        if "padded" not in self._packs:
            self._packs["padded"] = list(_padded(self))
        return self._packs["padded"]


def make_plan(
    prompt_mask: Tensor,
    response_mask: Tensor,
    *,
    group_size: int = 1,
    packing: Packing = "auto",
    token_budget: int | None = None,
) -> Plan:
    """Lay out a batch. With packing, the lengths are copied to the host: the one copy of a step.

    Args:
        prompt_mask: [B, P] bool; response_mask: [B, T] bool.
        group_size: siblings of a prompt, contiguous; they may share its computation.
        packing: False never copies to the host and pads every row to P + T.
        token_budget: tokens of one forward call; by default 32768 on CUDA and 4096 elsewhere.
    Raises:
        ValueError: masks are not bool matrices of one batch, or the group size does not divide it.
    """
    for name, mask in (("prompt_mask", prompt_mask), ("response_mask", response_mask)):
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"{name}: must be bool [B, *], got {mask.dtype} {list(mask.shape)}")
    B = prompt_mask.shape[0]
    if response_mask.shape[0] != B or response_mask.device != prompt_mask.device:
        raise ValueError(f"response_mask: must be bool [{B}, T] on {prompt_mask.device} like prompt_mask, "
                         f"got {list(response_mask.shape)} on {response_mask.device}")  # fmt: skip
    if group_size < 1 or B % group_size:
        raise ValueError(f"group_size: must be a positive divisor of the batch of {B} rows, got {group_size}")
    if packing not in (True, False, "auto"):
        raise ValueError(f'packing: must be True, False or "auto", got {packing!r}')
    if token_budget is None:
        token_budget = 32768 if prompt_mask.is_cuda else 4096
    full = torch.cat((prompt_mask, response_mask), 1)
    prompt_length, response_length = prompt_mask.sum(1), response_mask.sum(1)
    hosts: list[list[int]] | None = None
    if packing:
        hosts = torch.stack((prompt_length, response_length)).tolist()
    return Plan(
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        group_size=group_size,
        token_budget=token_budget,
        packing=bool(packing),
        prompt_lengths=hosts[0] if hosts else None,
        response_lengths=hosts[1] if hosts else None,
        columns=torch.argsort((~full).byte(), dim=1, stable=True),
        prompt_length=prompt_length,
        length=prompt_length + response_length,
    )


def _padded(plan: Plan) -> Iterator[Pack]:
    B, S = plan.num_rows, plan.columns.shape[1]
    device = plan.columns.device
    T = plan.response_mask.shape[1]
    if plan.prompt_lengths is None or plan.response_lengths is None:
        order = torch.arange(B, device=device)
        widths = [S] * B
        replies = [T] * B
    else:
        totals = [p + r for p, r in zip(plan.prompt_lengths, plan.response_lengths, strict=True)]
        order = torch.argsort(plan.length, stable=True)
        ranked = sorted(range(B), key=totals.__getitem__)
        widths, replies = [totals[i] for i in ranked], [plan.response_lengths[i] for i in ranked]
    begin = 0
    while begin < B:
        end = begin + 1
        while end < B and (end + 1 - begin) * widths[end] <= plan.token_budget:
            end += 1
        yield _padded_pack(plan, order[begin:end], max(widths[begin:end]), max(replies[begin:end]))
        begin = end


def _padded_pack(plan: Plan, rows: Tensor, width: int, reply: int) -> Pack:
    """`width` tokens a line, and `reply` predictions a row, of which those beyond its length are junk to be masked."""
    S, P = plan.columns.shape[1], plan.prompt_mask.shape[1]
    T = plan.response_mask.shape[1]
    device = rows.device
    width, reply = max(width, 1), min(reply, T)
    line = torch.arange(rows.shape[0], device=device)[:, None]
    position = torch.arange(width, device=device)
    columns, length, prompt = plan.columns[rows], plan.length[rows], plan.prompt_length[rows]
    source = rows[:, None] * S + columns[:, :width]
    step = torch.arange(reply, device=device)
    at = prompt[:, None] + step
    predict = line * width + (at - 1).clamp(0, width - 1)
    column = columns.gather(1, at.clamp(max=S - 1))
    # Beyond a response, and where nothing stands before it, there is nothing to predict.
    real = (at < length[:, None]) & (at > 0)
    slot = torch.where(real, rows[:, None] * T + column - P, plan.num_rows * T)
    return Pack(
        source=source,
        positions=position.expand(rows.shape[0], width),
        predict=predict.flatten(),
        target=(rows[:, None] * S + column).flatten(),
        slot=slot.flatten(),
        row=rows[:, None].expand(-1, reply).flatten(),
        last=line[:, 0] * width + (length - 1).clamp(min=0),
        rows=rows,
    )
