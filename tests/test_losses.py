"""Losses against few-line float64 versions written as loops over rows and tokens, and what must hold for any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from torchbandit import losses as L

B, T, G = 12, 7, 4
NAN = float("nan")


class Fake:
    """Ragged tokens (an empty row, a full row, rows of one) with plausible numbers, in the dtype asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 0.4) -> None:
        gen = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

        lengths = torch.randint(1, T + 1, (B,), generator=gen)
        lengths[:3] = torch.tensor([0, T, 1])
        self.mask = torch.arange(T) < lengths[:, None]
        self.old = -draw(B, T).abs()
        self.log_probs = self.old + spread * draw(B, T)
        self.ref = self.old + spread * draw(B, T)
        self.advantages = draw(B, T)
        self.row_advantages = draw(B)
        self.reward = draw(B)
        self.values, self.old_values, self.returns = draw(B, T), draw(B, T), draw(B, T)
        self.weights = draw(B, T).abs()
        self.token_reward = draw(B, T)
        self.entropy = draw(B, T).abs()


def tokens(mask: Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if bool(mask[b, t])]


def rows(mask: Tensor) -> list[tuple[int, list[int]]]:
    """Rows that have tokens, and the positions of these."""
    return [(b, [t for t in range(mask.shape[1]) if mask[b, t]]) for b in range(mask.shape[0]) if bool(mask[b].any())]


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


def same_loss_and_gradient(ours: Tensor, theirs: Tensor, of: Tensor) -> None:
    assert_close(ours, theirs)
    assert float(gradient(theirs, of).abs().sum()) > 0, "a gradient of 0 would prove nothing"
    assert_close(gradient(ours, of), gradient(theirs, of))


# ---------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma: float, lam: float) -> None:
    f = Fake()
    advantages, returns = L.gae(f.token_reward, f.values, f.mask, gamma=gamma, lam=lam)
    want_a, want_r = torch.zeros_like(f.values), torch.zeros_like(f.values)
    for b, ts in rows(f.mask):
        running = 0.0
        for t in reversed(ts):
            after = float(f.values[b, t + 1]) if t + 1 in ts else 0.0
            delta = float(f.token_reward[b, t]) + gamma * after - float(f.values[b, t])
            running = delta + gamma * lam * running
            want_a[b, t], want_r[b, t] = running, running + float(f.values[b, t])
    assert_close(advantages, want_a)
    assert_close(returns, want_r)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 65])
def test_gae_with_lambda_one_is_reward_to_go(width: int) -> None:
    gen = torch.Generator().manual_seed(width)
    reward, values = torch.randn(2, 3, width, generator=gen, dtype=torch.float64).unbind()
    mask = torch.ones(3, width, dtype=torch.bool)
    _, returns = L.gae(reward, values, mask, lam=1.0)
    assert_close(returns, reward.flip(-1).cumsum(-1).flip(-1))


def test_gae_gives_no_gradient_to_the_critic() -> None:
    f = Fake()
    advantages, returns = L.gae(f.token_reward, f.values.requires_grad_(), f.mask)
    assert not advantages.requires_grad and not returns.requires_grad


