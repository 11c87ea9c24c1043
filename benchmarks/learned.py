"""A language model and a reward model that have learned something, made from nothing in about two minutes of one GPU.

    python benchmarks/learned.py --out /tmp/learned            # hidden 1024, 12 layers
    python benchmarks/learned.py --out /tmp/learned --tiny     # a smoke test on the CPU: learns little

Random weights say nothing about precision: their scores are noise. These models know the demo's little world
(torchbandit/demo/grammar.py): the language model its stories, letters and replies, the reward model which of two
replies is liked better, on letters it never saw. It is a synthetic world, and models trained on the web have outliers
in their activations that these may lack.

Written into the folder: `sft`, `reward_model` (transformers folders), `pairs.jsonl` (prompt, chosen, rejected; held
out), `made.json` (what was measured).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from torchbandit.demo import grammar
from torchbandit.demo.make import make_tokenizer
from torchbandit.masters import MasterOptimizer
from torchbandit.scoring import corpus_loss, sequence_scores


@dataclass(frozen=True)
class Size:
    hidden: int = 1024
    layers: int = 12
    heads: int = 16
    vocab_size: int = 1024
    docs: int = 160_000
    pairs: int = 80_000
    heldout_pairs: int = 2_048
    batch: int = 256
    lm_lr: float = 5e-4
    rm_lr: float = 1e-4
    accuracy: float = 0.93  # of held-out pairs, at which the reward model's training ends
    seconds: float = 150.0  # at most, for both


TINY = Size(64, 2, 4, 400, docs=512, pairs=512, heldout_pairs=64, batch=32, lm_lr=3e-3, rm_lr=1e-3, seconds=20.0)
Pair = tuple[str, str, str]  # letter, better reply, worse reply


def make(out: Path, size: Size, device: str) -> dict[str, Any]:
    """Train both and write them; returns what `made.json` holds."""
    begin = time.perf_counter()
    # Forked before CUDA is touched: a worker needs nothing but the grammar.
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 16)) as pool:
        parts = pool.starmap(texts, [(seed, size.docs // 16) for seed in range(16)])
        docs = [text for part in parts for text in part]
        labelled = pool.starmap(preferences, [(seed, size.pairs // 16, False) for seed in range(16)])
        pairs = [pair for part in labelled for pair in part]
    heldout = preferences(99, size.heldout_pairs, True)
    tokenizer = make_tokenizer(docs[:20_000], size.vocab_size)
    eos = tokenizer.eos_token_id
    rows = [[*ids, eos] for ids in tokenizer(docs)["input_ids"]]
    made_texts = time.perf_counter() - begin
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(_config(size, tokenizer)).to(device, _dtype(device))
    lm_loss = train_lm(lm, rows, size, device)
    for part in (lm, tokenizer):
        part.save_pretrained(out / "sft")
    rm = AutoModelForSequenceClassification.from_pretrained(out / "sft", num_labels=1, dtype=_dtype(device)).to(device)
    torch.nn.init.normal_(rm.score.weight, std=size.hidden**-0.5)
    encode = lambda pairs: [_encode(pair, tokenizer) for pair in pairs]
    accuracy = train_rm(rm, encode(pairs), encode(heldout), size, device)
    for part in (rm, tokenizer):
        part.save_pretrained(out / "reward_model")
    lines = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in heldout]
    (out / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = {
        "size": asdict(size),
        "parameters": lm.num_parameters(),
        "lm_loss": lm_loss,
        "heldout_pair_accuracy": accuracy,
        "texts_s": made_texts,
        "seconds": time.perf_counter() - begin,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def _letters(heldout: bool) -> list[grammar.Letter]:
    every = grammar.letters(0)
    return every[:256] if heldout else every[256:]


def texts(seed: int, number: int) -> list[str]:
    """Stories, and letters with their replies, half and half."""
    rng, known = random.Random(seed), _letters(heldout=False)
    stories = list(itertools.islice(grammar.corpus(1000 + seed), number // 2))
    letters = [rng.choice(known) for _ in range(number - number // 2)]
    found = stories + [letter.text + grammar.reply(rng, letter) for letter in letters]
    rng.shuffle(found)
    return found


def preferences(seed: int, number: int, heldout: bool) -> list[Pair]:
    """Two replies to one letter, the better one first; equally good ones are left out."""
    rng, known, found = random.Random(seed), _letters(heldout), list[Pair]()
    while len(found) < number:
        letter = rng.choice(known)
        replies = [grammar.reply(rng, letter) for _ in range(2)]
        worse, better = sorted(replies, key=lambda reply: grammar.preference(letter, reply, True))
        if grammar.preference(letter, better, True) > grammar.preference(letter, worse, True):
            found.append((letter.text, better, worse))
    return found


def train_lm(model: PreTrainedModel, rows: Sequence[list[int]], size: Size, device: str) -> float:
    """One pass over the rows; returns the last batches' mean loss in nats a token."""
    losses: list[Tensor] = []

    def loss_of(at: int) -> Tensor:
        ids, mask = _pad(rows[at : at + size.batch], device)
        total, number = corpus_loss(model, ids, mask)
        losses.append((total / number).detach())
        return total / number

    steps = list(range(0, len(rows) - size.batch + 1, size.batch))
    _optimise("language model", model, loss_of, steps, size.lm_lr, size.seconds / 2)
    return float(torch.stack(losses[-20:]).mean())


