"""Packs: the index tensors of one forward call, built on the device.

Packed, rows lie end to end in one line of tokens; padded, each row is a line of its own, aligned left. The host knows
lengths (if anything), never ids: it decides how many rows go into a pack, the device where each token comes from.

Axis letters beside batch.py's: S = P + T columns; R rows of a pack; W tokens of a line; M predictions of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 64
"""Packed lines are filled up to a multiple of this, so that kernels' alignment guards hold for every pack."""

ALIGN_CPU = 8
"""The same on a CPU, where a few short rows must not pay for 64 tokens."""


class Segments(NamedTuple):
    """Where sequences begin in one packed line.

    A *size carrier* is a tensor read for its size alone: so a number travels into a compiled graph without
    specialising it, and into a kernel call without a copy from the device.

    Args:
        starts: [n + 1] int32 cumulative lengths of all segments (of prompts and responses alike when shared).
        longest: size carrier, tokens of the longest segment.
        shared: with shared prompts, the second attention: responses of a group to the prompt that they share.
    """

    starts: Tensor
    longest: Tensor
    shared: SharedPrompt | None = None


class SharedPrompt(NamedTuple):
    """The prompts of a pack stand first in its line, then the responses, those of a group in a row.

    Args:
        prompts, responses: size carriers, tokens of all prompts and of all responses.
        starts_q: [groups + 1] int32, over response tokens; starts_k: [groups + 1] int32, over prompt tokens.
        longest_q, longest_k: size carriers.
    """

    prompts: Tensor
    responses: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest_q: Tensor
    longest_k: Tensor


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
class Table:
    """Where real tokens stand in a batch.

    Args:
        columns: [B, S] int64, a row's real columns first, in order.
        prompt: [B] int64, real prompt tokens; `reply`: [B] int64, real response tokens.
        prompts, replies: the same numbers on the host, or None where no copy was allowed.
        width: P; `max_reply`: T.
    """

    columns: Tensor
    prompt: Tensor
    reply: Tensor
    prompts: list[int] | None
    replies: list[int] | None
    width: int
    max_reply: int

    @property
    def host(self) -> tuple[list[int], list[int]]:
        assert self.prompts is not None and self.replies is not None, "a plan without packing has no lengths"
        return self.prompts, self.replies


def padded(table: Table, budget: int) -> list[Pack]:
    """Lines aligned left, sorted and cut to the longest of their pack where the host knows lengths."""
    B, S = table.columns.shape
    if table.prompts is None:
        rows, ranked, totals = torch.arange(B, device=table.columns.device), list(range(B)), [S] * B
    else:
        totals = [p + r for p, r in zip(*table.host, strict=True)]
        rows, ranked = torch.argsort(table.prompt + table.reply, stable=True), sorted(range(B), key=totals.__getitem__)
    packs, begin = [], 0
    while begin < B:
        end = begin + 1
        while end < B and (end + 1 - begin) * totals[ranked[end]] <= budget:
            end += 1
        packs.append(_padded_pack(table, rows[begin:end], ranked[begin:end], max(totals[ranked[end - 1]], 1)))
        begin = end
    return packs


def _padded_pack(table: Table, rows: Tensor, hosts: list[int], W: int) -> Pack:
    R, S = len(hosts), table.columns.shape[1]
    line = torch.arange(R, device=rows.device) * W
    end = line + table.prompt[rows]
    return Pack(
        source=rows[:, None] * S + table.columns[rows, :W],
        positions=torch.arange(W, device=rows.device).expand(R, W),
        last=(end + table.reply[rows] - 1).clamp(min=0),
        rows=rows,
        segments=None,
        **_predictions(table, rows, hosts, end - 1, end),
    )


def end_to_end(table: Table, budget: int) -> Iterator[Pack]:
    """Rows in one line each pack, shortest first."""
    totals = [p + r for p, r in zip(*table.host, strict=True)]
    rows = torch.argsort(table.prompt + table.reply, stable=True)
    ranked = sorted(range(len(totals)), key=totals.__getitem__)
    for begin, end in _cuts([totals[i] for i in ranked], budget):
        yield _line(table, rows[begin:end], ranked[begin:end], totals)


def _line(table: Table, rows: Tensor, hosts: list[int], totals: list[int]) -> Pack:
    lengths = table.prompt[rows] + table.reply[rows]
    num_tokens = sum(totals[i] for i in hosts)
    starts, W = _starts(lengths, num_tokens)
    where = torch.arange(num_tokens, device=rows.device)
    at, seg = _within(starts, where)
    first = starts[:-2].long()
    end = first + table.prompt[rows]
    return Pack(
        source=_filled(rows[seg] * table.columns.shape[1] + table.columns[rows[seg], at], W),
        positions=_filled(at, W),
        last=(first + lengths - 1).clamp(min=0),
        rows=rows,
        segments=Segments(starts, size_carrier(max(max(totals[i] for i in hosts), W - num_tokens))),
        **_predictions(table, rows, hosts, end - 1, end),
    )


