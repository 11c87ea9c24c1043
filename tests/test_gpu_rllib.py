"""Actors of RLlib that share one GPU: runners read new weights out of the learner's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray.rllib")

import ray
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from rllib_toy import make_models, reward, toy_config

from torchbandit.rllib.broadcast import Broadcast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_runners_read_the_learners_memory_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_store: list[Any] = []
    through_store = Broadcast.through_store

    def spy(self: Broadcast, group: Any, workers: list[int] | None = None) -> None:
        by_store.append(workers)
        through_store(self, group, workers)

    monkeypatch.setattr(Broadcast, "through_store", spy)
    ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        config = toy_config(make_models(tmp_path)["policy"], 2, 1, lr=1e-2).rl_module(dtype="bfloat16")
        config.env_runners(num_gpus_per_env_runner=0.3).learners(num_gpus_per_learner=0.3)
        algo = config.build_algo()
        try:
            history = [reward(algo.train()) for _ in range(8)]
            learner = algo.learner_group.get_weights()[DEFAULT_MODULE_ID]["weights"]
            (now,) = (r.get() for r in algo.learner_group.foreach_learner(lambda learner: learner._weights_seq_no))
            states = algo.env_runner_group.foreach_env_runner(
                lambda r: (r.weights_seq_no, r.get_state(components=COMPONENT_RL_MODULE)[COMPONENT_RL_MODULE]),
                local_env_runner=False,
            )
        finally:
            algo.stop()
    finally:
        ray.shutdown()
    assert by_store == [], by_store
    assert sum(history[-2:]) > sum(history[:2]), history
    assert len(states) == 2
    for sequence, state in states:
        assert sequence == now > 0
        theirs = state[DEFAULT_MODULE_ID]["weights"]
        assert theirs.keys() == learner.keys()
        for name, bits in learner.items():
            assert bits.raw.tobytes() == theirs[name].raw.tobytes(), name
