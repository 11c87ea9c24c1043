"""The gradient of each KL estimate as a loss, in expectation: every token of a small vocabulary is enumerated."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from torchbandit.losses import kl_loss

CLOSE = dict(rtol=1e-9, atol=1e-12)
V = 5


def policies():
    gen = torch.Generator().manual_seed(0)
    theta, ref, old = (torch.randn(V, generator=gen, dtype=torch.float64) for _ in range(3))
    return theta.requires_grad_(), ref.log_softmax(-1), old.log_softmax(-1)


def expected(estimator, theta, ref, sampler, old=None):
    """Value and gradient, in expectation over tokens that `sampler` draws."""
    value, gradient = 0.0, torch.zeros(V, dtype=torch.float64)
    for token, p in enumerate(sampler.exp()):
        log_prob = theta.log_softmax(-1)[token].view(1, 1)
        loss, metrics = kl_loss(
            log_prob, ref[token].view(1, 1), torch.ones(1, 1).bool(), 1.0, estimator=estimator,
            old_log_probs=None if old is None else old[token].view(1, 1),
        )  # fmt: skip
        value = value + p * metrics["kl"]
        gradient = gradient + p * torch.autograd.grad(loss, theta)[0]
    return value, gradient


def kl(theta, ref):
    """KL(policy || reference) and KL(reference || policy), each with its gradient."""
    log_probs = theta.log_softmax(-1)
    both = (log_probs.exp() * (log_probs - ref)).sum(), (ref.exp() * (ref - log_probs)).sum()
    return [(value.detach(), torch.autograd.grad(value, theta, retain_graph=True)[0]) for value in both]


def test_on_policy():
    theta, ref, _ = policies()
    now = theta.log_softmax(-1).detach()
    (value, gradient), (_, reverse) = kl(theta, ref)
    found = {name: expected(name, theta, ref, now) for name in ("k1", "k2", "k3")}
    found["weighted_k3"] = expected("weighted_k3", theta, ref, now, now)
    for name in ("k1", "k3", "weighted_k3"):
        assert_close(found[name][0], value, **CLOSE)
    assert (found["k2"][0] - value).abs() > 0.01  # biased
    assert_close(found["k1"][1], torch.zeros_like(gradient), **CLOSE)  # pulls nowhere
    assert_close(found["k2"][1], gradient, **CLOSE)
    assert_close(found["weighted_k3"][1], gradient, **CLOSE)
    assert_close(found["k3"][1], reverse, **CLOSE)  # that of the other KL
    assert (found["k3"][1] - gradient).abs().max() > 0.01


def test_off_policy():
    """Tokens of an old policy: only the weighted estimate is still the KL's."""
    theta, ref, old = policies()
    (value, gradient), _ = kl(theta, ref)
    weighted = expected("weighted_k3", theta, ref, old, old)
    assert_close(weighted[0], value, **CLOSE)
    assert_close(weighted[1], gradient, **CLOSE)
    log_probs = theta.log_softmax(-1)
    differences = log_probs - ref
    right = {
        "k1": (old.exp() * log_probs).sum(),
        "k2": (old.exp() * differences.square() / 2).sum(),
        "k3": (old.exp() * ((-differences).exp() - 1 + differences)).sum(),
    }
    for name, loss in right.items():
        found = expected(name, theta, ref, old)[1]
        assert_close(found, torch.autograd.grad(loss, theta, retain_graph=True)[0], **CLOSE)
        assert (found - gradient).abs().max() > 0.01, name


@pytest.mark.parametrize("mean", ["token", "response", "width", "sum"])
def test_it_is_averaged_as_the_loss_is(mean):
    lengths = [4, 1, 0]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    new = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, metrics = kl_loss(new, torch.zeros_like(new), mask, 0.5, estimator="k1", mean=mean)
    rows = [new[i, :n].sum() for i, n in enumerate(lengths) if n]
    right = {
        "token": sum(rows) / 5,
        "response": (rows[0] / 4 + rows[1]) / 2,
        "width": sum(rows) / 5 / 2,
        "sum": sum(rows) / 2,
    }[mean]
    assert_close(loss, 0.5 * right, **CLOSE)
    assert_close(metrics["kl"], right, **CLOSE)


def test_a_weighted_estimate_needs_the_old_log_probs():
    with pytest.raises(ValueError, match='old_log_probs: needed for estimator="weighted_k3"'):
        kl_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1).bool(), 1.0, estimator="weighted_k3")
