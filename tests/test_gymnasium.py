"""The bandit behind Gymnasium's vector protocol, and RLlib's stock PPO on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", reason="the gymnasium extra is not installed")

import numpy as np  # noqa: E402
from fakes import byte_tokenizer, tiny_lm  # noqa: E402
from gymnasium.vector import AutoresetMode  # noqa: E402

from torchbandit.adapters.gymnasium import ID, BanditVectorEnv  # noqa: E402
from torchbandit.env import BanditEnv  # noqa: E402
from torchbandit.generation import Sampling  # noqa: E402
from torchbandit.policy import CausalLMPolicy  # noqa: E402
from torchbandit.prompts import PromptSet  # noqa: E402

T = 5


def make_env(num_prompts: int = 3, group_size: int = 2, nan_rows: int = 0) -> BanditEnv:
    prompts = PromptSet.from_texts([f"p{i}" for i in range(9)], byte_tokenizer(), max_length=8)

    def low(td: Any) -> torch.Tensor:
        mask = td["masks", "response"]
        share = ((td["tokens", "response"] < 64) & mask).sum(-1) / mask.sum(-1)
        return share.masked_fill(torch.arange(len(share)) < nan_rows, torch.nan)

    return BanditEnv(prompts, low, num_prompts=num_prompts, group_size=group_size, packing=False)


@pytest.fixture(scope="module")
def policy() -> CausalLMPolicy:
    sampling = Sampling(max_new_tokens=T)
    return CausalLMPolicy(tiny_lm(), byte_tokenizer(), sampling=sampling, critic="head", packing=False)


def test_protocol(policy: CausalLMPolicy) -> None:
    envs = BanditVectorEnv(make_env())
    assert envs.num_envs == 6 and envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    handles, info = envs.reset()
    assert handles in envs.observation_space and info == {}
    answered = policy.generate(envs.pending)
    again, rewards, terminated, truncated, info = envs.step(answered)
    assert (again == handles).all() and rewards.shape == (6,) and rewards.dtype == np.float64
    assert terminated.all() and not truncated.any() and not info["unscorable"].any()
    following, rewards, terminated, _, _ = envs.step(None)
    assert (following == handles + 6).all() and not rewards.any() and not terminated.any()
    envs.close()


def test_empty_step_costs_no_scoring(policy: CausalLMPolicy) -> None:
    env = make_env()
    calls: list[int] = []
    step = env.step
    env.step = lambda td: (calls.append(1), step(td))[1]  # type: ignore[method-assign]
    envs = BanditVectorEnv(env)
    envs.reset()
    for _ in range(3):
        envs.step(policy.generate(envs.pending))
        assert envs.pending is None
        envs.step(np.zeros((6, 1)))
    assert len(calls) == 3 and envs.num_scored == 18


def test_rows_behind_handles(policy: CausalLMPolicy) -> None:
    envs = BanditVectorEnv(make_env(), keep=2)
    envs.reset()
    made = []
    for _ in range(3):
        made.append(policy.generate(envs.pending))
        envs.step(made[-1])
        envs.step(None)
    rows = envs.rows([17, 6, 12])
    tokens = torch.cat(made)["tokens", "response"]
    assert torch.equal(rows["tokens", "response"], tokens[[17, 6, 12]])
    with pytest.raises(ValueError, match="handles: 5 is not among the last 2 batches"):
        envs.rows([5])


def test_seed_begins_the_prompts_anew() -> None:
    envs = BanditVectorEnv(make_env())
    draws = []
    for seed in (1, 1, 2):
        envs.reset(seed=seed)
        draws.append(envs.pending["prompt_id"].clone())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_unscorable_rows(policy: CausalLMPolicy) -> None:
    envs = BanditVectorEnv(make_env(nan_rows=2))
    envs.reset()
    _, rewards, _, _, info = envs.step(policy.generate(envs.pending))
    assert info["unscorable"].tolist() == [True, True, False, False, False, False]
    assert rewards[:2] == pytest.approx(rewards[2:].mean())


def test_make_vec(policy: CausalLMPolicy) -> None:
    envs = gymnasium.make_vec(ID, num_envs=6, vectorization_mode="vector_entry_point", env=make_env)
    envs.reset()
    _, rewards, *_ = envs.step(policy.generate(envs.unwrapped.pending))
    assert rewards.shape == (6,)
    with pytest.raises(ValueError, match="num_envs: must be the env's batch size, 6"):
        gymnasium.make_vec(ID, num_envs=4, vectorization_mode="vector_entry_point", env=make_env)


def test_action_of_another_kind() -> None:
    envs = BanditVectorEnv(make_env())
    envs.reset()
    with pytest.raises(ValueError, match=r"actions: must be the TensorDict `pending` with responses.*ndarray"):
        envs.step(np.zeros((6, 1)))


# --- RLlib's own loop ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="the rllib extra is not installed")
    folder = tmp_path_factory.mktemp("policy")
    tiny_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield str(folder)
    ray.shutdown()


@pytest.mark.slow
def test_stock_ppo_trains(pretrained: str) -> None:
    """Stock Algorithm, runner and learner; rows scored are rows recorded; half of the steps cost nothing."""
    from ray.rllib.algorithms.ppo import PPO
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    from torchbandit.rllib import stock_ppo_config

    envs = BanditVectorEnv(make_env(num_prompts=8, group_size=8))
    config = stock_ppo_config(envs, pretrained=pretrained, sampling=Sampling(max_new_tokens=T))
    algo = config.training(lr=1e-2, num_epochs=4, minibatch_size=32).build_algo()
    assert type(algo) is PPO and type(algo.env_runner) is SingleAgentEnvRunner
    assert type(algo.learner_group._learner) is PPOTorchLearner
    generated: list[int] = []
    module = algo.env_runner.module
    generate = module.generate
    module.generate = lambda td, **kw: (generated.append(len(td)), generate(td, **kw))[1]
    results = [algo.train() for _ in range(10)]
    history = [r["env_runners"]["episode_return_mean"] for r in results]
    recorded = int(results[-1]["env_runners"]["num_env_steps_sampled_lifetime"])
    algo.stop()
    assert recorded == envs.num_scored == sum(generated) == 640
    assert history[-1] > history[0] + 0.15, history


@pytest.mark.slow
@pytest.mark.parametrize("where", ["env_runners", "learners"])
def test_stock_ppo_refuses_other_processes(pretrained: str, where: str) -> None:
    from torchbandit.rllib import stock_ppo_config

    config = stock_ppo_config(make_env(), pretrained=pretrained, sampling=Sampling(max_new_tokens=T))
    getattr(config, where)(**{f"num_{where}": 1})
    with pytest.raises(ValueError, match=f"num_{where}: must be 0, got 1.*BanditConfig"):
        config.build_algo()
