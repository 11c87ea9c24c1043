"""The work of `torchbandit score`: read a window of rows, score it sorted by length, write it in order."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    stop_ids_of,
)
from torchbandit.prompts.options import PromptOptions
from torchbandit.prompts.records import Records, usable
from torchbandit.prompts.tokenise import tokenise
from torchbandit.read import Row, check_text, is_stream, rows
from torchbandit.score.options import ScoreOptions
from torchbandit.score.output import NOT_JSON, as_json, whole_output
from torchbandit.scoring import log_probs, make_plan, sequence_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 64
"""Batches read at a time and sorted by length inside: enough that rows of a batch are nearly equal."""
WRITTEN = ("reward_model", "log_prob", "kl")
"""The keys that each row comes back with."""


def score(options: ScoreOptions) -> Counter[str]:
    """Score `options.input` into `options.output`, row by row.

    The output takes its name when it is whole; a run that ends early leaves none.

    Returns:
        how many rows there were ("lines") and how many scores are null, by reason.
    Raises:
        ValueError: an option, a model, or a row of the input (named by file and line) is not what it must be. What
            can be read twice is looked through before a model is loaded; a pipe is read once.
        OSError: the output cannot be written.
    """
    total = None if is_stream(options.input) else sum(1 for _ in read(options))
    if total == 0:
        raise ValueError(f"{options.input}: must hold at least one row, got none; check --input")
    counts: Counter[str] = Counter(lines=0)
    models = _models(options, counts)
    window = options.batch_size * WINDOW
    with whole_output(options.output) as file, tqdm(total=total, unit="line", disable=None) as bar:
        lines = read(options)
        while chunk := list(itertools.islice(lines, window)):
            found = {name: model(chunk) for name, model in models.items()}
            for i, line in enumerate(chunk):
                ours = {name: values[i] for name, values in found.items()}
                file.write(as_json(line, _combine(ours), counts) + "\n")
            counts["lines"] += len(chunk)
            bar.update(len(chunk))
        if not counts["lines"]:
            raise ValueError(f"{options.input}: must hold at least one row, got none; check --input")
    return counts


def report(counts: Counter[str]) -> str:
    """One sentence on what was scored and what was not."""
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in counts.items() if reason not in ("lines", NOT_JSON) and count
    )
    told = f"{counts['lines']} lines scored" + (f"; null for want of an honest score: {reasons}" if reasons else "")
    return told + (f"; {counts[NOT_JSON]} lines with {NOT_JSON}" if counts[NOT_JSON] else "")


def read(options: ScoreOptions) -> Iterator[Row]:
    """The rows of the input.

    Raises:
        ValueError: names the file and the line that lacks the prompt or the response, has a key that the output needs
            for itself, or text that no file can hold.
    """
    kinds = {options.prompt_key: (str, list), options.response_key: (str,)}
    how = prompt_options(options)
    for row in rows(options.input, option="--input", key=options.prompt_key):
        where, values = row
        for (key, kind), option in zip(kinds.items(), ("--prompt-key", "--response-key"), strict=True):
            if key not in values:
                raise ValueError(f"{where}: must be an object with the key {key!r}, got {list(values)}; see {option}")
            if not isinstance(values[key], kind):
                got = type(values[key]).__name__
                raise ValueError(f"{where}: {key!r} must be a string, got {got}; see {option}")
        for key in WRITTEN:
            if key in values:
                raise ValueError(f"{where}: has the key {key!r}, which the score is written to; rename it in the input")
        check_text(values, where, "the row")
        if values[options.prompt_key]:
            usable(Records([values[options.prompt_key]], {}, [where], options.prompt_key), how)
        yield row


def prompt_options(options: ScoreOptions) -> PromptOptions:
    """How a prompt of the input becomes text, as in training."""
    return PromptOptions(
        chat=options.chat,
        system_prompt=options.system_prompt,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs or {},
        last_turn=options.last_turn,
    )


Score = Callable[[Sequence[Row]], list[float | None]]


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
        self.how = prompt_options(options)
        self.eos = tokenizer.eos_token_id if options.eos else None
        self.stops = {*stop_ids_of(model, tokenizer), *_eos_of_config(model)}
        if options.eos and self.eos is None:
            raise ValueError(f"{name}: its tokenizer has no eos token to append; pass --no-eos")

    def __call__(self, lines: Sequence[Row]) -> list[float | None]:
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

    def _encode(self, lines: Sequence[Row]) -> dict[int, tuple[list[int], list[int]]]:
        """Index of a line -> ids of prompt and response, for the lines that this model can score."""
        options = self.options
        response_of = [line.values[options.response_key] for line in lines]
        ids: list[list[int]] = self.tokenizer(response_of, add_special_tokens=False, verbose=False)["input_ids"]
        if self.eos is not None:
            ids = [row if row and row[-1] in self.stops else [*row, self.eos] for row in ids]
        full = [i for i, line in enumerate(lines) if line.values[options.prompt_key] and ids[i]]
        self.counts[f"empty ({self.name})"] += len(lines) - len(full)
        if not full:
            return {}
        tools = {"tools": [lines[i].values.get("tools") for i in full]}
        records = Records(
            [lines[i].values[options.prompt_key] for i in full], tools, [lines[i].where for i in full],
            options.prompt_key,
        )  # fmt: skip
        prompts = tokenise(records, self.tokenizer, max_length=None, options=self.how)
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


def _eos_of_config(model: PreTrainedModel) -> list[int]:
    """A classifier has no generation config; its own one names the ids that end a response."""
    eos = getattr(model.config, "eos_token_id", None)
    return [eos] if isinstance(eos, int) else list(eos or [])


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
