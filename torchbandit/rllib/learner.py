"""PPOPtxLearner: token-level PPO with GAE, a clipped critic, ptx and float32 masters, on RLlib's Learner.

The losses are the core's (torchbandit.losses). What is here is how they meet RLlib: minibatches drawn on the device,
denominators over all learners so that DDP's average is exact, and state as bits. (B, T, G: see batch.py.)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor

from torchbandit import losses
from torchbandit.batch import masked_whiten
from torchbandit.masters import MasterOptimizer
from torchbandit.responses import last_token
from torchbandit.rllib.module import CausalLMModule
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

    def build(self) -> None:
        """Build module and optimizer on this learner's device; load the ptx data of this node."""
        if self.config.num_learners > 0:
            cpus = self.config.num_cpus_per_learner
            torch.set_num_threads(max(1, int(cpus)) if isinstance(cpus, (int, float)) else 1)
        self._masters: dict[str, tuple[MasterOptimizer, int]] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_updates = 0
        self._ptx: PtxData | None = None
        super().build()
        if self.config.ptx_coef:
            tokenizer = next(iter(self._policies())).tokenizer
            # The index is told after build, so the place among the learners is taken at the first update.
            self._ptx = PtxData(self.config.ptx_data, tokenizer, self.config.ptx_length, self._seed(), self._device)

    def _make_module(self) -> Any:
        for spec in self._module_spec.rl_module_specs.values():
            spec.model_config = spec.model_config | {"device": str(self._device), "empty": False}
        return super()._make_module()

    def _policies(self) -> Iterator[Any]:
        for module_id in self.module.keys():
            yield self._module_of(module_id).policy

    def _module_of(self, module_id: str) -> CausalLMModule:
        module = self.module[module_id].unwrapped()
        assert isinstance(module, CausalLMModule)
        return module

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """AdamW with float32 masters; `.training(optimizer={...})` goes to it, `lr` may be a schedule."""
        module = self._module_of(module_id)
        if config.gradient_checkpointing:
            module.policy.gradient_checkpointing_enable()
        params = [p for p in module.parameters() if p.requires_grad]
        masters = MasterOptimizer(params, **{"weight_decay": 0.0, **config.optimizer})
        self._masters[module_id] = masters, module.num_loads
        self.register_optimizer(
            module_id=module_id, optimizer=masters.optimizer, params=params, lr_or_lr_schedule=config.lr
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
        self._follow_loaded_weights()
        self._sums, self._num_updates = {}, 0
        batch = training_data.batch
        if batch is None:  # the stock loop brings episodes, and its connector makes rows of them
            batch = self._make_batch_if_necessary(training_data=training_data)
        for module_id, rows in batch.policy_batches.items():
            targets = self.targets({key: to_tensor(value, self._device) for key, value in rows.items()})
            yield from self._minibatches(
                module_id, targets, num_epochs, minibatch_size, shuffle_batch_per_epoch, group_size
            )

    def targets(self, rows: Rows) -> Rows:
        """The batch with `learn_mask`, `advantages` and `returns`, each [B, T].

        Unscorable rows have an all-False mask and so no part in any loss or statistic.
        """
        mask = rows["masks/response"] & ~rows["next/unscorable"].unsqueeze(-1)
        token_reward = rows.get("next/token_reward")
        if token_reward is None:
            token_reward = torch.where(last_token(mask), rows["next/reward"], 0.0)
        advantages, returns = losses.gae(
            token_reward, rows["values"], mask, gamma=self.config.gamma, lam=self.config.lambda_
        )
        reduce = self._sum_over_learners if self.distributed else None
        advantages = masked_whiten(advantages, mask, reduce=reduce)
        return rows | {"learn_mask": mask, "advantages": advantages, "returns": returns}

    def _minibatches(
        self, module_id: str, rows: Rows, epochs: int, size: int | None, shuffle: bool, group_size: int
    ) -> Iterator[MultiAgentBatch]:
        num_rows = len(rows["learn_mask"])
        size = min(size or num_rows, num_rows)
        if num_rows % size:
            raise ValueError(f"minibatch_size: must divide the {num_rows} rows of a learner, got {size}")
        siblings = group_size if size % group_size == 0 and num_rows % group_size == 0 else 1
        generator = torch.Generator(self._device).manual_seed(self._seed(self._weights_seq_no, self._learner_index))
        within = torch.arange(siblings, device=self._device)
        orders = []
        for _ in range(epochs):
            groups = torch.arange(num_rows // siblings, device=self._device)
            if shuffle and size < num_rows:
                groups = torch.randperm(num_rows // siblings, generator=generator, device=self._device)
            orders.append((groups.unsqueeze(-1) * siblings + within).view(-1, size))
        order = torch.cat(orders)
        # Tokens of each minibatch over all learners; over their number, since DDP takes the mean of the gradients.
        tokens = rows["learn_mask"].sum(-1)[order].sum(-1).float()
        tokens = self._sum_over_learners(tokens) / self._num_learners
        for index, count in zip(order.unbind(), tokens.unbind(), strict=True):
            minibatch = SampleBatch({key: value[index] for key, value in rows.items()})
            minibatch["num_tokens"] = count
            minibatch["group_size"] = siblings
            if self._ptx is not None:
                self._ptx.shard(self._learner_index, self._num_learners)
                minibatch["ptx_ids"], minibatch["ptx_mask"] = self._ptx.next(self.config.ptx_batch_size or size)
            yield MultiAgentBatch({module_id: minibatch}, env_steps=size)

    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """One optimizer step, its gradient added up over microbatches."""
        for masters, _ in self._masters.values():
            masters.zero_grad()
        pieces = self._microbatches(batch)
        total: dict[str, Tensor] = {}
        fwd_out: Any = {}
        for i, piece in enumerate(pieces):
            with contextlib.ExitStack() as stack:
                if self.distributed and i < len(pieces) - 1:
                    for module in self.module.values():
                        stack.enter_context(module.no_sync())
                fwd_out = self.module.forward_train(piece)
                loss_per_module = self.compute_losses(fwd_out=fwd_out, batch=piece)
                self.compute_gradients(loss_per_module)
            for module_id, loss in loss_per_module.items():
                total[module_id] = total.get(module_id, 0) + loss.detach()
        self.apply_gradients({})
        self._num_updates += 1
        return fwd_out, total, {}

    def _microbatches(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """`micro_batch_size` rows at a time; the ptx rows are shared out among them."""
        pieces: list[dict[str, Any]] = []
        for module_id, rows in batch.items():
            rows = dict(rows)
            num_rows = len(rows["learn_mask"])
            if "ptx_mask" in rows:
                count = rows["ptx_mask"][:, 1:].sum().float()
                rows["num_ptx_tokens"] = self._sum_over_learners(count) / self._num_learners
            size = min(self.config.micro_batch_size or num_rows, num_rows)
            starts = range(0, num_rows, size)
            for i, start in enumerate(starts):
                piece = {
                    k: v[start : start + size] if isinstance(v, Tensor) and v.dim() and not k.startswith("ptx") else v
                    for k, v in rows.items()
                }
                if size % rows["group_size"]:
                    piece["group_size"] = 1
                for key in ("ptx_ids", "ptx_mask"):
                    if key in rows:
                        piece[key] = rows[key].tensor_split(len(starts))[i]
                if "ptx_ids" in piece and len(piece["ptx_ids"]) == 0:
                    del piece["ptx_ids"], piece["ptx_mask"]
                pieces.append({module_id: piece})
            own = [piece[module_id] for piece in pieces if module_id in piece]
            for piece, plans in zip(own, self._module_of(module_id).plans(own), strict=True):
                piece["plans"] = plans
        return pieces

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
        policy, policy_metrics = losses.ppo_loss(
            fwd_out["log_probs"], batch["log_probs/response"], batch["advantages"], mask,
            clip=config.clip_param, clip_high=config.clip_param_high, denominator=tokens,
        )  # fmt: skip
        value, value_metrics = losses.value_loss(
            fwd_out["values"], batch["values"], batch["returns"], mask, clip=config.vf_clip_param, denominator=tokens
        )
        loss = policy + config.vf_loss_coeff * value
        metrics = {"policy": policy.detach(), "value": value.detach()} | policy_metrics | value_metrics
        if "entropy" in fwd_out:
            coef = self.entropy_coeff_schedulers_per_module[module_id].get_current_value()
            bonus, entropy_metrics = losses.entropy_bonus(fwd_out["entropy"], mask, coef, denominator=tokens)
            loss, metrics = loss + bonus, metrics | entropy_metrics
        if "ptx_loss" in fwd_out:
            summed = fwd_out["ptx_loss"] * fwd_out["ptx_tokens"]
            ptx, ptx_metrics = losses.ptx_loss(
                summed, fwd_out["ptx_tokens"], config.ptx_coef, denominator=batch["num_ptx_tokens"]
            )
            loss, metrics = loss + ptx, metrics | ptx_metrics
        self.add_metrics({f"loss/{name}": number for name, number in metrics.items()})
        total: Tensor = loss
        return total

    def add_metrics(self, metrics: dict[str, Tensor]) -> None:
        """Add scalars up on the device; `train()` reports their mean over the updates, after one copy to the host."""
        for name, number in metrics.items():
            number = number.detach().float()
            self._sums[name] = self._sums[name] + number if name in self._sums else number

    def compute_gradients(self, loss_per_module: dict[str, Tensor], **kwargs: Any) -> dict[Any, Tensor]:
        """Add this microbatch's gradient to what is there; clipping and the check for finiteness come with the step."""
        total = torch.stack(list(loss_per_module.values())).sum()
        total.backward()
        return {}

    def apply_gradients(self, gradients_dict: dict[Any, Tensor]) -> None:
        """Step the masters; where the norm is not finite nothing moves, decided on the device."""
        for masters, _ in self._masters.values():
            norm = masters.step(self.config.grad_clip)
            self.add_metrics({"grad_norm": norm, "skipped_updates": (~norm.isfinite()).float()})

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Report the update's metrics: one copy for all of them."""
        super().after_gradient_based_update(timesteps=timesteps)
        if self._sums:
            numbers = (torch.stack(list(self._sums.values())) / self._num_updates).tolist()
            for name, number in zip(self._sums, numbers, strict=True):
                self.metrics.log_value((next(iter(self.module.keys())), name), number, window=1)

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

    def _seed(self, *numbers: int) -> int:
        """A seed from the run's seed and what is given: permutations need no state of their own to resume."""
        text = "/".join(str(n) for n in (self.config.seed or 0, *numbers))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")

    # --- state -------------------------------------------------------------------------------------------------

    def _follow_loaded_weights(self) -> None:
        """Weights that came without their optimizer's state (set_weights, a module checkpoint) become the masters."""
        for module_id, (masters, seen) in self._masters.items():
            loads = self._module_of(module_id).num_loads
            if loads != seen:
                masters.refresh()
                self._masters[module_id] = masters, loads

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
        return {module_id: pack(masters.state_dict()) for module_id, (masters, _) in self._masters.items()}

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        for module_id, packed in state.items():
            masters, _ = self._masters[module_id]
            masters.load_state_dict(unpack(packed, self._device))
            self._masters[module_id] = masters, self._module_of(module_id).num_loads
