"""BanditEnvRunner: whole prompt batches, generated and scored on the device. (B, T, G: see batch.py.)

RLlib's own runner keeps an episode object a row; here a batch stays one TensorDict until it is handed over, as flat
tensors. A remote runner sends them as arrays together with its place in the prompts, from which it, or its successor
after a crash, goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import fsum
from typing import Any

import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils import metrics as names
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics.stats import MeanStats, SumStats
from tensordict import TensorDict
from torch import Tensor

from torchbandit.clock import Clock
from torchbandit.env import BanditEnv
from torchbandit.learn.collect import EnvDraw, collect
from torchbandit.learn.metrics import Metrics, reward_metrics, to_host
from torchbandit.learn.seeds import sampling_seed
from torchbandit.rllib.env_fn import call_env_fn, check_tokenizers
from torchbandit.rllib.module import PLACEHOLDER, CausalLMModule, empty_module, here, same_algorithms
from torchbandit.rllib.wire import flatten, pack, to_array, unpack

PLACE = "place"
COUNTED = "refill/groups"
"""What names of counts begin with, which add up over runners as over the local engine's ranks."""


class BanditEnvRunner(EnvRunner, Checkpointable):
    """Samples from one `BanditEnv`; built by RLlib from a `BanditConfig`, on the driver or as an actor.

    An actor whose env or policy cannot be built stays alive and says why in `report()`, since RLlib would start a dead
    one again and again.
    """

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        with same_algorithms():
            super().__init__(config=config, **kwargs)
        self.num_env_steps_sampled_lifetime: int = 0
        self.module: CausalLMModule | None = None
        self.env: BanditEnv | None = None
        self.problem: str | None = None
        self._shares_module = False
        self.weights_seq_no = 0
        self._sampled: list[tuple[dict[str, Tensor], Clock]] = []
        self._last: TensorDict | None = None
        self.told: Metrics = {}
        self.learners_weights: dict[str, Tensor] | None = None  # see broadcast.py
        remote = bool(self.worker_index)
        if remote:
            torch.set_num_threads(max(1, int(config.num_cpus_per_env_runner)))
            gpus = config.num_gpus_per_env_runner
        else:  # the learner's device if it lives here, and not the CPU, as RLlib has it for local runners
            gpus = config.num_gpus_per_env_runner if config.num_learners else config.num_gpus_per_learner
        self.device = torch.empty((), device=get_device(config, gpus)).device
        seed = sampling_seed(config.seed or 0, max(0, self.worker_index - 1), evaluation=bool(config.in_evaluation))
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.algorithm, self.options = config.algorithm, config.update_options()
        try:
            self.make_env()
            self.make_module()
        except Exception as error:
            if not remote:
                raise
            self.problem = f"{type(error).__name__}: {error}"

    def make_env(self) -> None:
        """Call `env_fn` and take this runner's share of the prompts; ValueError where it cannot be had."""
        self.stop()
        self.env = call_env_fn(self.config.env_fn, self.worker_index, self.num_workers, self.device)

    def make_module(self) -> None:
        """Build this runner's own policy, empty until the first broadcast; the local one is handed the learner's."""
        if self.worker_index or self.config.num_learners:
            self._take(empty_module(self.config, self.device))

    def share_module(self, module: CausalLMModule) -> None:
        """Generate with the learner's own module; there is no second copy of the model, and nothing to broadcast."""
        self._take(module)
        self._shares_module = True

    def _take(self, module: CausalLMModule) -> None:
        assert self.env is not None
        check_tokenizers(self.config.env_fn, self.env, module)
        self.module = module

    def report(self) -> dict[str, Any]:
        """What the algorithm checks before the first batch: the problem of its build, sizes, and the place it is at."""
        told = {"worker": self.worker_index, "node": here(), "problem": self.problem}
        if self.problem is not None or self.env is None:
            return told
        sizes = {"group_size": self.env.group_size, "prompt_width": self.env.prompts.width}
        return told | sizes | {"rows": self.env.batch_size, PLACE: self.place()}

    def get_spaces(self) -> dict[str, tuple[Any, Any]]:
        """Placeholders: RLlib asks for spaces, and a bandit on token tensors has none to tell."""
        spaces = (PLACEHOLDER, PLACEHOLDER)
        return {INPUT_ENV_SPACES: spaces, INPUT_ENV_SINGLE_SPACES: spaces, DEFAULT_MODULE_ID: spaces}

    def assert_healthy(self) -> None:
        """Nothing to assert: a runner that could not be built says so in `report()`."""

    def stop(self) -> None:
        """End the worker processes of host rewards."""
        if self.env is not None:
            self.env.close()

    def sample(
        self, *, num_timesteps: int | None = None, num_episodes: int | None = None, explore: bool | None = None,
        random_actions: bool = False, **kwargs: Any,
    ) -> list[MultiAgentBatch]:  # fmt: skip
        """At least that many rows (or episodes, which are the same), as tensors on the device.

        They come in whole prompt batches, one without a number. explore=False answers greedily, None is the config's;
        random actions are refused.
        """
        if random_actions:
            raise ValueError("random_actions: a policy over tokens has no use for random ones; leave it False")
        if self.env is None or self.module is None or self.problem is not None:
            raise ValueError(f"sample: this runner was not built: {self.problem}")
        rows = num_timesteps or num_episodes or self.env.batch_size
        explore = self.config.explore if explore is None else explore
        parts = [self._sample_batch(explore) for _ in range(-(-rows // self.env.batch_size))]
        td: Any = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = len(td)
        self.num_env_steps_sampled_lifetime += rows
        return [MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(flatten(td))}, env_steps=rows)]

    def sample_for_driver(self) -> dict[str, Any]:
        """One batch for the object store, with metrics and the place after it; a failure comes back as its reason.

        A runner that died of a bad reward model would take the reason with it.
        """
        told: dict[str, Any] = {"worker": self.worker_index, "node": here()}
        try:
            rows = self.sample()[0].policy_batches[DEFAULT_MODULE_ID]
            arrays = {key: to_array(value) for key, value in rows.items()}
            return told | {"rows": arrays, "metrics": self.get_metrics(), PLACE: self.place(), **self.health()}
        except Exception as error:
            return told | {"problem": f"{type(error).__name__}: {error}"}

    def health(self) -> dict[str, Any]:
        """After `get_metrics`: its numbers by the local engine's names, and why rows have no valid score if most do."""
        assert self.env is not None
        why = ""
        if self.told.get("unscorable", 0.0) > 0.5 and self._last is not None:  # the run ends: copies cost nothing now
            why = f"of {len(self._last)} rows here: {self.env.rewards.why_unscorable(self._last)}"
        return {"told": self.told, "why_unscorable": why}

    def _sample_batch(self, explore: bool) -> TensorDict:
        assert self.env is not None and self.module is not None
        env, module, G = self.env, self.module, self.env.group_size
        before = self.position()
        clock = Clock(self.device)

        def answer(td: TensorDict) -> TensorDict:
            return module.generate(td, greedy=not explore, generator=self.generator, group_size=G)

        draw = EnvDraw(env, answer, lambda td: module.generate(td, greedy=True, group_size=1), clock)
        try:
            if explore and not self.config.in_evaluation:
                td, numbers = collect(env, self.algorithm, draw, self.options)
            else:  # nothing is learnt from it, so it is what was asked
                td = draw()
                numbers = reward_metrics(td, G)
        except BaseException:  # whoever goes on, begins with the prompts that were lost here
            self.go_to(before)
            raise
        self._sampled.append((numbers, clock))
        self._last = td
        return td

    def get_metrics(self) -> dict[str, Any]:
        """Means over the batches since the last call; one copy from the device for all numbers of a batch."""
        assert self.env is not None
        rows = len(self._sampled) * self.env.batch_size
        agent, module = f"{names.NUM_AGENT_STEPS_SAMPLED}/{DEFAULT_AGENT_ID}", names.NUM_MODULE_STEPS_SAMPLED
        counted = (names.NUM_ENV_STEPS_SAMPLED, agent, f"{module}/{DEFAULT_MODULE_ID}", names.NUM_EPISODES)
        sums: dict[str, float] = dict.fromkeys(counted, rows)
        means: dict[str, float] = {} if self._shares_module else {names.WEIGHTS_SEQ_NO: self.weights_seq_no}
        if self._sampled:
            each = [to_host(numbers) for numbers, _ in self._sampled]
            self.told = joined(each) | self.env.packing_metrics
            sums |= {name: number for name, number in self.told.items() if name.startswith(COUNTED)}
            means |= {name: number for name, number in self.told.items() if name not in sums}
            means[names.EPISODE_RETURN_MEAN] = means["reward"]
            times = [clock.read() for _, clock in self._sampled]
            sums |= {f"time/{stage}_s": sum(seconds[stage] for seconds in times) for stage in ("generate", "score")}
        self._sampled = []
        self.metrics.log_value(names.NUM_ENV_STEPS_SAMPLED_LIFETIME, rows, reduce="lifetime_sum", with_throughput=True)
        reduced: dict[str, Any] = self.metrics.reduce()
        # What is one number already needs no logger: it would add each up, or take its mean, by numpy, for 0.3 ms.
        for kind, found in ((partial(MeanStats, window=1), means), (SumStats, sums)):
            for name, value in found.items():
                group, _, last = name.partition("/")
                stats = kind()
                stats.push(value)
                reduced |= {group: {**reduced.get(group, {}), last: stats} if last else stats}
        return reduced

    def place(self) -> dict[str, Any]:
        """`position()` as it travels."""
        return {name: pack(value) for name, value in self.position().items()}

    def position(self) -> dict[str, Any]:
        """Where this runner stands: its batch of prompts, the terms' statistics, its generator; nothing is copied."""
        assert self.env is not None
        return {"env": self.env.state_dict(), "generator": self.generator.get_state()}

    def go_to(self, place: dict[str, Any], *, generator: bool = True) -> None:
        """Go on where one of the two was taken; generator=False keeps this runner's own, for another's place."""
        assert self.env is not None
        self.env.load_state_dict(unpack(place["env"]))
        if generator:
            self.generator.set_state(unpack(place["generator"]))

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The place, and the weights if they are asked for."""
        state: dict[str, Any] = {names.NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime}
        if self.env is not None and self._check_component(PLACE, components, not_components):
            state[PLACE] = self.place()
        if self.module is None or self._shares_module:  # the learner's to save
            return state
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = {DEFAULT_MODULE_ID: self.module.get_state()}
            state[names.WEIGHTS_SEQ_NO] = self.weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up weights and place, whichever are there."""
        if COMPONENT_RL_MODULE in state and self.module is not None and not self._shares_module:
            weights = state[COMPONENT_RL_MODULE]
            weights = ray.get(weights) if isinstance(weights, ray.ObjectRef) else weights
            try:
                self.module.set_state(weights[DEFAULT_MODULE_ID])
                self.problem = None
            except ValueError as error:
                if not self.worker_index:
                    raise
                self.problem = f"ValueError: {error}"  # told by `report` and `sample`; a dead actor tells nothing
            self.weights_seq_no = state.get(names.WEIGHTS_SEQ_NO, 0)
        if PLACE in state and self.env is not None:
            self.go_to(state[PLACE])
        steps = state.get(names.NUM_ENV_STEPS_SAMPLED_LIFETIME, self.num_env_steps_sampled_lifetime)
        self.num_env_steps_sampled_lifetime = steps

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For RLlib's checkpoints."""
        return (), {"config": self.config, "worker_index": self.worker_index, "num_workers": self.num_workers}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        """None: weights are the learner's to save."""
        return []


def joined(each: Sequence[Metrics]) -> Metrics:
    """One line of metrics from those of several batches or runners: their mean, and the sum of what is counted."""
    sums = {name: fsum(numbers[name] for numbers in each) for name in each[0]}
    return {name: number if name.startswith(COUNTED) else number / len(each) for name, number in sums.items()}