def train_rm(model: PreTrainedModel, pairs: list[Any], heldout: list[Any], size: Size, device: str) -> float:
    """Bradley-Terry, until held-out pairs come out right often enough; returns how often."""

    def loss_of(at: int) -> Tensor:
        better, worse = _pair_scores(model, pairs[at : at + size.batch // 2], device)
        return -logsigmoid(better - worse).mean() + 0.01 * (better + worse).mean() ** 2

    def accuracy() -> float:
        with torch.no_grad():
            parts = [_pair_scores(model, heldout[i : i + 512], device) for i in range(0, len(heldout), 512)]
        return torch.cat([(better > worse).float() for better, worse in parts]).mean().item()

    steps = list(range(0, len(pairs) - size.batch // 2 + 1, size.batch // 2))
    done = lambda: accuracy() > size.accuracy
    _optimise("reward model", model, loss_of, steps, size.rm_lr, size.seconds / 2, done)
    return accuracy()


def _optimise(
    name: str, model: PreTrainedModel, loss_of: Callable[[int], Tensor], steps: list[int], lr: float, seconds: float,
    done: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """AdamW over float32 masters, warmed up, then down to a tenth; stops when `done` or out of time."""
    model.torchbandit_compile = False  # compiling would take longer than it saves
    optimizer = MasterOptimizer(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    begin = time.perf_counter()
    for step, at in enumerate(steps):
        share = step / len(steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 1.0 - 0.9 * share)
        loss = loss_of(at)
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        if step % 100 == 99 or step == len(steps) - 1:
            passed = time.perf_counter() - begin
            print(f"  {name} {step + 1}/{len(steps)}  loss {loss.item():.4f}  {passed:.0f} s", flush=True)
            if passed > seconds or done():
                return


def _pair_scores(model: PreTrainedModel, pairs: list[Any], device: str) -> tuple[Tensor, Tensor]:
    prompt = _pad([prompt for prompt, _, _ in pairs for _ in range(2)], device, left=True)
    response = _pad([ids for _, better, worse in pairs for ids in (better, worse)], device)
    scores = sequence_scores(model, *prompt, *response).view(-1, 2)
    return scores[:, 0], scores[:, 1]


def _encode(pair: Pair, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    prompt, better, worse = tokenizer(list(pair))["input_ids"]
    return prompt, [*better, tokenizer.eos_token_id], [*worse, tokenizer.eos_token_id]


def _pad(rows: Sequence[list[int]], device: str, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([[*pad, *row] if left else [*row, *pad] for pad, row in zip(fill, rows, strict=True)])
    lengths, place = torch.tensor([len(row) for row in rows])[:, None], torch.arange(width)
    mask = place >= width - lengths if left else place < lengths
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def _config(size: Size, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=-(-size.hidden * 11 // 256) * 64,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads // 2,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--tiny", action="store_true", help="hidden 64, a few steps, on the CPU")
    return found


if __name__ == "__main__":
    arguments = parser().parse_args()
    on = "cpu" if arguments.tiny else "cuda"
    print(json.dumps(make(arguments.out, TINY if arguments.tiny else Size(), on)))
