"""`torchbandit bench rllib`: what RLlib's runner costs over the env's own time.

`BanditEnvRunner.sample()` + `get_metrics()` against the same reset, generate and step without a runner, and RLlib's
SingleAgentEnvRunner on a `BanditVectorEnv` beside it. Generation is stood in for by ready tokens, so that milliseconds
are not lost in the noise of a model; the share is of a step in which a tiny model generates.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import LlamaForCausalLM

from torchbandit import batch
from torchbandit.bench.frame import Frame, Line, Peer, one_thread
from torchbandit.bench.models import llama, word_tokenizer
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.models import load_tokenizer
from torchbandit.prompts import PromptSet

T, GROUP = 64, 8


def length_reward(td: Any) -> Tensor:
    """A function of the batch on its device."""
    mask: Tensor = td[batch.RESPONSE_MASK]
    return mask.sum(-1).float()


class MakeEnv:
    """The env_fn of a given number of rows, 8 a prompt."""

    def __init__(self, policy: str, rows: int) -> None:
        self.policy, self.rows = policy, rows

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> BanditEnv:
        texts = [f"t{3 + i % 500} t{3 + i // 500}" for i in range(1024)]
        prompts = PromptSet.from_texts(texts, load_tokenizer(self.policy), max_length=64)
        return BanditEnv(
            prompts, length_reward, num_prompts=self.rows // GROUP, group_size=GROUP, device=device, packing=False
        )


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
        out: TensorDict = td.copy()
        for key, value in made.items():
            out.set(key, value)
        return out

    return generate


def run(frame: Frame) -> None:
    try:
        import ray
    except ImportError:
        raise ImportError("the benchmark of RLlib needs ray: pip install torchbandit[rllib]") from None
    started = not ray.is_initialized()
    if started:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as folder, one_thread():
            LlamaForCausalLM(llama("tiny", pad_token_id=0, bos_token_id=None, eos_token_id=2)).save_pretrained(folder)
            word_tokenizer(512).save_pretrained(folder)
            first: float | None = None
            for rows in (16, 32) if frame.tiny else (16, 256, 2048):
                first = measure(frame, folder, rows, first)
    finally:
        if started:
            ray.shutdown()


def measure(frame: Frame, policy: str, rows: int, first: float | None) -> float:
    """Add the line of a number of rows; returns the runner's own milliseconds."""
    from torchbandit.adapters.gymnasium import BanditVectorEnv
    from torchbandit.rllib import BanditPPOConfig, stock_ppo_config

    config = BanditPPOConfig().bandit(env_fn=MakeEnv(policy, rows), sampling=Sampling(max_new_tokens=T))
    algo = config.rl_module(pretrained=policy).learners(num_gpus_per_learner=int(frame.cuda)).build_algo()
    runner = algo.env_runner
    env, device, generate = runner.env, runner.device, runner.module.generate
    envs = BanditVectorEnv(MakeEnv(policy, rows)(0, 0, device))
    stock = stock_ppo_config(envs, pretrained=policy, sampling=Sampling(max_new_tokens=T)).build_algo()
    try:
        real = frame.time(lambda: env.step(generate(env.reset(), group_size=GROUP)), repeats=3).median
        runner.module.generate = stock.env_runner.module.generate = stand_in(rows, device)

        def alone() -> None:
            env.step(runner.module.generate(env.reset()))

        def ours() -> None:
            made = runner.sample()[0]
            assert made.env_steps() == rows, f"{made.env_steps()} rows, not {rows}"
            reward = runner.get_metrics()["reward"].peek()
            assert reward == T, f"the reward is {reward}, not {T}"

        def theirs() -> None:
            episodes = stock.env_runner.sample(num_timesteps=rows)
            assert sum(len(episode) for episode in episodes) == rows
            stock.env_runner.get_metrics()

        both = frame.alternate({"alone": alone, "ours": ours}, device=device, repeats=30, warm=5)
        peer = frame.alternate({"theirs": theirs}, device=device, repeats=5, warm=1)["theirs"]
        syncs, peak = frame.host_syncs(ours), frame.peak_gb(ours, device)
    finally:
        algo.stop()
        stock.stop()
    seconds, over = both["ours"], both["ours"].median - both["alone"].median
    line = Line(
        "rllib", f"sample + get_metrics, {rows} rows", rows / seconds.median, "rows/s", rows / seconds.high,
        rows / seconds.low, percent=100 * both["alone"].median / seconds.median, ceiling="the env's own rate",
        peak_gb=peak, host_syncs=syncs,
        peers=[Peer("RLlib's own runner and connectors", rows / peer.median, peer.median / seconds.median)],
    )  # fmt: skip
    line.more["runner over the env, ms"] = over * 1e3
    line.more["RLlib's own over the env, ms"] = (peer.median - both["alone"].median) * 1e3
    for name, more in (("runner's", over), ("RLlib's own", peer.median - both["alone"].median)):
        line.more[f"{name} share of a step in which a tiny model generates, %"] = 100 * more / (real + more)
    if first is not None:
        line.more["runner over the env, ms more than with 16 rows"] = over * 1e3 - first
    line.notes.append("RLlib's own runner does more: it keeps an episode object a row and runs its connectors on them")
    frame.add(line)
    return over * 1e3 if first is None else first
