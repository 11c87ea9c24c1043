"""Models asleep and awake. On a CPU `park` stands in for `offload`, which passes over what is there already."""

from __future__ import annotations

from pathlib import Path

import naive
import pytest
import torch
from fakes import byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from test_models_quantize import ON_CPU, SIZES

from torchbandit import BanditEnv, KLPenalty, ModelSpec, PromptSet, RewardModel
from torchbandit.models import load_causal_lm
from torchbandit.models.estimate import weight_bytes
from torchbandit.models.offload import Sleeper, plain_tensors
from torchbandit.scoring import log_probs


def size(tensors: list[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_a_sleeping_model_takes_nothing_and_wakes_as_it_was() -> None:
    model = tiny_lm("gpt2")  # its head is tied to its embeddings
    args, tensors = naive.tensors(fake_batch()), plain_tensors(model)
    parameters, before, whole = list(model.parameters()), log_probs(model, *args), size(tensors)
    assert whole == sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    sleeper = Sleeper()
    assert sleeper.park(tensors) == whole and size(tensors) == 0
    assert sleeper.park(tensors) == 0, "asleep already"
    assert model.lm_head.weight.shape == (259, 32), "shape and dtype are still told"
    assert sleeper.onload() == whole == size(tensors) and sleeper.onload() == 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(log_probs(model, *args), before, rtol=0, atol=0)


def test_what_two_models_share_moves_once() -> None:
    lm, rm = tiny_lm(), tiny_reward_model()
    rm.model = lm.model
    both = [*plain_tensors(lm), *plain_tensors(rm)]
    alone = size(plain_tensors(lm)) + rm.score.weight.numel() * 4
    assert Sleeper().park(both) == alone


@pytest.mark.parametrize("kind", ON_CPU)
def test_quantised_weights_sleep_with_their_scales(kind: str, tmp_path: Path) -> None:
    tiny_lm(**SIZES).save_pretrained(tmp_path)
    model = load_causal_lm(ModelSpec(tmp_path, quantization=kind, dtype="bfloat16"), "cpu")
    args = naive.tensors(fake_batch())
    before, sleeper, tensors = log_probs(model, *args), Sleeper(), plain_tensors(model)
    freed = sleeper.park(tensors)  # float32 would stay: it is read in place, from the file
    assert freed > 0.95 * weight_bytes(tiny_lm(**SIZES), torch.bfloat16, kind) and size(plain_tensors(model)) == 0
    sleeper.onload()
    torch.testing.assert_close(log_probs(model, *args), before, rtol=0, atol=0)


def env_of(device: str = "cpu") -> BanditEnv:
    prompts = PromptSet.from_texts(["one", "three", "five"], byte_tokenizer(), max_length=8)
    terms = [RewardModel(tiny_reward_model().to(device)), KLPenalty(tiny_lm().to(device))]
    return BanditEnv(prompts, terms, num_prompts=2, device=device)


def step(env: BanditEnv) -> torch.Tensor:
    td = env.reset()
    response = torch.full((2, 3), 65, device=env.device)
    td["tokens", "response"], td["masks", "response"] = response, response == 65
    td["log_probs", "response"] = torch.zeros(2, 3, device=env.device)
    return env.step(td)["next", "reward"]


def test_on_the_cpu_there_is_nothing_to_free() -> None:
    env = env_of()
    assert env.offload() == 0, "nothing is loaded yet"
    before = step(env)
    assert env.offload() == 0 == env.onload()
    assert before.isfinite().all() and step(env).isfinite().all()


def test_a_sleeping_model_is_not_run() -> None:
    env, sleeper = env_of(), Sleeper()
    step(env)
    sleeper.park([t for model in env.rewards.models() for t in plain_tensors(model)])
    with pytest.raises(ValueError, match="sleeps in host memory.*onload"):
        step(env)
    sleeper.onload()
    assert step(env).isfinite().all()
