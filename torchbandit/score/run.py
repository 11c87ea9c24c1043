"""The work of `torchbandit score`: read a window of lines, score it sorted by length, write it in order."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from torchbandit.models import (
    ModelSpec,
    check_same_tokenizer,
    context_length,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from torchbandit.prompts.tokenise import tokenise
from torchbandit.score.options import ScoreOptions
from torchbandit.scoring import log_probs, make_plan, sequence_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 64
"""Batches read at a time and sorted by length inside: enough that rows of a batch are nearly equal."""


class Line(NamedTuple):
    number: int
    row: dict[str, Any]


def score(options: ScoreOptions) -> Counter[str]:
    """Score `options.input` into `options.output`, line by line.

    Returns:
        how many lines there were ("lines") and how many scores are null, by reason.
    Raises:
        ValueError: an option, a model, or a line of the input (named by file and number) is not what it must be; the
            lines are looked through before a model is loaded.
        OSError: the output cannot be written.
    """
    total = sum(1 for _ in read(options))
    if not total:
        raise ValueError(f"{options.input}: must hold at least one line, got an empty file")
    counts: Counter[str] = Counter(lines=total)
    models = _models(options, counts)
    window = options.batch_size * WINDOW
    with open(options.output, "w", encoding="utf-8") as file, tqdm(total=total, unit="line", disable=None) as bar:
        lines = read(options)
        while chunk := list(itertools.islice(lines, window)):
            found = {name: model(chunk) for name, model in models.items()}
            for i, line in enumerate(chunk):
                ours = {name: values[i] for name, values in found.items()}
                file.write(json.dumps(line.row | _combine(ours), ensure_ascii=False) + "\n")
            bar.update(len(chunk))
    return counts


def report(counts: Counter[str]) -> str:
    """One sentence on what was scored and what was not."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "lines" and count)
    return f"{counts['lines']} lines scored" + (f"; null for want of an honest score: {reasons}" if reasons else "")


def read(options: ScoreOptions) -> Iterator[Line]:
    """The lines of the input; blank ones are skipped.

    Raises:
        ValueError: names the file and the line that is no JSON object, or lacks the prompt or the response.
    """
    try:
        file = open(options.input, "rb")  # noqa: SIM115 (closed below; the error is of the opening alone)
    except OSError as error:
        raise ValueError(f"{options.input}: cannot be read: {error.strerror}; check --input") from error
    with file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{options.input}:{number}"
            try:
                row = json.loads(text)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise ValueError(f"{where}: must be one JSON object in UTF-8 ({error})") from error
            kinds = {options.prompt_key: (str, list), options.response_key: (str,)}
            for (key, kind), option in zip(kinds.items(), ("--prompt-key", "--response-key"), strict=True):
                if not isinstance(row, dict) or key not in row:
                    got = list(row) if isinstance(row, dict) else type(row).__name__
                    raise ValueError(f"{where}: must be an object with the key {key!r}, got {got}; see {option}")
                if not isinstance(row[key], kind):
                    got = type(row[key]).__name__
                    raise ValueError(f"{where}: {key!r} must be a string, got {got}; see {option}")
            yield Line(number, row)


Score = Callable[[Sequence[Line]], list[float | None]]


def _models(options: ScoreOptions, counts: Counter[str]) -> dict[str, Score]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, and torch sees no CUDA device; use --device cpu")
    if options.policy is not None and options.reference is not None:
        check_same_tokenizer(load_tokenizer(options.policy), options.reference, "reference")
    loaders = {"reward_model": load_reward_model, "policy": load_causal_lm, "reference": load_causal_lm}
    found: dict[str, Score] = {}
    for name, load in loaders.items():
        path = getattr(options, name)
        if path is not None:
            # Of a folder that misses its tokenizer or has another one, one hears before the weights are read.
            tokenizer = load_tokenizer(path)
            model = load(ModelSpec(path, dtype=options.dtype, quantization=options.quantization), device)
            found[name] = _Scorer(name, model, tokenizer, options, counts)
    return found


