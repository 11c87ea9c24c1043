"""PPOPtxLearner: token-level PPO with GAE, a clipped critic, ptx and float32 masters, on RLlib's Learner.

The losses are the core's (torchbandit.losses). What is here is how they meet RLlib: minibatches drawn on the device,
denominators over all learners so that DDP's average is exact, and state as bits. (B, T, G: see batch.py.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor

from torchbandit import losses
from torchbandit.masters import MasterOptimizer
from torchbandit.rllib.cut import draw_order, microbatches
from torchbandit.rllib.module import CausalLMModule, same_algorithms
from torchbandit.rllib.ptx import PtxData
from torchbandit.rllib.wire import Rows, pack, to_tensor, unpack

STATE = "torchbandit"


class PPOPtxLearner(PPOTorchLearner):
    """PPO-ptx on a `CausalLMModule`. A loss of one's own is a subclass that overrides `compute_loss_for_module`.

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
        self._sums: dict[str, Tensor] = {}
        self._num_updates = 0
        self._ptx: PtxData | None = None
        super().build()
        if self.config.ptx_coef:
            data, length = self.config.ptx_data, self.config.ptx_length
            # The index is told after build, so the place among the learners is taken at the first update.
            self._ptx = PtxData(data, self.lm_module.policy.tokenizer, length, self._seed(), self._device)

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
        self.register_optimizer(
            module_id=module_id, optimizer=self._masters.optimizer, params=params, lr_or_lr_schedule=config.lr
        )

    # --- one update: prepare the batch, cut it, step -----------------------------------------------------------

    def _create_iterator_if_necessary(
        self,
        *,
        training_data: Any,
        num_total_minibatches: int = 0,
        num_epochs: int = 1,
        minibatch_size: int | None = None,
        shuffle_batch_per_epoch: bool = True,
        group_size: int = 1,
        **kwargs: Any,
    ) -> Iterator[MultiAgentBatch]:
        """RLlib's hook for minibatches; its own draws them with numpy on the host."""
        if self._loads_seen != self.lm_module.num_loads:  # weights alone (set_weights, a module's checkpoint)
            self._masters.refresh()
            self._loads_seen = self.lm_module.num_loads
        self._sums, self._num_updates = {}, 0
        rows = training_data.batch.policy_batches[DEFAULT_MODULE_ID]
        targets = self.targets({key: to_tensor(value, self._device) for key, value in rows.items()})
        return self._minibatches(targets, num_epochs, minibatch_size, shuffle_batch_per_epoch, group_size)

    def targets(self, rows: Rows) -> Rows:
        """The batch with `learn_mask`, `advantages` and `returns`, each [B, T].

        Unscorable rows have an all-False mask and so no part in any loss or statistic.
        """
        mask = rows["masks/response"] & ~rows["next/unscorable"].unsqueeze(-1)
        advantages, returns = losses.ppo_advantages(
            rows["next/reward"], rows.get("next/token_reward"), rows["values"], mask,
            gamma=self.config.gamma, lam=self.config.lambda_,
            reduce=self._sum_over_learners if self.distributed else None,
        )  # fmt: skip
        return rows | {"learn_mask": mask, "advantages": advantages, "returns": returns}

    def _minibatches(
        self, rows: Rows, epochs: int, size: int | None, shuffle: bool, group_size: int
    ) -> Iterator[MultiAgentBatch]:
        num_rows = len(rows["learn_mask"])
        size = size or num_rows
        generator = torch.Generator(self._device).manual_seed(self._seed(self._weights_seq_no, self._learner_index))
        siblings = group_size if size % group_size == 0 else 1
        order = draw_order(num_rows, epochs, size, siblings, generator, shuffle and size < num_rows)
        # Tokens of each minibatch over all learners; over their number, since DDP takes the mean of the gradients.
        tokens = self._mean_over_learners(rows["learn_mask"].sum(-1)[order].sum(-1).float())
        for index, count in zip(order.unbind(), tokens.unbind(), strict=True):
            minibatch = SampleBatch({key: value[index] for key, value in rows.items()})
            minibatch["num_tokens"], minibatch["group_size"] = count, siblings
            if self._ptx is not None:
                self._ptx.shard(self._learner_index, self._num_learners)
                ids, mask = self._ptx.next(self.config.ptx_batch_size or size)
                minibatch["ptx_ids"], minibatch["ptx_mask"] = ids, mask
                minibatch["num_ptx_tokens"] = self._mean_over_learners(mask[:, 1:].sum().float())
            yield MultiAgentBatch({DEFAULT_MODULE_ID: minibatch}, env_steps=size)

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """One optimizer step, its gradient added up over microbatches."""
        self._masters.zero_grad()
        pieces = microbatches(batch[DEFAULT_MODULE_ID], self.config.micro_batch_size)
        for rows, plans in zip(pieces, self.lm_module.plans(pieces), strict=True):
            rows["plans"] = plans
        total = torch.zeros((), device=self._device)
        for i, rows in enumerate(pieces):
            piece = {DEFAULT_MODULE_ID: rows}
            last = i == len(pieces) - 1
            with self.module[DEFAULT_MODULE_ID].no_sync() if self.distributed and not last else nullcontext():
                fwd_out = self.module.forward_train(piece)
                loss_per_module = self.compute_losses(fwd_out=fwd_out, batch=piece)
                self.compute_gradients(loss_per_module)
            total += loss_per_module[DEFAULT_MODULE_ID].detach()
        self.apply_gradients({})
        self._num_updates += 1
        return fwd_out, {DEFAULT_MODULE_ID: total}, {}

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        """PPO's clipped surrogate + vf_loss_coeff x clipped value loss - entropy_coeff x entropy + ptx_coef x ptx.

        Args:
            batch: flat keys ("masks/response", "next/reward", …) of a microbatch, and `learn_mask`, `advantages`,
                `returns` [B, T]; `num_tokens`, what sums over tokens are divided by.
            fwd_out: log_probs, values, on request entropy [B, T]; ptx_loss and ptx_tokens, scalars.
        Returns:
            scalar with gradient.
        """
        mask, tokens = batch["learn_mask"], batch["num_tokens"]
        parts = {
            "policy": losses.ppo_loss(
                fwd_out["log_probs"], batch["log_probs/response"], batch["advantages"], mask,
                clip=config.clip_param, clip_high=config.clip_param_high, denominator=tokens,
            ),
            "value": losses.value_loss(
                fwd_out["values"], batch["values"], batch["returns"], mask,
                clip=config.vf_clip_param, denominator=tokens,
            ),
        }  # fmt: skip
        if "entropy" in fwd_out:
            coef = self.entropy_coeff_schedulers_per_module[module_id].get_current_value()
            parts["entropy_bonus"] = losses.entropy_bonus(fwd_out["entropy"], mask, coef, denominator=tokens)
        if "ptx_loss" in fwd_out:
            summed = fwd_out["ptx_loss"] * fwd_out["ptx_tokens"]
            parts["ptx_weighted"] = losses.ptx_loss(
                summed, fwd_out["ptx_tokens"], config.ptx_coef, denominator=batch["num_ptx_tokens"]
            )
        loss, metrics = losses.add_up(parts, {"value": config.vf_loss_coeff})
        self.add_metrics({f"loss/{name}": number for name, number in metrics.items()})
        return loss

    def add_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Add scalars up on the device; `train()` reports their mean over the updates, after one copy to the host."""
        for name, number in metrics.items():
            number = number.detach().float()
            self._sums[name] = self._sums[name] + number if name in self._sums else number

    def compute_gradients(self, loss_per_module: dict[str, Tensor], **kwargs: Any) -> dict[Any, Tensor]:
        """Add this microbatch's gradient to what is there; clipping and the check for finiteness come with the step."""
        loss_per_module[DEFAULT_MODULE_ID].backward()
        return {}

    def apply_gradients(self, gradients_dict: dict[Any, Tensor]) -> None:
        """Step the masters; where the norm is not finite nothing moves, decided on the device."""
        norm = self._masters.step(self.config.grad_clip)
        self.add_metrics({"grad_norm": norm, "skipped_updates": (~norm.isfinite()).float()})

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Report the update's metrics: one copy for all of them."""
        super().after_gradient_based_update(timesteps=timesteps)
        if self._sums:
            numbers = (torch.stack(list(self._sums.values())) / self._num_updates).tolist()
            for name, number in zip(self._sums, numbers, strict=True):
                self.metrics.log_value((DEFAULT_MODULE_ID, name), number, window=1)

    @staticmethod
    def _set_optimizer_lr(optimizer: torch.optim.Optimizer, lr: Any) -> None:
        """A number: RLlib's schedules hand out their own tensor, which would change under a saved state."""
        for group in optimizer.param_groups:
            group["lr"] = float(lr)

    # --- several learners --------------------------------------------------------------------------------------

    @property
    def _num_learners(self) -> int:
        return max(1, int(self.config.num_learners))

    def _sum_over_learners(self, x: Tensor) -> Tensor:
        if self.distributed:
            x = x.clone()
            torch.distributed.all_reduce(x)
        return x

    def _mean_over_learners(self, x: Tensor) -> Tensor:
        return self._sum_over_learners(x) / self._num_learners

    def _seed(self, *numbers: int) -> int:
        """A seed from the run's seed and what is given: permutations need no state of their own to resume."""
        text = "/".join(str(n) for n in (self.config.seed or 0, *numbers))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    # --- state -------------------------------------------------------------------------------------------------

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """RLlib's state, and the place in the ptx data."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._ptx is not None and self._check_component(STATE, components, not_components):
            state[STATE] = {"ptx": pack(self._ptx.state_dict())}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up `get_state()`, older or newer than this learner's own."""
        if COMPONENT_RL_MODULE in state:
            self._weights_seq_no = 0  # RLlib keeps the present weights where the given ones are older
        super().set_state(state)
        if self._ptx is not None and STATE in state:
            self._ptx.load_state_dict(unpack(state[STATE]["ptx"]))

    def _get_optimizer_state(self) -> dict[str, Any]:
        return {"masters": pack(self._masters.state_dict())}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        self._masters.load_state_dict(unpack(state["masters"], self._device))
        self._loads_seen = self.lm_module.num_loads
