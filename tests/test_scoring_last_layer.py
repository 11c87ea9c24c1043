"""The last layer runs on the tokens that are read, and these come out as if it had run on all."""

from __future__ import annotations

import naive
import pytest
import torch
from fakes import ARCHS, fake_batch, tiny_lm, tiny_reward_model
from test_scoring import TOL, layout
from torch import Tensor, nn

from torchbandit.scoring import last_layer, log_probs, prepare, sequence_scores
from torchbandit.scoring.routes import route_of


def seen(module: nn.Module) -> list[int]:
    """How many tokens each call of `module` gets."""
    counts: list[int] = []
    module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:-1].numel()))
    return counts


@pytest.mark.parametrize("kind", ["packed", "shared"])
@pytest.mark.parametrize("arch", [a for a in ARCHS if a != "opt"])
def test_last_layer_sees_what_is_read(arch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_layer, "WORTH_BELOW", 1.1)
    args = naive.tensors(fake_batch())
    rm, lm = tiny_reward_model(arch), tiny_lm(arch)
    assert route_of(rm).trims and route_of(lm).trims
    prepare(rm)  # looks at it with a few tokens of its own
    plan = layout(kind, args)
    want, wanted_logps = naive.scores(rm, args), naive.log_probs(lm, args)[0]
    counts = [[seen(m) for m in model.modules() if type(m).__name__.endswith("MLP")] for model in (rm, lm)]
    with torch.no_grad():
        torch.testing.assert_close(sequence_scores(rm, *args, plan=plan), want, **TOL, equal_nan=True)
        torch.testing.assert_close(log_probs(lm, *args, plan=plan), wanted_logps, **TOL)
    for (first, *_, last), num_read in zip(counts, (len(args[0]), int(args[3].sum())), strict=True):
        assert sum(last) == num_read + 2 * len(last) < sum(first), "and two that keep sizes 0 and 1 away"


def test_with_gradient_the_whole_layer_runs() -> None:
    args, rm = naive.tensors(fake_batch()), tiny_reward_model()
    route_of(rm)
    first, *_, last = [seen(m) for m in rm.modules() if type(m).__name__.endswith("MLP")]
    sequence_scores(rm, *args, plan=layout("packed", args)).nansum().backward()
    assert sum(last) == sum(first)


def test_a_layer_that_is_not_the_last_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong variant: trimmed in the first layer, later tokens would attend to numbers that mean nothing."""
    own = last_layer.blocks
    monkeypatch.setattr(last_layer, "blocks", lambda model: own(model)[:1])
    assert not route_of(tiny_reward_model()).trims


def test_an_mlp_that_looks_at_other_tokens_is_found_out() -> None:
    rm = tiny_reward_model()
    mlp = rm.model.layers[-1].mlp
    own = mlp.forward

    def mixing(hidden: Tensor) -> Tensor:
        return own(hidden + hidden.mean(1, keepdim=True))

    mlp.forward = mixing
    assert not route_of(rm).trims
