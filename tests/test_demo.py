"""The demo's files are whole, small and good enough to learn from, and the script makes the same ones again."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from torchbandit import demo
from torchbandit.demo import grammar, make

TINY = make.Recipe(
    vocab_size=400, hidden=32, layers=2, num_prompts=20, num_heldout_prompts=4, num_docs=200, num_heldout_docs=10,
    pretrain_steps=2, sft_steps=2, batch=8, num_labelled_prompts=64, rm_epochs=1,
)  # fmt: skip


def texts(path: Path, key: str) -> list[str]:
    return [json.loads(line)[key] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def shipped():
    """Tokenizer, SFT model, reward model, and four fresh samples for each of 64 held-out letters."""
    tokenizer = AutoTokenizer.from_pretrained(demo.SFT)
    sft = AutoModelForCausalLM.from_pretrained(demo.SFT).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(demo.REWARD_MODEL).eval()
    heldout = set(texts(demo.HELDOUT_PROMPTS, "prompt"))
    letters = [letter for letter in grammar.letters(0) if letter.text in heldout][:64]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)  # not the seed of make
        samples = make.sample(sft, tokenizer, letters, make.Recipe())
    return tokenizer, sft, reward_model, samples


def test_files_are_there_and_small():
    weights = sorted(demo.ROOT.rglob("*.safetensors"))
    assert weights == [demo.REWARD_MODEL / "model.safetensors", demo.SFT / "model.safetensors"]
    assert not [p for p in demo.ROOT.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert sum(p.stat().st_size for p in demo.ROOT.rglob("*") if p.is_file()) <= 8e6


def test_texts_are_those_of_the_recipe():
    recipe, letters, stream = make.Recipe(), grammar.letters(0), grammar.corpus(0)
    assert json.loads((demo.ROOT / "made.json").read_text())["recipe"] == asdict(recipe)
    cut = recipe.num_heldout_prompts
    assert texts(demo.HELDOUT_PROMPTS, "prompt") == [letter.text for letter in letters[:cut]]
    assert texts(demo.PROMPTS, "prompt") == [letter.text for letter in letters[cut : cut + recipe.num_prompts]]
    assert texts(demo.HELDOUT_CORPUS, "text") == list(itertools.islice(stream, recipe.num_heldout_docs))
    assert texts(demo.CORPUS, "text") == list(itertools.islice(stream, recipe.num_docs))


def test_held_out_texts_are_held_out():
    assert not set(texts(demo.PROMPTS, "prompt")) & set(texts(demo.HELDOUT_PROMPTS, "prompt"))
    assert not set(texts(demo.CORPUS, "text")) & set(texts(demo.HELDOUT_CORPUS, "text"))


def test_both_folders_hold_the_same_tokenizer_and_everything_fits(shipped):
    tokenizer = shipped[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (demo.SFT / name).read_bytes() == (demo.REWARD_MODEL / name).read_bytes()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.bos_token_id is None
    longest_prompt = max(len(ids) for ids in tokenizer(texts(demo.PROMPTS, "prompt"))["input_ids"])
    longest_text = max(len(ids) for ids in tokenizer(texts(demo.CORPUS, "text"))["input_ids"])
    assert longest_prompt <= 16 and longest_text < tokenizer.model_max_length
    assert tokenizer.decode(tokenizer("Größe: 3 €\n")["input_ids"]) == "Größe: 3 €\n"  # bytes: nothing is unknown


def test_models_load_as_what_a_user_would_bring(shipped):
    _, sft, reward_model, _ = shipped
    assert type(sft).__name__ == "LlamaForCausalLM" and 3e5 <= sft.num_parameters() <= 1e6
    assert type(reward_model).__name__ == "LlamaForSequenceClassification" and reward_model.config.num_labels == 1
    assert {p.dtype for m in (sft, reward_model) for p in m.parameters()} == {torch.float32}


def test_sft_model_knows_the_corpus_and_mostly_ends_its_replies(shipped):
    tokenizer, sft, _, samples = shipped
    heldout = math.exp(make.lm_loss(sft, tokenizer, texts(demo.HELDOUT_CORPUS, "text")[:128]))
    fresh = math.exp(make.lm_loss(sft, tokenizer, list(itertools.islice(grammar.corpus(99), 128))))
    assert 1.5 < heldout < 2 and 1.5 < fresh < 2
    assert 0.9 < sum(samples.finished) / len(samples.finished) < 1  # imperfect, as it should be


def test_reward_model_orders_fresh_held_out_pairs(shipped):
    _, _, reward_model, samples = shipped
    scores = make.score(reward_model, samples.rows).view(-1, samples.group_size)
    truth = torch.tensor(samples.preferences).view_as(scores)
    assert make.pair_accuracy(scores, truth) > 0.86
    assert 0.85 < scores.std() < 1.15 and abs(scores.mean()) < 0.2  # its unit is an SFT standard deviation


def test_preference_sees_every_merit():
    letter = grammar.Letter("Anna", "red", "lamp", "is broken")
    opening, remedy, end = " Dear Anna, we are sorry about your red lamp.", " We will gladly mend it for free.", " Bye."
    best = grammar.preference(letter, opening + remedy + end, True)
    worse = {
        "no end token": (opening + remedy + end, False),
        "no ending": (opening + remedy, True),
        "another remedy": (opening + " We will gladly pay for the post." + end, True),
        "another name": (opening.replace("Anna", "Ben") + remedy + end, True),
        "another thing": (opening.replace("lamp", "clock") + remedy + end, True),
        "another colour": (opening.replace("red", "blue") + remedy + end, True),
        "gruff": (opening + remedy + " Ask someone else." + end, True),
        "not sorry": (opening.replace("sorry", "told") + remedy + end, True),
        "rambling": (opening + " The weather is fine." + remedy + end, True),
        "said twice": (opening + remedy + remedy + end, True),
    }
    for what, (response, finished) in worse.items():
        assert grammar.preference(letter, response, finished) < best - 0.2, what


def test_make_gives_the_same_files_again(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = make.make(tmp_path / "a", TINY), make.make(tmp_path / "b", TINY)
        other = make.make(tmp_path / "c", replace(TINY, seed=1))
    finally:
        torch.set_num_threads(threads)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert Path("sft/model.safetensors") in names and Path("reward_model/model.safetensors") in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert first == second != other
    shipped_files = {
        p.relative_to(demo.ROOT) for p in demo.ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {p for p in shipped_files if p.suffix != ".py"} == set(names)
