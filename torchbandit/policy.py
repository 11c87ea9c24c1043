"""What writes a response, and its log-probs. (B, P, T: see batch.py.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from torchbandit import batch, scoring
from torchbandit.generation import Sampling, generate
from torchbandit.models import (
    ModelLike,
    ModelSpec,
    check_embeddings,
    check_same_tokenizer,
    context_length,
    keep_steady,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    load_value_head,
    num_ids,
    save_model,
    save_value_head,
    stop_ids_of,
)
from torchbandit.responses import tell_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Plans(NamedTuple):
    """How `CausalLMPolicy.forward` lays out its rows, and those of its pretraining batch."""

    rows: scoring.Plan
    ptx: scoring.Plan | None = None


class CausalLMPolicy(nn.Module):
    """A causal language model as the bandit's policy, with an optional critic.

    `generate` writes the response keys. `forward` returns everything a loss needs from one forward pass; it is what
    DistributedDataParallel wraps, so that gradients of every part are averaged.

    Args:
        model: hub id, folder, `ModelSpec` or live model.
        tokenizer: None takes the one beside the model.
        sampling: how responses are drawn; its stop ids default to the tokenizer's and the model's eos.
        critic: None, "head" (a linear value head on the backbone; the one that `save_pretrained` left in the model's
            folder, or a new one of zeros) or a model of its own (a one-label sequence classifier, usually the reward
            model's weights).
        device, dtype: where and in what precision; "auto" is bfloat16 on CUDA, float32 on a CPU.
        seed: of the policy's own generator, from which every token is drawn.
    Raises:
        ValueError: the model's tokenizer is another one, or the model cannot be used as asked.
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        sampling: Sampling | None = None,
        critic: Literal["head"] | ModelLike | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        seed: int = 0,
        trainable: bool = True,
        packing: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.device = batch.resolved(device)
        self.lm = load_causal_lm(model, self.device, dtype=dtype, trainable=trainable)
        if tokenizer is None:
            if not isinstance(model, (str, Path)) and not hasattr(model, "path"):
                raise ValueError("tokenizer: a live model brings none; pass the tokenizer it was trained with")
            tokenizer = load_tokenizer(model)  # type: ignore[arg-type]
        else:
            check_same_tokenizer(tokenizer, model, "policy")
        check_embeddings(tokenizer, self.lm, "policy")
        self.tokenizer = tokenizer
        sampling = Sampling() if sampling is None else sampling
        if sampling.num_ids is None:
            sampling = dataclasses.replace(sampling, num_ids=num_ids(tokenizer))
        self.sampling = sampling
        self.packing = packing
        self.value_head: nn.Linear | None = None
        self.critic: PreTrainedModel | None = None
        if isinstance(critic, str) and critic == "head":
            # Zero weights: the first values are 0 and do not steer the first advantages.
            size = getattr(self.lm.config.get_text_config(), "hidden_size", None)
            if not isinstance(size, int):
                raise ValueError(f"critic: {type(self.lm).__name__} must say its hidden_size to carry a value head, "
                                 f"got {size}; name a critic model of its own")  # fmt: skip
            self.value_head = nn.Linear(size, 1, device=self.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if isinstance(model, (str, Path, ModelSpec)):
                load_value_head(model, self.value_head)
            self.value_head.requires_grad_(trainable)
        elif critic is not None:
            check_same_tokenizer(tokenizer, critic, "critic")
            self.critic = load_reward_model(critic, self.device, dtype=dtype, trainable=trainable)
            check_embeddings(tokenizer, self.critic, "critic")
        self.generator = torch.Generator(self.device).manual_seed(seed)
        own = self.sampling.stop_ids  # (): nothing stops
        self.stop_ids = stop_ids_of(self.lm, tokenizer) if own is None else own
        tell_stop_ids(tokenizer, self.stop_ids)
        self.pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    @property
    def has_critic(self) -> bool:
        """True where `generate` and `forward` write values."""
        return self.value_head is not None or self.critic is not None

    @torch.no_grad()
    def generate(
        self,
        td: TensorDictBase,
        *,
        greedy: bool = False,
        generator: torch.Generator | None = None,
        group_size: int | None = None,
    ) -> TensorDict:
        """Answer every prompt.

        Args:
            td: reads ("tokens","prompt") [B, P] int64 and ("masks","prompt") [B, P] bool.
            greedy: take the most likely token (log-probs are then at temperature 1).
            generator: draws instead of the policy's own one (for an evaluation that leaves training as it was).
            group_size: contiguous siblings, which share the computation of their prompt; None reads it off group_id
                with one small copy to the host.
        Returns:
            td's keys and ("tokens"|"masks"|"log_probs","response") [B, T], finished [B], temperature [B] and, with
            a critic, values [B, T]; T = sampling.max_new_tokens. td is left as it was.
        """
        self._ready()
        sampling = dataclasses.replace(self.sampling, temperature=0.0) if greedy else self.sampling
        siblings = _siblings(td) if group_size is None else group_size
        made = generate(
            self.lm,
            td[batch.PROMPT],
            td[batch.PROMPT_MASK],
            sampling,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            generator=self.generator if generator is None else generator,
            group_size=siblings,
        )
        out: TensorDict = td.copy()
        out.set(batch.RESPONSE, made.tokens)
        out.set(batch.RESPONSE_MASK, made.mask)
        out.set(batch.LOG_PROBS, made.log_probs)
        out.set(batch.FINISHED, made.finished)
        out.set(batch.TEMPERATURE, torch.full_like(made.log_probs[:, 0], sampling.temperature or 1.0))
        if self.has_critic:
            out.set(batch.VALUES, self.values(out, group_size=siblings))
        return out

    def values(self, td: TensorDictBase, *, group_size: int = 1) -> Tensor:
        """The critic's value before each response token: [B, T] float32, 0 outside the mask.

        Args:
            group_size: contiguous siblings, whose prompt is then read once.
        Raises:
            ValueError: the policy was built without a critic.
        """
        if not self.has_critic:
            raise ValueError('values: this policy has no critic; build it with critic="head" or critic=<model>')
        self._ready()
        plan = self.plans([td], group_size=group_size)[0].rows
        return self._values(td, plan)

    def _values(self, td: TensorDictBase, plan: scoring.Plan) -> Tensor:
        if self.critic is None:
            return scoring.token_values(self.lm, *_rows(td), plan=plan, value_head=self.value_head)
        mask, limit = td[batch.RESPONSE_MASK], context_length(self.critic)
        values = scoring.token_values(self.critic, *_rows(td), plan=plan)
        if limit is None or mask.shape[1] + td[batch.PROMPT_MASK].shape[1] <= limit:
            return values
        return values.masked_fill(batch.longer_than(limit, td[batch.PROMPT_MASK], mask)[:, None] & mask, torch.nan)

    def forward(
        self,
        td: TensorDictBase,
        *,
        ptx_ids: Tensor | None = None,
        ptx_mask: Tensor | None = None,
        entropy: bool = False,
        group_size: int = 1,
        plans: Plans | None = None,
    ) -> TensorDict:
        """Everything a loss needs, from one forward pass, with gradient.

        Args:
            td: reads the prompt and response keys and `temperature` [B] (absent: 1).
            ptx_ids, ptx_mask: [M, L] int64 and bool, a pretraining batch (InstructGPT's ptx).
            entropy: also compute the entropy of each token's distribution.
            group_size: contiguous siblings of a prompt in td.
            plans: of these rows, from `plans`; made here if absent, with a small copy to the host.
        Returns:
            batch_size []: log_probs [B, T] float32 (0 outside the mask), entropy [B, T] on request, values [B, T]
            with a critic, and with ptx_ids ptx_loss (mean token cross-entropy) and ptx_tokens, scalars.
        """
        self._ready()
        plans = self.plans([td], [ptx_mask], group_size=group_size)[0] if plans is None else plans
        temperature = td.get(batch.TEMPERATURE, None)
        scores = scoring.token_scores(
            self.lm,
            *_rows(td),
            temperature=1.0 if temperature is None else temperature,
            plan=plans.rows,
            entropy=entropy,
            value_head=self.value_head,
        )
        out = TensorDict({"log_probs": scores.log_probs}, batch_size=[])
        if scores.entropy is not None:
            out["entropy"] = scores.entropy
        if scores.values is not None:
            out["values"] = scores.values
        elif self.critic is not None:
            out["values"] = self._values(td, plans.rows)
        if ptx_ids is not None:
            if ptx_mask is None:
                raise ValueError("ptx_mask: must be bool [M, L] beside ptx_ids, got None")
            total, count = self.corpus_loss(ptx_ids, ptx_mask, plans.ptx)
            out["ptx_loss"], out["ptx_tokens"] = total / count.clamp(min=1), count
        return out

    def plans(
        self,
        pieces: Sequence[TensorDictBase],
        ptx_masks: Sequence[Tensor | None] | None = None,
        *,
        group_size: int | Sequence[int] = 1,
    ) -> list[Plans]:
        """How `forward` will lay out each of several microbatches, with one small copy to the host for all of them.

        Args:
            pieces: each reads the masks of prompt and response; ptx_masks: [M, L] bool or None, one a piece.
            group_size: contiguous siblings of a prompt, in all pieces or in each.
        """
        sizes = [group_size] * len(pieces) if isinstance(group_size, int) else group_size
        rows = [
            scoring.Rows(td[batch.PROMPT_MASK], td[batch.RESPONSE_MASK], size, td.get(batch.GROUP_ID, None))
            for td, size in zip(pieces, sizes, strict=True)
        ]
        masks = [None] * len(pieces) if ptx_masks is None else ptx_masks
        texts = [scoring.corpus_rows(mask) for mask in masks if mask is not None]
        made = scoring.make_plans([*rows, *texts], packing=self.packing)
        ptx = iter(made[len(rows) :])
        return [
            Plans(plan, None if mask is None else next(ptx))
            for plan, mask in zip(made[: len(rows)], masks, strict=True)
        ]

    def corpus_loss(self, ids: Tensor, mask: Tensor, plan: scoring.Plan | None = None) -> tuple[Tensor, Tensor]:
        """Summed token cross-entropy of text [M, L] under the policy, and the number of tokens; with gradient."""
        return scoring.corpus_loss(self.lm, ids, mask, plan=plan)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for model in self._models():
            model.gradient_checkpointing_enable({"use_reentrant": False})
            keep_steady(model)

    def train(self, mode: bool = True) -> CausalLMPolicy:
        """Set the policy's own flag; its models stay in eval mode, which two forward passes need to agree."""
        super().train(False)
        self.training = mode
        return self

    def _models(self) -> list[PreTrainedModel]:
        return [model for model in (self.lm, self.critic) if model is not None]

    def _ready(self) -> None:
        """What must be so before a model runs. At building it could not be: RLlib allows no forward pass there."""
        for model in self._models():
            scoring.prepare(model)  # tries the model on a few tokens, the first time
            keep_steady(model)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that `CausalLMPolicy` and `AutoModelForCausalLM.from_pretrained` open, tokenizer included.

        Of a policy with a PEFT adapter the adapter is written, in peft's format, over its base by name. A value head
        goes into `value_head.safetensors` beside the model, where `critic="head"` finds it; a critic of its own into
        `critic/`, to be opened with `critic="<directory>/critic"`.
        """
        directory = Path(directory)
        save_model(self.lm, directory)
        self.tokenizer.save_pretrained(directory)
        if self.value_head is not None:
            save_value_head(self.value_head, directory)
        if self.critic is not None:
            save_model(self.critic, directory / "critic")
            self.tokenizer.save_pretrained(directory / "critic")


def _rows(td: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return td[batch.PROMPT], td[batch.PROMPT_MASK], td[batch.RESPONSE], td[batch.RESPONSE_MASK]


def _siblings(td: TensorDictBase) -> int:
    """Group size of a batch whose groups are contiguous and of one size; otherwise 1."""
    group_id = td.get(batch.GROUP_ID, None)
    if group_id is None or len(group_id) == 0:
        return 1
    starts = [0] + (group_id[1:] != group_id[:-1]).nonzero().flatten().add(1).tolist()
    sizes = {stop - start for start, stop in zip(starts, starts[1:] + [len(group_id)], strict=True)}
    return sizes.pop() if len(sizes) == 1 else 1
