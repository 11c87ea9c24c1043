"""Run by test_train.py, alone or under `accelerate launch`: the same work, whole or in two shares."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model

from torchbandit.corpus import Corpus
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import ALGORITHMS
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty, RewardModel
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import LoopOptions


class Scripted(CausalLMPolicy):
    """Answers a prompt's siblings from a table, wherever they are drawn, so that two ranks see what one does."""

    @torch.no_grad()
    def generate(self, td, **options):
        table = torch.randint(0, 256, (16, 2, 6), generator=torch.Generator().manual_seed(7))
        out = td.copy()
        out["tokens", "response"] = table[td["prompt_id"][::2]].flatten(0, 1)
        out["masks", "response"] = torch.arange(6) < 1 + (td["prompt_id"] % 6)[:, None]
        out["finished"] = td["prompt_id"] % 2 == 0
        out["log_probs", "response"] = self(out)["log_probs"]
        if self.has_critic:
            out["values"] = self.values(out)
        return out


def main(out: str, algo: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    world = accelerator.num_processes
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts([f"prompt {i}" + "?" * (i % 4) for i in range(16)], tokenizer, max_length=32)
    terms = [RewardModel(tiny_reward_model(), normalize="running"), KLPenalty(tiny_lm(seed=3), coef=0.1, target=2.0)]
    env = BanditEnv(prompts, terms, num_prompts=8 // world, group_size=2)
    policy = Scripted(
        tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=6), critic="head" if ALGORITHMS[algo].needs_critic else None
    )
    corpus = Corpus.from_texts([f"a document {i}" * (1 + i % 3) for i in range(32)], tokenizer)
    options = LoopOptions(
        steps=3,
        epochs=2,
        lr=1e-3,
        ptx_coef=0.5,
        ptx_batch_size=8 // world,
        micro_batch_size=4,
        loss_kl_coef=0.1,
    )
    trainer = BanditTrainer(env, policy, ALGORITHMS[algo](), options, corpus=corpus, accelerator=accelerator)
    lines = [trainer.step() for _ in range(3)]
    if accelerator.is_main_process:
        weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
        with open(out, "w", encoding="utf-8") as file:
            json.dump({"world": world, "lines": lines, "weights": weights.tolist(), "state": env.stream.draws}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
