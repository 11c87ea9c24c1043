"""Hidden states of a plan's packs, by the fastest route that a model is known to take rightly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from torchbandit.scoring import attention
from torchbandit.scoring.heads import Head, lm_head
from torchbandit.scoring.plan import Pack, Plan


class Hidden(NamedTuple):
    """Hidden states of one pack: [lines * W, D], before the head."""

    pack: Pack
    hidden: Tensor
    head: Head
    vocab_size: int


def hidden_states(model: PreTrainedModel, ids: Tensor, plan: Plan) -> Iterator[Hidden]:
    """Run the backbone over the plan, pack by pack.

    Args:
        ids: [B, S] int64, prompt and response side by side.
    """
    head = lm_head(model) if model.get_output_embeddings() is not None else _no_head
    flat = ids.flatten()
    for pack in plan.padded():
        with attention.installed(model):
            out = model.base_model(input_ids=flat[pack.source], position_ids=pack.positions, use_cache=False)
        yield Hidden(pack, out.last_hidden_state.flatten(0, 1), head, int(model.config.get_text_config().vocab_size))


def own_scores(model: PreTrainedModel, ids: Tensor, plan: Plan) -> Iterator[tuple[Pack, Tensor]]:
    """Scores of a classifier that pools by itself (an encoder): right-padded, with its own mask; [R] float32."""
    flat = ids.flatten()
    for pack in plan.padded():
        real = pack.positions < plan.length[pack.rows][:, None]
        out = model(input_ids=torch.where(real, flat[pack.source], 0), attention_mask=real.long())
        yield pack, out.logits[:, 0].float()


def _no_head(hidden: Tensor) -> Tensor:
    raise ValueError("model: must be a causal LM with an LM head to give log-probs; load it with AutoModelForCausalLM")
