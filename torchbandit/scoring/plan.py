"""The layout of a step's batch: made once, used by every model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchbandit.scoring import packs
from torchbandit.scoring.packs import Pack, Table

Packing = bool | Literal["auto"]

PAYS_BELOW = 0.92
"""Prompts are shared where that leaves less than this share of the tokens: the second attention has its price."""


@dataclass
class Plan:
    """Made by `make_plan`, read by scoring.

    Args:
        packing: the host knows the lengths.
        share_prompts: groups share their prompt, in models that can.
        metrics: what was decided, as numbers: `packing/tokens`, `packing/padding` (the share of padded lines that
            packing leaves out), `packing/shared` (1 where prompts are shared), `packing/saved` (share of tokens).
    """

    prompt_mask: Tensor
    response_mask: Tensor
    group_size: int
    token_budget: int
    packing: bool
    share_prompts: bool
    table: Table
    metrics: dict[str, float] = field(default_factory=dict)
    _packs: dict[str, Iterable[Pack]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.response_mask.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, as far as the host knows."""
        if not self.packing:
            return self.table.columns.shape[1]
        return max((p + r for p, r in zip(*self.table.host, strict=True)), default=0)

    def padded(self) -> Iterable[Pack]:
        """Rows in lines of their own, aligned left; sorted by length where the host knows lengths."""
        if "padded" not in self._packs:
            self._packs["padded"] = packs.padded(self.table, self.token_budget)
        return self._packs["padded"]

    def packed(self) -> Iterable[Pack]:
        """Rows end to end in lines of about `token_budget` tokens."""
        if "packed" not in self._packs:
            self._packs["packed"] = _Kept(packs.end_to_end(self.table, self.token_budget))
        return self._packs["packed"]

    def shared(self) -> Iterable[Pack]:
        """Groups end to end, each prompt once."""
        if "shared" not in self._packs:
            self._packs["shared"] = _Kept(packs.with_shared_prompts(self.table, self.group_size, self.token_budget))
        return self._packs["shared"]


class _Kept:
    """Packs, laid out when first asked for and kept for the next model: while the device computes one, the host
    prepares the next."""

    def __init__(self, packs: Iterator[Pack]) -> None:
        self._packs = packs
        self._kept: list[Pack] = []

    def __iter__(self) -> Iterator[Pack]:
        at = 0
        while True:
            if at == len(self._kept):
                pack = next(self._packs, None)
                if pack is None:
                    return
                self._kept.append(pack)
            yield self._kept[at]
            at += 1


class Rows(NamedTuple):
    """What a plan is made of: prompt_mask [B, P] and response_mask [B, T] bool; the rest as in `make_plan`."""

    prompt_mask: Tensor
    response_mask: Tensor
    group_size: int = 1
    group_id: Tensor | None = None


def make_plan(
    prompt_mask: Tensor,
    response_mask: Tensor,
    *,
    group_size: int = 1,
    group_id: Tensor | None = None,
    packing: Packing = "auto",
    token_budget: int | None = None,
    share_prompts: bool | Literal["auto"] = "auto",
) -> Plan:
    """Lay out a batch. With packing, the lengths are copied to the host: the one copy of a step.

    Args:
        prompt_mask: [B, P] bool; response_mask: [B, T] bool.
        group_size: siblings of a prompt, contiguous; they may share its computation.
        group_id: [B] int64; where it shows that contiguous rows are no siblings, each row is scored by itself.
        packing: False never copies to the host and pads every row to P + T.
        token_budget: tokens of one forward call; by default 49152 on CUDA and 4096 elsewhere.
        share_prompts: "auto" where it saves enough; needs packing.
    Raises:
        ValueError: masks are not bool matrices of one batch, or the group size does not divide it.
    """
    rows = Rows(prompt_mask, response_mask, group_size, group_id)
    return make_plans([rows], packing=packing, token_budget=token_budget, share_prompts=share_prompts)[0]


def make_plans(
    batches: Sequence[Rows],
    *,
    packing: Packing = "auto",
    token_budget: int | None = None,
    share_prompts: bool | Literal["auto"] = "auto",
) -> list[Plan]:
    """`make_plan` for several batches, with one copy to the host for all: the microbatches of an update."""
    if packing not in (True, False, "auto"):
        raise ValueError(f'packing: must be True, False or "auto", got {packing!r}')
    for rows in batches:
        _check(rows)
    told = _lengths(batches) if packing else [None] * len(batches)
    return [_plan(rows, lengths, token_budget, share_prompts) for rows, lengths in zip(batches, told, strict=True)]


