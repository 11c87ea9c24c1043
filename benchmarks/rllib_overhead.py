"""What RLlib's runner costs over the env's own time: `python benchmarks/rllib_overhead.py`.

`BanditEnvRunner.sample()` + `get_metrics()` against the same reset, generate and step without a runner, and RLlib's
SingleAgentEnvRunner on a `BanditVectorEnv` beside it, at 16, 256 and 2048 rows. Generation is stood in for by a slice
of ready tokens, so that milliseconds of overhead are not lost in the noise of a model; the share is of a step with a
model: yours (`--real-step-s`), or a tiny one timed here. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
from tensordict import TensorDict

from torchbandit import batch
from torchbandit.adapters.gymnasium import BanditVectorEnv
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.models import load_tokenizer
from torchbandit.prompts import PromptSet
from torchbandit.rllib import BanditPPOConfig, stock_ppo_config

T = 64


def save_model(folder: str) -> None:
    """A small Llama with a byte tokenizer, from the test suite's fakes."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from fakes import byte_tokenizer, tiny_lm

    tiny_lm().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def length_reward(td: Any) -> torch.Tensor:
    """A function of the batch on its device."""
    return td["masks", "response"].sum(-1).float()


class MakeEnv:
    """The env_fn of a given number of rows, 8 a prompt."""

    def __init__(self, policy: str, rows: int) -> None:
        self.policy, self.rows = policy, rows

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> BanditEnv:
        texts = [f"prompt number {i} of these" for i in range(1024)]
        prompts = PromptSet.from_texts(texts, load_tokenizer(self.policy), max_length=64)
        return BanditEnv(prompts, length_reward, num_prompts=self.rows // 8, group_size=8, device=device, packing=False)


def stand_in(rows: int, device: torch.device) -> Callable[..., TensorDict]:
    """A `generate` that costs next to nothing."""
    made = {
        batch.RESPONSE: torch.full((rows, T), 65, device=device),
        batch.RESPONSE_MASK: torch.ones(rows, T, dtype=torch.bool, device=device),
        batch.LOG_PROBS: torch.zeros(rows, T, device=device),
        batch.FINISHED: torch.ones(rows, dtype=torch.bool, device=device),
        batch.TEMPERATURE: torch.ones(rows, device=device),
        batch.VALUES: torch.zeros(rows, T, device=device),
    }

    def generate(td: TensorDict, **kwargs: Any) -> TensorDict:
        out = td.copy()
        for key, value in made.items():
            out.set(key, value)
        return out

    return generate


def median_ms(fn: Callable[[], Any], device: torch.device, repeats: int = 30, warm_up: int = 5) -> float:
    """Median wall time of a call, the device idle before and after."""
    times = []
    for i in range(warm_up + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(policy: str, rows: int, gpu: bool) -> dict[str, float]:
    """Milliseconds a batch: the env alone, our runner's and the stock runner's overhead over it, a real step."""
    config = BanditPPOConfig().bandit(env_fn=MakeEnv(policy, rows), sampling=Sampling(max_new_tokens=T))
    algo = config.rl_module(pretrained=policy).learners(num_gpus_per_learner=int(gpu)).build_algo()
    runner = algo.env_runner
    env, device, generate = runner.env, runner.device, runner.module.generate

    def real() -> None:
        env.step(generate(env.reset(), group_size=8))

    real_step = median_ms(real, device, repeats=3, warm_up=1)
    runner.module.generate = stand_in(rows, device)

    def alone() -> None:
        env.step(runner.module.generate(env.reset()))

    def ours() -> None:
        made = runner.sample()[0]
        assert made.env_steps() == rows
        assert runner.get_metrics()["reward"].peek() == T

    bare, with_runner = median_ms(alone, device), median_ms(ours, device)
    algo.stop()

    envs = BanditVectorEnv(MakeEnv(policy, rows)(0, 0, device))
    algo = stock_ppo_config(envs, pretrained=policy, sampling=Sampling(max_new_tokens=T)).build_algo()
    algo.env_runner.module.generate = stand_in(rows, device)

    def stock() -> None:
        episodes = algo.env_runner.sample(num_timesteps=rows)
        assert sum(len(episode) for episode in episodes) == rows
        algo.env_runner.get_metrics()

    with_stock = median_ms(stock, device, repeats=5, warm_up=1)
    algo.stop()
    return {
        "rows": rows,
        "env_ms": bare,
        "runner_ms": with_runner - bare,
        "stock_ms": with_stock - bare,
        "real_step_ms": real_step,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--real-step-s", type=float, help="generate + score seconds of 2048 rows with your model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        lines = [measure(folder, rows, arguments.gpu) for rows in (16, 256, 2048)]
    ray.shutdown()
    print(f"\n{'rows':>5} {'env alone':>10} {'+ runner':>9} {'+ stock':>9}   share of a real step (runner, stock)")
    for line in lines:
        real = line["real_step_ms"]
        if arguments.real_step_s is not None:
            real = arguments.real_step_s * 1e3 * line["rows"] / 2048
        line["runner_share"], line["stock_share"] = line["runner_ms"] / real, line["stock_ms"] / real
        print(
            f"{line['rows']:5} {line['env_ms']:7.2f} ms {line['runner_ms']:6.2f} ms {line['stock_ms']:6.1f} ms   "
            f"{line['runner_share']:.2%}, {line['stock_share']:.1%} of {real:.0f} ms"
        )
    most = lines[-1]["runner_ms"]
    print(f"target: runner <= 1 ms at 2048 rows: {most:.2f} ms, {'met' if most <= 1 else 'missed'}")
    print(json.dumps({"benchmark": "rllib_overhead", "device": "cuda" if arguments.gpu else "cpu", "lines": lines}))


if __name__ == "__main__":
    main()
