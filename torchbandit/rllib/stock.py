"""RLlib's own PPO - Algorithm, SingleAgentEnvRunner, episodes and PPOTorchLearner - on a `BanditVectorEnv`.

A facade, for one process: episodes carry row handles, and connectors fetch the tokens behind them from the env. PPO
sees each response as one action: one ratio, one value, one advantage a row. docs/stock-loop.md has its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.tune import register_env
from torch import Tensor

from torchbandit import losses
from torchbandit.adapters.gymnasium import BanditVectorEnv
from torchbandit.batch import masked_whiten
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.models import ModelSpec
from torchbandit.rllib.module import CausalLMModule
from torchbandit.rllib.wire import flatten, unflatten

_LIVE: WeakValueDictionary[str, BanditVectorEnv] = WeakValueDictionary()
"""Envs by name: a config is copied and pickled, what stands behind a handle cannot be."""

INSTEAD = (
    "row handles mean nothing in another process, so the stock loop runs with local runner and learner alone; for "
    "remote ones use torchbandit.rllib.BanditConfig"
)


class StockPPOConfig(PPOConfig):
    """PPOConfig that refuses remote runners and learners; the rest is RLlib's. Made by `stock_ppo_config`."""

    live_env: BanditVectorEnv

    def validate(self) -> None:
        """As PPOConfig, and ValueError for anything that would leave the process."""
        for name in ("num_env_runners", "num_learners", "evaluation_num_env_runners"):
            if getattr(self, name):
                raise ValueError(f"{name}: must be 0, got {getattr(self, name)}; {INSTEAD}")
        super().validate()


def stock_ppo_config(
    env: BanditEnv | BanditVectorEnv,
    *,
    pretrained: str | Path | ModelSpec,
    sampling: Sampling,
    critic: str | Path | ModelSpec = "head",
    dtype: str = "float32",
) -> PPOConfig:
    """A config of RLlib's PPO for one env of this process; keep the env alive as long as the algorithm.

    Args:
        env: its batch size becomes `num_envs_per_env_runner` and the train batch.
        pretrained, sampling, critic, dtype: as in `BanditConfig`; RLlib's Adam has no masters, so float32.
    """
    envs = env if isinstance(env, BanditVectorEnv) else BanditVectorEnv(env)
    name = f"torchbandit-{id(envs)}"
    _LIVE[name] = envs
    register_env(name, lambda context: _live(name))
    config = StockPPOConfig()
    config.environment(env=name)
    config.env_runners(
        num_env_runners=0, num_envs_per_env_runner=envs.num_envs, gym_env_vectorize_mode="vector_entry_point",
        env_to_module_connector=lambda env, spaces=None, device=None: FetchPrompts(_live(name)),
        add_default_connectors_to_env_to_module_pipeline=False,
        module_to_env_connector=lambda env, spaces=None, device=None: PassOn(),
        add_default_connectors_to_module_to_env_pipeline=False,
    )  # fmt: skip
    config.learners(
        num_learners=0, learner_connector=lambda obs_space, action_space: FetchRows(name),
        add_default_connectors_to_learner_pipeline=False,
    )  # fmt: skip
    settings = dict(
        pretrained=pretrained, critic=critic, dtype=dtype, sampling=sampling, packing="auto",
        device=str(envs.bandit.device), empty=False,
    )  # fmt: skip
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=ResponseModule, model_config=settings))
    config.training(
        train_batch_size_per_learner=envs.num_envs, minibatch_size=envs.num_envs, num_epochs=1, lr=1e-5,
        use_kl_loss=False, clip_param=0.2, vf_loss_coeff=0.5, grad_clip=1.0,
    )  # fmt: skip
    return config


def _live(name: str) -> BanditVectorEnv:
    envs = _LIVE.get(name)
    if envs is None:
        raise ValueError(f"the env {name!r} is not in this process: {INSTEAD}")
    return envs


