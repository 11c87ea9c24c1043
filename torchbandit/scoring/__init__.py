"""Log-probs and reward scores of given responses: packed, with shared prompts, and never [B, T, V].

Each function takes a live transformers model and plain tensors: prompt_ids [B, P] int64 with prompt_mask [B, P] bool,
padded on either side, and response_ids [B, T] int64 with response_mask [B, T] bool. What stands outside the masks is
never read. Results are float32; how far they may be from a one-row-at-a-time float32 forward depends on the model's
dtype alone: about 1e-4 in float32, a few thousandths a token in float16 and a few hundredths in bfloat16, where batch
shape alone moves as much.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.scoring.forward import hidden_states, own_scores
from torchbandit.scoring.plan import Packing, Plan, Rows, make_plan, make_plans
from torchbandit.scoring.routes import route_of, scores_by_head

__all__ = [
    "Packing",
    "Plan",
    "Rows",
    "TokenScores",
    "corpus_loss",
    "corpus_rows",
    "log_probs",
    "make_plan",
    "make_plans",
    "prepare",
    "sequence_scores",
    "token_scores",
    "token_values",
]


class TokenScores(NamedTuple):
    """[B, T] float32 each, 0 outside the response mask."""

    log_probs: Tensor
    entropy: Tensor | None
    values: Tensor | None


def prepare(model: PreTrainedModel) -> None:
    """Find out how `model` may be run, which takes a few tokens and some syncs; else its first scoring does it."""
    model = _bare(model)
    route_of(model)
    if model.get_output_embeddings() is None:
        scores_by_head(model)


def log_probs(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group_size: int = 1,
    plan: Plan | None = None,
) -> Tensor:
    """Log-probs of the response's tokens under softmax(logits / temperature) over the whole vocabulary.

    Args:
        model: a causal LM, used where it is; gradient flows where it requires it.
        prompt_ids: [B, P] int64; prompt_mask: [B, P] bool; response_ids: [B, T] int64; response_mask: [B, T] bool.
        temperature: a number, or [B] float32; 0 counts as 1.
        group_size: siblings of one prompt, contiguous; they may share its computation.
        plan: the step's layout, from `make_plan`; made here if absent.
    Returns:
        [B, T] float32 on the model's device; 0 outside the mask, NaN for a token that nothing precedes, for rows of
        a group whose prompts turn out to differ, and for rows that the plan was not made of.
    Raises:
        ValueError: tensors do not fit together; or the model has dropout on, sees what it predicts, or is asked for
            rows beyond its positions.
    """
    return token_scores(
        model, prompt_ids, prompt_mask, response_ids, response_mask,
        temperature=temperature, group_size=group_size, plan=plan,
    ).log_probs  # fmt: skip


def token_scores(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group_size: int = 1,
    plan: Plan | None = None,
    entropy: bool = False,
    value_head: nn.Module | None = None,
) -> TokenScores:
    """`log_probs`, and from the same forward pass entropy and a value head's values, as [B, T] float32.

    Args:
        entropy: of softmax(logits / temperature), in nats.
        value_head: hidden [..., D] -> [..., 1]; its value before each response token.
    """
    model = _bare(model)
    ids, plan, honest = _checked(prompt_ids, prompt_mask, response_ids, response_mask, group_size, plan)
    heat = _temperature(temperature, plan)
    logps, entropies, values = (_Slots(plan, honest) for _ in range(3))
    for part in hidden_states(model, ids, plan, read="predict"):
        pack = part.pack
        hidden = part.hidden.index_select(0, pack.predict)
        targets = ids.flatten()[pack.target]
        row_heat = None if heat is None else heat[pack.row]
        logp, ent = part.head.of_targets(hidden, targets, row_heat, entropy=entropy)
        logps.add(pack.slot, logp)
        if ent is not None:
            entropies.add(pack.slot, ent)
        if value_head is not None:
            if part.head.whole:
                raise _no_hidden_states(model)
            values.add(pack.slot, _apply(value_head, hidden))
    return TokenScores(
        logps.table(), entropies.table() if entropy else None, values.table() if value_head is not None else None
    )


def token_values(
    critic: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    group_size: int = 1,
    plan: Plan | None = None,
    value_head: nn.Module | None = None,
) -> Tensor:
    """The critic's value before each response token.

    Args:
        critic: a sequence classifier with one label, whose score head is read at every token; with `value_head` any
            decoder, whose LM head does not run.
        value_head: hidden [..., D] -> [..., 1].
    Returns:
        [B, T] float32, with gradient where the critic has it; 0 outside the mask.
    """
    critic = _bare(critic)
    ids, plan, honest = _checked(prompt_ids, prompt_mask, response_ids, response_mask, group_size, plan)
    head = _score_head(critic) if value_head is None else value_head
    values = _Slots(plan, honest)
    for part in hidden_states(critic, ids, plan, read="predict"):
        if part.head.whole:
            raise _no_hidden_states(critic)
        values.add(part.pack.slot, _apply(head, part.hidden.index_select(0, part.pack.predict)))
    return values.table()


def sequence_scores(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    group_size: int = 1,
    plan: Plan | None = None,
) -> Tensor:
    """A reward model's score of each response, read on its last real token, whatever that token is.

    Args:
        model: a sequence classifier with one label.
    Returns:
        [B] float32; NaN where the response is empty. Gradient where the model has it.
    Raises:
        ValueError: tensors do not fit together, or the model is none whose scores can be trusted in a batch.
    """
    model = _bare(model)
    ids, plan, honest = _checked(prompt_ids, prompt_mask, response_ids, response_mask, group_size, plan)
    rows, scores = [], []
    if scores_by_head(model):
        parts = [
            (part.pack.rows, _apply(_score_head(model), part.hidden.index_select(0, part.pack.last)))
            for part in hidden_states(model, ids, plan, read="last")
        ]
    else:
        parts = [(pack.rows, score) for pack, score in own_scores(model, ids, plan)]
    for row, score in parts:
        rows.append(row)
        scores.append(score)
    table = torch.full((plan.num_rows,), torch.nan, device=ids.device)
    if rows:
        table = table.index_copy(0, torch.cat(rows), torch.cat(scores))
    scorable = plan.response_mask.any(1) if honest is None else plan.response_mask.any(1) & honest
    return table.masked_fill(~scorable, torch.nan)


def corpus_loss(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a corpus batch, each real token predicted from the real ones before it in its row.

    Args:
        ids: [M, L] int64; mask: [M, L] bool.
        plan: made of `corpus_rows(mask)`; made here if absent.
    Returns:
        (summed cross-entropy in nats, float32 scalar with gradient; number of predicted tokens, float32 scalar).
    """
    first, scored = corpus_rows(mask)[:2] if plan is None else (plan.prompt_mask, plan.response_mask)
    logps = log_probs(model, ids, first, ids, scored, plan=plan)
    return -torch.where(scored, logps, logps.new_zeros(())).sum(), scored.sum().float()