def group_loop(reward: Tensor, scorable: Tensor, kind: str) -> Tensor:
    out = torch.zeros_like(reward)
    for start in range(0, len(reward), G):
        counted = [i for i in range(start, start + G) if scorable[i] and math.isfinite(reward[i])]
        got = [float(reward[i]) for i in counted]
        if len(got) < 2:
            continue
        mean = sum(got) / len(got)
        std = math.sqrt(sum((r - mean) ** 2 for r in got) / (len(got) - 1))
        for i in counted:
            r = float(reward[i])
            others = (sum(got) - r) / (len(got) - 1)
            grpo = (r - mean) / (std + 1e-6)
            out[i] = {"rloo": r - others, "dr_grpo": r - mean, "grpo": grpo}[kind]
    return out


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "rloo": L.rloo_advantages,
    "grpo": L.grpo_advantages,
    "dr_grpo": lambda *args, **kwargs: L.grpo_advantages(*args, scale=False, **kwargs),
}


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("case", ["all", "nan_siblings", "scorable", "one_left"])
def test_group_advantages_use_the_siblings_that_count(kind: str, case: str) -> None:
    reward = Fake().reward
    scorable = torch.ones(B, dtype=torch.bool)
    if case == "nan_siblings":
        reward[1], reward[6] = NAN, math.inf
    if case == "scorable":
        scorable[[0, 5, 6]] = False
    if case == "one_left":
        reward[1:4], reward[8:12] = NAN, NAN
    got = ADVANTAGES[kind](reward, G, scorable=None if case == "all" else scorable)
    assert_close(got, group_loop(reward, scorable, kind))
    assert bool((got[4:8] != 0).any())


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_equal_rewards_give_exactly_zero_and_leave_the_other_groups_alone(kind: str) -> None:
    reward = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.4, 0.7])
    assert reward[:3].sum() / 3 != reward[0], "the mean must be off by a rounding"
    got = ADVANTAGES[kind](reward, 3)
    assert torch.equal(got[:3], torch.zeros(3))
    assert float(got[5]) > 0.2


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_a_group_of_one_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"group_size: .*at least 2, got 1"):
        ADVANTAGES[kind](torch.randn(4), 1)


def test_constant_groups_are_counted_and_marked() -> None:
    reward = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 5.0, NAN, 5.0, NAN, NAN, 1.0, NAN, NAN, NAN])
    #                      all equal      | differ       | equal but one  | one left      | none
    want = torch.tensor([True, False, True, True, True])
    assert torch.equal(L.group_is_constant(reward, 3), want.repeat_interleave(3))
    assert int(L.num_constant_groups(reward, 3)) == 4
    scorable = torch.ones(15, dtype=torch.bool)
    scorable[4] = False  # the one that differed
    assert int(L.num_constant_groups(reward, 3, scorable)) == 5


# ---------------------------------------------------------------------------------------------- ratios


def test_kl_estimators_are_schulmans() -> None:
    f = Fake()
    for b, t in tokens(f.mask):
        r = math.exp(float(f.ref[b, t]) - float(f.log_probs[b, t]))
        want = {"k1": -math.log(r), "k2": 0.5 * math.log(r) ** 2, "k3": (r - 1) - math.log(r)}
        for name, value in want.items():
            got = L.kl_estimate(f.log_probs, f.ref, name, f.mask)  # type: ignore[arg-type]
            assert_close(float(got[b, t]), value)
            assert_close(got, torch.where(f.mask, L.kl_estimate(f.log_probs, f.ref, name), 0.0))  # type: ignore[arg-type]


def test_trap_10_kl_is_never_negative_and_padding_does_not_count() -> None:
    # float32 rounding near 0 and far from it, where (r - 1) - log r would go below 0
    tiny = torch.logspace(-12, 1, 4000)
    steps = torch.cat((tiny, -tiny, torch.zeros(1)))[None]
    naive = torch.exp(-steps) - 1 + steps
    assert float(naive.min()) < 0, "the inputs must provoke what is guarded against"
    k3 = L.kl_estimate(steps, torch.zeros_like(steps), "k3")
    assert float(k3.min()) >= 0
    exact = steps.double().square() / 2 - steps.double() ** 3 / 6  # the series: what is left of it is below d^4
    small = (steps.abs() > 1e-3) & (steps.abs() < 1e-2)
    assert_close(k3.double()[small], exact[small], rtol=1e-3, atol=0)
    f = Fake()
    log_probs = torch.where(f.mask, f.log_probs, -9.0)  # what a model says about padding: k1 far below 0
    for name in ("k1", "k2", "k3"):
        kl = L.kl_estimate(log_probs, torch.where(f.mask, f.ref, NAN), name, f.mask)  # type: ignore[arg-type]
        assert torch.equal(kl[~f.mask], torch.zeros_like(kl[~f.mask]))
        assert_close(kl.sum(), L.kl_estimate(f.log_probs, f.ref, name)[f.mask].sum())  # type: ignore[arg-type]


