"""Architectures of several kinds, and models of more than text: right in groups, or refused in one line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer, fake_batch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from torchbandit import CausalLMPolicy, ModelSpec, Sampling
from torchbandit.models import empty_causal_lm, load_causal_lm

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "models_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("models_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["models_table"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["models_table"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "generation"), [("llama", "fast"), ("lfm2", "plain"), ("qwen3_next", "plain"), ("roberta", "plain")]
)
def test_a_row_of_the_table(script, kind, generation):
    cells = script.try_out(kind)
    assert cells["generation"] == generation
    assert cells["packed"] == ("yes" if kind == "llama" else "padded")
    assert cells["gradient"] == cells["save and load"] == "yes"
    assert cells["critic head"] == "yes" or (kind == "roberta" and "shows no hidden states" in cells["critic head"])


def test_a_fault_shows_in_the_table(script, monkeypatch):
    monkeypatch.setattr(script, "log_probs", lambda model, *args, **more: torch.zeros(8, script.T))
    assert script.try_out("llama")["packed"].startswith("WRONG by")
    assert "| llama | fast | WRONG by" in script.markdown({"llama": script.try_out("llama")})


IDS = dict(vocab_size=259, bos_token_id=257, eos_token_id=258, pad_token_id=256)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
             max_position_embeddings=256)  # fmt: skip


def gemma3():
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    text = dict(**IDS, **SMALL, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3,
                     boi_token_index=4, eoi_token_index=5)
    )  # fmt: skip


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=14)
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=IDS | SMALL | {"rope_parameters": rope}, vision_config=vision)
    )


@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_the_text_side_of_a_model_of_more_than_text(tmp_path, make):
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="holds more than text; its text side alone"):
        policy = CausalLMPolicy(tmp_path / "whole", sampling=Sampling(max_new_tokens=4))
    td = fake_batch(response_width=4)
    policy(td)["log_probs"].sum().backward()
    assert all(weight.grad is not None for weight in policy.lm.parameters())
    policy.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(again) is type(policy.lm) and not any("vision" in name for name, _ in again.named_parameters())
    ids = torch.arange(3, 20)[None]
    assert_close(again(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    empty = empty_causal_lm(tmp_path / "whole", "cpu")
    assert {n: w.shape for n, w in empty.named_parameters()} == {n: w.shape for n, w in again.named_parameters()}


def test_a_model_of_more_than_text_is_not_quantised(tmp_path):
    pytest.importorskip("torchao", reason="the quant extra is not installed")
    gemma3().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantization must be None for a model of more than text"):
        load_causal_lm(ModelSpec(tmp_path, quantization="int8"), "cpu")