def corpus_rows(mask: Tensor) -> Rows:
    """What a plan for `corpus_loss` is made of: each row's first real token is its prompt."""
    first = mask & (mask.cumsum(1) == 1)
    return Rows(first, mask & ~first)


class _Slots:
    """A [B, T] table filled pack by pack. What is never filled, inside the mask, stays NaN."""

    def __init__(self, plan: Plan, honest: Tensor | None) -> None:
        self._plan = plan
        self._honest = honest
        self._slots: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, slot: Tensor, value: Tensor) -> None:
        self._slots.append(slot)
        self._values.append(value)

    def table(self) -> Tensor:
        mask = self._plan.response_mask
        flat = torch.full((mask.numel() + 1,), torch.nan, device=mask.device)
        if self._slots:
            flat = flat.index_copy(0, torch.cat(self._slots), torch.cat(self._values))
        table = flat[:-1].view(mask.shape)
        if self._honest is not None:
            table = table.where(self._honest[:, None], torch.nan)
        return torch.where(mask, table, table.new_zeros(()))


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, whose adapters sit in its layers; any other model as it is."""
    configs: Any = getattr(model, "peft_config", None)
    unwrap: Any = getattr(model, "get_base_model", None)
    if not configs or unwrap is None:
        return model
    if any(config.is_prompt_learning for config in configs.values()):
        kinds = sorted(str(config.peft_type) for config in configs.values())
        raise ValueError(
            f"model: PEFT adapters that put tokens before the prompt cannot be scored, got {', '.join(kinds)}; "
            "use adapters inside the layers, such as LoRA"
        )
    return unwrap()  # type: ignore[no-any-return]


def _no_hidden_states(model: nn.Module) -> ValueError:
    return ValueError(f"critic: {type(model).__name__} shows no hidden states to a head; name a model")


def _score_head(model: nn.Module) -> nn.Module:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"critic: must be a sequence classifier whose `score` head reads any token, got {type(model).__name__}; "
            'use critic="head" or a model of a decoder architecture'
        )
    return head


def _apply(head: nn.Module, hidden: Tensor) -> Tensor:
    """[M, D] -> [M] float32; the head runs in its own dtype."""
    weight = next(head.parameters(), hidden)
    return head(hidden.to(weight.dtype)).squeeze(-1).float()  # type: ignore[no-any-return]


def _temperature(temperature: float | Tensor, plan: Plan) -> Tensor | None:
    """[B] float32, or None for 1."""
    if isinstance(temperature, Tensor):
        heat = temperature.to(torch.float32).expand(plan.num_rows)
        return torch.where(heat > 0, heat, torch.ones_like(heat))
    if temperature in (0, 1):
        return None
    if not temperature > 0:
        raise ValueError(f"temperature: must be at least 0 (0 counts as 1), got {temperature}")
    return torch.full((plan.num_rows,), float(temperature), device=plan.response_mask.device)


def _checked(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    group_size: int,
    plan: Plan | None,
) -> tuple[Tensor, Plan, Tensor | None]:
    """([B, S] ids, 0 outside the masks; the plan; [B] bool, False where a row is not what the plan takes it for)."""
    for name, ids, mask in (("prompt", prompt_ids, prompt_mask), ("response", response_ids, response_mask)):
        if ids.dtype != torch.int64 or mask.dtype != torch.bool or ids.shape != mask.shape or ids.device != mask.device:
            raise ValueError(
                f"{name}_ids, {name}_mask: must be int64 and bool of one shape and device, got {ids.dtype} "
                f"{list(ids.shape)} on {ids.device} and {mask.dtype} {list(mask.shape)} on {mask.device}"
            )
    if plan is None:
        plan = make_plan(prompt_mask, response_mask, group_size=group_size)
    elif plan.response_mask.shape != response_mask.shape or plan.prompt_mask.shape != prompt_mask.shape:
        raise ValueError(
            f"plan: must be of these masks, {list(prompt_mask.shape)} and {list(response_mask.shape)}, got one of "
            f"{list(plan.prompt_mask.shape)} and {list(plan.response_mask.shape)}; make it once a step with make_plan"
        )
    # A plan of other masks would read other tokens: such rows get NaN, without a sync.
    same: Tensor | None = None
    for ours, planned in ((prompt_mask, plan.prompt_mask), (response_mask, plan.response_mask)):
        if ours is not planned:
            equal = (ours == planned).all(1)
            same = equal if same is None else same & equal
    ids, mask = torch.cat((prompt_ids, response_ids), 1), torch.cat((prompt_mask, response_mask), 1)
    ids = ids.masked_fill(~mask, 0)
    if not plan.share_prompts:
        return ids, plan, same
    # Rows that say they share a prompt and do not: their scores would be those of another prompt. No sync: NaN.
    P, G = prompt_mask.shape[1], plan.group_size
    prompts = ids.gather(1, plan.table.columns[:, :P])
    prompts = prompts.where(torch.arange(P, device=ids.device) < plan.table.prompt[:, None], 0).view(-1, G, P)
    siblings = (prompts == prompts[:, :1]).all(2).all(1).repeat_interleave(G, output_size=plan.num_rows)
    return ids, plan, siblings if same is None else siblings & same