def test_trap_11_kl_is_unclamped_with_the_gradient_of_its_definition() -> None:
    d = torch.tensor([[-30.0, -11.0, -0.5, 0.0, 0.5, 11.0, 30.0]], dtype=torch.float64)
    ref = torch.full_like(d, -40.0)
    log_probs = (ref + d).requires_grad_()
    value = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}
    slope = {"k1": torch.ones_like(d), "k2": d, "k3": 1 - (-d).exp()}
    for name in value:
        kl = L.kl_estimate(log_probs, ref, name)  # type: ignore[arg-type]
        assert_close(kl, value[name])
        assert_close(gradient(kl.sum(), log_probs), slope[name])
        # The wrong variant, a clamp at 10: other values in the tails, and no gradient there.
        clamped = L.kl_estimate((log_probs - ref).clamp(-10, 10), torch.zeros_like(ref), name)  # type: ignore[arg-type]
        assert (clamped - value[name])[0, [0, -1]].abs().min() > 10
        assert gradient(clamped.sum(), log_probs)[0, [0, -1]].abs().max() == 0


def test_kl_estimators_in_expectation_over_a_whole_vocabulary() -> None:
    gen = torch.Generator().manual_seed(3)
    logits = torch.randn(9, generator=gen, dtype=torch.float64).requires_grad_()
    policy, ref = logits.log_softmax(-1), torch.randn(9, generator=gen, dtype=torch.float64).log_softmax(-1)
    p = policy.exp().detach()
    kl = (policy.exp() * (policy - ref)).sum()
    for name in ("k1", "k3"):  # unbiased values
        assert_close((p * L.kl_estimate(policy[None], ref[None], name)[0]).sum(), kl)  # type: ignore[arg-type]
    k2 = (p * L.kl_estimate(policy[None], ref[None], "k2")[0]).sum()  # unbiased gradient
    assert_close(torch.autograd.grad(k2, logits, retain_graph=True)[0], torch.autograd.grad(kl, logits)[0])


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_importance_weights_are_truncated_ratios(per: Any) -> None:
    f = Fake(spread=0.8)
    got = L.importance_weights(f.log_probs.requires_grad_(), f.old, f.mask, cap=1.5, per=per)
    want = torch.zeros_like(got)
    for b, ts in rows(f.mask):
        logs = [float((f.log_probs[b, t] - f.old[b, t]).detach()) for t in ts]
        for i, t in enumerate(ts):
            want[b, t] = min(1.5, math.exp(logs[i] if per == "token" else sum(logs)))
    assert_close(got, want)
    assert not got.requires_grad
    assert bool((got == 1.5).any() & ((got < 1.5) & (got > 0)).any())