class FetchPrompts(ConnectorV2):
    """Env to module: the pending prompts, or nothing before an empty step."""

    def __init__(self, envs: BanditVectorEnv) -> None:
        super().__init__()
        self.envs = envs

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        """{"td": what the module shall answer}."""
        return {"td": self.envs.pending}


class PassOn(ConnectorV2):
    """Module to env: the responses as they are."""

    def __call__(self, *, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The module's output."""
        return batch


class FetchRows(ConnectorV2):
    """Learner: the scored rows behind the episodes' handles, with what PPOTorchLearner reads."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __call__(self, *, episodes: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        """Columns of one action a row; unscorable rows are masked out of the loss."""
        td = _live(self.name).rows([int(episode.get_observations(0)[0]) for episode in episodes])
        rows = flatten(td)
        kept = ~rows["next/unscorable"]
        reward, value = torch.where(kept, rows["next/reward"].squeeze(-1), 0.0), rows["values"][:, 0]
        # A response is one action: GAE over a single step.
        advantage, target = losses.gae(reward.unsqueeze(-1), value.unsqueeze(-1), kept.unsqueeze(-1))
        columns = {
            Columns.ACTIONS: reward.new_zeros(len(reward), 1),
            Columns.ACTION_LOGP: rows["log_probs/response"].sum(-1),
            Columns.ACTION_DIST_INPUTS: rows["log_probs/response"].sum(-1, keepdim=True),
            Columns.LOSS_MASK: kept,
            Postprocessing.ADVANTAGES: masked_whiten(advantage, kept.unsqueeze(-1)).squeeze(-1),
            Postprocessing.VALUE_TARGETS: target.squeeze(-1),
        }
        return {DEFAULT_MODULE_ID: rows | columns}


class ResponseModule(CausalLMModule):
    """A `CausalLMModule` as the stock loop sees it: a distribution over whole responses, and their value."""

    _rows = 0

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._answer(batch["td"], greedy=False)

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._answer(batch["td"], greedy=True)

    def _answer(self, td: Any, greedy: bool) -> dict[str, Any]:
        if td is None:  # the env's empty step; as many placeholder actions as rows, whatever the env has
            return {Columns.ACTIONS: np.zeros((self._rows, 1), np.float32)}
        self._rows = td.batch_size[0]
        return {
            Columns.ACTIONS: np.zeros((self._rows, 1), np.float32),
            Columns.ACTIONS_FOR_ENV: self.generate(td, greedy=greedy),
        }

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        wanted = ("tokens/prompt", "masks/prompt", "tokens/response", "masks/response", "temperature")
        out = self.policy(unflatten({key: batch[key] for key in wanted}))
        return {
            Columns.ACTION_DIST_INPUTS: out["log_probs"].sum(-1, keepdim=True),
            Columns.EMBEDDINGS: out["values"][:, 0],
        }

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """The value before the first token: [B] float32."""
        return self._forward_train(batch)[Columns.EMBEDDINGS] if embeddings is None else embeddings

    def get_train_action_dist_cls(self) -> Any:
        """A response's log-prob is its own distribution parameter."""
        return ResponseDistribution

    get_exploration_action_dist_cls = get_train_action_dist_cls
    get_inference_action_dist_cls = get_train_action_dist_cls

    def to(self, *args: Any, **kwargs: Any) -> ResponseModule:
        """Nothing: RLlib would move the runner's copy to the CPU, away from the env."""
        return self


class ResponseDistribution:
    """What PPOTorchLearner asks of a distribution, for responses that were drawn already."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: Any) -> ResponseDistribution:
        """[B, 1] log-probs of whole responses."""
        return cls(logits.squeeze(-1))

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        """[B] log-probs; `value` is a placeholder."""
        return self.log_probs

    def entropy(self, **kwargs: Any) -> Tensor:
        """-log p of the drawn response: its one-sample estimate, [B]."""
        return -self.log_probs
