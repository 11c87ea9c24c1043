"""Hidden states of a plan's packs, by the fastest route that a model is known to take rightly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from torchbandit.scoring import attention, compiled, last_layer
from torchbandit.scoring.heads import Head
from torchbandit.scoring.packs import Pack
from torchbandit.scoring.plan import Plan
from torchbandit.scoring.routes import Route, check_usable, route_of


class Hidden(NamedTuple):
    """Hidden states of one pack: [lines * W, D], before the head (or logits, where the head says `whole`)."""

    pack: Pack
    hidden: Tensor
    head: Head


def hidden_states(
    model: PreTrainedModel, ids: Tensor, plan: Plan, *, read: Literal["predict", "last", "all"] = "all"
) -> Iterator[Hidden]:
    """Run the backbone over the plan, pack by pack.

    Args:
        ids: [B, S] int64, prompt and response side by side.
        read: which of the pack's tokens the caller will look at; the others may come out as anything.
    """
    route = route_of(model)
    check_usable(model, plan.longest)
    if read == "predict" and not route.causal:
        raise ValueError(f"model: must be causal, got {type(model).__name__}, whose predictions see the tokens that "
                         "they predict; load a causal LM (of BERT's kind: is_decoder=True in its config)")  # fmt: skip
    head = Head(model, route.whole)
    body = model if route.whole else model.base_model
    flat = ids.flatten()
    for pack in _packs(plan, route):
        inputs: dict[str, Any] = {"input_ids": flat[pack.source], "use_cache": False}
        if route.ours:
            inputs["position_ids"] = pack.positions
            if pack.segments is not None:
                inputs["segments"] = pack.segments
            with contextlib.ExitStack() as stack:
                stack.enter_context(attention.installed(model))
                trimmed = False
                if route.trims and read != "all":
                    places = pack.predict if read == "predict" else pack.last
                    trimmed = stack.enter_context(last_layer.trimmed(model, places, pack.source.numel()))
                stack.enter_context(compiled.layers(model, trimmed=trimmed))
                out = body(**inputs)
        else:
            real = pack.positions < (plan.table.prompt + plan.table.reply)[pack.rows][:, None]
            out = body(**inputs, attention_mask=real.long())
        yield Hidden(pack, (out.logits if route.whole else out.last_hidden_state).flatten(0, 1), head)


def _packs(plan: Plan, route: Route) -> Iterable[Pack]:
    if not plan.num_rows:
        return ()
    if not (plan.packing and route.packs):
        return plan.padded()
    # Behind a window, how far back a shared prompt lies differs from response to response: no sharing there.
    windowed = route.window is not None and plan.longest > route.window
    return plan.shared() if plan.share_prompts and not windowed else plan.packed()


def own_scores(model: PreTrainedModel, ids: Tensor, plan: Plan) -> Iterator[tuple[Pack, Tensor]]:
    """Scores of a classifier that pools by itself (an encoder): right-padded, with its own mask; [R] float32."""
    check_usable(model, plan.longest)
    flat = ids.flatten()
    for pack in plan.padded() if plan.num_rows else ():
        real = pack.positions < (plan.table.prompt + plan.table.reply)[pack.rows][:, None]
        out = model(input_ids=flat[pack.source], attention_mask=real.long())
        yield pack, out.logits[:, 0].float()
