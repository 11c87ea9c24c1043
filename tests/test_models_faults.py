"""What is saved reopens, what would go wrong without a word is refused: one test a fault, with the right value."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from fakes import byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from torchbandit import BanditEnv, CausalLMPolicy, KLPenalty, ModelSpec, PromptSet, RewardModel, Sampling
from torchbandit.generation import generate
from torchbandit.learn import PPO, RLOO
from torchbandit.models import (
    check_apart,
    check_same_tokenizer,
    load_causal_lm,
    load_reward_model,
    quantize,
    without_adapter,
)
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import LoopOptions

SAMPLING = Sampling(max_new_tokens=6)


def folder(model, at, tokenizer=None):
    model.save_pretrained(at)
    (tokenizer or byte_tokenizer()).save_pretrained(at)
    return at


def unanswered():
    return fake_batch().exclude(("tokens", "response"), ("masks", "response"))


def length(td):
    return td["masks", "response"].float().sum(-1)


def mixture(kind=Qwen3MoeConfig, **more):
    sizes = dict(vocab_size=259, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_local_experts=4,
                 num_experts_per_tok=2, pad_token_id=None, bos_token_id=None, eos_token_id=258)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(sizes | more)))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


def test_trap_20_a_value_head_reopens(tmp_path):
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=SAMPLING, critic="head")
    torch.nn.init.normal_(policy.value_head.weight)
    policy.save_pretrained(tmp_path)
    td = fake_batch()
    again = CausalLMPolicy(tmp_path, critic="head", sampling=SAMPLING)
    assert policy.values(td).abs().max() > 0.1
    assert_close(again.values(td), policy.values(td))
    state = load_file(tmp_path / "value_head.safetensors")
    save_file(
        {"weight": state["weight"][:, :-1].contiguous(), "bias": state["bias"]}, tmp_path / "value_head.safetensors"
    )
    with pytest.raises(ValueError, match="value_head.safetensors: must hold .*32.*got .*31"):
        CausalLMPolicy(tmp_path, critic="head")


def test_trap_20_a_critic_reopens_and_is_not_replaced_by_a_head(tmp_path):
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=SAMPLING, critic=tiny_reward_model())
    policy.save_pretrained(tmp_path)
    again = CausalLMPolicy(tmp_path, critic=tmp_path / "critic", sampling=SAMPLING)
    assert_close(again.values(fake_batch()), policy.values(fake_batch()))
    with pytest.raises(ValueError, match=r'critic: .*got critic="head"; name it'):
        CausalLMPolicy(tmp_path, critic="head")


@pytest.mark.parametrize("live", [False, True])
def test_trap_20_an_adapter_reopens(tmp_path, live):
    peft = pytest.importorskip("peft")
    base = folder(tiny_lm(), tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    if live:  # over a base that has no name
        source = peft.get_peft_model(tiny_lm(), config).get_base_model()
    else:
        peft.get_peft_model(tiny_lm(), config).save_pretrained(tmp_path / "lora")
        source = ModelSpec(base, adapter=tmp_path / "lora")
    policy = CausalLMPolicy(source, byte_tokenizer(), sampling=SAMPLING, critic="head")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name or ("lm_head" in name and weight.requires_grad) or "value_head" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    policy.save_pretrained(tmp_path / "out")
    td = fake_batch()
    want = policy(td)["log_probs"]
    again = CausalLMPolicy(tmp_path / "out", critic="head", sampling=SAMPLING)
    assert_close(again(td)["log_probs"], want)
    assert_close(again.values(td), policy.values(td))
    assert {n for n, p in again.lm.named_parameters() if p.requires_grad and "lora_" in n}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(3, 12)[None]
    assert_close(theirs(input_ids=ids).logits, policy.lm(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_trap_21_shared_weights_are_refused():
    tok, model, judge = byte_tokenizer(), tiny_lm(), tiny_reward_model()
    prompts = PromptSet.from_texts(["one", "two"], tok, max_length=8)
    options = LoopOptions(steps=1)
    for terms in ([length, KLPenalty(model)], [length, RewardModel(model)]):
        env = BanditEnv(prompts, terms, num_prompts=2, group_size=2)
        with pytest.raises(
            ValueError, match="must have weights of its own, got the policy's lm.model.embed_tokens.weight"
        ):
            BanditTrainer(env, CausalLMPolicy(model, tok, sampling=SAMPLING), RLOO(), options)
    env = BanditEnv(prompts, [RewardModel([tiny_reward_model(seed=3), judge])], num_prompts=2)
    policy = CausalLMPolicy(model, tok, sampling=SAMPLING, critic=judge)
    with pytest.raises(ValueError, match='"reward_model".*critic.model.embed_tokens'):
        BanditTrainer(env, policy, PPO(), LoopOptions(steps=1))
    check_apart(policy, {"kl": [copy.deepcopy(model)]})


def test_trap_21_the_frozen_base_of_an_adapter_may_be_shared():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_lm(), peft.LoraConfig(r=4, target_modules=["q_proj"])).get_base_model()
    check_apart(model, {"kl": [without_adapter(model)]})
    with pytest.raises(ValueError, match="lora_A"):
        check_apart(model, {"kl": [model]})


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_trap_27_ids_beyond_the_tokenizer_are_never_sampled(plain, greedy):
    model = tiny_lm(vocab_size=320, **({"sliding_window": 4} if plain else {}))
    with torch.no_grad():
        model.lm_head.weight[259:] = model.lm_head.weight[:61] * 3  # the likeliest ids are no tokens
    policy = CausalLMPolicy(model, byte_tokenizer(), sampling=Sampling(max_new_tokens=30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = policy.generate(unanswered(), greedy=greedy)
        free = generate(
            model, out["tokens", "prompt"], out["masks", "prompt"], Sampling(max_new_tokens=30), stop_ids=(), pad_id=0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert free.tokens.max() >= 259 > out["tokens", "response"].max()
    # The log-probs are those of the whole softmax, as scoring computes them.
    assert_close(policy(out)["log_probs"], out["log_probs", "response"], atol=2e-4, rtol=1e-4)


def test_trap_27_sizes_are_compared():
    tok = byte_tokenizer()
    tok.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="policy: must have an embedding .* 259 embeddings for 260 ids .*<new>"):
        CausalLMPolicy(tiny_lm(), tok)
    with pytest.raises(ValueError, match="critic: must have an embedding"):
        CausalLMPolicy(tiny_lm(vocab_size=260), tok, critic=tiny_reward_model())


def test_a_device_that_is_not_there_is_refused():
    for device in ("mps", "tpu"):
        with pytest.raises(ValueError, match=f"device: must be one that torch can use here, got '{device}'"):
            CausalLMPolicy(tiny_lm(), byte_tokenizer(), device=device)
        with pytest.raises(ValueError, match="device: must be one"):
            BanditEnv(PromptSet.from_texts(["a"], byte_tokenizer(), max_length=4), length, num_prompts=1, device=device)


def test_a_head_needs_a_size(monkeypatch):
    model = tiny_lm("gpt2")
    config = type(model.config)
    monkeypatch.setattr(config, "attribute_map", {k: v for k, v in config.attribute_map.items() if k != "hidden_size"})
    with pytest.raises(ValueError, match="critic: GPT2LMHeadModel must say its hidden_size"):
        CausalLMPolicy(model, byte_tokenizer(), critic="head")


def test_prompt_ids_outside_the_vocabulary_are_refused():
    policy = CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=SAMPLING)
    td = unanswered()
    td["tokens", "prompt"][0, -1] = 300
    with pytest.raises(ValueError, match="prompt_ids: must be in 0..258, .* got 300"):
        policy.generate(td)


def test_a_pad_token_appended_to_a_reward_model_is_accepted(tmp_path):
    ours, own = byte_tokenizer(), byte_tokenizer()
    own.add_special_tokens({"pad_token": "[PAD]"})
    check_same_tokenizer(ours, folder(tiny_reward_model(vocab_size=260), tmp_path / "special", own), "reward model")
    own.add_tokens(["word"])  # a text that holds it is split otherwise
    with pytest.raises(ValueError, match="1 differ|2 differ"):
        check_same_tokenizer(ours, folder(tiny_reward_model(vocab_size=261), tmp_path / "plain", own), "reward model")
    grown = byte_tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<think>"]})  # ours may be written, and means nothing there
    with pytest.raises(ValueError, match="<think>"):
        check_same_tokenizer(grown, folder(tiny_reward_model(), tmp_path / "less"), "reward model")


def test_trap_35_experts_become_small(tmp_path):
    pytest.importorskip("torchao")
    plain = mixture()
    folder(plain, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        small = load_causal_lm(ModelSpec(tmp_path, quantization="int8"), "cpu")
    held = {n: p for n, p in small.named_parameters() if "experts" in n and p.dim() == 3 and n.endswith("original0")}
    assert len(held) == 4 and all(quantize.is_quantized(p) for p in held.values())
    ids = torch.arange(3, 40)[None]
    got, want = small(input_ids=ids).logits.flatten(), plain(input_ids=ids).logits.flatten()
    assert not torch.equal(got, want) and torch.corrcoef(torch.stack((got, want)))[0, 1] > 0.999


def test_trap_35_the_share_that_stays_is_said(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    folder(mixture(), tmp_path)
    monkeypatch.setattr("torchbandit.models.experts.quantise", lambda model, kind: None)
    with pytest.warns(UserWarning, match=r"int8 leaves 8\d% of the weights of its layers"):
        load_causal_lm(ModelSpec(tmp_path, quantization="int8"), "cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_36_train_mode_changes_no_forward(checkpointing):
    policy = CausalLMPolicy(mixture(MixtralConfig, router_jitter_noise=0.5), byte_tokenizer(), sampling=SAMPLING)
    td = policy.generate(unanswered())
    if checkpointing:
        policy.gradient_checkpointing_enable()
    for turn_on in (policy.train, policy.lm.train):
        turn_on()
        for _ in range(2):
            assert_close(policy(td)["log_probs"], td["log_probs", "response"], atol=2e-4, rtol=1e-4)
    if checkpointing:
        again = [layer for layer in policy.lm.model.layers if layer.training and layer.gradient_checkpointing]
        assert len(again) == 2, "layers are computed again"


def test_trap_37_rows_beyond_a_context_are_unscorable():
    td = fake_batch(prompt_width=30, response_width=30)
    tokens = td["masks", "prompt"].sum(1) + td["masks", "response"].sum(1)
    limit = int(tokens.sort().values[4])
    long = tokens > limit
    assert long.any() and not long.all()
    for arch in ("llama", "gpt2"):
        size = {"gpt2": "n_positions"}.get(arch, "max_position_embeddings")
        short = RewardModel(tiny_reward_model(arch, **{size: limit}))
        got = short.score(td)
        assert torch.equal(got.isnan(), long | ~td["masks", "response"].any(1))
        kept = td[~long]
        assert_close(got[~long], short.score(kept), equal_nan=True, atol=1e-4, rtol=1e-4)
        reference = KLPenalty(tiny_lm(arch, **{size: limit})).log_probs(td)
        assert torch.equal(reference.isnan(), long[:, None] & td["masks", "response"])


def test_trap_37_rows_beyond_the_critics_context_are_unscorable():
    tok = byte_tokenizer()
    prompts = PromptSet.from_texts(["a" * 20, "b"], tok, max_length=20)
    policy = CausalLMPolicy(
        tiny_lm(), tok, sampling=Sampling(max_new_tokens=8, stop_ids=()),
        critic=tiny_reward_model(max_position_embeddings=24),
    )  # fmt: skip
    env = BanditEnv(prompts, length, num_prompts=2)
    td = env.step(policy.generate(env.reset()))
    assert torch.equal(td["next", "unscorable"], td["masks", "prompt"].sum(1) == 20)
    metrics = BanditTrainer(env, policy, PPO(), LoopOptions(steps=1)).step()
    assert all(value == value for name, value in metrics.items() if name.startswith("loss/")), metrics


def test_trap_38_unexpected_keys_are_refused(tmp_path):
    folder(tiny_reward_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"score.bias": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="got score.bias as well"):
        load_reward_model(tmp_path, "cpu")
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # older checkpoints hold it
    save_file(state | known, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_reward_model(tmp_path, "cpu")


def test_trap_39_a_quantised_model_is_no_policy_and_no_critic(tmp_path):
    pytest.importorskip("torchao")
    model = load_causal_lm(ModelSpec(folder(tiny_lm(), tmp_path / "lm"), quantization="int8"), "cpu")
    with pytest.raises(ValueError, match="quantization must be None .*lay adapters over it"):
        CausalLMPolicy(model, byte_tokenizer())
    CausalLMPolicy(model, byte_tokenizer(), trainable=False)
    spec = ModelSpec(folder(tiny_reward_model(), tmp_path / "rm"), quantization="int8")
    for critic in (spec, load_reward_model(spec, "cpu")):
        with pytest.raises(ValueError, match="quantization must be None .*lay adapters over it"):
            CausalLMPolicy(tiny_lm(), byte_tokenizer(), critic=critic)
