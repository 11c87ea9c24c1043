"""Each algorithm as its paper writes it, in loops over rows and tokens: what `torchbandit.learn` is compared with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

G = 4


def stepped(seed: int, *, num_prompts: int = 4, width: int = 6, per_token: bool = False) -> TensorDict:
    """A float64 batch after a step: ragged, one response empty, one unscorable, one group of equal rewards."""
    gen = torch.Generator().manual_seed(seed)
    rows = num_prompts * G
    lengths = torch.randint(1, width + 1, (rows,), generator=gen)
    lengths[seed % rows], lengths[(seed + 5) % rows] = 0, width
    mask = torch.arange(width) < lengths[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    reward = normal(rows)
    reward[G : 2 * G] = reward[G]  # a constant group
    unscorable = torch.zeros(rows, dtype=torch.bool)
    unscorable[(seed + 2) % G] = True
    token_reward = torch.where(mask, normal(rows, width), 0.0)
    if per_token:
        reward = token_reward.sum(-1)
    reward[unscorable], token_reward[unscorable] = torch.nan, torch.nan
    following = {"reward": reward[:, None], "unscorable": unscorable, "truncated": torch.zeros(rows, 1).bool()}
    if per_token:
        following["token_reward"] = token_reward
    return TensorDict(
        {
            "tokens": {"prompt": torch.zeros(rows, 2).long(), "response": torch.zeros(rows, width).long()},
            "masks": {"prompt": torch.ones(rows, 2).bool(), "response": mask},
            "log_probs": {"response": torch.where(mask, -normal(rows, width).abs(), 0.0)},
            "values": torch.where(mask, normal(rows, width), 0.0),
            "baseline_reward": normal(rows),
            "next": following,
        },
        batch_size=[rows],
    )


def outputs(td: TensorDict, seed: int, apart: float = 0.4) -> TensorDict:
    """What a policy returns now: log-probs and values off the old ones by about `apart`, with gradient."""
    gen = torch.Generator().manual_seed(seed + 100)

    def near(x: Tensor) -> Tensor:
        return (x + apart * torch.randn(x.shape, generator=gen, dtype=x.dtype)).requires_grad_()

    return TensorDict(
        {"log_probs": near(td["log_probs", "response"]), "values": near(td["values"])}, batch_size=td.batch_size
    )


class Batch:
    """The rows and tokens of a batch, one at a time."""

    def __init__(self, td: TensorDict) -> None:
        self.reward = td["next", "reward"].squeeze(-1)
        self.counts = [not bad for bad in td["next", "unscorable"].tolist()]
        self.real = [[t for t, is_real in enumerate(row) if is_real] for row in td["masks", "response"].tolist()]
        self.rows = [i for i, ts in enumerate(self.real) if self.counts[i] and ts]
        self.num_tokens = sum(len(self.real[i]) for i in self.rows)
        token_reward = td["next"].get("token_reward", None)
        self.token_reward = (
            {i: [token_reward[i, t] for t in self.real[i]] for i in self.rows}
            if token_reward is not None
            else {i: [torch.zeros(())] * (len(self.real[i]) - 1) + [self.reward[i]] for i in self.rows}
        )
        self.has_token_reward = token_reward is not None

    def siblings(self, i: int) -> list[int]:
        first = i - i % G
        return [j for j in range(first, first + G) if self.counts[j]]

    def mean(self, i: int) -> Tensor:
        return torch.stack([self.reward[j] for j in self.siblings(i)]).mean()

    def deviation(self, i: int) -> Tensor:
        return torch.stack([self.reward[j] for j in self.siblings(i)]).std()

    def others(self, i: int) -> Tensor:
        return torch.stack([self.reward[j] for j in self.siblings(i) if j != i]).mean()

    def batch_deviation(self) -> Tensor:
        return torch.stack([r for r, counts in zip(self.reward, self.counts, strict=True) if counts]).std()

    def grpo(self, i: int) -> Tensor:
        return (self.reward[i] - self.mean(i)) / (self.deviation(i) + 1e-6)


def whitened(table: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
    every = torch.stack(list(table.values()))
    return {at: (x - every.mean()) / (every.var(unbiased=False) + 1e-8).sqrt() for at, x in table.items()}


def clipped(r: Tensor, A: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    surrogate = torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    return torch.maximum(surrogate, dual * A) if dual is not None and A < 0 else surrogate


def ppo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    advantages, returns = {}, {}
    for i in b.rows:
        following = next_value = torch.zeros((), dtype=torch.float64)
        for r, t in zip(reversed(b.token_reward[i]), reversed(b.real[i]), strict=True):
            delta = r + 1.0 * next_value - td["values"][i, t]
            following = delta + 1.0 * 0.95 * following
            advantages[i, t], next_value = following, td["values"][i, t]
            returns[i, t] = following + td["values"][i, t]
    total = torch.zeros((), dtype=torch.float64)
    for (i, t), A in whitened(advantages).items():
        total = total - clipped((new[i, t] - old[i, t]).exp(), A, 0.2, 0.2)
        v, was, R = out["values"][i, t], td["values"][i, t], returns[i, t]
        near = was + (v - was).clamp(-0.2, 0.2)
        total = total + 0.5 * 0.5 * torch.maximum((v - R) ** 2, (near - R) ** 2)
    return total / b.num_tokens


def reinforce_plus_plus(b: Batch, out: Any, td: TensorDict, *, baseline: bool = False) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    table = {}
    for i in b.rows:
        for n, t in enumerate(b.real[i]):
            R = sum(b.token_reward[i][n:], start=torch.zeros((), dtype=torch.float64))
            table[i, t] = R - (b.mean(i) if baseline else 0.0)
    total = sum(clipped((new[i, t] - old[i, t]).exp(), A, 0.2, 0.2) for (i, t), A in whitened(table).items())
    return -total / b.num_tokens


def reinforce_plus_plus_baseline(b: Batch, out: Any, td: TensorDict) -> Tensor:
    return reinforce_plus_plus(b, out, td, baseline=True)


def whole_response(b: Batch, out: Any, td: TensorDict, advantage: Callable[[int], Tensor]) -> Tensor:
    """REINFORCE, the response as one action; off policy by its ratio, nothing beyond the clip."""
    new, old = out["log_probs"], td["log_probs", "response"]
    total = torch.zeros((), dtype=torch.float64)
    for i in b.rows:
        log_prob = sum(new[i, t] for t in b.real[i])
        r = (log_prob - sum(old[i, t] for t in b.real[i])).detach().exp()
        A = advantage(i)
        gone = (A > 0 and r > 1.2) or (A < 0 and r < 0.8)
        total = total - (0.0 if gone else r * A * log_prob)
    return total / len(b.rows)


def rloo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    return whole_response(b, out, td, lambda i: b.reward[i] - b.others(i))


def remax(b: Batch, out: Any, td: TensorDict) -> Tensor:
    return whole_response(b, out, td, lambda i: b.reward[i] - td["baseline_reward"][i])


def grpo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    total = torch.zeros((), dtype=torch.float64)
    for i in b.rows:
        terms = [clipped((new[i, t] - old[i, t]).exp(), b.grpo(i), 0.2, 0.2) for t in b.real[i]]
        total = total + sum(terms) / len(terms)
    return -total / len(b.rows)


def dr_grpo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    total = torch.zeros((), dtype=torch.float64)
    for i in b.rows:
        for t in b.real[i]:
            total = total + clipped((new[i, t] - old[i, t]).exp(), b.reward[i] - b.mean(i), 0.2, 0.2)
    return -total / (len(b.rows) * new.shape[1])


def dapo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    terms = [clipped((new[i, t] - old[i, t]).exp(), b.grpo(i), 0.2, 0.28) for i in b.rows for t in b.real[i]]
    return -sum(terms) / b.num_tokens


def gspo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    total = torch.zeros((), dtype=torch.float64)
    for i in b.rows:
        s = (sum(new[i, t] - old[i, t] for t in b.real[i]) / len(b.real[i])).exp()
        total = total + clipped(s, b.grpo(i), 3e-4, 4e-4)
    return -total / len(b.rows)


def cispo(b: Batch, out: Any, td: TensorDict) -> Tensor:
    new, old = out["log_probs"], td["log_probs", "response"]
    terms = [
        (new[i, t] - old[i, t]).exp().clamp(max=5.0).detach() * b.grpo(i) * new[i, t] for i in b.rows for t in b.real[i]
    ]
    return -sum(terms) / b.num_tokens


def raft(b: Batch, out: Any, td: TensorDict) -> Tensor:
    best = {max(b.siblings(i), key=lambda j: (float(b.reward[j]), -j)) for i in range(0, len(b.counts), G)}
    tokens = [(i, t) for i in b.rows if i in best for t in b.real[i]]
    return -sum(out["log_probs"][at] for at in tokens) / len(tokens)


NAIVE = {
    "ppo": ppo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++-baseline": reinforce_plus_plus_baseline,
    "rloo": rloo,
    "remax": remax,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "raft": raft,
}


def together(*works: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run each work as a rank of its own, with a `reduce` that sums over them."""
    barrier, given, results = threading.Barrier(len(works)), [None] * len(works), [None] * len(works)

    def run(rank: int) -> None:
        def reduce(x: Tensor) -> Tensor:
            given[rank] = x
            barrier.wait(30)
            total = sum(given)
            barrier.wait(30)
            return total

        try:
            results[rank] = works[rank](reduce)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
