"""Two nodes on one machine: a replica on each, which loads its own weights from its own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from fakes import byte_tokenizer, tiny_lm, tiny_reward_model  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from rllib_toy import ToyEnv, make_models, toy_config  # noqa: E402

from torchbandit.env import BanditEnv  # noqa: E402
from torchbandit.rewards import RewardModel  # noqa: E402

pytestmark = pytest.mark.slow
REWARD, ONLY_HERE, POLICIES = "toy/reward", "toy/only-here", ("toy/policy-here", "toy/policy-there")


def fill_hub_cache(home: Path, name: str, model: Any) -> None:
    """What `huggingface_hub` finds under HF_HOME when it is offline."""
    repo = home / "hub" / ("models--" + name.replace("/", "--"))
    snapshot = repo / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot)
    byte_tokenizer().save_pretrained(snapshot)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)


class HubEnv(ToyEnv):
    """A reward model by hub id, read from the node's own cache."""

    def __init__(self, policy: str, reward_model: str) -> None:
        super().__init__(policy)
        self.reward_model = reward_model

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> Any:
        plain = super().__call__(worker_index, num_workers, device)
        return BanditEnv(plain.prompts, RewardModel(self.reward_model), num_prompts=4, group_size=4, device=device)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two nodes with two HF_HOMEs: each with a reward model and a policy of its own, and one more model."""
    folder = tmp_path_factory.mktemp("nodes")
    homes = [folder / "home0", folder / "home1"]
    for seed, home in enumerate(homes):
        fill_hub_cache(home, REWARD, tiny_reward_model("llama", seed=seed))
        fill_hub_cache(home, POLICIES[seed], tiny_lm("llama"))
    fill_hub_cache(homes[0], ONLY_HERE, tiny_reward_model("llama"))
    tests = str(Path(__file__).parent)
    cluster = Cluster()
    for home in homes:
        path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
        variables = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        cluster.add_node(num_cpus=3, include_dashboard=False, env_vars=variables)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield homes
    ray.shutdown()
    cluster.shutdown()


def config(policy: str, reward_model: str) -> Any:
    """Two runners of two CPUs each: one a node."""
    made = toy_config(policy, 2, 0, env_fn=HubEnv(policy, reward_model))
    return made.env_runners(num_cpus_per_env_runner=2)


def test_each_replica_loads_its_own(homes: list[Path], tmp_path: Path) -> None:
    algo = config(make_models(tmp_path)["policy"], REWARD).build_algo()
    each = algo.env_runner_group.foreach_env_runner
    told = each(lambda r: (os.environ["HF_HOME"], ray.get_runtime_context().get_node_id()))
    assert sorted(home for home, _ in told) == sorted(map(str, homes))
    assert len({node for _, node in told}) == 2
    result = algo.train()
    assert result["env_runners"]["num_env_steps_sampled"] == 32
    heads = each(lambda r: float(r.env.rewards.models()[0].score.weight.sum()))
    assert heads[0] != heads[1]
    algo.stop()


def test_weights_of_one_node_alone(homes: list[Path], tmp_path: Path) -> None:
    """Found at build, with the node and the path, before anything is trained."""
    with pytest.raises(ValueError, match=rf"env runner \d on node .*{ONLY_HERE}.*put them on all nodes"):
        config(make_models(tmp_path)["policy"], ONLY_HERE).build_algo()


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_of_one_node_alone(homes: list[Path], tmp_path: Path, policy: str) -> None:
    """A runner's policy is filled by the broadcast, but its shape and tokenizer are read where it lives."""
    made = config(make_models(tmp_path)["policy"], REWARD).rl_module(pretrained=policy).learners(num_learners=1)
    with pytest.raises(ValueError, match=rf"rl_module\(pretrained='{policy}', .*built on node .*put it on all nodes"):
        made.build_algo()
