"""Each algorithm's loss and gradient are those of its paper, written as loops (naive_algorithms.py), in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from naive_algorithms import NAIVE, Batch, G, clipped, outputs, stepped, together
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit.learn import ALGORITHMS, GRPO, PPO, RAFT

CLOSE = dict(rtol=1e-9, atol=1e-11)


def counted(targets, extra=()):
    mask = torch.cat([part["learn_mask"] for part in (targets, *extra)])
    return {"tokens": mask.sum().double().clamp(min=1), "rows": mask.any(-1).sum().double().clamp(min=1)}


def loss_of(algorithm, td, out, reduce=None):
    targets = algorithm.targets(td, group_size=G, reduce=reduce)
    return algorithm.loss(out, targets, denominators=counted(targets))


def gradients(loss, out):
    found = torch.autograd.grad(loss, [out["log_probs"], out["values"]], allow_unused=True, materialize_grads=True)
    return TensorDict(dict(zip(("log_probs", "values"), found, strict=True)), batch_size=out.batch_size)


def agree(algorithm, naive, td, out):
    loss, metrics = loss_of(algorithm, td, out)
    expected = naive(Batch(td), out, td)
    assert_close(loss, expected, **CLOSE)
    found, right = gradients(loss, out), gradients(expected, out)
    for name in right.keys():
        assert_close(found[name], right[name], **CLOSE)
    assert right["log_probs"].abs().max() > 1e-4
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())
    return metrics


def test_no_algorithm_is_without_a_naive_version():
    assert NAIVE.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAIVE)
def test_loss_and_gradient_are_the_paper_s(name, seed):
    td = stepped(seed)
    agree(ALGORITHMS[name](), NAIVE[name], td, outputs(td, seed, 0.001 if name == "gspo" else 0.4))


@pytest.mark.parametrize("name", ["ppo", "reinforce++", "reinforce++-baseline"])
def test_with_a_reward_for_each_token(name):
    td = stepped(5, per_token=True)
    agree(ALGORITHMS[name](), NAIVE[name], td, outputs(td, 5))


def grpo_of_choices(o):
    """GRPO with every choice, from the sentences of its docstring."""

    def naive(b, out, td):
        new, old = out["log_probs"], td["log_probs", "response"]
        high = o.clip if o.clip_high is None else o.clip_high
        total = torch.zeros((), dtype=torch.float64)
        for i in b.rows:
            A = b.reward[i] - {"mean": b.mean, "leave_one_out": b.others, "none": lambda _: 0.0}[o.baseline](i)
            A = A / {"group": b.deviation(i) + 1e-6, "batch": b.batch_deviation() + 1e-6, "none": 1.0}[o.scale]
            drift = torch.stack([new[i, t] - old[i, t] for t in b.real[i]])
            level = {"product": drift.sum()}.get(o.ratio, drift.mean())
            row = []
            for n, t in enumerate(b.real[i]):
                d = drift[n] if o.ratio == "token" else level
                if o.ratio == "response_token":
                    d = level.detach() + drift[n] - drift[n].detach()
                r = d.exp()
                if o.clip_as == "min":
                    row.append(clipped(r, A, o.clip, high, o.dual_clip))
                elif o.clip_as == "weight":
                    row.append(r.clamp(1 - o.clip, 1 + high).detach() * A * new[i, t])
                else:
                    gone = (A > 0 and r > 1 + high) or (A < 0 and r < 1 - o.clip)
                    row.append(0.0 if gone else r.detach() * A * new[i, t])
            over = {"token": b.num_tokens, "response": len(row) * len(b.rows)}
            over |= {"width": new.shape[1] * len(b.rows), "sum": len(b.rows)}
            total = total - sum(row) / over[o.mean]
        return total

    return naive


@pytest.mark.parametrize(
    "options",
    [
        {"dual_clip": 1.5},
        {"clip_high": 0.4},
        {"clip": 0.1, "clip_high": 0.9, "dual_clip": 1.2, "mean": "token"},
        *({"ratio": ratio, "clip_as": clip_as} for ratio in ("response", "response_token", "product", "token")
          for clip_as in ("min", "weight", "mask")),
        *({"mean": mean} for mean in ("token", "width", "sum")),
        *({"scale": scale, "baseline": baseline} for scale in ("batch", "none", "group")
          for baseline in ("mean", "leave_one_out", "none")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_every_choice_of_grpo(options):
    td = stepped(3)
    algorithm = GRPO(**options)
    metrics = agree(algorithm, grpo_of_choices(algorithm), td, outputs(td, 3))
    assert metrics["clip_fraction"] > 0 and metrics["old_kl"] > 0 and metrics["ratio_at_bound"] == 0


def test_ppo_s_options():
    td, out = stepped(1), outputs(stepped(1), 1)

    def naive(b, out, td):
        rows = PPO(gamma=0.9, lam=0.5).targets(td, group_size=G, reduce=None)
        new, old = out["log_probs"], td["log_probs", "response"]
        total = torch.zeros((), dtype=torch.float64)
        for i in b.rows:
            following, later = 0.0, 0.0
            for t in reversed(b.real[i]):
                r = b.token_reward[i][b.real[i].index(t)]
                following = r + 0.9 * later - td["values"][i, t] + 0.9 * 0.5 * following
                later = td["values"][i, t]
                assert_close(rows["returns"][i, t], following + later, **CLOSE)
                total = total - clipped((new[i, t] - old[i, t]).exp(), rows["advantages"][i, t], 0.1, 0.3, 1.5)
                total = total + 2.0 * 0.5 * (out["values"][i, t] - following - later) ** 2
        return total / b.num_tokens

    agree(PPO(clip=0.1, clip_high=0.3, dual_clip=1.5, gamma=0.9, lam=0.5, value_clip=0, value_coef=2.0), naive, td, out)


@pytest.mark.parametrize(
    ("algorithm", "chosen"),
    [(RAFT(best=2), 2), (RAFT(best=2, mean="response"), 2), (RAFT(threshold=0.2), None)],
)
def test_raft_s_options(algorithm, chosen):
    def naive(b, out, td):
        rows = []
        for first in range(0, len(b.counts), G):
            ranked = sorted(b.siblings(first), key=lambda j: (-float(b.reward[j]), j))
            rows += ranked[:chosen] if chosen else [j for j in ranked if b.reward[j] >= 0.2]
        rows = [i for i in rows if b.real[i]]
        num_tokens = sum(len(b.real[i]) for i in rows)
        over = {i: num_tokens if algorithm.mean == "token" else len(b.real[i]) * len(rows) for i in rows}
        return -sum(out["log_probs"][i, t] / over[i] for i in rows for t in b.real[i])

    td = stepped(4)
    agree(algorithm, naive, td, outputs(td, 4))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_advantage_may_be_of_a_row_or_of_each_token(name):
    td, algorithm = stepped(2), ALGORITHMS[name]()
    out = outputs(td, 2, 0.001 if name == "gspo" else 0.4)
    targets = algorithm.targets(td, group_size=G, reduce=None)
    both = []
    for shape in ([len(td)], [len(td), 6]):
        row = torch.arange(len(td)).double().sub(7.5)
        targets["advantages"] = row if len(shape) == 1 else row[:, None].expand(shape)
        loss, _ = algorithm.loss(out, targets, denominators=counted(targets))
        both.append((loss, gradients(loss, out)["log_probs"]))
    assert_close(both[0], both[1], rtol=0, atol=0)
    tokens = torch.arange(len(td) * 6).double().view(len(td), 6).sin()
    targets["advantages"] = tokens
    loss, _ = algorithm.loss(out, targets, denominators=counted(targets))
    assert loss.isfinite() and (loss - both[0][0]).abs() > 1e-6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_microbatches_and_ranks_add_up(name):
    """Two ranks, each in uneven microbatches: loss, gradient and metrics are those of the whole batch."""
    td, algorithm = stepped(6), ALGORITHMS[name]()
    out = outputs(td, 6, 0.001 if name == "gspo" else 0.4)
    whole, metrics = loss_of(algorithm, td, out)
    right = gradients(whole, out)
    half = len(td) // 2
    shares = together(
        *(lambda reduce, part=part: algorithm.targets(part, group_size=G, reduce=reduce) for part in td.split(half))
    )
    denominators = counted(shares[0], shares[1:])
    total, added = torch.zeros((), dtype=torch.float64), dict.fromkeys(metrics, 0.0)
    for rank, targets in enumerate(shares):
        for rows in (range(3), range(3, half)):
            at = torch.tensor(rows)
            loss, numbers = algorithm.loss(out[at + rank * half], targets[at], denominators=denominators)
            total = total + loss
            added = {key: added[key] + numbers[key] for key in added}
    assert_close(total, whole, **CLOSE)
    found = gradients(total, out)
    for key in ("log_probs", "values"):
        assert_close(found[key], right[key], **CLOSE)
    for key, value in metrics.items():
        assert_close(added[key], value, rtol=1e-6, atol=1e-8)  # counts are divided in float32


def test_the_batch_s_deviation_is_that_of_all_ranks():
    td, algorithm = stepped(7), GRPO(scale="batch")
    right = algorithm.targets(td, group_size=G, reduce=None)["advantages"]
    halves = together(
        *(lambda reduce, part=part: algorithm.targets(part, group_size=G, reduce=reduce) for part in td.split(8))
    )
    assert_close(torch.cat([half["advantages"] for half in halves]), right, **CLOSE)
    alone = [algorithm.targets(part, group_size=G, reduce=None)["advantages"] for part in td.split(8)]
    assert (torch.cat(alone) - right).abs().max() > 1e-3


def test_gspo_token_is_gspo_where_a_response_has_one_advantage():
    td, out = stepped(8), outputs(stepped(8), 8, 0.001)
    losses = [loss_of(ALGORITHMS["gspo"](ratio=ratio), td, out)[0] for ratio in ("response", "response_token")]
    assert_close(losses[0], losses[1], **CLOSE)
    assert_close(*(gradients(loss, out)["log_probs"] for loss in losses), **CLOSE)


def test_the_defaults_are_the_papers():
    told = {name: dataclasses.asdict(cls()) for name, cls in ALGORITHMS.items()}
    assert told["ppo"] == dict(
        clip=0.2, clip_high=None, dual_clip=None, value_clip=0.2, value_coef=0.5, gamma=1.0, lam=0.95
    )
    grpo = told["grpo"]
    assert grpo == dict(
        baseline="mean", scale="group", ratio="token", clip_as="min", mean="response", clip=0.2, clip_high=None,
        dual_clip=None,
    )  # fmt: skip
    assert told["dr_grpo"] == grpo | dict(scale="none", mean="width")
    assert told["dapo"] == grpo | dict(mean="token", clip_high=0.28)
    assert told["gspo"] == grpo | dict(ratio="response", clip=3e-4, clip_high=4e-4)
    assert told["cispo"] == grpo | dict(clip_as="weight", mean="token", clip=None, clip_high=4.0)
    where = {name: tuple(cls.kl_default) for name, cls in ALGORITHMS.items()}
    assert where["ppo"] == where["reinforce++"] == ("reward-token", "k1")
    assert where["rloo"] == where["remax"] == where["raft"] == ("reward-response", "k1")
    assert where["reinforce++-baseline"] == ("loss", "k2")
    assert {where[name] for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")} == {("loss", "k3")}
