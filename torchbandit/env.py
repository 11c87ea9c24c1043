"""The bandit environment: draw prompts, take responses, hand back rewards. (B, P, T: see batch.py.)

Every row terminates in one step, so there is no transition to model: `reset` gathers a batch of prompts on the
device and `step` turns responses into rewards there. Neither copies anything to the host when the reward terms
are torch functions (with packed model scoring: one small copy of the row lengths a step).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase

from torchbandit import batch
from torchbandit.batch import Key, Reduce, require
from torchbandit.prompts import PromptSet, PromptStream
from torchbandit.responses import has_stopped, stop_ids_told
from torchbandit.rewards import RewardPipeline, RewardTerm
from torchbandit.rewards.term import TermFn
from torchbandit.scoring import Plan, make_plan

Packing = bool | Literal["auto"]


class Spec(NamedTuple):
    """Shape, dtype and writer of one key."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    writer: Literal["reset", "policy", "step"]


class BanditEnv:
    """A batched bandit over a prompt set, with everything on one device.

    Args:
        prompts: the contexts; moved to `device`.
        reward: one term or a list: a `RewardTerm`, or any callable `td -> Tensor` [B] or [B, T].
        num_prompts: prompts a batch, drawn from seeded permutations of the set.
        group_size: responses a prompt (G); B = num_prompts * group_size, siblings contiguous.
        device: where every tensor lives and where terms named by path load their models.
        seed: of the permutations. No global generator is read or changed.
        packing: how models score: "auto" packs where model and device allow, False keeps rows padded and makes
            no copy to the host at all.
        stop_ids: ids that end a response, where a batch has no `finished`; None takes those of the policy that was
            built with this tokenizer, or the tokenizer's eos.
    Raises:
        ValueError: a count is below 1, `num_prompts > len(prompts)`, or two terms share a name.
    """

    def __init__(
        self,
        prompts: PromptSet,
        reward: RewardTerm | TermFn | Sequence[RewardTerm | TermFn],
        *,
        num_prompts: int,
        group_size: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 0,
        packing: Packing = "auto",
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        for name, count in (("num_prompts", num_prompts), ("group_size", group_size)):
            if count < 1:
                raise ValueError(f"{name}: must be at least 1, got {count}")
        if num_prompts > len(prompts):
            raise ValueError(
                f"num_prompts: must be at most the {len(prompts)} prompts of the set, got {num_prompts}; "
                "lower num_prompts, raise group_size, or add prompts"
            )
        if packing not in (True, False, "auto"):
            raise ValueError(f'packing: must be True, False or "auto", got {packing!r}')
        self.device = batch.resolved(device)
        self.prompts = prompts.to(self.device)
        self.num_prompts, self.group_size, self.packing = num_prompts, group_size, packing
        self.stream = PromptStream(self.prompts, seed)
        self.rewards = RewardPipeline(
            reward, device=self.device, tokenizer=self.prompts.tokenizer, prompts=self.prompts
        )
        self.packing_metrics: dict[str, float] = {}
        """How the models' rows were laid out in the last step: tokens, padding and sharing."""
        self._handed_out: tuple[tuple[weakref.ref[torch.Tensor], int], ...] = ()
        self._stop_ids = None if stop_ids is None else tuple(stop_ids)

    @property
    def batch_size(self) -> int:
        """Rows of a batch: num_prompts * group_size."""
        return self.num_prompts * self.group_size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response, where a batch has no `finished`."""
        return stop_ids_told(self.prompts.tokenizer) if self._stop_ids is None else self._stop_ids

    def reset(self) -> TensorDict:
        """Draw the next `num_prompts` prompts, each `group_size` times.

        Returns:
            batch_size [B], on the env's device: ("tokens","prompt") [B, P] int64, ("masks","prompt") [B, P] bool,
            prompt_id and group_id [B] int64, and ("columns", name) where the set has tensor columns.
        """
        prompt_id, group_id = self.stream.next(self.num_prompts)
        return self._gather(prompt_id, group_id, self.group_size)

    def gather(self, prompt_id: torch.Tensor, group_id: torch.Tensor) -> TensorDict:
        """The batch of chosen prompts, for evaluation on rows of one's own choice.

        Args:
            prompt_id: [n] int64 rows of the prompt set, siblings contiguous; group_id: [n] int64.
        Returns:
            as `reset`, with batch_size [n].
        """
        return self._gather(prompt_id, group_id, 1)

    def _gather(self, prompt_id: torch.Tensor, group_id: torch.Tensor, times: int) -> TensorDict:
        """Each prompt `times` times; gathered once, since siblings are cheaper copied as rows."""
        rows = len(prompt_id) * times

        def repeat(x: torch.Tensor) -> torch.Tensor:
            return x if times == 1 else x.repeat_interleave(times, 0, output_size=rows)

        ids, mask, columns = self.prompts.gather(prompt_id)
        ids, mask = repeat(ids), repeat(mask)
        source: dict[str, Any] = {
            "tokens": {"prompt": ids},
            "masks": {"prompt": mask},
            batch.PROMPT_ID: repeat(prompt_id),
            batch.GROUP_ID: repeat(group_id),
        }
        if columns is not None:
            source[batch.COLUMNS] = columns.apply(repeat, batch_size=[rows])
        self._handed_out = tuple((weakref.ref(x), x._version) for x in (ids, mask) if not x.is_inference())
        return TensorDict(source, batch_size=[rows], device=self.device)

    def _are_own(self, *tensors: torch.Tensor) -> bool:
        """Whether these are the prompts and mask handed out last, and nobody has written into them."""
        return len(tensors) == len(self._handed_out) and all(
            ref() is x and x._version == version for (ref, version), x in zip(self._handed_out, tensors, strict=True)
        )

    def step(self, td: TensorDictBase) -> TensorDict:
        """Score the responses of a batch.

        Args:
            td: what `reset` returned, plus ("tokens","response") [B, T] int64 and ("masks","response") [B, T]
                bool; `finished` [B] bool (absent: a row is finished where it ends with one
                of `stop_ids`);
                ("log_probs","response") [B, T] float32 if a KL term is there; `temperature` [B] float32
                (absent: 1). Any B will do. It is left as it was.
        Returns:
            the same rows with "next" added: reward [B, 1] float32 (NaN where unscorable), reward_terms,
            unscorable [B] bool, done, terminated (always True) and truncated [B, 1] bool, and, where terms
            write them, token_reward and ref_log_probs [B, T].
        Raises:
            ValueError: a key is missing, or its shape, dtype or device differs.
        """
        out = td.copy()
        mask = self._check(td)
        if td.get(batch.FINISHED, None) is None:
            out.set(batch.FINISHED, has_stopped(td[batch.RESPONSE], mask, self.stop_ids))
        plan: Plan | None = None

        def plan_once() -> Plan:
            nonlocal plan
            if plan is None:
                plan = make_plan(
                    out[batch.PROMPT_MASK],
                    mask,
                    group_size=self._siblings(out),
                    group_id=out.get(batch.GROUP_ID, None),
                    packing=self.packing,
                )
                self.packing_metrics = plan.metrics
            return plan

        own = self._are_own(td[batch.PROMPT], td[batch.PROMPT_MASK])
        following = self.rewards(out, plan_once, prompts_are_own=own)
        ended = torch.ones_like(mask[:, :1])
        following.set("done", ended)
        following.set("terminated", ended.clone())
        following.set("truncated", ~out[batch.FINISHED].unsqueeze(-1))
        out.set("next", following)
        return out

    def _siblings(self, td: TensorDictBase) -> int:
        """The group size, as far as metadata tell; whether rows really are siblings is seen with their lengths."""
        grouped = len(td) % self.group_size == 0 and td.get(batch.GROUP_ID, None) is not None
        return self.group_size if grouped else 1

    def _check(self, td: TensorDictBase) -> torch.Tensor:
        """Metadata alone: a look at values would stall the device."""
        if td.batch_dims != 1:
            raise ValueError(f"step: the batch must have batch_size [B], got {list(td.batch_size)}; reshape it first")
        rows, device = td.batch_size[0], self.device
        made = "keep what env.reset() returned"
        prompt = require(td, batch.PROMPT, shape=(rows, -1), dtype=torch.int64, device=device, hint=made)
        width = prompt.shape[1]
        require(td, batch.PROMPT_MASK, shape=(rows, width), dtype=torch.bool, device=device, hint=made)
        hint = "write it with policy.generate, or from your engine's ids"
        response = require(td, batch.RESPONSE, shape=(rows, -1), dtype=torch.int64, device=device, hint=hint)
        hint = "build it with responses.stop_mask"
        shape = tuple(response.shape)
        mask = require(td, batch.RESPONSE_MASK, shape=shape, dtype=torch.bool, device=device, hint=hint)
        optional: tuple[tuple[Key, tuple[int, ...], torch.dtype], ...] = (
            (batch.FINISHED, (rows,), torch.bool),
            (batch.TEMPERATURE, (rows,), torch.float32),
            (batch.LOG_PROBS, shape, torch.float32),
            (batch.VALUES, shape, torch.float32),
        )
        for key, expected, dtype in optional:
            if td.get(key, None) is not None:
                require(td, key, shape=expected, dtype=dtype, device=device)
        return mask

    def specs(self, max_new_tokens: int) -> dict[Key, Spec]:
        """Shape, dtype and writer of every key that is always there; T = max_new_tokens."""
        B, P, T = self.batch_size, self.prompts.width, max_new_tokens
        return {
            batch.PROMPT: Spec((B, P), torch.int64, "reset"),
            batch.PROMPT_MASK: Spec((B, P), torch.bool, "reset"),
            batch.PROMPT_ID: Spec((B,), torch.int64, "reset"),
            batch.GROUP_ID: Spec((B,), torch.int64, "reset"),
            batch.RESPONSE: Spec((B, T), torch.int64, "policy"),
            batch.RESPONSE_MASK: Spec((B, T), torch.bool, "policy"),
            batch.REWARD: Spec((B, 1), torch.float32, "step"),
            batch.UNSCORABLE: Spec((B,), torch.bool, "step"),
            batch.DONE: Spec((B, 1), torch.bool, "step"),
            batch.TERMINATED: Spec((B, 1), torch.bool, "step"),
            batch.TRUNCATED: Spec((B, 1), torch.bool, "step"),
        }

    def shard(self, rank: int, world_size: int, reduce: Reduce | None = None) -> None:
        """Make this env one of `world_size` that take turns over one seeded permutation.

        Called by a training loop or env runner, not by whoever builds the env.

        Args:
            rank: in 0..world_size-1.
            reduce: sums a tensor over the processes, so that running statistics are of all ranks; None where the
                processes cannot meet inside a step.
        """
        self.stream.shard(rank, world_size)
        self.rewards.shard(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Cursor and seed of the prompt stream, and the terms' statistics by name: tensors and plain values."""
        state = {"stream": self.stream.state_dict(), "rewards": self.rewards.state_dict()}
        at = self.prompts.rendered_at
        return state if at is None else state | {"rendered_at": at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. Prompts whose chat template asks for the time are rendered as
        they were then.

        Raises:
            ValueError: the state is of other prompts, or of other terms.
        """
        prompts = self.prompts.rendered(state.get("rendered_at"))
        if prompts is not self.prompts:
            rank, world_size = self.stream.rank, self.stream.world_size
            self.prompts = self.rewards.prompts = prompts
            self.stream = PromptStream(prompts, self.stream.seed)
            self.stream.shard(rank, world_size)
        self.stream.load_state_dict(state["stream"])
        self.rewards.load_state_dict(state["rewards"])

    def offload(self) -> int:
        """Put the models of the reward terms to sleep in pinned host memory, so that others can use the device.

        A live model that was handed to a term sleeps too, and with it whatever shares its weights. `step` refuses to
        run until `onload`.

        Returns:
            bytes freed on the device; 0 where the models are on the CPU, or not loaded yet.
        """
        return self.rewards.offload()

    def onload(self) -> int:
        """Wake the models that `offload` put to sleep: the same tensors, so compiled code and ties hold.

        Returns:
            bytes taken on the device.
        """
        return self.rewards.onload()

    def close(self) -> None:
        """End the worker processes of host rewards; harmless to call twice."""
        self.rewards.close()
