"""BanditConfig: an algorithm of torchbandit.learn on RLlib, by plain keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.util.debug import log_once

from torchbandit.generation import Sampling
from torchbandit.learn import PPO
from torchbandit.learn.algorithm import Algorithm
from torchbandit.learn.find import make_algorithm, name_of
from torchbandit.learn.options import UpdateOptions
from torchbandit.models import ModelSpec
from torchbandit.rllib import keywords
from torchbandit.rllib.algorithm import BanditLoop
from torchbandit.rllib.env_runner import BanditEnvRunner
from torchbandit.rllib.learner import BanditLearner
from torchbandit.rllib.module import PLACEHOLDER, CausalLMModule


class BanditAlgorithm(BanditLoop):
    """An algorithm of `torchbandit.learn` on RLlib; built by `BanditConfig`."""

    @classmethod
    def get_default_config(cls) -> Any:
        """A fresh `BanditConfig`."""
        return BanditConfig()


class BanditConfig(AlgorithmConfig):
    """An algorithm on a `BanditEnv`, on one GPU or a Ray cluster.

    Its defaults are those of `torchbandit.learn`; of RLlib's, these differ: lr 1e-6, grad_clip 1, one epoch, the whole
    batch as one minibatch, no env runner beside the driver. What RLlib has for episodes and other algorithms (rollout
    fragments, connectors, a discount of its own) has no part here, and `.training` refuses it.

    `train_batch_size_per_learner` counts rows; 0, the default, is one prompt batch of every runner.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or BanditAlgorithm)
        self.env_fn: Callable[..., Any] | None = None
        self.sampling = Sampling()
        self.pretrained: Any = None
        self.critic: Any = None
        self.dtype, self.gradient_checkpointing = "auto", False
        self.packing: Any = "auto"
        self.algo: Any = None
        self.algo_options: dict[str, Any] = {}
        self.ptx_data: Any = None
        self.ptx_length = 512
        for name, default in keywords.UPDATE.items():
            setattr(self, name, default)
        self.lr, self.grad_clip = 1e-6, 1.0
        self.num_epochs, self.minibatch_size = 1, None
        self.train_batch_size, self._train_batch_size_per_learner = None, 0
        self.num_env_runners, self.env_runner_cls = 0, BanditEnvRunner
        self.sample_timeout_s, self.delay_between_env_runner_restarts_s = 3600.0, 0.0
        # There are no connector states to merge; weights have their own broadcast.
        self._dont_auto_sync_env_runner_states = True
        self.add_default_connectors_to_learner_pipeline = False
        self.evaluation_config = {"explore": False}

    def bandit(self, *, env_fn: Callable[..., Any] = NotProvided, sampling: Sampling = NotProvided) -> Self:
        """The environment and how responses are drawn.

        Args:
            env_fn: `env_fn(worker_index, num_workers, device) -> BanditEnv`. Called once in every runner, where that
                runner lives: it loads reward model and reference there, on `device`. It need not shard the prompts.
            sampling: as for `CausalLMPolicy`.
        """
        self.env_fn = self.env_fn if env_fn is NotProvided else env_fn
        self.sampling = self.sampling if sampling is NotProvided else sampling
        return self

    def rl_module(
        self, *, pretrained: str | Path | ModelSpec = NotProvided, critic: str | Path | ModelSpec | None = NotProvided,
        dtype: str = NotProvided, gradient_checkpointing: bool = NotProvided, packing: Any = NotProvided, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """The policy.

        Args:
            pretrained: folder or hub id (or a `ModelSpec` of one), which every node can open.
            critic: "head" on the policy's backbone, or a one-label sequence classifier, usually the reward model's.
                None, the default, is what the algorithm needs: a head, or none.
            dtype: of the weights in forward passes; what the optimizer steps is float32.
            gradient_checkpointing: recompute activations in the learners' backward passes.
            packing: as for `CausalLMPolicy`.
            kwargs: RLlib's own.
        """
        given: dict[str, Any] = dict(
            pretrained=_absolute(pretrained), critic=_absolute(critic), dtype=dtype, packing=packing,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        for name, value in given.items():
            if value is not NotProvided:
                setattr(self, name, value)
        super().rl_module(**kwargs)
        return self

    def training(
        self, *, algo: str | type[Algorithm] | Algorithm = NotProvided, ptx_data: Any = NotProvided,
        ptx_length: int = NotProvided, learner_class: type = NotProvided, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """What is learnt, and how.

        Args:
            algo: a name of `torchbandit.learn.ALGORITHMS`, `package.module:Class`, a class or an instance.
            ptx_data: corpus file, ids [M, L] int64 or (ids, mask), or a function `device -> batches` of (ids, mask).
            ptx_length: longest row of a corpus file.
            learner_class: a subclass of `BanditLearner` with a loss of one's own.
            kwargs: the algorithm's own options (its class has them); those of `torchbandit.learn.UpdateOptions`
                (ptx_coef, entropy_coef, micro_batch_size, refill, mismatch, …); what the learner class declares; and
                of RLlib's lr (a number, or [[rows sampled, rate], …]), grad_clip (a norm; None or 0: no clipping),
                num_epochs, minibatch_size (rows of an update and learner; None: the whole batch),
                train_batch_size_per_learner (rows of an iteration) and optimizer (options of AdamW).
        """
        self.algo = self.algo if algo is NotProvided else algo
        self.ptx_length = self.ptx_length if ptx_length is NotProvided else ptx_length
        self._learner_class: Any = self._learner_class if learner_class is NotProvided else learner_class
        if ptx_data is not NotProvided:
            # A bare tensor as an attribute would break RLlib's own comparisons of config values.
            is_ids = isinstance(ptx_data, torch.Tensor)
            self.ptx_data = (ptx_data, torch.ones_like(ptx_data, dtype=torch.bool)) if is_ids else _absolute(ptx_data)
        of_learner, own = keywords.of_learner(self.learner_class), keywords.of_algorithm(self.algo)
        rllibs: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name not in own:
                keywords.check_given("training", name, value)
            if name in keywords.RLLIB or (name == "model" and value == self.model):  # as RLlib's own copies have it
                rllibs[name] = value
            elif name in keywords.UPDATE or name in of_learner:
                setattr(self, name, value)
            elif name in own:
                self.algo_options = self.algo_options | {name: value}
                continue
            else:
                raise ValueError(keywords.why_unknown(name, self.algo, [*of_learner, *own]))
            if name in own and self.algo is not None:
                raise ValueError(
                    f"training({name}=…): is an option of {name_of(self.algo)} and of every algorithm; pass algo an "
                    "instance that has it"
                )
        super().training(**rllibs)
        return self

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm with its options; ValueError where none is named, it is none, or it refuses an option."""
        return make_algorithm(self.algo, self.algo_options)

    def update_options(self, rows: int | None = None) -> UpdateOptions:
        """What `torchbandit.learn` needs beside the algorithm, for a learner's batch of so many rows."""
        size: Any = self.minibatch_size
        parts = 1 if rows is None or not size else rows // size
        return UpdateOptions(
            epochs=self.num_epochs, minibatches=parts, max_grad_norm=self.grad_clip or 0.0, seed=self.seed or 0,
            **{name: getattr(self, name) for name in keywords.UPDATE},
        )  # fmt: skip

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """A `CausalLMModule` of this config: paths and settings, never weights (an actor restart needs them again)."""
        critic = "head" if self.critic is None and self.algorithm.needs_critic else self.critic
        settings = dict(
            pretrained=self.pretrained, critic=critic, dtype=self.dtype, sampling=self.sampling, packing=self.packing,
            device="cpu", empty=False,
        )  # fmt: skip
        return RLModuleSpec(
            module_class=CausalLMModule, observation_space=PLACEHOLDER, action_space=PLACEHOLDER, model_config=settings
        )

    def get_default_learner_class(self) -> type:
        """`BanditLearner`."""
        return BanditLearner

    def validate(self) -> None:
        """ValueError for everything that can be known before a process is started."""
        self.create_local_env_runner = self.num_env_runners == 0
        for name, default in keywords.of_learner(self.learner_class).items():
            if not hasattr(self, name):
                setattr(self, name, default)
        self._validate_bandit()
        self._validate_training()
        log_once(f"{self.algo_class.__name__}_on_new_api_stack")  # as told; RLlib would advise its old stack
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
        algorithm = self.algorithm
        if self.critic is not None and not algorithm.needs_critic:
            raise ValueError(
                f"rl_module(critic=…): {name_of(algorithm)} has no use for one, got {self.critic!r}; leave it out"
            )
        if self.critic is not None and not isinstance(self.critic, (str, Path, ModelSpec)):
            raise ValueError(f'rl_module(critic=…): must be "head", a folder or a hub id, got {self.critic!r}')
        sampling = self.sampling
        if not self.in_evaluation and (sampling.temperature <= 0 or sampling.top_k or sampling.top_p != 1):
            raise ValueError(
                f"bandit(sampling=…): training draws with a temperature above 0 alone, got {sampling}; truncate when "
                "you evaluate"
            )
        if not self.in_evaluation and not self.merge_env_runner_states and not self.broadcast_env_runner_states:
            raise ValueError(
                "env_runners(merge_env_runner_states=False, broadcast_env_runner_states=False): then the first weights "
                "never reach remote runners; leave one of them on"
            )

    def _validate_training(self) -> None:
        if not issubclass(self.learner_class, BanditLearner):
            raise ValueError(
                f"learner_class: must be a subclass of BanditLearner, got {self.learner_class.__name__}; override "
                "compute_loss_for_module"
            )
        least = dict(ptx_length=2, num_epochs=1, minibatch_size=1, grad_clip=0, train_batch_size_per_learner=0, seed=0)
        for name, floor in least.items():
            value = getattr(self, name)
            if value is not None and not value >= floor:
                raise ValueError(f"training({name}=…): must be at least {floor}, got {value}")
        try:
            self.update_options()
        except ValueError as error:
            name, colon, rest = str(error).partition(":")
            raise ValueError(f"training({name}=…){colon}{rest}") from None
        if self.max_draws != 4 and not self.refill:
            raise ValueError(f"training(max_draws={self.max_draws}): is of dynamic sampling; add refill=True")
        if self.ptx_coef and self.ptx_data is None:
            raise ValueError(
                f"training(ptx_coef={self.ptx_coef}): needs ptx_data, got none; give a corpus file, token tensors or a "
                "function, or ptx_coef=0"
            )


class BanditPPOConfig(BanditConfig):
    """`BanditConfig` whose algorithm is PPO where no other is named; with a `ptx_coef` it is PPO-ptx."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.algo = name_of(PPO())


def _absolute(value: Any) -> Any:
    """A folder or file that is here, by its whole path: actors and tune trials work in other directories."""
    if isinstance(value, (str, Path)) and value != "head" and Path(value).exists():
        return str(Path(value).resolve())
    return value


for _name in keywords.METHODS:
    setattr(BanditConfig, _name, keywords.with_hint(_name, getattr(BanditConfig, _name)))