def _check(rows: Rows) -> None:
    for name, mask in (("prompt_mask", rows.prompt_mask), ("response_mask", rows.response_mask)):
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"{name}: must be bool [B, *], got {mask.dtype} {list(mask.shape)}")
    B, device = rows.prompt_mask.shape[0], rows.prompt_mask.device
    if rows.response_mask.shape[0] != B or rows.response_mask.device != device:
        raise ValueError(
            f"response_mask: must be bool [{B}, T] on {device} like prompt_mask, got "
            f"{list(rows.response_mask.shape)} on {rows.response_mask.device}"
        )
    if rows.group_size < 1 or B % rows.group_size:
        raise ValueError(f"group_size: must be a positive divisor of the batch of {B} rows, got {rows.group_size}")


def _lengths(batches: Sequence[Rows]) -> list[list[list[int]] | None]:
    """Of each batch real prompt tokens, real response tokens and, where group ids are given, who is no sibling of its
    group's first; in one copy."""
    counts: list[Tensor] = []
    for rows in batches:
        counts += [rows.prompt_mask.sum(1), rows.response_mask.sum(1)]
        if rows.group_id is not None and rows.group_size > 1:
            first = rows.group_id[:: rows.group_size]
            first = first.repeat_interleave(rows.group_size, output_size=len(rows.group_id))
            counts.append((rows.group_id != first).long())
    numbers = iter(torch.cat(counts).tolist() if counts else [])
    told: list[list[list[int]] | None] = []
    for rows in batches:
        columns = 3 if rows.group_id is not None and rows.group_size > 1 else 2
        told.append([list(itertools.islice(numbers, rows.prompt_mask.shape[0])) for _ in range(columns)])
    return told


def _plan(
    rows: Rows, lengths: list[list[int]] | None, token_budget: int | None, share_prompts: bool | Literal["auto"]
) -> Plan:
    prompt_mask, response_mask, group_size, _ = rows
    if token_budget is None:
        token_budget = 49152 if prompt_mask.is_cuda else 4096
    prompts: list[int] | None = None
    replies: list[int] | None = None
    if lengths is not None:
        prompts, replies, *strangers = lengths
        group_size = 1 if any(any(flags) for flags in strangers) else group_size
    full = torch.cat((prompt_mask, response_mask), 1)
    plan = Plan(
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        group_size=group_size,
        token_budget=token_budget,
        packing=lengths is not None,
        share_prompts=False,
        table=Table(
            columns=torch.argsort((~full).byte(), dim=1, stable=True),
            prompt=prompt_mask.sum(1),
            reply=response_mask.sum(1),
            prompts=prompts,
            replies=replies,
            width=prompt_mask.shape[1],
            max_reply=response_mask.shape[1],
        ),
    )
    if prompts:
        _decide(plan, share_prompts)
    return plan


def _decide(plan: Plan, share_prompts: bool | Literal["auto"]) -> None:
    prompts, replies = plan.table.host
    G = plan.group_size
    for b in range(0, len(prompts), G):
        if len(set(prompts[b : b + G])) > 1:
            raise ValueError(
                f"group_size: rows {b} to {b + G - 1} must be siblings of one prompt, got prompts of "
                f"{prompts[b : b + G]} tokens; order the batch by group or pass group_size=1"
            )
    unshared = sum(prompts) + sum(replies)
    shared = sum(prompts[::G]) + sum(replies)
    saved = 1 - shared / max(unshared, 1)
    if share_prompts == "auto":
        plan.share_prompts = G > 1 and saved > 1 - PAYS_BELOW
    else:
        plan.share_prompts = bool(share_prompts) and G > 1
    plan.metrics = {
        "packing/tokens": float(shared if plan.share_prompts else unshared),
        "packing/padding": 1 - unshared / max(plan.table.columns.numel(), 1),
        "packing/shared": float(plan.share_prompts),
        "packing/saved": saved if plan.share_prompts else 0.0,
    }
