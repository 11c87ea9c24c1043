"""BanditLearner: `torchbandit.learn.Update` on RLlib's Learner.

What is learnt, and how, stands in torchbandit.learn. What is here is how it meets RLlib: the module through DDP, ranks
that are learners, `compute_loss_for_module`, and state as bits. (B, T, G: see batch.py.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch
from tensordict import TensorDict
from torch import Tensor

from torchbandit.learn.algorithm import Algorithm, Denominators
from torchbandit.learn.metrics import to_host
from torchbandit.learn.ptx import PtxData
from torchbandit.learn.ranks import Ranks
from torchbandit.learn.update import Update
from torchbandit.losses import Loss
from torchbandit.masters import MasterOptimizer
from torchbandit.rllib.module import CausalLMModule, same_algorithms
from torchbandit.rllib.wire import flatten, pack, to_tensor, unflatten, unpack

STATE = "torchbandit"
TOLD = "told"
"""Of an update's results: the metrics of the local engine, by its names."""


class BanditLearner(TorchLearner):
    """Learns with `config.algorithm`. A loss of one's own is a subclass that overrides `compute_loss_for_module`.

    Attributes:
        keywords: options that a subclass adds, with their defaults: `.training(learner_class=Mine, name=value)` sets
            them, and they are read as `config.name`.
    """

    keywords: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any) -> None:
        with same_algorithms():
            super().__init__(**kwargs)

    def build(self) -> None:
        """Build module and optimizer on this learner's device; load the ptx data of this node."""
        if self.config.num_learners > 0:
            cpus = self.config.num_cpus_per_learner
            torch.set_num_threads(max(1, int(cpus)) if isinstance(cpus, (int, float)) else 1)
        self._core: Update | None = None
        self._steps_done = 0
        self._told: dict[str, Tensor] = {}
        self._ptx: PtxData | None = None
        super().build()
        self._algorithm: Algorithm = self.config.algorithm
        rank = torch.distributed.get_rank() if self.distributed else 0
        self._ranks = Ranks(rank, max(1, int(self.config.num_learners)), self._sum if self.distributed else None)
        if self.config.ptx_coef:
            tokenizer, seed = self.lm_module.policy.tokenizer, self.config.seed or 0
            self._ptx = PtxData(self.config.ptx_data, tokenizer, self.config.ptx_length, seed, self._device)
            self._ptx.shard(self._ranks.rank, self._ranks.world_size)

    def _make_module(self) -> Any:
        spec = self._module_spec.rl_module_specs[DEFAULT_MODULE_ID]
        spec.model_config = spec.model_config | {"device": str(self._device), "empty": False}
        return super()._make_module()

    @property
    def lm_module(self) -> CausalLMModule:
        """The one module that is trained, without DDP around it."""
        module = self.module[DEFAULT_MODULE_ID].unwrapped()
        assert isinstance(module, CausalLMModule)
        return module

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """AdamW with float32 masters; `.training(optimizer={...})` goes to it, `lr` may be a schedule."""
        module = self.lm_module
        if config.gradient_checkpointing:
            module.policy.gradient_checkpointing_enable()
        params = [p for p in module.parameters() if p.requires_grad]
        self._masters = MasterOptimizer(params, **{"weight_decay": 0.0, **config.optimizer})
        self._loads_seen = module.num_loads
        optimizer = self._masters.optimizer
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=params, lr_or_lr_schedule=config.lr)

    def update(
        self, batch: MultiAgentBatch | None = None, *, training_data: TrainingData | None = None,
        timesteps: dict[str, Any] | None = None, group_size: int = 1, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Learn from a stepped batch, or this learner's share of it; how it is cut stands in the config.

        Returns:
            RLlib's results, and under `TOLD` the metrics as floats: those of all learners together, so each has them.
        """
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        data = TrainingData(batch=batch) if training_data is None else training_data
        data.solve_refs()
        whole = data.batch
        self._weights_seq_no += 1
        if self._loads_seen != self.lm_module.num_loads:  # weights alone (set_weights, a module's checkpoint)
            self._masters.refresh()
            self._loads_seen = self.lm_module.num_loads
        rows = whole.policy_batches[DEFAULT_MODULE_ID]
        td = unflatten({key: to_tensor(value, self._device) for key, value in rows.items()})
        if self._core is None:
            self._core = self._make_core(len(td), group_size)
        told = to_host(self._core(td, self._steps_done))
        self._steps_done += 1
        for name, number in told.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), number, window=1)
        self._log_steps_trained_metrics(whole)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return {**self.metrics.reduce(), TOLD: told}

    def _make_core(self, rows: int, group_size: int) -> Update:
        no_sync = {"no_sync": self.module[DEFAULT_MODULE_ID].no_sync} if self.distributed else {}
        return Update(
            self.lm_module.policy, self._algorithm, self.config.update_options(rows), self._masters,
            group_size=group_size, ptx=self._ptx, ranks=self._ranks, forward=self._forward, loss=self._loss, **no_sync,
        )  # fmt: skip

    def _forward(self, td: TensorDict, **options: Any) -> TensorDict:
        """The policy's forward through RLlib's module, which is what DDP wraps."""
        return TensorDict(self.module[DEFAULT_MODULE_ID].forward_train({"td": td, **options}), batch_size=[])

    def _loss(self, out: TensorDict, targets: TensorDict, denominators: Denominators) -> Loss:
        self._told = {}
        batch = {**flatten(targets), "denominators": denominators}
        loss = self.compute_loss_for_module(
            module_id=DEFAULT_MODULE_ID, config=self.config, batch=batch, fwd_out=dict(out.items())
        )
        return loss, self._told

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        """The algorithm's loss of one microbatch; KL, entropy and ptx are added to whatever this returns.

        Args:
            batch: rows of the algorithm's targets by flat keys ("masks/response", "learn_mask", "advantages", …), and
                `denominators`: "tokens", "rows" and "ptx" of the whole minibatch over all learners.
            fwd_out: log_probs [B, T]; with a critic values, on request entropy [B, T]; ptx_loss and ptx_tokens.
        Returns:
            scalar with gradient: sums divided by a denominator, so that microbatches and learners add up.
        """
        targets = unflatten({key: value for key, value in batch.items() if key != "denominators"})
        out = TensorDict(fwd_out, batch_size=[])
        loss, metrics = self._algorithm.loss(out, targets, denominators=batch["denominators"])
        self.add_metrics(metrics)
        return loss

    def add_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Parts of the loss, told as "loss/<name>": scalars that add up over microbatches and learners.

        They stay on the device until the iteration's one copy to the host; `train()` has their mean over the updates.
        Of a name that ends in `_max` the greatest is taken.
        """
        self._told |= {name.removeprefix("loss/"): number for name, number in metrics.items()}

    @staticmethod
    def _set_optimizer_lr(optimizer: torch.optim.Optimizer, lr: Any) -> None:
        """A number: RLlib's schedules hand out their own tensor, which would change under a saved state."""
        for group in optimizer.param_groups:
            group["lr"] = float(lr)

    @staticmethod
    def _sum(x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, the batches learnt from, and the place in the ptx data."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(STATE, components, not_components):
            ptx = {} if self._ptx is None else {"ptx": pack(self._ptx.state_dict())}
            state[STATE] = {"steps_done": self._steps_done, **ptx}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up `get_state()`, older or newer than this learner's own."""
        if COMPONENT_RL_MODULE in state:
            self._weights_seq_no = 0  # RLlib keeps the present weights where the given ones are older
        super().set_state(state)
        own = state.get(STATE, {})
        self._steps_done = own.get("steps_done", self._steps_done)
        if self._ptx is not None and "ptx" in own:
            self._ptx.load_state_dict(unpack(own["ptx"]))

    def _get_optimizer_state(self) -> dict[str, Any]:
        return {"masters": pack(self._masters.state_dict())}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        self._masters.load_state_dict(unpack(state["masters"], self._device))
        self._loads_seen = self.lm_module.num_loads
