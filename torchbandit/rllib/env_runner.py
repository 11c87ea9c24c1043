"""BanditEnvRunner: whole prompt batches, generated and scored on the device. (B, T, G: see batch.py.)

RLlib's own runner keeps an episode object a row; here a batch stays one TensorDict until it is handed over, as flat
tensors. A remote runner sends them as arrays together with its place in the prompts, from which it, or its successor
after a crash, goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_AGENT_ID, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils import metrics as names
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from tensordict import TensorDict
from torch import Tensor

from torchbandit import batch
from torchbandit.batch import masked_mean
from torchbandit.clock import Clock
from torchbandit.env import BanditEnv
from torchbandit.rllib.module import CausalLMModule, here
from torchbandit.rllib.wire import flatten, to_array, unpack
from torchbandit.rllib.wire import pack as pack_state

PLACE = "place"
PLACEHOLDER = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)


class BanditEnvRunner(EnvRunner, Checkpointable):
    """Samples from one `BanditEnv`; built by RLlib from a `BanditPPOConfig`, on the driver or as an actor.

    An actor whose env or policy cannot be built stays alive and says why in `report()`, since RLlib would start a dead
    one again and again.
    """

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.num_env_steps_sampled_lifetime: int = 0
        self.module: CausalLMModule | None = None
        self.env: BanditEnv | None = None
        self.problem: str | None = None
        self.unscorable = 0.0
        self._shares_module = False
        self._weights_seq_no = 0
        self._seen: list[tuple[list[str], Tensor]] = []
        self._clocks: list[Clock] = []
        self._num_rows = 0
        self._last: TensorDict | None = None
        remote = bool(self.worker_index)
        if remote:
            torch.set_num_threads(max(1, int(config.num_cpus_per_env_runner)))
            gpus = config.num_gpus_per_env_runner
        else:  # the learner's device if it lives here, and not the CPU, as RLlib has it for local runners
            gpus = config.num_gpus_per_learner if config.num_learners == 0 else 0
        self.device = torch.empty((), device=get_device(config, gpus)).device
        self.generator = torch.Generator(self.device).manual_seed(self._sampling_seed())
        try:
            self.make_env()
            self.make_module()
        except Exception as error:
            if not remote:
                raise
            self.problem = f"{type(error).__name__}: {error}"

    # --- what it is made of --------------------------------------------------------------------------------------

    def make_env(self) -> None:
        """Call `env_fn` and take this runner's share of the prompts.

        Raises:
            ValueError: env_fn raised, or returned something that is no `BanditEnv` on this runner's device.
        """
        rank, world_size = max(0, self.worker_index - 1), max(1, self.num_workers)
        made_by = f"bandit(env_fn={_name(self.config.env_fn)})"
        try:
            env = self.config.env_fn(self.worker_index, self.num_workers, self.device)
            if isinstance(env, BanditEnv):
                for term in env.rewards.terms:  # now, and not in the first batch: weights may be missing on this node
                    term.load(env.device)
        except Exception as error:
            raise ValueError(
                f"{made_by}: raised {type(error).__name__} on node {here()}: {error}. Every replica runs it on its own "
                "node and loads its models there: put them on all nodes or on shared storage, or give hub ids"
            ) from error
        if not isinstance(env, BanditEnv):
            raise ValueError(f"{made_by}: must return a BanditEnv, got {type(env).__name__}")
        if env.device != self.device:
            raise ValueError(
                f"{made_by}: must build the env on the device it is given, {self.device}, got {env.device}; pass "
                "device=device to BanditEnv"
            )
        if world_size > len(env.prompts):
            raise ValueError(
                f"num_env_runners: must be at most the {len(env.prompts)} prompts of the set, got {world_size}; use "
                "fewer runners, or give more prompts"
            )
        if self.env is not None:
            self.env.close()
        env.shard(rank, world_size)
        self.env = env

    def make_module(self) -> None:
        """Build this runner's own policy, empty until the first broadcast; the local one is handed the learner's."""
        if not self.worker_index and self.config.num_learners == 0:
            return
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        module = spec.module_class(
            observation_space=PLACEHOLDER,
            action_space=PLACEHOLDER,
            inference_only=True,
            model_config=spec.model_config | {"device": str(self.device), "empty": True},
        )
        self._take(module)

    def share_module(self, module: CausalLMModule) -> None:
        """Generate with the learner's own module; there is no second copy of the model, and nothing to broadcast."""
        self._take(module)
        self._shares_module = True

    def _take(self, module: CausalLMModule) -> None:
        assert self.env is not None
        ours, theirs = self.env.prompts.tokenizer.get_vocab(), module.policy.tokenizer.get_vocab()
        if ours != theirs:
            odd = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
            raise ValueError(
                f"bandit(env_fn={_name(self.config.env_fn)}): the prompts must be tokenised as the policy is "
                f"({len(theirs)} tokens), got another tokenizer ({len(ours)} tokens; {odd[0]!r} differs); build the "
                f"PromptSet with load_tokenizer({str(self.config.pretrained)!r})"
            )
        if module.policy.device != self.env.device:
            raise ValueError(
                f"device: the policy is on {module.policy.device}, the env on {self.env.device}; give runner and "
                "learner the same kind of device (num_gpus_per_env_runner, num_gpus_per_learner)"
            )
        self.module = module

    def report(self) -> dict[str, Any]:
        """What the algorithm checks before the first batch: the problem of its build, sizes, and the place it is at."""
        if self.problem is not None or self.env is None:
            return {"worker": self.worker_index, "node": here(), "problem": self.problem}
        return {
            "worker": self.worker_index,
            "node": here(),
            "problem": None,
            "rows": self.env.batch_size,
            "group_size": self.env.group_size,
            "prompt_width": self.env.prompts.width,
            PLACE: self.place(),
        }

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

    # --- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[MultiAgentBatch]:
        """At least that many rows, in whole prompt batches (one without a number), as tensors on the device.

        Args:
            num_timesteps, num_episodes: rows; the two are the same here.
            explore: False answers greedily; None takes the config's.
            random_actions: refused.
            force_reset: nothing to do, since every batch begins anew.
        """
        if random_actions:
            raise ValueError("random_actions: a policy over tokens has no use for random ones; leave it False")
        if self.env is None or self.module is None or self.problem is not None:
            raise ValueError(f"sample: this runner was not built: {self.problem}")
        rows = num_timesteps or num_episodes or self.env.batch_size
        explore = self.config.explore if explore is None else explore
        parts = [self._sample_batch(explore) for _ in range(-(-rows // self.env.batch_size))]
        td: Any = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = td.batch_size[0]
        self._num_rows += rows
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
            return told | {"rows": arrays, "metrics": self.get_metrics(), PLACE: self.place(), **self._health()}
        except Exception as error:
            return told | {"problem": f"{type(error).__name__}: {error}"}

    def _health(self) -> dict[str, Any]:
        assert self.env is not None
        why = ""
        if self.unscorable > 0.5 and self._last is not None:  # the run ends, so copies cost nothing any more
            why = f"of {len(self._last)} rows here: {self.env.rewards.why_unscorable(self._last)}"
        return {"unscorable": self.unscorable, "why_unscorable": why}

    def _sample_batch(self, explore: bool) -> TensorDict:
        assert self.env is not None and self.module is not None
        before = self.env.state_dict(), self.generator.get_state()
        clock = Clock(self.device)
        try:
            td = self.env.reset()
            with clock("generate"):
                td = self.module.generate(
                    td, greedy=not explore, generator=self.generator, group_size=self.env.group_size
                )
            with clock("score"):
                td = self.env.step(td)
        except BaseException:  # whoever goes on, begins with the prompts that were lost here
            self.env.load_state_dict(before[0])
            self.generator.set_state(before[1])
            raise
        self._clocks.append(clock)
        self._seen.append(summary(td))
        self._last = td
        return td

    def get_metrics(self) -> dict[str, Any]:
        """Means over the rows since the last call; one copy from the device for all numbers."""
        log, rows = self.metrics.log_value, self._num_rows
        log(names.NUM_ENV_STEPS_SAMPLED, rows, reduce="sum")
        log((names.NUM_AGENT_STEPS_SAMPLED, DEFAULT_AGENT_ID), rows, reduce="sum")
        log((names.NUM_MODULE_STEPS_SAMPLED, DEFAULT_MODULE_ID), rows, reduce="sum")
        log(names.NUM_EPISODES, rows, reduce="sum")
        log(names.NUM_ENV_STEPS_SAMPLED_LIFETIME, rows, reduce="lifetime_sum", with_throughput=True)
        if not self._shares_module:
            log(names.WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        if self._seen:
            keys = self._seen[0][0]
            means = torch.stack([numbers for _, numbers in self._seen]).mean(0).tolist()
            for key, value in zip(keys, means, strict=True):
                log(tuple(key.split("/")), value, window=1)
            log(names.EPISODE_RETURN_MEAN, means[keys.index("reward")], window=1)
            self.unscorable = means[keys.index("unscorable")]
            for stage in ("generate", "score"):
                log(("time", f"{stage}_s"), sum(c.read().get(stage, 0.0) for c in self._clocks), reduce="sum")
        self._seen, self._clocks, self._num_rows = [], [], 0
        reduced: dict[str, Any] = self.metrics.reduce()
        return reduced

    # --- state ---------------------------------------------------------------------------------------------------

    def place(self) -> dict[str, Any]:
        """Where this runner stands: its draw of the prompts, the terms' statistics, its generator."""
        assert self.env is not None
        return {"env": pack_state(self.env.state_dict()), "generator": pack_state(self.generator.get_state())}

    def go_to(self, place: dict[str, Any], *, generator: bool = True) -> None:
        """Go on where `place()` was taken.

        Args:
            generator: False keeps this runner's own one, for a place that another runner took.
        """
        assert self.env is not None
        self.env.load_state_dict(unpack(place["env"]))
        if generator:
            self.generator.set_state(unpack(place["generator"]))

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The place, and the weights if they are asked for."""
        state: dict[str, Any] = {names.NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime}
        if self.env is not None and self._check_component(PLACE, components, not_components):
            state[PLACE] = self.place()
        if self.module is not None and self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = {DEFAULT_MODULE_ID: self.module.get_state()}
            state[names.WEIGHTS_SEQ_NO] = self._weights_seq_no
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up weights and place, whichever are there."""
        if COMPONENT_RL_MODULE in state and self.module is not None:
            weights = state[COMPONENT_RL_MODULE]
            if isinstance(weights, ray.ObjectRef):
                weights = ray.get(weights)
            if not self._shares_module:
                try:
                    self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
                    self.problem = None
                except ValueError as error:
                    if not self.worker_index:
                        raise
                    self.problem = f"ValueError: {error}"  # told by `report` and `sample`; a dead actor tells nothing
            self._weights_seq_no = state.get(names.WEIGHTS_SEQ_NO, 0)
        if PLACE in state and self.env is not None:
            self.go_to(state[PLACE])
        self.num_env_steps_sampled_lifetime = state.get(
            names.NUM_ENV_STEPS_SAMPLED_LIFETIME, self.num_env_steps_sampled_lifetime
        )

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For RLlib's checkpoints."""
        return (), {"config": self.config, "worker_index": self.worker_index, "num_workers": self.num_workers}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        """None: weights are the learner's to save."""
        return []

    def _sampling_seed(self) -> int:
        """Of its own for every runner, and for training and evaluation."""
        text = f"{self.config.seed or 0}/{self.worker_index}/{bool(self.config.in_evaluation)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def summary(td: TensorDict) -> tuple[list[str], Tensor]:
    """Names and means [K] float32 of a scored batch, over its scorable rows, on the device."""
    unscorable = td[batch.UNSCORABLE]
    every = torch.ones_like(unscorable)
    rows = {"reward": (td[batch.REWARD].squeeze(-1), ~unscorable)}
    for name, value in td[batch.REWARD_TERMS].items():
        rows[f"reward_terms/{name}"] = value, value.isfinite()
    if "reward_terms/kl" in rows:
        rows["kl"] = rows["reward_terms/kl"]
    rows["unscorable"] = unscorable.float(), every
    rows["truncated"] = td[batch.TRUNCATED].squeeze(-1).float(), every
    rows["response_length"] = td[batch.RESPONSE_MASK].sum(-1).float(), every
    return list(rows), torch.stack([masked_mean(value.float(), kept) for value, kept in rows.values()])


def _name(fn: Callable[..., Any] | None) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__
