"""Reward model, reference and policy as adapters over one backbone: the right numbers, and its weights once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import naive
import pytest
import torch
from fakes import byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from test_models_quantize import asks
from torch.testing import assert_close
from transformers import PreTrainedModel

from torchbandit import BanditEnv, CausalLMPolicy, KLPenalty, ModelSpec, PromptSet, RewardModel, Sampling
from torchbandit.models import causal_lm_on, load_causal_lm, load_reward_model, reward_model_on, without_adapter
from torchbandit.models.offload import plain_tensors
from torchbandit.scoring import log_probs, sequence_scores

peft = pytest.importorskip("peft", reason="peft is not installed")
TARGETS = ["q_proj", "v_proj", "up_proj"]
SIZES = dict(hidden_size=64, intermediate_size=128)


def adapter(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    """Lay random LoRA weights over `model` and save them; returns the model that has them."""
    torch.manual_seed(7)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1, **options))
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    made.save_pretrained(folder)
    return made.get_base_model().eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A base folder, a policy adapter and a reward adapter over it, and the same two built by peft alone."""
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_lm(**SIZES)
    base.save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    classifier = tiny_reward_model(**SIZES)
    classifier.model.load_state_dict(base.model.state_dict())
    return {
        "root": root,
        "rm": adapter(classifier, root / "rm", task_type="SEQ_CLS", modules_to_save=["score"]),
        "lm": adapter(tiny_lm(**SIZES), root / "lm", task_type="CAUSAL_LM"),
    }


def memory(*models: PreTrainedModel) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for m in models for t in plain_tensors(m)}
    return sum(storages.values())


def test_three_models_over_one_backbone(made: dict[str, object]) -> None:
    root, args = made["root"], naive.tensors(fake_batch())
    base = load_causal_lm(root / "base", "cpu")
    plain = log_probs(base, *args)
    rm, lm = reward_model_on(base, root / "rm"), causal_lm_on(base, root / "lm")
    assert_close(sequence_scores(rm, *args), sequence_scores(made["rm"], *args))
    assert_close(log_probs(lm, *args), log_probs(made["lm"], *args))
    assert_close(log_probs(base, *args), plain, rtol=0, atol=0)
    assert (log_probs(lm, *args) - plain).abs().max() > 0.1, "the adapter does something"
    assert memory(base, rm, lm) < 1.3 * memory(base), "three times the backbone would be 3"
    assert rm.model.layers[0].mlp.down_proj.weight is base.model.layers[0].mlp.down_proj.weight


def test_a_spec_names_base_and_adapter(made: dict[str, object]) -> None:
    root, args = made["root"], naive.tensors(fake_batch())
    rm = load_reward_model(ModelSpec(root / "base", adapter=root / "rm"), "cpu")
    lm = load_causal_lm(ModelSpec(root / "base", adapter=str(root / "lm")), "cpu")
    assert_close(sequence_scores(rm, *args), sequence_scores(made["rm"], *args))
    assert_close(log_probs(lm, *args), log_probs(made["lm"], *args))
    assert not any(p.requires_grad for model in (rm, lm) for p in model.parameters())
    trained = load_causal_lm(ModelSpec(root / "base", adapter=root / "lm"), "cpu", trainable=True)
    assert {"lora_" in name for name, p in trained.named_parameters() if p.requires_grad} == {True}


def test_the_reference_of_a_lora_policy_is_its_base(made: dict[str, object]) -> None:
    """One backbone serves policy, reference and reward model in a step; KL starts where the adapter is."""
    root, tokenizer = made["root"], byte_tokenizer()
    lm = load_causal_lm(ModelSpec(root / "base", adapter=root / "lm"), "cpu", trainable=True)
    reference = without_adapter(lm)
    policy = CausalLMPolicy(lm, tokenizer, sampling=Sampling(max_new_tokens=5))
    terms = [RewardModel(reward_model_on(reference, root / "rm")), KLPenalty(reference)]
    env = BanditEnv(PromptSet.from_texts(["one", "two"], tokenizer, max_length=4), terms, num_prompts=2)
    td = env.step(policy.generate(env.reset()))
    batch = (td["tokens", "prompt"], td["masks", "prompt"], td["tokens", "response"], td["masks", "response"])
    assert_close(td["next", "ref_log_probs", "response"], log_probs(tiny_lm(**SIZES), *batch), atol=1e-4, rtol=1e-4)
    assert td["next", "reward_terms", "kl"].abs().max() > 0.1
    assert memory(lm, *env.rewards.models()) < 1.3 * memory(tiny_lm(**SIZES))
    before = log_probs(reference, *batch)
    log_probs(lm, *batch).sum().backward()
    torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.1).step()
    assert_close(log_probs(reference, *batch), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [asks("nf4"), asks("int8")])
def test_over_a_quantised_backbone(kind: str, made: dict[str, object]) -> None:
    root, args = made["root"], naive.tensors(fake_batch(num_prompts=16))
    base = load_causal_lm(ModelSpec(root / "base", quantization=kind), "cpu")
    rm = reward_model_on(base, root / "rm")
    scores = torch.stack([sequence_scores(rm, *args), sequence_scores(made["rm"], *args)])
    assert torch.corrcoef(scores)[0, 1] > 0.9
    assert memory(base, rm) < 1.3 * memory(base)


def test_what_does_not_fit_is_told(made: dict[str, object], tmp_path: Path) -> None:
    root = made["root"]
    base = load_causal_lm(root / "base", "cpu")
    with pytest.raises(ValueError, match=r"must bring the score head.*modules_to_save=\['score'\]"):
        reward_model_on(base, root / "lm")
    with pytest.raises(ValueError, match="is a PEFT adapter, not a whole model|its config cannot be opened"):
        load_causal_lm(root / "lm", "cpu")
    (tmp_path / "adapter_config.json").write_text((root / "lm" / "adapter_config.json").read_text())
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="must have .*adapter_model.safetensors, got .*adapter_model.bin"):
        causal_lm_on(base, tmp_path)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        causal_lm_on(tiny_lm(), root / "lm")


def test_a_missing_library_names_the_extra(made: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match=r"pip install 'torchbandit\[lora\]'"):
        causal_lm_on(tiny_lm(), made["root"] / "lm")
