"""Which way new weights take to a runner, with groups of stand-ins in this process: RLlib's calls, no actors, no GPU.

That CUDA's handles hold what they promise is tests/test_gpu_rllib.py's; the way through the store, with actors,
tests/test_rllib_remote.py's.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("ray.rllib")

from torchbandit.rllib import broadcast
from torchbandit.rllib.broadcast import DEVICE, Broadcast


class Module:
    def __init__(self, value: float) -> None:
        self.layer = torch.full((3,), value)

    def weights(self) -> dict[str, torch.Tensor]:
        return {"layer": self.layer}

    def copy_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.layer.copy_(weights["layer"])


class Runner:
    """Any one that is made is index 5 of its process's GPUs."""

    def __init__(self, worker_index: int, gpu: str | None) -> None:
        self.worker_index, self.device = worker_index, SimpleNamespace(gpu=gpu, index=5)
        self.module, self.weights_seq_no = Module(0.0), 0
        self.learners_weights: Any = None

    def set_state(self, state: dict[str, Any]) -> None:
        self.module.copy_weights(state["rl_module"])
        self.weights_seq_no = state["weights_seq_no"]

    @property
    def value(self) -> float:
        return float(self.module.layer[0])


class Learner:
    def __init__(self, gpu: str | None, value: float) -> None:
        self.lm_module, self._device = Module(value), SimpleNamespace(gpu=gpu, type="cpu")
        self._weights_seq_no = 7

    def get_state(self, **kwargs: Any) -> dict[str, Any]:
        return {"rl_module": {"layer": self.lm_module.layer.clone()}}


class Learners:
    is_local = False

    def __init__(self, *learners: Learner) -> None:
        self.learners = learners
        self._worker_manager = SimpleNamespace(actor_ids=lambda: list(range(len(learners))))

    def foreach_learner(self, what: Any, *, remote_actor_ids: list[int] | None) -> list[Any]:
        return [what(learner) for i, learner in enumerate(self.learners) if i in (remote_actor_ids or [i])]

    def _get_results(self, results: list[Any]) -> list[Any]:
        return results


class Group:
    def __init__(self, *runners: Runner) -> None:
        self.runners = runners

    def foreach_env_runner(self, what: Any, *, timeout_seconds: float) -> list[Any]:
        assert timeout_seconds == 60.0
        return [what(runner) for runner in self.runners]


@pytest.fixture(autouse=True)
def puts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What goes into the object store. A handle opens the very tensor; a device knows the name of its GPU."""
    stored: list[Any] = []

    def put(what: Any) -> Any:
        stored.append(what)
        return what

    def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        def rebuild(*args: Any) -> torch.Tensor:
            assert args == (*range(DEVICE), 5, "after"), f"a runner's own device belongs there: {args}"
            return tensor

        return rebuild, (*range(DEVICE), "the learner's device", "after")

    monkeypatch.setattr(broadcast.ray, "put", put)
    monkeypatch.setattr(broadcast, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr(broadcast, "card", lambda device: device.gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return stored


def test_each_runner_reads_from_the_learner_on_its_gpu(puts: list[Any]) -> None:
    learners = Learner("a", 1.0), Learner("b", 2.0)  # in truth they hold the same; this tells which one was read
    runners = Runner(1, "b"), Runner(2, "a"), Runner(3, "b")
    send, group = Broadcast(Learners(*learners), 60.0), Group(*runners)
    send(group)
    assert [runner.value for runner in runners] == [2.0, 1.0, 2.0] and not puts
    learners[1].lm_module.layer.add_(1)
    learners[1]._weights_seq_no = learners[0]._weights_seq_no = 8
    send(group)
    assert [runner.value for runner in runners] == [3.0, 1.0, 3.0] and not puts
    assert [runner.weights_seq_no for runner in runners] == [8, 8, 8]


def test_the_others_get_them_through_the_store_written_once(puts: list[Any]) -> None:
    runners = Runner(1, "a"), Runner(2, "c"), Runner(3, None)
    send = Broadcast(Learners(Learner("a", 1.0), Learner("b", 2.0)), 60.0)
    for _ in range(2):
        send(Group(*runners))
    assert [runner.value for runner in runners] == [1.0, 1.0, 1.0]
    assert [runner.weights_seq_no for runner in runners] == [7, 7, 7]
    assert len(puts) == 2  # one a broadcast


def test_a_runner_that_was_started_again_is_introduced(puts: list[Any]) -> None:
    send = Broadcast(Learners(Learner("a", 1.0)), 60.0)
    send(Group(Runner(1, "a"), Runner(2, "a")))
    fresh = Runner(2, "a")
    send(Group(Runner(1, "a"), fresh))
    assert fresh.value == 1.0 and not puts


@pytest.mark.parametrize("side", ["learner", "runner"])
def test_where_handles_are_refused_the_store_serves(
    side: str, puts: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("CUDA error: not permitted here")

    monkeypatch.setattr(broadcast, "reduce_tensor", refuse if side == "learner" else lambda x: (refuse, (0,) * 8))
    runner, send = Runner(4, "a"), Broadcast(Learners(Learner("a", 1.0)), 60.0)
    with caplog.at_level(logging.WARNING, broadcast.logger.name):
        send(Group(runner))
        send(Group(runner))
    assert runner.value == 1.0 and len(puts) == 2
    assert caplog.text.count("through the host") == caplog.text.count("not permitted here") == 1, caplog.text
