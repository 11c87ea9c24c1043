"""Make the demo's files: `python -m torchbandit.demo.make --out DIR` (six minutes on one idle core).

Steps, as in InstructGPT but small: a byte-level BPE tokenizer; a causal LM pretrained on the corpus, then fine-tuned
on letters and replies (with corpus mixed in); replies sampled from it; a reward model, started from the fine-tuned
LM, trained by Bradley-Terry on noisy preferences between those samples.

The same recipe gives the same bytes on the same machine, thread count and versions of torch, transformers and
tokenizers. Texts are the same everywhere. Elsewhere (other CPU kernels or thread count) sums are rounded in another
order, so the weights differ though they are as good; config files name the transformers version that wrote them.

A script: the package never imports it, so transformers may be imported here. Rows are [B, L]: B texts, L tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging,
)

from torchbandit.demo import grammar

PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Recipe:
    """Sizes of everything; the defaults made the files in the package."""

    seed: int = 0
    vocab_size: int = 768
    hidden: int = 96
    layers: int = 3
    num_prompts: int = 1024
    num_heldout_prompts: int = 256
    num_docs: int = 4096
    num_heldout_docs: int = 512
    pretrain_steps: int = 300
    sft_steps: int = 1100
    batch: int = 64
    lr: float = 3e-3
    max_new_tokens: int = 32
    samples_per_prompt: int = 4
    num_labelled_prompts: int = 4096
    rm_epochs: int = 4
    rm_lr: float = 1e-3
    label_slope: float = 3.0  # labellers err: P(a over b) = sigmoid(slope * difference in preference)


def make(out: Path, recipe: Recipe) -> dict[str, float]:
    """Write all files of the demo into `out` and return what was measured (also in `made.json`)."""
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        measured = make_language_model(out, recipe) | make_reward_model(out, recipe)
    measured = {key: round(value, 4) for key, value in measured.items()}
    (out / "made.json").write_text(json.dumps({"recipe": asdict(recipe), "measured": measured}, indent=1) + "\n")
    return measured


def make_language_model(out: Path, recipe: Recipe) -> dict[str, float]:
    """The texts, the tokenizer and `sft/`."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    heldout, train = split_letters(recipe)
    stream = grammar.corpus(recipe.seed)  # no repeats: held-out texts are never trained on
    heldout_docs = list(itertools.islice(stream, recipe.num_heldout_docs))
    docs = list(itertools.islice(stream, recipe.num_docs))
    write_jsonl(out / "prompts.jsonl", "prompt", (letter.text for letter in train[: recipe.num_prompts]))
    write_jsonl(out / "heldout_prompts.jsonl", "prompt", (letter.text for letter in heldout))
    write_jsonl(out / "corpus.jsonl", "text", docs)
    write_jsonl(out / "heldout_corpus.jsonl", "text", heldout_docs)

    def demonstration() -> str:
        letter = rng.choice(train)
        return letter.text + grammar.reply(rng, letter)

    tokenizer = make_tokenizer(docs + [demonstration() for _ in range(len(docs))], recipe.vocab_size)
    sft = make_lm(tokenizer, recipe)
    train_lm(sft, tokenizer, lambda: next(stream), recipe.pretrain_steps, recipe.lr, recipe.batch)
    mixture = lambda: demonstration() if rng.random() < 0.7 else next(stream)
    train_lm(sft, tokenizer, mixture, recipe.sft_steps, recipe.lr, recipe.batch)
    save(sft, out / "sft")
    tokenizer.save_pretrained(out / "sft")
    return {"sft_parameters": sft.num_parameters(), "heldout_corpus_loss": lm_loss(sft, tokenizer, heldout_docs)}


