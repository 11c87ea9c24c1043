"""How good the policy is on prompts and text it does not train on, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

from torchbandit import batch
from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.policy import CausalLMPolicy
from torchbandit.texts import response_texts


@dataclass
class Sample:
    """A prompt, the policy's response and what its terms made of it."""

    prompt: str
    response: str
    terms: dict[str, float]


@dataclass
class Evaluation:
    """Numbers over the evaluation prompts, and the first few responses."""

    metrics: dict[str, float]
    samples: list[Sample] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    policy: CausalLMPolicy,
    env: BanditEnv,
    *,
    corpus: Corpus | None = None,
    num_samples: int = 8,
    max_prompts: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Answer every prompt of `env` once, or the first `max_prompts`, by a generator of this call's own.

    Neither the policy's generator nor the prompt stream nor the terms' statistics move.

    Returns:
        metrics: `<term>` and `<term>_std` over the scorable rows (raw, before clip and weight), response_length,
        truncated, unscorable, and with a corpus lm_loss (mean token cross-entropy over all of it).
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    statistics = env.rewards.state_dict()
    kept: list[TensorDict] = []
    limit = len(env.prompts) if max_prompts is None else min(max_prompts, len(env.prompts))
    chosen = torch.arange(limit, device=env.device)
    for ids in chosen.split(max(1, env.batch_size)):
        td = policy.generate(env.gather(ids, ids), generator=generator, group_size=1)
        kept.append(env.step(td))
    env.rewards.load_state_dict(statistics)
    terms = {
        str(name): torch.cat([td[batch.REWARD_TERMS][name] for td in kept]).float()
        for name in kept[0][batch.REWARD_TERMS].keys()
    }
    metrics = {name: value for name, term in terms.items() for name, value in _moments(name, term)}
    metrics["response_length"] = torch.cat([td[batch.RESPONSE_MASK].sum(-1) for td in kept]).float().mean().item()
    metrics["truncated"] = torch.cat([td[batch.TRUNCATED] for td in kept]).float().mean().item()
    metrics["unscorable"] = torch.cat([td[batch.UNSCORABLE] for td in kept]).float().mean().item()
    if corpus is not None:
        metrics["lm_loss"] = language_loss(policy, corpus, rows=max(16, env.batch_size))
    return Evaluation(metrics, _samples(policy, env, kept[0], terms, num_samples))


def _moments(name: str, term: Tensor) -> Iterator[tuple[str, float]]:
    term = term[term.isfinite()]
    mean = term.mean()  # NaN where no row has the term
    yield name, mean.item()
    yield f"{name}_std", (term - mean).square().mean().sqrt().item()


@torch.no_grad()
def language_loss(policy: CausalLMPolicy, corpus: Corpus, *, rows: int = 64) -> float:
    """Mean token cross-entropy of the policy over every row of a corpus, in nats."""
    total, count = 0.0, 0.0
    for ids, mask in zip(corpus.ids.split(rows), corpus.mask.split(rows), strict=True):
        out = policy.corpus_loss(ids, mask)
        total, count = total + out[0].item(), count + out[1].item()
    return total / max(count, 1)


def _samples(
    policy: CausalLMPolicy, env: BanditEnv, td: TensorDict, terms: dict[str, Tensor], num: int
) -> list[Sample]:
    num = min(num, len(td))
    texts = env.prompts.texts(td[batch.PROMPT_ID][:num])
    responses = response_texts(td, policy.tokenizer, range(num))
    samples = []
    for row in range(num):
        samples.append(Sample(texts[row], responses[row], {name: term[row].item() for name, term in terms.items()}))
    return samples
