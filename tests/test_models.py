"""Loading: precision, dropout, labels, tokenizers, and nothing hidden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from transformers import GenerationConfig

from torchbandit.models import (
    ModelSpec,
    check_same_tokenizer,
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    stop_ids_of,
    wants_compile,
    with_pad,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm")
    tiny_lm("llama", attention_dropout=0.1).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_folder_loads_frozen_in_eval_without_dropout(folder: Path) -> None:
    model = load_causal_lm(folder, "cpu")
    assert model.dtype == torch.float32 and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    ids = torch.arange(1, 9)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    reference = tiny_lm("llama")
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)


def test_trainable_and_dtype(folder: Path) -> None:
    model = load_causal_lm(ModelSpec(folder, dtype="bfloat16", compile=True), "cpu", trainable=True)
    assert model.dtype == torch.bfloat16 and all(p.requires_grad for p in model.parameters())
    assert wants_compile(model) and not wants_compile(load_causal_lm(str(folder), "cpu"))
    with pytest.raises(ValueError, match='dtype: must be "auto"'):
        load_causal_lm(folder, "cpu", dtype="int3")


def test_a_live_model_is_used_where_it_is() -> None:
    model = tiny_lm("gpt2")
    assert load_causal_lm(model, "cpu", dtype="bfloat16") is model
    assert model.dtype == torch.float32 and next(model.parameters()).requires_grad


def test_reward_model_must_have_one_label(tmp_path: Path) -> None:
    tiny_reward_model().save_pretrained(tmp_path / "one")
    assert load_reward_model(tmp_path / "one", "cpu").config.num_labels == 1
    with pytest.raises(ValueError, match="num_labels=2"):
        load_reward_model(tiny_reward_model(num_labels=2), "cpu")


def test_a_language_model_is_no_reward_model(folder: Path) -> None:
    """transformers would give it a random head and a warning: every score would be noise."""
    with pytest.raises(
        ValueError, match=r"must hold all weights of a LlamaForSequenceClassification, got none for score"
    ):
        load_reward_model(folder, "cpu")


def test_errors_name_the_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: cannot be loaded"):
        load_causal_lm(tmp_path / "nowhere", "cpu")
    with pytest.raises(ValueError, match="tokenizer of .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_tokenizer_without_pad(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither"):
        with_pad(tokenizer)


def test_trap_05_foreign_tokenizer(tmp_path: Path, folder: Path) -> None:
    ours = byte_tokenizer()
    check_same_tokenizer(ours, folder, "reward model")
    check_same_tokenizer(ours, tiny_lm(), "reward model")
    other = byte_tokenizer()
    other.add_tokens(["<tool>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reward model .*<tool>.*HostReward"):
        check_same_tokenizer(ours, tmp_path, "reward model")
    # The wrong check compares sizes alone: two tokens that change places pass it.
    swapped = byte_tokenizer()
    a, b = (swapped.get_vocab()[token] for token in "AB")
    state = swapped.backend_tokenizer.to_str()
    state = state.replace(f'"A":{a}', '"A":-1').replace(f'"B":{b}', f'"B":{a}').replace('"A":-1', f'"A":{b}')
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(state)
    swapped.save_pretrained(tmp_path / "swapped")
    assert len(swapped) == len(ours)
    with pytest.raises(ValueError, match="2 differ"):
        check_same_tokenizer(ours, tmp_path / "swapped", "reference")


def test_trap_18_only_eos_is_taken_from_a_generation_config() -> None:
    model = tiny_lm()
    model.generation_config = GenerationConfig(eos_token_id=[258, 7], top_p=0.5, repetition_penalty=1.3)
    assert stop_ids_of(model, byte_tokenizer()) == (258, 7)
    assert stop_ids_of(None, byte_tokenizer()) == (258,)
    assert stop_ids_of(None, None) == ()


def test_dropout_of_every_kind_is_off() -> None:
    model = tiny_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_empty_models_have_the_names_and_ties_of_loaded_ones(tmp_path: Path) -> None:
    """A process that is sent weights by name must know the same names, tied ones once."""
    from torchbandit.models import empty_causal_lm

    for arch, tied in (("gpt2", True), ("llama", True), ("llama", False)):
        folder = tmp_path / f"{arch}{tied}"
        tiny_lm(arch, tie_word_embeddings=tied).save_pretrained(folder)
        loaded, empty = (
            load_causal_lm(folder, "cpu", dtype="bfloat16"),
            empty_causal_lm(folder, "cpu", dtype="bfloat16"),
        )
        for model in (loaded, empty):
            one, other = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            assert (one.data_ptr() == other.data_ptr()) == tied, (arch, tied)
        with torch.no_grad():
            for name, weight in empty.state_dict().items():
                weight.copy_(loaded.state_dict()[name])
        ids = torch.arange(6).view(1, 6)
        assert torch.equal(empty(ids).logits, loaded(ids).logits)
