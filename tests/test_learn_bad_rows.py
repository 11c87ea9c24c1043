"""Rows that teach nothing, or hold numbers that are none, are as if they were not there."""

from __future__ import annotations

import pytest
import torch
from naive_algorithms import G, outputs, stepped
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit import losses
from torchbandit.learn import ALGORITHMS, CISPO, GRPO, RLOO

CLOSE = dict(rtol=1e-9, atol=1e-12)
BAD = [torch.nan, torch.inf, -torch.inf]


def counted(mask):
    return {"tokens": mask.sum().double().clamp(min=1), "rows": mask.any(-1).sum().double().clamp(min=1)}


def learned(algorithm, td, out, targets=None):
    """The loss, its gradient [B, T] and its metrics."""
    targets = algorithm.targets(td, group_size=G, reduce=None) if targets is None else targets
    loss, metrics = algorithm.loss(out, targets, denominators=counted(targets["learn_mask"]))
    found = torch.autograd.grad(loss, [out["log_probs"], out["values"]], allow_unused=True, materialize_grads=True)
    return loss, torch.stack(found), metrics


def near(name):
    return 0.001 if name == "gspo" else 0.4


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_group_without_valid_scores_is_as_if_it_were_not_there(name, bad):
    """Rewards, values, log-probs and outputs of its rows may be anything, said to be unscorable or not."""
    algorithm, td = ALGORITHMS[name](), stepped(1)
    out = outputs(td, 1, near(name))
    loss, grad, metrics = learned(algorithm, td[G:], out[G:])
    td["next", "reward"][:G] = bad
    td["next", "unscorable"][: G - 1] = True
    td["next", "unscorable"][G - 1] = False
    for table in (td["values"], td["log_probs", "response"], out["log_probs"].data, out["values"].data):
        table[:G] = bad
    found, found_grad, found_metrics = learned(algorithm, td, out)
    assert_close(found, loss, **CLOSE)
    assert_close(found_grad[:, G:], grad, **CLOSE)
    assert (found_grad[:, :G] == 0).all()
    for key, value in metrics.items():
        assert_close(found_metrics[key], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["advantages", "log_probs"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_with_a_number_that_is_none_gives_no_gradient(name, what, bad):
    algorithm, td = ALGORITHMS[name](), stepped(2)
    out = outputs(td, 2, near(name))
    targets = algorithm.targets(td, group_size=G, reduce=None)
    row = int(targets["learn_mask"].any(-1).nonzero()[1])
    before = learned(algorithm, td, out, targets)[1]
    number = targets["advantages"] if what == "advantages" else targets["log_probs", "response"]
    number[row] = bad
    loss, grad, metrics = learned(algorithm, td, out, targets)
    assert loss.isfinite() and grad.isfinite().all() and all(value.isfinite() for value in metrics.values())
    others = torch.arange(len(td)) != row
    assert_close(grad[:, others], before[:, others], **CLOSE)
    if what == "advantages" or name != "raft":  # which reads no old log-prob
        assert (grad[0, row] == 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_to_learn_from_is_a_loss_of_zero(name):
    algorithm, td = ALGORITHMS[name](), stepped(3)
    for nothing in ("masked", "empty", "unscorable"):
        bad = td.clone()
        if nothing == "masked":
            bad["learn_mask"] = torch.zeros_like(td["masks", "response"])
        elif nothing == "empty":
            bad["masks", "response"] = torch.zeros_like(td["masks", "response"])
        else:
            bad["next", "unscorable"] = torch.ones(len(td), dtype=torch.bool)
            bad["next", "reward"] = torch.full((len(td), 1), torch.nan, dtype=torch.float64)
        loss, grad, metrics = learned(algorithm, bad, outputs(td, 3))
        assert loss == 0 and (grad == 0).all(), nothing
        assert all(value == 0 for value in metrics.values()), nothing


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_a_constant_group_has_no_gradient_at_all(name):
    td = stepped(4)
    td["next", "reward"][G : 2 * G] = 0.1 + 0.2  # its mean is off by a rounding
    grad = learned(ALGORITHMS[name](), td, outputs(td, 4, near(name)))[1]
    assert (grad[0, G : 2 * G] == 0).all() and grad.abs().max() > 0


def test_a_batch_of_constant_groups_teaches_nothing_with_a_baseline():
    """Not even a rounding, which whitening would blow up and Adam make a whole step of."""
    for name in ("reinforce++-baseline", "grpo", "rloo"):
        td = stepped(4).apply(lambda x: x.float() if x.is_floating_point() else x)
        td["next", "reward"] = torch.tensor([0.3, 0.7, 1.1, 1.9]).repeat_interleave(G)[:, None]
        td["next", "reward"][0], td["next", "unscorable"] = torch.nan, torch.arange(len(td)) == 0
        assert (ALGORITHMS[name]().targets(td, group_size=G, reduce=None)["advantages"] == 0).all(), name


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(dual_clip=3.0), GRPO(ratio="response"), CISPO(), RLOO()], ids=repr)
@pytest.mark.parametrize("drift", [90.0, -90.0])
def test_a_log_ratio_of_90_leaves_loss_and_gradient_finite(algorithm, drift):
    td = stepped(5).apply(lambda x: x.float() if x.is_floating_point() else x)
    td["next", "unscorable"][:] = False
    out = outputs(td, 5, 0.1)
    targets = algorithm.targets(td, group_size=G, reduce=None)
    row = int(targets["learn_mask"].any(-1).nonzero()[0])
    targets["advantages"] = torch.full((len(td),), -1.0)
    out["log_probs"].data[row] = targets["log_probs", "response"][row] + drift
    loss, grad, metrics = learned(algorithm, td, out, targets)
    assert loss.isfinite() and grad.isfinite().all()
    mask = targets["learn_mask"]
    by_token = getattr(algorithm, "mean", algorithm.mean_of) == "token"
    share = mask[row].sum() / mask.sum() if by_token else 1 / mask.any(-1).sum()
    assert_close(metrics["ratio_at_bound"].double(), share.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", BAD)
def test_a_weight_that_is_none_leaves_its_row_out(bad):
    gen = torch.Generator().manual_seed(0)
    new = torch.randn(3, 4, generator=gen).requires_grad_()
    mask, weights = torch.ones(3, 4).bool(), torch.ones(3, 4)
    weights[1, 2] = bad
    loss, _ = losses.policy_loss(new, new.detach(), torch.ones(3), mask, weights=weights)
    right, _ = losses.policy_loss(new[[0, 2]], new.detach()[[0, 2]], torch.ones(2), mask[[0, 2]])
    assert_close(loss, right)
    (grad,) = torch.autograd.grad(loss, new)
    assert (grad[1] == 0).all() and (grad[0] != 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "weighted_k3"])
@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_the_reference_cannot_score_has_no_kl(estimator, bad):
    new = torch.full((2, 3), -1.0).requires_grad_()
    ref, mask = torch.full((2, 3), -2.0), torch.ones(2, 3).bool()
    old = torch.full((2, 3), -1.5)
    right, _ = losses.kl_loss(new[1:], ref[1:], mask[1:], 0.5, estimator=estimator, old_log_probs=old[1:])
    ref[0, 1] = bad
    loss, metrics = losses.kl_loss(new, ref, mask, 0.5, estimator=estimator, old_log_probs=old)
    assert_close(loss, right)
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.isfinite().all() and (grad[0] == 0).all() and (grad[1] != 0).all() and metrics["kl"].isfinite()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "weighted_k3"])
@pytest.mark.parametrize("apart", [90.0, -90.0])
def test_a_kl_of_90_nats_at_one_token_is_finite(estimator, apart):
    new = torch.full((1, 2), -100.0).requires_grad_()
    ref = torch.tensor([[-100.0 - apart, -99.0]])
    loss, _ = losses.kl_loss(
        new, ref, torch.ones(1, 2).bool(), 1.0, estimator=estimator, old_log_probs=new.detach().clone()
    )
    (grad,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and grad.isfinite().all() and grad[0, 1] != 0


def test_the_rows_of_a_batch_that_are_truncated_can_be_left_out():
    """`learn_mask` of the batch is kept to, and what it leaves out is not counted."""
    for name, cls in ALGORITHMS.items():
        td = stepped(6)
        out = outputs(td, 6, near(name))
        left = td["masks", "response"].clone()
        left[5] = False
        loss, grad, _ = learned(cls(), TensorDict(td.to_dict() | {"learn_mask": left}, td.batch_size), out)
        assert loss.isfinite() and (grad[:, 5] == 0).all() and grad.abs().max() > 0, name
