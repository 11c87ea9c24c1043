"""Every algorithm gives the same metrics on either engine, from one seed; and runs on actors of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from rllib_toy import NUM_PROMPTS, T, make_models  # noqa: E402

from torchbandit.learn import ALGORITHMS  # noqa: E402
from torchbandit.learn.algorithm import Algorithm, training_rows  # noqa: E402
from torchbandit.rllib.run import flat_metrics, to_config  # noqa: E402
from torchbandit.train import build  # noqa: E402
from torchbandit.train.loop import BanditTrainer  # noqa: E402
from torchbandit.train.options import TrainOptions  # noqa: E402

TIMED = ("time/", "samples_per_s", "memory")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    torch.set_num_threads(1)
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run on files of one's own; the same for every algorithm."""
    folder = tmp_path_factory.mktemp("toy")
    paths = make_models(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(NUM_PROMPTS)))
    return dict(
        policy=paths["policy"], reward=["rllib_toy:prefers_low_bytes"], prompts=str(prompts),
        ptx_data=paths["corpus.txt"], ptx_coef=0.1, ptx_length=32, num_prompts=4, max_new_tokens=T, epochs=2,
        minibatches=2, micro_batch_size=4, entropy_coef=0.01, lr=1e-3, kl_coef=0.05, steps=3, device="cpu",
        schedule="linear", packing=False, seed=5,
    )  # fmt: skip


def told(metrics: dict[str, float]) -> dict[str, float]:
    """Times and rates aside."""
    return {name: number for name, number in metrics.items() if not name.startswith(TIMED)}


def local(options: TrainOptions) -> list[dict[str, float]]:
    """Three steps of the local engine."""
    device, tokenizer = torch.device("cpu"), build.build_tokenizer(options)
    env = build.build_env(options, tokenizer, device)
    policy = build.build_policy(options, tokenizer, device)
    corpus = build.build_corpus(options, options.ptx_data if options.ptx_coef else None, tokenizer, device)
    trainer = BanditTrainer(env, policy, options.algorithm, options, corpus=corpus)
    return [told(trainer.step()) for _ in range(3)]


def on_rllib(options: TrainOptions, runners: int = 0, learners: int = 0) -> list[dict[str, float]]:
    """Three iterations on RLlib."""
    options.env_runners, options.learners = runners, learners
    algo = to_config(options, torch.device("cpu")).build_algo()
    try:
        return [told(flat_metrics(algo.train(), step, 1.0, max(1, runners))) for step in (1, 2, 3)]
    finally:
        algo.stop()


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 3 and {"reward", "grad_norm"} <= set(ours[0])
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_metrics_as_the_local_engine(own: dict[str, Any], name: str) -> None:
    options = own | {"algo": name}
    ours = on_rllib(TrainOptions(**options))
    assert_same(ours, local(TrainOptions(**options)))
    assert {"kl", "loss/ptx", "loss/entropy", "skipped_updates"} <= set(ours[0])


def test_refill_and_masks_too(own: dict[str, Any]) -> None:
    """What is orthogonal to an algorithm reaches RLlib by itself."""
    options = own | dict(
        algo="dapo", reward=["test_rllib_algorithms:coin"], refill=True, max_draws=3, mask_truncated=True,
        drop_constant_groups=True, max_grad_norm=0.0, ptx_coef=0.0, kl_in="loss", group_size=2,
    )  # fmt: skip
    ours = on_rllib(TrainOptions(**options))
    assert_same(ours, local(TrainOptions(**options)))
    assert ours[0]["refill/groups_drawn"] > 4 and ours[0]["refill/draws"] > 1


def coin(td: Any) -> torch.Tensor:
    """One row in four has a reward, so that most groups of two are constant."""
    return (td["tokens", "response"][:, 0] < 64).float()


@dataclass(frozen=True)
class Mine(Algorithm):
    """REINFORCE of one's own, with an option and a metric."""

    shift: float = 0.5

    def targets(self, td: Any, *, group_size: int, reduce: Any) -> Any:
        rows = training_rows(td)
        rows["advantages"] = td["next", "reward"].squeeze(-1) - self.shift
        rows["width"] = rows["learn_mask"].sum(-1).float()
        return rows

    def loss(self, out: Any, targets: Any, *, denominators: Any) -> Any:
        mask = targets["learn_mask"]
        value = -(out["log_probs"] * targets["advantages"] * mask).sum() / denominators["tokens"]
        return value, {"mine": value.detach(), "width_max": targets["width"].amax()}


def test_a_class_of_ones_own(own: dict[str, Any]) -> None:
    """On both engines by its name; KL, entropy and ptx are added to its loss."""
    options = own | dict(algo="test_rllib_algorithms:Mine", algo_options={"shift": 0.25}, group_size=2, kl_in="loss")
    ours = on_rllib(TrainOptions(**options))
    assert_same(ours, local(TrainOptions(**options)))
    assert {"loss/mine", "loss/width_max", "loss/kl", "loss/ptx", "loss/entropy"} <= set(ours[0])
    assert ours[0]["loss/width_max"] == T
    other = on_rllib(TrainOptions(**options | {"algo_options": {"shift": 0.75}}))
    assert other[0]["loss/mine"] != pytest.approx(ours[0]["loss/mine"], rel=1e-3), "the option does not arrive"


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_two_runners_and_two_learners(own: dict[str, Any], name: str) -> None:
    options = own | dict(algo=name, num_prompts=2, group_size=2, minibatches=1, micro_batch_size=2)
    ours = on_rllib(TrainOptions(**options, engine="rllib"), 2, 2)
    assert [line["step"] for line in ours] == [1, 2, 3]
    assert {"reward", "kl", "loss/policy", "loss/ptx", "grad_norm"} <= set(ours[0])
    assert all(line["grad_norm"] > 0 and line["skipped_updates"] == 0 for line in ours)
