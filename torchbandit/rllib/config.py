"""BanditPPOConfig: PPO-ptx on a bandit by plain keyword arguments."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from ray.rllib.algorithms.algorithm_config import NotProvided
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.util.debug import log_once

from torchbandit.generation import Sampling
from torchbandit.models import ModelSpec
from torchbandit.rllib.algorithm import BanditPPO
from torchbandit.rllib.env_runner import BanditEnvRunner
from torchbandit.rllib.learner import PPOPtxLearner
from torchbandit.rllib.module import PLACEHOLDER, CausalLMModule

Config = TypeVar("Config", bound="BanditPPOConfig")


class BanditPPOConfig(PPOConfig):
    """PPO-ptx on a `BanditEnv`, on one GPU or a Ray cluster.

    Every option of RLlib's PPO is there; those that mean little for whole batches of text (rollout fragments, episodes,
    connectors) are ignored. Defaults differ from RLlib's where language models ask for it: lr 1e-6, gamma 1, lambda_
    0.95, clip_param 0.2, vf_loss_coeff 0.5, grad_clip 1, one epoch, the whole batch as one minibatch, no env runner
    beside the driver. `vf_clip_param` is how far a value may move (0.2), and None for no clip. `use_kl_loss` stays off:
    KL to a reference is a reward term (`KLPenalty`).

    `train_batch_size_per_learner` counts rows; 0, the default, is one prompt batch of every runner.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or BanditPPO)
        self.env_fn: Callable[..., Any] | None = None
        self.sampling = Sampling()
        self.pretrained: Any = None
        self.critic: Any = "head"
        self.dtype = "auto"
        self.gradient_checkpointing = False
        self.packing: Any = "auto"
        self.ptx_coef = 0.0
        self.ptx_data: Any = None
        self.ptx_batch_size: int | None = None
        self.ptx_length = 512
        self.micro_batch_size: int | None = None
        self.clip_param_high: float | None = None
        self.lr, self.gamma, self.lambda_ = 1e-6, 1.0, 0.95
        self.clip_param, self.vf_clip_param, self.vf_loss_coeff = 0.2, 0.2, 0.5
        self.grad_clip = 1.0
        self.num_epochs, self.minibatch_size = 1, None
        self.train_batch_size, self._train_batch_size_per_learner = None, 0
        self.use_kl_loss, self.kl_coeff = False, 0.0
        self.num_env_runners = 0
        self.env_runner_cls = BanditEnvRunner
        self.sample_timeout_s = 3600.0
        self.delay_between_env_runner_restarts_s = 0.0
        # There are no connector states to merge; weights have their own broadcast.
        self._dont_auto_sync_env_runner_states = True
        self.add_default_connectors_to_learner_pipeline = False
        self.evaluation_config = {"explore": False}

    def bandit(
        self,
        *,
        env_fn: Callable[..., Any] = NotProvided,
        sampling: Sampling = NotProvided,
    ) -> Self:
        """The environment and how responses are drawn.

        Args:
            env_fn: `env_fn(worker_index, num_workers, device) -> BanditEnv`. Called once in every runner, where that
                runner lives: it loads reward model and reference there, on `device`. It need not shard the prompts.
            sampling: as for `CausalLMPolicy`.
        """
        if env_fn is not NotProvided:
            self.env_fn = env_fn
        if sampling is not NotProvided:
            self.sampling = sampling
        return self

    def rl_module(
        self,
        *,
        pretrained: str | Path | ModelSpec = NotProvided,
        critic: str | Path | ModelSpec = NotProvided,
        dtype: str = NotProvided,
        gradient_checkpointing: bool = NotProvided,
        packing: Any = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """The policy.

        Args:
            pretrained: folder or hub id (or a `ModelSpec` of one), which every node can open.
            critic: "head" on the policy's backbone, or a one-label sequence classifier, usually the reward model's.
            dtype: of the weights in forward passes; what the optimizer steps is float32.
            gradient_checkpointing: recompute activations in the learners' backward passes.
            packing: as for `CausalLMPolicy`.
            kwargs: RLlib's own.
        """
        given: dict[str, Any] = dict(
            pretrained=pretrained, critic=critic, dtype=dtype, gradient_checkpointing=gradient_checkpointing,
            packing=packing,
        )  # fmt: skip
        for name, value in given.items():
            if value is not NotProvided:
                setattr(self, name, _absolute(value) if name in ("pretrained", "critic") else value)
        super().rl_module(**kwargs)
        return self

    def training(
        self,
        *,
        ptx_coef: float = NotProvided,
        ptx_data: Any = NotProvided,
        ptx_batch_size: int | None = NotProvided,
        ptx_length: int = NotProvided,
        micro_batch_size: int | None = NotProvided,
        clip_param_high: float | None = NotProvided,
        learner_class: type = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """How it learns. Any option of RLlib's PPO, any keyword that the learner class declares, and:

        Args:
            ptx_coef: weight of the pretraining loss (InstructGPT's gamma); 0 is plain PPO.
            ptx_data: corpus file, ids [M, L] int64 or (ids, mask), or a function `device -> batches` of (ids, mask).
            ptx_batch_size: pretraining rows an update and learner; None takes as many as the minibatch has.
            ptx_length: longest row of a corpus file.
            micro_batch_size: rows a forward and backward pass; None takes the whole minibatch.
            clip_param_high: upper ratio clip where it differs (clip-higher).
            learner_class: a subclass of `PPOPtxLearner` with a loss of one's own.
        """
        if learner_class is not NotProvided:
            self._learner_class = learner_class
        if ptx_data is not NotProvided:
            # A bare tensor as an attribute would break RLlib's own comparisons of config values.
            is_ids = isinstance(ptx_data, torch.Tensor)
            self.ptx_data = (ptx_data, torch.ones_like(ptx_data, dtype=torch.bool)) if is_ids else _absolute(ptx_data)
        if isinstance(ptx_coef, (int, float)) and ptx_coef < 0:  # here, since RLlib takes -1 for "not given"
            raise ValueError(f"training(ptx_coef=…): must be at least 0, got {ptx_coef}")
        given = dict(
            ptx_coef=ptx_coef, ptx_batch_size=ptx_batch_size, ptx_length=ptx_length,
            micro_batch_size=micro_batch_size, clip_param_high=clip_param_high,
        )  # fmt: skip
        given |= {name: kwargs.pop(name) for name in _keywords(self.learner_class) if name in kwargs}
        for name, value in given.items():
            if value is not NotProvided:
                setattr(self, name, value)
        if "optimizer" in kwargs:
            self.optimizer = kwargs.pop("optimizer")
        super().training(**kwargs)
        return self

    # --- what RLlib asks of a config -------------------------------------------------------------------------------

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """A `CausalLMModule` of this config: paths and settings, never weights (an actor restart needs them again)."""
        return RLModuleSpec(
            module_class=CausalLMModule,
            observation_space=PLACEHOLDER,
            action_space=PLACEHOLDER,
            model_config={
                "pretrained": self.pretrained,
                "critic": self.critic,
                "dtype": self.dtype,
                "sampling": self.sampling,
                "packing": self.packing,
                "entropy": self.entropy_coeff != 0.0,
                "device": "cpu",
                "empty": False,
            },
        )

    def get_default_learner_class(self) -> type:
        """`PPOPtxLearner`."""
        return PPOPtxLearner

    def validate(self) -> None:
        """Check everything that can be known before a process is started.

        Raises:
            ValueError: names the option, what it must be, what it is, and what to do.
        """
        self.create_local_env_runner = self.num_env_runners == 0
        for name, default in _keywords(self.learner_class).items():
            if not hasattr(self, name):
                setattr(self, name, default)
        self._validate_bandit()
        # Counts as said: RLlib would advise to switch to its old stack, which has no part here.
        log_once(f"{self.algo_class.__name__}_on_new_api_stack")
        super().validate()

    def _validate_bandit(self) -> None:
        if self.env_fn is None or not callable(self.env_fn):
            got = "none" if self.env_fn is None else type(self.env_fn).__name__
            raise ValueError(
                "bandit(env_fn=…): must be a function env_fn(worker_index, num_workers, device) -> BanditEnv, got "
                f"{got}; add .bandit(env_fn=make_env) to the config"
            )
        if self.env is not None:
            raise ValueError(f"environment(env={self.env!r}): the env comes from bandit(env_fn=…); leave it out")
        if not isinstance(self.pretrained, (str, Path, ModelSpec)):
            got = "none" if self.pretrained is None else type(self.pretrained).__name__
            raise ValueError(
                f"rl_module(pretrained=…): must be a folder or hub id, got {got}; every actor loads it for itself, so "
                "a live model has to be saved first (save_pretrained)"
            )
        if not isinstance(self.critic, (str, Path, ModelSpec)):
            raise ValueError(
                f'rl_module(critic=…): must be "head", a folder or a hub id, got {self.critic!r}; PPO needs a critic'
            )
        if not issubclass(self.learner_class, PPOPtxLearner):
            raise ValueError(
                f"learner_class: must be a subclass of PPOPtxLearner, got {self.learner_class.__name__}; override "
                "compute_loss_for_module"
            )
        sampling = self.sampling
        if not self.in_evaluation and (sampling.temperature <= 0 or sampling.top_k or sampling.top_p != 1):
            raise ValueError(
                f"bandit(sampling=…): training draws with a temperature above 0 alone, got {sampling}; truncate when "
                "you evaluate"
            )
        for name, least in (("ptx_coef", 0), ("ptx_batch_size", 1), ("ptx_length", 2), ("micro_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"training({name}=…): must be at least {least}, got {value}")
        if self.ptx_coef and self.ptx_data is None:
            raise ValueError(
                f"training(ptx_coef={self.ptx_coef}): needs ptx_data, got none; give a corpus file, token tensors or a "
                "function, or ptx_coef=0"
            )
        if self.use_kl_loss:
            raise ValueError("training(use_kl_loss=True): KL is a reward term here; add a KLPenalty to the env instead")
        if self.grad_clip_by != "global_norm":
            raise ValueError(f'grad_clip_by: must be "global_norm", got {self.grad_clip_by!r}')
        if not self.in_evaluation and not self.merge_env_runner_states and not self.broadcast_env_runner_states:
            raise ValueError(
                "env_runners(merge_env_runner_states=False, broadcast_env_runner_states=False): then the first weights "
                "never reach remote runners; leave one of them on"
            )
        rows: int = self.train_batch_size_per_learner
        size: Any = self.minibatch_size
        if rows and size and size > rows:
            raise ValueError(f"minibatch_size: must be at most train_batch_size_per_learner={rows}, got {size}")


def _absolute(value: Any) -> Any:
    """A folder or file that is here, by its whole path: actors and tune trials work in other directories."""
    if isinstance(value, (str, Path)) and value != "head" and Path(value).exists():
        return str(Path(value).resolve())
    return value


def _keywords(learner_class: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in reversed(learner_class.__mro__):
        found |= vars(cls).get("keywords", {})
    return found


def _with_hint(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Name an unknown keyword and its nearest known one, in place of Python's TypeError."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        known: set[str] = set()
        for cls in type(self).__mro__:
            if name in vars(cls):
                known |= set(inspect.signature(vars(cls)[name]).parameters) - {"self", "kwargs", "args"}
        if name == "training":
            known |= _keywords(kwargs.get("learner_class", self.learner_class)).keys()
        for given in kwargs:
            if given not in known:
                near = difflib.get_close_matches(given, sorted(known), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(known - {'_'}))}"
                raise ValueError(f"{name}({given}=…): no such keyword; {hint}")
        return method(self, *args, **kwargs)

    return checked


for _name in (
    "bandit", "rl_module", "training", "env_runners", "learners", "evaluation", "fault_tolerance", "debugging",
    "environment", "resources", "reporting", "checkpointing", "callbacks", "framework",
):  # fmt: skip
    setattr(BanditPPOConfig, _name, _with_hint(_name, getattr(BanditPPOConfig, _name)))
