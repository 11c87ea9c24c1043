"""How new weights reach the runners: out of the learner's memory on the same GPU, else once through the object store.

CUDA lets a process of the same machine open another one's memory by a handle. A runner that shares a GPU with a
learner is handed the handles of its weights once; from then on a broadcast to it is a call without data and a copy on
the device, where the way through the host takes longer than a batch of a small model does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.utils import metrics as names
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

logger = logging.getLogger(__name__)
DEVICE = 6
"""Where the handle of a CUDA tensor has the number of its device, which is another one in another process."""


def card(device: torch.device) -> str | None:
    """The GPU, by a name that no other one has and every process knows; None on a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def handles_of(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What another process of this machine needs to open CUDA tensors; {} where they cannot be shared."""
    try:
        return {name: reduce_tensor(tensor.detach()) for name, tensor in weights.items()}
    except Exception as error:  # what a driver, a container or an allocator forbids has many names
        logger.warning("the learner's weights go to env runners on its GPU through the host: %s", error)
        return {}


def meet(runner: Any, handles: dict[str, Any]) -> str | None:
    """Open a learner's weights where they lie ({}: no learner is near); why that failed, or None.

    The memory stays the learner's, and is gone when that one ends.
    """
    runner.learners_weights = {}
    if runner.module is None or runner.module.weights().keys() != handles.keys():
        return None  # what is wrong with it, `set_state` tells
    index = runner.device.index
    try:
        runner.learners_weights = {
            name: rebuild(*args[:DEVICE], index, *args[DEVICE + 1 :]) for name, (rebuild, args) in handles.items()
        }
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def read(runner: Any, sequence: int) -> bool | None:
    """Copy the weights of the learner on this runner's GPU; False where none is, None where that is not known yet.

    Args:
        sequence: RLlib's number of these weights.
    """
    if not runner.learners_weights or runner.module is None:
        return None if runner.learners_weights is None else False
    runner.module.copy_weights(runner.learners_weights)
    torch.cuda.synchronize(runner.device)  # before the learner writes the next ones
    runner.weights_seq_no = sequence
    return True


class Broadcast:
    """Sends a learner group's weights to the env runners of a group, and waits until they are there.

    Args:
        learners: RLlib's LearnerGroup.
        timeout_s: for a runner's answer to a call. One that gives none in time takes the weights when it can, before
            it samples again: an actor's calls keep their order.
    """

    def __init__(self, learners: Any, timeout_s: float | None) -> None:
        self._learners, self._timeout_s = learners, timeout_s

    def __call__(self, group: Any) -> None:
        """Every runner takes the present weights by the quickest way that it has."""
        sequence = self._ask(_settled)[0]

        def read_weights(runner: Any) -> tuple[int, bool | None]:
            return runner.worker_index, read(runner, sequence)

        answers = dict(self._each(group, read_weights))
        if None in answers.values():  # new ones, and those that Ray has started again
            self._introduce(group)
            answers = dict(self._each(group, read_weights))
        far = [worker for worker, has_read in answers.items() if not has_read]
        if far:
            self.through_store(group, far)

    def through_store(self, group: Any, workers: list[int] | None = None) -> None:
        """The bits of every weight, written once by a learner and read by the runners (None: all of them)."""
        ref, sequence = self._ask(_put, first=True)[0]
        state = {COMPONENT_RL_MODULE: ref, names.WEIGHTS_SEQ_NO: sequence}

        def take(runner: Any) -> None:
            if workers is None or runner.worker_index in workers:
                runner.set_state(state)

        self._each(group, take)

    def _introduce(self, group: Any) -> None:
        """Hand each runner the handles of the learner on its GPU, if there is one."""
        for worker, here in self._each(group, lambda runner: (runner.worker_index, card(runner.device))):
            # Anew for each: a handle is opened once. By name: which answer is whose is not told by their order.
            handles = dict(self._ask(_offer)).get(here, {}) if here is not None else {}

            def hand_over(runner: Any, worker: int = worker, handles: dict[str, Any] = handles) -> str | None:
                return meet(runner, handles) if runner.worker_index == worker else None

            for why in filter(None, self._each(group, hand_over)):
                logger.warning("env runner %d takes its learner's weights through the host: %s", worker, why)

    def _each(self, group: Any, what: Callable[[Any], Any]) -> list[Any]:
        answers: list[Any] = group.foreach_env_runner(what, timeout_seconds=self._timeout_s)
        return answers

    def _ask(self, what: Callable[[Any], Any], *, first: bool = False) -> list[Any]:
        """A call's results on all learners, or on the first of them."""
        chosen = None if self._learners.is_local or not first else self._learners._worker_manager.actor_ids()[:1]
        found: list[Any] = self._learners._get_results(self._learners.foreach_learner(what, remote_actor_ids=chosen))
        return found


def _settled(learner: Any) -> int:
    """The number of the present weights, when all that writes them has been done."""
    if learner._device.type == "cuda":
        torch.cuda.synchronize(learner._device)
    return int(learner._weights_seq_no)


def _put(learner: Any) -> tuple[Any, int]:
    state = learner.get_state(components=COMPONENT_RL_MODULE, inference_only=True)[COMPONENT_RL_MODULE]
    return ray.put(state), int(learner._weights_seq_no)


def _offer(learner: Any) -> tuple[str | None, dict[str, Any]]:
    here = card(learner._device)
    return here, {} if here is None else handles_of(learner.lm_module.weights())
