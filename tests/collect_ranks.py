"""Refilled batches of a scripted env. Run by test_learn_collect.py as a rank of gloo: RANK WORLD RENDEZVOUS OUT."""

from __future__ import annotations

import json
import sys

import torch
from fakes import byte_tokenizer

from torchbandit.clock import Clock
from torchbandit.env import BanditEnv
from torchbandit.learn import GRPO
from torchbandit.learn.collect import EnvDraw, collect
from torchbandit.learn.options import RefillOptions
from torchbandit.prompts import PromptSet

G = 2
TEACHES = {  # which draws are of equal rewards, by the global index of the draw
    "balanced": {0, 1, 2, 3},
    "one rank lacks": {0, 2, 8},
    "never enough": set(range(2, 1000)),
}


def answered(td):
    """Two siblings that differ, without a model."""
    out, rows = td.copy(), len(td)
    out["tokens", "response"] = torch.stack((torch.arange(rows) % G, td["prompt_id"]), 1)
    out["masks", "response"] = torch.ones(rows, 2, dtype=torch.bool)
    out["finished"] = torch.ones(rows, dtype=torch.bool)
    return out


def make_env(constant, num_prompts):
    def reward(td):
        equal = torch.isin(td["group_id"], torch.tensor(sorted(constant)))
        return torch.where(equal, 0.5, td["tokens", "response"][:, 0] + td["group_id"].float())

    prompts = PromptSet.from_texts([f"prompt {i}" for i in range(64)], byte_tokenizer(), max_length=16)
    return BanditEnv(prompts, reward, num_prompts=num_prompts, group_size=G)


def refilled(env, reduce=None, max_draws=4, refill=True, algorithm=None):
    draw = EnvDraw(env, answered, answered, Clock(env.device))
    return collect(env, algorithm or GRPO(), draw, RefillOptions(refill=refill, max_draws=max_draws), reduce)


def main(rank: int, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)

    def reduce(x):
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    found = {}
    for name, constant in TEACHES.items():
        env = make_env(constant, 8 // world)
        env.shard(rank, world, reduce)
        td, metrics = refilled(env, reduce)
        found[name] = {
            "groups": td["group_id"][::G].tolist(),
            "learned": td["learn_mask"].any(-1)[::G].tolist(),
            "metrics": {key: value.item() for key, value in metrics.items()},
        }
    with open(f"{out}.{rank}", "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