def test_importance_weights_survive_an_overflowing_ratio() -> None:
    ones = torch.ones(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for per in ("token", "sequence"):
        assert torch.equal(L.importance_weights(500 * ones, ones, mask, per=per), 2 * ones)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize(("clip", "high"), [(0.2, None), (0.2, 0.28), (1.5, 0.1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_ppo_is_the_clipped_surrogate(clip: float, high: float | None, weighted: bool) -> None:
    f = Fake(spread=0.8)
    f.log_probs.requires_grad_()
    loss, metrics = L.ppo_loss(
        f.log_probs, f.old, f.advantages, f.mask, clip=clip, clip_high=high, weights=f.weights if weighted else None
    )
    total, num_clipped, kl = torch.zeros((), dtype=torch.float64), 0, 0.0
    top = clip if high is None else high
    for b, t in tokens(f.mask):
        ratio = (f.log_probs[b, t] - f.old[b, t]).exp()
        a = f.advantages[b, t]
        total = total + (f.weights[b, t] if weighted else 1.0) * clipped(ratio, a, clip, top)
        num_clipped += bool(ratio > 1 + top if a > 0 else ratio < 1 - clip)
        kl += float((ratio - 1 - ratio.log()).detach())
    n = len(tokens(f.mask))
    same_loss_and_gradient(loss, total / n, f.log_probs)
    assert 0 < num_clipped < n
    assert_close(float(metrics["clip_fraction"]), num_clipped / n, rtol=1e-6, atol=0)
    assert_close(float(metrics["old_kl"]), kl / n)


def test_ppo_stays_finite_where_the_clip_holds_an_overflowing_ratio() -> None:
    log_probs = torch.tensor([[200.0, -200.0, 200.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 0.0]])
    loss, _ = L.ppo_loss(log_probs, torch.zeros(1, 3), advantages, torch.ones(1, 3, dtype=torch.bool))
    assert_close(loss, torch.tensor((-1.2 + 0.8) / 3))
    assert torch.equal(gradient(loss, log_probs), torch.zeros(1, 3))


@pytest.mark.parametrize("clip", [0.3, None])
def test_value_loss_is_the_greater_of_plain_and_clipped(clip: float | None) -> None:
    f = Fake()
    f.values.requires_grad_()
    loss, metrics = L.value_loss(f.values, f.old_values, f.returns, f.mask, clip=clip)
    total, num_clipped, squares, n = torch.zeros((), dtype=torch.float64), 0, 0.0, len(tokens(f.mask))
    for b, t in tokens(f.mask):
        v, old, target = f.values[b, t], f.old_values[b, t], f.returns[b, t]
        plain = (v - target) ** 2
        near = plain if clip is None else (old + torch.clamp(v - old, -clip, clip) - target) ** 2
        total = total + 0.5 * torch.maximum(plain, near)
        num_clipped += bool(near > plain)
        squares += float(plain.detach())
    same_loss_and_gradient(loss, total / n, f.values)
    assert (num_clipped > 0) == (clip is not None)
    assert_close(float(metrics["value_clip_fraction"]), num_clipped / n, rtol=1e-6, atol=0)
    assert_close(float(metrics["value_error"]), squares / n)


@pytest.mark.parametrize("weighted", [False, True])
def test_rloo_is_reinforce_on_whole_responses(weighted: bool) -> None:
    f = Fake()
    f.log_probs.requires_grad_()
    loss, metrics = L.rloo_loss(f.log_probs, None, f.row_advantages, f.mask, weights=f.weights if weighted else None)
    total = torch.zeros((), dtype=torch.float64)
    for b, ts in rows(f.mask):
        for t in ts:
            total = total - f.row_advantages[b] * (f.weights[b, t] if weighted else 1.0) * f.log_probs[b, t]
    same_loss_and_gradient(loss, total / len(rows(f.mask)), f.log_probs)
    assert float(metrics["clip_fraction"]) == float(metrics["old_kl"]) == 0.0


@pytest.mark.parametrize(("clip", "high"), [(None, None), (0.2, None), (0.3, 0.5)])
def test_rloo_on_later_epochs_has_the_gradient_of_the_responses_ratio(clip: float | None, high: float | None) -> None:
    f = Fake(spread=0.2)
    f.log_probs.requires_grad_()
    loss, metrics = L.rloo_loss(f.log_probs, f.old, f.row_advantages, f.mask, clip=clip, clip_high=high)
    total, num_clipped, kl = torch.zeros((), dtype=torch.float64), 0, 0.0
    low, top = (1e9, 1e9) if clip is None else (clip, clip if high is None else high)
    for b, ts in rows(f.mask):
        ratio = torch.stack([f.log_probs[b, t] - f.old[b, t] for t in ts]).sum().exp()
        total = total + clipped(ratio, f.row_advantages[b], low, top)
        num_clipped += bool(ratio > 1 + top if f.row_advantages[b] > 0 else ratio < 1 - low)
        kl += float((ratio - 1 - ratio.log()).detach())
    n = len(rows(f.mask))
    want = gradient(total / n, f.log_probs)
    assert float(want.abs().sum()) > 0
    assert_close(gradient(loss, f.log_probs), want)
    assert num_clipped == 0 if clip is None else 0 < num_clipped < n
    assert_close(float(metrics["clip_fraction"]), num_clipped / n, rtol=1e-6, atol=0)
    assert_close(float(metrics["old_kl"]), kl / n)


def test_rloo_stays_finite_where_the_clip_holds_an_overflowing_ratio() -> None:
    log_probs = torch.tensor([[200.0], [-200.0], [200.0]], requires_grad=True)
    loss, _ = L.rloo_loss(
        log_probs, torch.zeros(3, 1), torch.tensor([1.0, -1.0, 0.0]), torch.ones(3, 1, dtype=torch.bool)
    )
    assert torch.equal(gradient(loss, log_probs), torch.zeros(3, 1)) and bool(loss.isfinite())


@pytest.mark.parametrize("sequence_mean", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_grpo_is_the_papers_objective(sequence_mean: bool, weighted: bool) -> None:
    f = Fake()
    f.log_probs.requires_grad_()
    loss, metrics = L.grpo_loss(
        f.log_probs, f.old, f.row_advantages, f.mask, ref_log_probs=f.ref, kl_coef=0.3, clip_high=0.28,
        weights=f.weights if weighted else None, sequence_mean=sequence_mean,
    )  # fmt: skip
    total, kl = torch.zeros((), dtype=torch.float64), 0.0
    for b, ts in rows(f.mask):
        length = len(ts) if sequence_mean else T
        for t in ts:
            surrogate = clipped((f.log_probs[b, t] - f.old[b, t]).exp(), f.row_advantages[b], 0.2, 0.28)
            r = (f.ref[b, t] - f.log_probs[b, t]).exp()
            k3 = r - r.log() - 1
            total = total + (surrogate * (f.weights[b, t] if weighted else 1.0) + 0.3 * k3) / length
            kl += float(k3.detach()) / length
    n = len(rows(f.mask))
    same_loss_and_gradient(loss, total / n, f.log_probs)
    assert_close(float(metrics["kl"]), kl / n)
    assert not metrics["kl"].requires_grad


def test_grpo_without_reference_is_ppo_where_all_responses_are_equally_long() -> None:
    f = Fake()
    mask = torch.ones(B, T, dtype=torch.bool)
    spread = f.row_advantages[:, None].expand(B, T)
    grpo, metrics = L.grpo_loss(f.log_probs, f.old, f.row_advantages, mask)
    ppo, ppo_metrics = L.ppo_loss(f.log_probs, f.old, spread, mask)
    assert_close(grpo, ppo)
    assert_close(metrics, ppo_metrics, check_dtype=False)


def test_ptx_and_entropy_are_weighted_means() -> None:
    f = Fake()
    summed = torch.tensor(30.0, requires_grad=True)
    loss, metrics = L.ptx_loss(summed, torch.tensor(12), 0.5)
    assert_close(float(loss.detach()), 0.5 * 30.0 / 12)
    assert_close(float(gradient(loss, summed)), 0.5 / 12)
    assert_close(float(metrics["ptx"]), 30.0 / 12)
    f.entropy.requires_grad_()
    loss, metrics = L.entropy_bonus(f.entropy, f.mask, 0.01)
    mean = sum(float(f.entropy[b, t].detach()) for b, t in tokens(f.mask)) / len(tokens(f.mask))
    assert_close(float(loss.detach()), -0.01 * mean)
    assert_close(float(metrics["entropy"]), mean)
    assert_close(gradient(loss, f.entropy), -0.01 * f.mask.double() / f.mask.sum())


# ---------------------------------------------------------------------------------------------- for every loss

Run = Callable[[Fake, slice, Any], tuple[Tensor, dict[str, Tensor]]]


def _cut(f: Fake, part: slice) -> dict[str, Tensor]:
    return {name: x[part] for name, x in vars(f).items()}


def run_of(loss: str) -> Run:
    def run(f: Fake, part: slice, denominator: Any) -> tuple[Tensor, dict[str, Tensor]]:
        x = _cut(f, part)
        common = {"weights": x["weights"], "denominator": denominator}
        match loss:
            case "ppo":
                return L.ppo_loss(x["log_probs"], x["old"], x["advantages"], x["mask"], **common)
            case "value":
                return L.value_loss(x["log_probs"], x["old_values"], x["returns"], x["mask"], denominator=denominator)
            case "rloo_first":
                return L.rloo_loss(x["log_probs"], None, x["row_advantages"], x["mask"], **common)
            case "rloo_later":
                return L.rloo_loss(x["log_probs"], x["old"], x["row_advantages"], x["mask"], **common)
            case "entropy":
                return L.entropy_bonus(x["log_probs"], x["mask"], 0.1, denominator=denominator)
            case "grpo" | "dr_grpo":
                return L.grpo_loss(
                    x["log_probs"], x["old"], x["row_advantages"], x["mask"], ref_log_probs=x["ref"], kl_coef=0.1,
                    sequence_mean=loss == "grpo", **common,
                )  # fmt: skip
        raise AssertionError(loss)

    return run


PER_TOKEN = ("ppo", "value", "entropy")
PER_ROW = ("rloo_first", "rloo_later", "grpo", "dr_grpo")
every_loss = pytest.mark.parametrize("loss", PER_TOKEN + PER_ROW)


def _count(loss: str, mask: Tensor) -> Tensor:
    return mask.sum() if loss in PER_TOKEN else mask.any(-1).sum()


@every_loss
@pytest.mark.parametrize("size", [1, 5])
def test_microbatches_with_one_denominator_add_up(loss: str, size: int) -> None:
    f = Fake(spread=0.2)
    f.log_probs.requires_grad_()
    whole, metrics = run_of(loss)(f, slice(None), None)
    want = gradient(whole, f.log_probs)
    parts = [run_of(loss)(f, slice(i, i + size), _count(loss, f.mask)) for i in range(0, B, size)]
    total = torch.stack([part for part, _ in parts]).sum()
    assert_close(total, whole, rtol=1e-13, atol=1e-15)
    assert_close(gradient(total, f.log_probs), want, rtol=1e-13, atol=1e-15)
    assert float(want.abs().sum()) > 0
    for name, value in metrics.items():
        assert_close(sum(m[name].double() for _, m in parts), value.double(), rtol=1e-6, atol=1e-12)


@every_loss
def test_nan_outside_the_mask_reaches_neither_loss_nor_gradient(loss: str) -> None:
    clean, dirty = Fake(spread=0.2), Fake(spread=0.2)
    for f in (clean, dirty):
        f.mask[4:6] = False  # unscorable rows, left out by the mask
    gone = ~dirty.mask.any(-1)
    for name, x in vars(dirty).items():
        if name != "mask":
            x[gone if x.dim() == 1 else ~dirty.mask] = NAN if name != "ref" else -math.inf
    for f in (clean, dirty):
        f.log_probs.requires_grad_()
    want, want_metrics = run_of(loss)(clean, slice(None), None)
    got, metrics = run_of(loss)(dirty, slice(None), None)
    assert_close(got, want)
    assert_close(metrics, want_metrics)
    slope = gradient(got, dirty.log_probs)
    assert_close(slope, gradient(want, clean.log_probs))
    assert float(slope.abs().sum()) > 0


@every_loss
@pytest.mark.parametrize("denominator", [None, 0])
def test_a_batch_with_nothing_to_learn_from_gives_zero(loss: str, denominator: int | None) -> None:
    f = Fake()
    f.mask[:] = False
    f.log_probs.requires_grad_()
    got, metrics = run_of(loss)(f, slice(None), None if denominator is None else torch.tensor(denominator))
    assert float(got.detach()) == 0 and all(float(m) == 0 for m in metrics.values())
    assert torch.equal(gradient(got, f.log_probs), torch.zeros(B, T, dtype=torch.float64))


@every_loss
def test_float32_agrees_with_float64(loss: str) -> None:
    exact, single = Fake(spread=0.2), Fake(spread=0.2, dtype=torch.float32)
    got, _ = run_of(loss)(single, slice(None), None)
    assert got.dtype == torch.float32
    assert_close(got.double(), run_of(loss)(exact, slice(None), None)[0], rtol=1e-5, atol=1e-6)


def test_nan_in_an_unscorable_row_stays_out_of_gae_advantages_and_weights() -> None:
    f = Fake()
    f.mask[3] = False
    want = L.gae(f.token_reward, f.values, f.mask)
    weights = L.importance_weights(f.log_probs, f.old, f.mask)
    for x in (f.token_reward, f.values, f.log_probs, f.old):
        x[~f.mask] = NAN
    assert_close(L.gae(f.token_reward, f.values, f.mask), want)
    assert_close(L.importance_weights(f.log_probs, f.old, f.mask), weights)


class NoHostCopy(TorchDispatchMode):
    """Fails on what would make the host wait: reading a number, or a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal") or indexed:
            raise AssertionError(f"aten::{name} waits for the device")
        return func(*args, **(kwargs or {}))


def run_everything(f: Fake, count: Tensor) -> None:
    L.gae(f.token_reward, f.values, f.mask)
    for kind in ADVANTAGES.values():
        kind(f.reward, G)
        kind(f.reward, G, scorable=f.mask.any(-1))
    L.group_is_constant(f.reward, G)
    L.num_constant_groups(f.reward, G, f.mask.any(-1))
    for name in ("k1", "k2", "k3"):
        L.kl_estimate(f.log_probs, f.ref, name, f.mask)  # type: ignore[arg-type]
    for per in ("token", "sequence"):
        L.importance_weights(f.log_probs, f.old, f.mask, per=per)  # type: ignore[arg-type]
    for loss in PER_TOKEN + PER_ROW:
        for denominator in (None, count):
            gradient(run_of(loss)(f, slice(None), denominator)[0], f.log_probs)
    L.ptx_loss(f.log_probs.sum(), count, 0.1)


def test_no_function_makes_the_host_wait() -> None:
    f = Fake()
    f.log_probs.requires_grad_()
    with NoHostCopy():
        run_everything(f, f.mask.sum())
    with NoHostCopy(), pytest.raises(AssertionError, match="waits"):
        f.mask.sum().item()
    with NoHostCopy(), pytest.raises(AssertionError, match="waits"):
        f.old[f.mask]


def test_every_function_runs_without_values() -> None:
    """On the meta device there are no values: whatever depends on one raises."""
    f = Fake()
    for name, x in vars(f).items():
        setattr(f, name, x.to("meta"))
    f.log_probs.requires_grad_()
    run_everything(f, f.mask.sum())


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_with_its_name() -> None:
    f = Fake()
    good = {"log_probs": f.log_probs, "old_log_probs": f.old, "advantages": f.advantages, "mask": f.mask}

    def ppo(**changed: Any) -> None:
        L.ppo_loss(**(good | changed))

    with pytest.raises(ValueError, match=r"mask: must be bool \[\*, \*\], got float64 \[12, 7\]"):
        ppo(mask=f.mask.double())
    with pytest.raises(ValueError, match=r"advantages: must be float32 \[12, 7\] .*got float64 \[12, 1\]"):
        ppo(advantages=f.advantages[:, :1])
    with pytest.raises(ValueError, match=r"old_log_probs: must be float32 .*got bfloat16"):
        ppo(old_log_probs=f.old.bfloat16())
    with pytest.raises(ValueError, match=r"weights: .* on meta"):
        ppo(weights=f.weights.to("meta"))
    with pytest.raises(ValueError, match="clip: must be above 0, got 0"):
        ppo(clip=0.0)
    with pytest.raises(ValueError, match="clip_high: must be above 0, got -1"):
        ppo(clip_high=-1.0)
    with pytest.raises(ValueError, match="clip: must be above 0, or None"):
        L.value_loss(f.values, f.old_values, f.returns, f.mask, clip=0.0)
    with pytest.raises(ValueError, match=r"advantages: must be float32 \[12\]"):
        L.rloo_loss(f.log_probs, f.old, f.advantages, f.mask)
    with pytest.raises(ValueError, match=r"advantages: must be float32 \[12\]"):
        L.grpo_loss(f.log_probs, f.old, f.advantages, f.mask)
    with pytest.raises(ValueError, match=r"ref_log_probs: needed for kl_coef=0.1"):
        L.grpo_loss(f.log_probs, f.old, f.row_advantages, f.mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"estimator: .*got 'k4'"):
        L.kl_estimate(f.log_probs, f.ref, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ref_log_probs: must be"):
        L.kl_estimate(f.log_probs, f.ref[:1])
    with pytest.raises(ValueError, match="gamma: must be in"):
        L.gae(f.token_reward, f.values, f.mask, gamma=1.1)
    with pytest.raises(ValueError, match="cap: must be above 0"):
        L.importance_weights(f.log_probs, f.old, f.mask, cap=0.0)
    with pytest.raises(ValueError, match="per: must be"):
        L.importance_weights(f.log_probs, f.old, f.mask, per="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size: must be a positive divisor of the 12 rows, got 5"):
        L.rloo_advantages(f.reward, 5)
    with pytest.raises(ValueError, match=r"group_size: .*got 0"):
        L.group_is_constant(f.reward, 0)
    with pytest.raises(ValueError, match=r"reward: .*\[12, 1\].*squeeze"):
        L.grpo_advantages(f.reward[:, None], G)
    with pytest.raises(ValueError, match="scorable: must be"):
        L.grpo_advantages(f.reward, G, scorable=f.mask[:3].any(-1))


def test_parts_add_up_with_their_coefficients_and_all_metrics() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    parts = {
        "policy": (x * 3, {"clip_fraction": torch.tensor(0.5)}),
        "value": (x * x, {"explained": torch.tensor(0.1)}),
    }
    loss, metrics = L.add_up(parts, {"value": 0.25})
    assert_close(loss, torch.tensor(7.0))
    loss.backward()
    assert x.grad is not None
    assert_close(x.grad, torch.tensor(4.0))
    assert {name: round(float(number), 6) for name, number in metrics.items()} == {
        "policy": 6.0, "value": 4.0, "clip_fraction": 0.5, "explained": 0.1,
    }  # fmt: skip
    assert not any(number.requires_grad for number in metrics.values())
    assert_close(L.add_up({"policy": parts["policy"]})[0], torch.tensor(6.0))


def test_ppo_advantages_are_whitened_gae_of_either_reward() -> None:
    f = Fake()
    advantages, returns = L.ppo_advantages(f.reward.unsqueeze(-1), f.token_reward, f.values, f.mask, lam=0.9)
    plain, plain_returns = L.gae(f.token_reward, f.values, f.mask, lam=0.9)
    assert_close(returns, plain_returns)
    real, want = advantages[f.mask], plain[f.mask]
    assert_close(real, (want - want.mean()) / want.var(unbiased=False).sqrt())
    assert not advantages[~f.mask].any()
    alone = torch.zeros_like(f.token_reward)
    for row, count in enumerate(f.mask.sum(-1)):
        if count:
            alone[row, count - 1] = f.reward[row]
    _, returns = L.ppo_advantages(f.reward.unsqueeze(-1), None, f.values, f.mask, gamma=0.9)
    assert_close(returns, L.gae(alone, f.values, f.mask, gamma=0.9)[1])


def test_advantages_carry_no_gradient() -> None:
    f = Fake()
    reward, values = torch.randn(B, requires_grad=True), f.values.float().requires_grad_()
    made = [
        L.rloo_advantages(reward, G),
        L.grpo_advantages(reward, G),
        *L.gae(f.token_reward.float(), values, f.mask),
        *L.ppo_advantages(reward.unsqueeze(-1), None, values, f.mask),
    ]
    assert not any(x.requires_grad for x in made)