def with_shared_prompts(table: Table, group_size: int, budget: int) -> Iterator[Pack]:
    """Groups in one line each pack: their prompts once, then their responses."""
    prompts, replies = table.host
    B, G = len(prompts), group_size
    totals = [prompts[b] + sum(replies[b : b + G]) for b in range(0, B, G)]
    device_totals = table.prompt[::G] + table.reply.view(-1, G).sum(1)
    groups, ranked = torch.argsort(device_totals, stable=True), sorted(range(B // G), key=totals.__getitem__)
    for begin, end in _cuts([totals[i] for i in ranked], budget):
        yield _tree(table, groups[begin:end], ranked[begin:end], G)


def _tree(table: Table, groups: Tensor, hosts: list[int], G: int) -> Pack:
    prompts, replies = table.host
    S = table.columns.shape[1]
    members = [g * G + i for g in hosts for i in range(G)]
    rows = (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()
    prompt, reply = table.prompt[groups * G], table.reply[rows]
    num_prompt, num_reply = sum(prompts[g * G] for g in hosts), sum(replies[i] for i in members)
    num_tokens = num_prompt + num_reply
    starts, W = _starts(torch.cat((prompt, reply)), num_tokens)
    at, seg = _within(starts, torch.arange(num_tokens, device=groups.device))
    owner = torch.cat((groups * G, rows))
    offset = torch.cat((torch.zeros_like(prompt), prompt.repeat_interleave(G)))
    n = groups.shape[0]
    first, prompt_end = starts[n:-2].long(), (starts[1 : n + 1].long() - 1).repeat_interleave(G)
    by_group = [sum(replies[g * G : g * G + G]) for g in hosts]
    longest = max([prompts[g * G] for g in hosts] + [replies[i] for i in members] + [W - num_tokens])
    return Pack(
        source=_filled(owner[seg] * S + table.columns[owner[seg], at + offset[seg]], W),
        positions=_filled(at + offset[seg], W),
        last=(first + reply - 1).clamp(min=0),
        rows=rows,
        segments=Segments(
            starts,
            size_carrier(longest),
            SharedPrompt(
                size_carrier(num_prompt),
                size_carrier(num_reply),
                _cumulative(reply.view(-1, G).sum(1)),
                _cumulative(prompt),
                size_carrier(max(by_group)),
                size_carrier(max(prompts[g * G] for g in hosts)),
            ),
        ),
        **_predictions(table, rows, members, prompt_end, first),
    )


def _predictions(table: Table, rows: Tensor, hosts: list[int], before: Tensor, first: Tensor) -> dict[str, Tensor]:
    """The response tokens of `rows`: `before` [R] is the flat index of the prompt's last token, `first` [R] that of
    the response's first."""
    S, T = table.columns.shape[1], table.max_reply
    device = rows.device
    prompt, reply = table.prompt[rows], table.reply[rows]
    if table.replies is None:
        step = torch.arange(T, device=device).repeat(len(hosts))
        seg = torch.arange(len(hosts) * T, device=device) // max(T, 1)
    else:
        num = sum(table.replies[i] for i in hosts)
        step, seg = _within(_cumulative(reply), torch.arange(num, device=device))
    row, at = rows[seg], prompt[seg] + step
    column = table.columns[row, at.clamp(max=S - 1)]
    # Beyond a response, and where nothing stands before it, there is nothing to predict.
    real = (step < reply[seg]) & (at > 0)
    return {
        "predict": torch.where(step == 0, before[seg], first[seg] + step - 1).clamp(min=0).where(real, 0),
        "target": row * S + column,
        "slot": torch.where(real, row * T + column - table.width, table.reply.shape[0] * T),
        "row": row,
    }


def _cuts(totals: list[int], budget: int) -> list[tuple[int, int]]:
    """Consecutive spans of nearly equal token counts, as few as the budget allows (it may be passed by half a row)."""
    whole = sum(totals)
    target = whole / max(-(-whole // budget), 1)
    spans: list[tuple[int, int]] = []
    begin = done = 0
    for i, total in enumerate(totals):
        if i > begin and done + total / 2 > target * (len(spans) + 1):
            spans.append((begin, i))
            begin = i
        done += total
    return [*spans, (begin, len(totals))]


def _starts(lengths: Tensor, num_tokens: int) -> tuple[Tensor, int]:
    """Cumulative lengths with a last segment of filling, and the width that it fills up to."""
    align = ALIGN_CPU if lengths.device.type == "cpu" else ALIGN
    W = max(-(-num_tokens // align), 1) * align
    return _cumulative(torch.cat((lengths, lengths.new_full((1,), W - num_tokens)))), W


def _cumulative(lengths: Tensor) -> Tensor:
    """[n] -> [n + 1] int32: 0, then running sums."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _within(starts: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """(offset in its segment, segment) of each flat position."""
    seg = torch.searchsorted(starts.long(), where, right=True) - 1
    return where - starts[seg], seg


def _filled(line: Tensor, W: int) -> Tensor:
    """[n] -> [1, W], the filling being 0."""
    return torch.nn.functional.pad(line, (0, W - line.shape[0])).unsqueeze(0)


def size_carrier(number: int) -> Tensor:
    """`number` as the size of a tensor (plus two: compilers specialise on sizes 0 and 1)."""
    return torch.empty(number + 2, dtype=torch.uint8)


def size_of(carrier: Tensor) -> int:
    """The number that `size_carrier` was given."""
    return carrier.shape[0] - 2
