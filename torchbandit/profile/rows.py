"""What is scored: prompts, responses, and which rows are pairs of which."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchbandit import demo
from torchbandit.generation import Sampling, generate, release
from torchbandit.models import stop_ids_of
from torchbandit.profile.options import ProfileOptions
from torchbandit.prompts import PromptSet
from torchbandit.prompts.options import PromptOptions
from torchbandit.prompts.records import Records, usable
from torchbandit.prompts.tokenise import tokenise
from torchbandit.read import check_text, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUP = 4
"""Responses a prompt, where the reference answers."""


@dataclass(frozen=True)
class Rows:
    """Token ids row by row, shortest first, and pairs [N, 2] of row indices."""

    prompts: list[list[int]]
    responses: list[list[int]]
    pairs: Tensor
    source: str

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(map(len, self.responses))


def read(options: ProfileOptions, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of `options.input`, in a tokenizer's ids.

    Raises:
        ValueError: names the file and the line that is not what it must be, or there is no pair.
    """
    prompts: list[Any] = []
    texts: list[str] = []
    where: list[str] = []
    pairs: list[tuple[int, int]] = []
    for place, row in rows(str(options.input), option="--input", key=options.prompt_key):
        keys = ("chosen", "rejected") if "chosen" in row else ("response",)
        for key in (options.prompt_key, *keys):
            if key not in row:
                raise ValueError(f"{place}: must have the key {key!r}, got {list(row)}")
            if not isinstance(row[key], str) and not (key == options.prompt_key and isinstance(row[key], list)):
                raise ValueError(f"{place}: {key!r} must be a string, got {type(row[key]).__name__}")
        if len(texts) + len(keys) > options.rows:
            break
        if len(keys) == 2:
            pairs.append((len(texts), len(texts) + 1))
        for key in keys:
            check_text(row[key], place, key)
            prompts.append(row[options.prompt_key])
            texts.append(str(row[key]))
            where.append(place)
    if not texts:
        raise ValueError(f"{options.input}: must hold at least one line, got none")
    how = PromptOptions(chat=options.chat)
    records = usable(Records(prompts, {}, where, options.prompt_key), how)
    found = tokenise(records, tokenizer, max_length=None, options=how)
    prompt_ids: list[list[int]] = [ids.tolist() for ids in found.flat.split(found.lengths.tolist())]
    responses: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id if options.eos else None
    if eos is not None:
        responses = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in responses]
    return _sorted(prompt_ids, responses, pairs or siblings(prompt_ids), str(options.input))


def answer(options: ProfileOptions, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The reference's own responses to the demo's prompts, sampled at temperature 1 with a fixed seed."""
    prompts = PromptSet.from_jsonl(demo.HELDOUT_PROMPTS, tokenizer, max_length=512, chat=options.chat)
    prompts = prompts.to(reference.device)
    number = max(1, min(len(prompts), options.rows // GROUP))
    ids, mask, _ = prompts.gather(torch.arange(number, device=reference.device).repeat_interleave(GROUP))
    eos = tokenizer.eos_token_id
    out = generate(
        reference, ids, mask, Sampling(max_new_tokens=options.max_new_tokens),
        stop_ids=stop_ids_of(reference, tokenizer), pad_id=0 if eos is None else int(eos),
        generator=torch.Generator(reference.device).manual_seed(0), group_size=GROUP,
    )  # fmt: skip
    release(reference)
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    responses = [row[keep].tolist() for row, keep in zip(out.tokens.cpu(), out.mask.cpu(), strict=True)]
    return _sorted(rows, responses, siblings(rows), f"the reference's answers to {number} demo prompts")


def siblings(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Every pair of rows with one prompt."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[tuple(prompt)].append(i)
    return [pair for group in groups.values() for pair in itertools.combinations(group, 2)]


def batches(rows: Rows, size: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Prompt ids, prompt mask, response ids, response mask of `size` rows each."""
    return [
        (*_pad(rows.prompts[at : at + size], device, left=True), *_pad(rows.responses[at : at + size], device))
        for at in range(0, len(rows.prompts), size)
    ]


def _sorted(
    prompts: list[list[int]], responses: list[list[int]], pairs: list[tuple[int, int]], source: str
) -> Rows:  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(order))
    both = place[torch.tensor(pairs, dtype=torch.int64).view(-1, 2)]
    return Rows([prompts[i] for i in order], [responses[i] for i in order], both, source)


def _pad(rows: list[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(1, max(map(len, rows)))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), True
    return ids.to(device), mask.to(device)