def make_reward_model(out: Path, recipe: Recipe) -> dict[str, float]:
    """`reward_model/` from `sft/` and replies sampled from it; it is seeded anew, so it can be made again alone."""
    torch.manual_seed(recipe.seed)
    heldout, train = split_letters(recipe)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "sft")
    sft = AutoModelForCausalLM.from_pretrained(out / "sft").eval()
    labelled = sample(sft, tokenizer, train[: recipe.num_labelled_prompts], recipe)
    reward_model = train_reward_model(out / "sft", labelled, recipe)
    unit = score(reward_model, labelled.rows).std().item()
    with torch.no_grad():  # Bradley-Terry fixes no unit: take the SFT model's standard deviation
        score_head(reward_model).weight /= unit
    save(reward_model, out / "reward_model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # a loaded tokenizer, saved again, differs in its config
        shutil.copyfile(out / "sft" / name, out / "reward_model" / name)

    fresh = sample(sft, tokenizer, heldout, replace(recipe, samples_per_prompt=16))
    scores = score(reward_model, fresh.rows).view(len(heldout), -1)
    truth = torch.tensor(fresh.preferences).view_as(scores)
    best = scores.max(1)
    return {
        "heldout_pair_accuracy": pair_accuracy(scores, truth),
        "heldout_score_mean": scores.mean().item(),
        "heldout_score_std": scores.std().item(),
        "best_of_16_rise_in_std": ((best.values.mean() - scores.mean()) / scores.std()).item(),
        "preference_mean": truth.mean().item(),
        "preference_std": truth.std().item(),
        "best_of_16_preference_mean": truth.gather(1, best.indices[:, None]).mean().item(),
        "finished_share": statistics.mean(fresh.finished),
    }


def split_letters(recipe: Recipe) -> tuple[list[grammar.Letter], list[grammar.Letter]]:
    """Held-out letters, and all others."""
    letters = grammar.letters(recipe.seed)
    return letters[: recipe.num_heldout_prompts], letters[recipe.num_heldout_prompts :]


def write_jsonl(path: Path, key: str, texts: Iterable[str]) -> None:
    """One object a line: {key: text}."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")


def make_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`: no text is unknown to it; pad, then eos, are ids 0 and 1, and nothing is added."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left", model_max_length=128
    )


def make_lm(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> PreTrainedModel:
    """A small Llama (RoPE, two KV heads for four heads, tied embedding) with fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def save(model: PreTrainedModel, folder: Path) -> None:
    """Weights as safetensors, readable by all: an installed package has readers other than its maker."""
    model.eval().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def right_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token rows -> ids [B, L] int64 (0 in the padding) and mask [B, L] bool."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def texts_to_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Each text's ids and one end token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]


def token_losses(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Cross-entropy of every token but the first of each row, flat."""
    ids, mask = right_padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits
    real = mask[:, 1:]
    return cross_entropy(logits[:, :-1][real], ids[:, 1:][real], reduction="none")


@torch.no_grad()
def lm_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Mean token cross-entropy over `texts`, each ended by eos."""
    rows = texts_to_rows(tokenizer, texts)
    return torch.cat([token_losses(model, rows[i : i + 128]) for i in range(0, len(rows), 128)]).mean().item()


def optimise(model: PreTrainedModel, losses: Iterable[Callable[[], Tensor]], steps: int, lr: float) -> None:
    """AdamW, a short warm-up, then a cosine down to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    model.train()
    for step, loss_of in enumerate(losses):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval()


def train_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[], str],
    steps: int,
    lr: float,
    batch: int,
) -> None:
    """`steps` batches of texts from `draw`; never the same text twice, so there is nothing to overfit."""

    def loss_of() -> Tensor:
        return token_losses(model, texts_to_rows(tokenizer, [draw() for _ in range(batch)])).mean()

    print("language model", flush=True)
    optimise(model, (loss_of for _ in range(steps)), steps, lr)


@dataclass(frozen=True)
class Samples:
    """Sampled replies, the siblings of a letter next to each other."""

    rows: list[list[int]]  # prompt, response and, where it came, the end token
    preferences: list[float]
    finished: list[bool]
    group_size: int


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, letters: Sequence[grammar.Letter], recipe: Recipe
) -> Samples:
    """Replies at temperature 1 from the untruncated distribution."""
    group, eos = recipe.samples_per_prompt, tokenizer.eos_token_id
    found = Samples([], [], [], group)
    for start in range(0, len(letters), 128):
        chunk = [letter for letter in letters[start : start + 128] for _ in range(group)]
        prompts = tokenizer([letter.text for letter in chunk], return_tensors="pt", padding=True)
        width = prompts["input_ids"].shape[1]
        ids = model.generate(  # type: ignore[operator]
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=recipe.max_new_tokens,
        )
        for letter, prompt, response in zip(chunk, prompts["input_ids"].tolist(), ids[:, width:].tolist(), strict=True):
            finished = eos in response
            response = response[: response.index(eos)] if finished else response
            text = str(tokenizer.decode(response))
            found.rows.append([t for t in prompt if t != tokenizer.pad_token_id] + response + [eos] * finished)
            found.preferences.append(grammar.preference(letter, text, finished))
            found.finished.append(finished)
    return found


def train_reward_model(start: Path, samples: Samples, recipe: Recipe) -> PreTrainedModel:
    """Bradley-Terry over all pairs of siblings, each pair labelled once by a labeller who sometimes errs."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    torch.nn.init.normal_(score_head(model).weight, std=recipe.hidden**-0.5)
    group, per_step = samples.group_size, 32
    left, right = torch.triu_indices(group, group, 1)
    truth = torch.tensor(samples.preferences).view(-1, group)
    wins = torch.rand(len(truth), len(left)) < torch.sigmoid(recipe.label_slope * (truth[:, left] - truth[:, right]))
    signs = wins.float() * 2 - 1
    order = torch.cat([torch.randperm(len(truth)) for _ in range(recipe.rm_epochs)]).tolist()
    steps = len(order) // per_step

    def loss_of(step: int) -> Tensor:
        chosen = order[step * per_step : (step + 1) * per_step]
        rows = [samples.rows[i * group + j] for i in chosen for j in range(group)]
        scores = reward_scores(model, rows).view(-1, group)
        margin = signs[chosen] * (scores[:, left] - scores[:, right])
        return -logsigmoid(margin).mean() + 0.01 * scores.mean() ** 2  # pairs say nothing of the level: keep it near 0

    print("reward model", flush=True)
    optimise(model, (partial(loss_of, step) for step in range(steps)), steps, recipe.rm_lr)
    return model


def score_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The classifier's last layer, [1, hidden] without bias."""
    head = model.get_submodule("score")
    assert isinstance(head, torch.nn.Linear)
    return head


def reward_scores(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B] scores, read on each row's last token."""
    ids, mask = right_padded(rows)
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, 0]


@torch.no_grad()
def score(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """`reward_scores` in chunks, without gradient."""
    return torch.cat([reward_scores(model, rows[i : i + 256]) for i in range(0, len(rows), 256)])


def pair_accuracy(scores: Tensor, truth: Tensor) -> float:
    """Share of sibling pairs [N, G] that both order alike; pairs that are equal in truth are left out."""
    left, right = torch.triu_indices(truth.shape[1], truth.shape[1], 1)
    gap = truth[:, left] - truth[:, right]
    right_way = ((scores[:, left] - scores[:, right]) * gap > 0)[gap != 0]
    return right_way.float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's models, tokenizer and texts.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="part of the recipe: another number rounds differently")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(make(arguments.out, Recipe(seed=arguments.seed)), indent=1))