def _combine(scores: dict[str, float | None]) -> dict[str, float | None]:
    """The three numbers of a line, out of what each model said."""
    policy, reference = scores.get("policy"), scores.get("reference")
    return {
        "reward_model": scores.get("reward_model"),
        "log_prob": policy if "policy" in scores else reference,
        "kl": None if policy is None or reference is None else policy - reference,
    }


class _Scorer:
    """One model and its tokenizer: lines to numbers."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: ScoreOptions,
        counts: Counter[str],
    ) -> None:
        self.name, self.model, self.tokenizer, self.options, self.counts = name, model, tokenizer, options, counts
        self.context = context_length(model)
        self.eos = tokenizer.eos_token_id if options.eos else None
        if options.eos and self.eos is None:
            raise ValueError(f"{name}: its tokenizer has no eos token to append; pass --no-eos")

    def __call__(self, lines: Sequence[Line]) -> list[float | None]:
        """One number a line: the reward model's score, or the summed log-prob of the response."""
        encoded = self._encode(lines)
        order = sorted(encoded, key=lambda i: sum(map(len, encoded[i])))
        parts = [order[at : at + self.options.batch_size] for at in range(0, len(order), self.options.batch_size)]
        results = [self._forward([encoded[i] for i in part]) for part in parts]
        values: list[float | None] = [None] * len(lines)
        if results:
            for i, value in zip(order, torch.cat(results).tolist(), strict=True):
                if math.isfinite(value):
                    values[i] = value
                else:
                    self.counts[f"not finite ({self.name})"] += 1
        return values

    def _encode(self, lines: Sequence[Line]) -> dict[int, tuple[list[int], list[int]]]:
        """Index of a line -> ids of prompt and response, for the lines that this model can score."""
        options = self.options
        response_of = [line.row[options.response_key] for line in lines]
        ids: list[list[int]] = self.tokenizer(response_of, add_special_tokens=False, verbose=False)["input_ids"]
        if self.eos is not None:
            ids = [row if row and row[-1] == self.eos else [*row, self.eos] for row in ids]
        full = [i for i, line in enumerate(lines) if line.row[options.prompt_key] and ids[i]]
        self.counts[f"empty ({self.name})"] += len(lines) - len(full)
        if not full:
            return {}
        prompts = tokenise(
            [lines[i].row[options.prompt_key] for i in full], self.tokenizer, max_length=2**31, chat=options.chat,
            where=lambda at: f"{options.input}:{lines[full[at]].number}",
        )  # fmt: skip
        split: Iterable[Tensor] = prompts.flat.split(prompts.lengths.tolist())
        pairs = {i: (prompt.tolist(), ids[i]) for i, prompt in zip(full, split, strict=True)}
        kept = {i: pair for i, pair in pairs.items() if self.context is None or sum(map(len, pair)) <= self.context}
        self.counts[f"longer than the context of {self.context} tokens ({self.name})"] += len(pairs) - len(kept)
        return kept

    @torch.no_grad()
    def _forward(self, rows: list[tuple[list[int], list[int]]]) -> Tensor:
        device = next(self.model.parameters()).device
        prompt_ids, prompt_mask = _pad([prompt for prompt, _ in rows], device, left=True)
        response_ids, response_mask = _pad([response for _, response in rows], device, left=False)
        batch = (prompt_ids, prompt_mask, response_ids, response_mask)
        plan = make_plan(prompt_mask, response_mask, packing=self.options.packing)
        if self.name == "reward_model":
            return sequence_scores(self.model, *batch, plan=plan)
        return log_probs(self.model, *batch, plan=plan).sum(-1)


def _pad(rows: list[list[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """[B, width] int64 ids and bool mask; 0 stands where nothing is, and is never read."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), True
    return ids.to(device), mask.to(device)


def main(options: ScoreOptions) -> None:
    """`score`, with its sentence on stderr."""
    counts = score(options)
    print(f"{report(counts)} -> {Path(options.output)}", file=sys.stderr)
