"""Every algorithm gives the same metrics on either engine, from one seed; and runs on actors of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from rllib_toy import NUM_PROMPTS, T, make_models  # noqa: E402

from torchbandit.learn import ALGORITHMS  # noqa: E402
from torchbandit.rllib.run import to_config, train  # noqa: E402
from torchbandit.train import run as local  # noqa: E402
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
        minibatches=2, micro_batch_size=4, entropy_coef=0.01, lr=1e-3, kl_coef=0.05, steps=3, save_every=0,
        device="cpu", schedule="linear", packing=False, num_samples=0, seed=5,
    )  # fmt: skip


def lines(out: Path) -> list[dict[str, float]]:
    """What is told of a run's steps, times and rates aside."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in read]


def assert_same_metrics(own: dict[str, Any], folder: Path, **options: Any) -> list[dict[str, float]]:
    """Three steps on the local engine and on RLlib with nothing remote."""
    local.train(TrainOptions(**own | options | {"out": str(folder / "local")}))
    train(TrainOptions(**own | options | {"out": str(folder / "rllib"), "engine": "rllib"}))
    ours, theirs = lines(folder / "rllib"), lines(folder / "local")
    assert len(ours) == 3 and {"reward", "kl", "loss/policy", "loss/ptx", "grad_norm"} <= set(ours[0])
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5, nan_ok=True)
    return ours


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_metrics_as_the_local_engine(own: dict[str, Any], tmp_path: Path, name: str) -> None:
    assert_same_metrics(own, tmp_path, algo=name)
