"""`torchbandit train --engine rllib`: the options, files and outputs of the local engine, on runners and learners."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID

from torchbandit.env import BanditEnv
from torchbandit.learn.metrics import Metrics
from torchbandit.models import ModelSpec
from torchbandit.rllib.algorithm import BANDIT
from torchbandit.rllib.config import BanditAlgorithm, BanditConfig
from torchbandit.rllib.keywords import UPDATE
from torchbandit.rllib.module import CausalLMModule, empty_module
from torchbandit.train import build, folder
from torchbandit.train import run as local
from torchbandit.train.loop import schedule_factor
from torchbandit.train.options import TrainOptions
from torchbandit.train.signals import hangup_ignored, stop_signals

FREE = folder.FREE | {"env_runners", "learners"}


class EnvOfOptions:
    """The env_fn of a run: what the local engine builds, in every runner. Imported user functions load there."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> BanditEnv:
        return build.build_env(self.options, build.build_tokenizer(self.options), device)


def train(options: TrainOptions) -> Path:
    """Train as `options` say through `BanditAlgorithm`; the run's folder is that of `torchbandit.train.run.train`.

    Raises:
        ValueError: as there, and where rows do not divide.
        Interrupted, StoppedAtOnce, OSError: as there, once the iteration has ended.
    """
    _rows(options)
    out, device = Path(options.out), build.pick_device(options)
    with folder.claim(out, options.resume):
        done = 0
        if options.resume:
            folder.recover(out / "checkpoint")
            # RLlib's schedule is over rows, of which a step has as many as the env runners give it.
            paced = options.schedule != "constant" or options.warmup_steps > 0
            done = local.find_run(out, asdict(options), FREE - {"env_runners"} if paced else FREE)
        # Ray has a way of its own with SIGTERM, from its start on.
        with _cluster(options, device), stop_signals(patient=False):
            algo = to_config(options, device).build_algo()
            try:
                _run(algo, options, out, done, device)
            finally:
                algo.stop()
    return out


def to_config(options: TrainOptions, device: torch.device) -> BanditConfig:
    """The same run as a `BanditConfig`; ValueError where rows do not divide, or learners would share a GPU."""
    assert options.policy is not None
    rows = _rows(options)
    runner_gpus, learner_gpus = gpu_shares(options) if device.type == "cuda" else (0.0, 0.0)

    def spec(path: str) -> ModelSpec:
        return ModelSpec(path, dtype=options.dtype, compile=options.compile)

    config = BanditConfig()
    config.bandit(env_fn=EnvOfOptions(options), sampling=build.build_sampling(options))
    runners = options.env_runners
    config.env_runners(num_env_runners=runners, num_cpus_per_env_runner=1, num_gpus_per_env_runner=runner_gpus)
    config.learners(num_learners=options.learners, num_gpus_per_learner=learner_gpus, local_gpu_idx=device.index or 0)
    config.rl_module(
        pretrained=spec(options.policy),
        critic=options.critic if options.critic in (None, "head") else spec(options.critic),
        gradient_checkpointing=options.gradient_checkpointing, packing=options.packing,
    )  # fmt: skip
    config.training(
        algo=options.algorithm, lr=_learning_rate(options, rows), num_epochs=options.epochs,
        minibatch_size=rows // max(1, options.learners) // options.minibatches,
        grad_clip=options.max_grad_norm, optimizer={"weight_decay": options.weight_decay},
        ptx_data=options.ptx_data if options.ptx_coef else None,
        ptx_length=build.ptx_length(options, build.build_tokenizer(options)),
        **{name: getattr(options, name) for name in UPDATE},
    )  # fmt: skip
    config.debugging(seed=options.seed)
    return config


def _rows(options: TrainOptions) -> int:
    """Rows of an iteration; ValueError where they do not divide."""
    assert options.group_size is not None
    groups = options.num_prompts * max(1, options.env_runners)
    if groups % (max(1, options.learners) * options.minibatches):
        raise ValueError(
            f"minibatches, learners: must divide the batch of {groups} prompts (num_prompts x env_runners), whose "
            f"responses stay together, got {options.minibatches} and {options.learners}"
        )
    return groups * options.group_size


def _learning_rate(options: TrainOptions, rows: int) -> Any:
    """A number, or RLlib's list of (rows sampled, rate): the local engine's schedule, exact at every iteration."""
    if options.schedule == "constant" and not options.warmup_steps:
        return options.lr
    o, rates = options, range(options.steps + 1)
    return [[step * rows, o.lr * schedule_factor(o.schedule, step, o.steps, o.warmup_steps)] for step in rates]


def gpu_shares(options: TrainOptions) -> tuple[float, float]:
    """What of a GPU an env runner and a learner ask Ray for: fractions where there are more actors than GPUs.

    Ray fills the fullest GPU that still has room, runners first, and NCCL wants no two learners on one GPU. So a
    runner's share is a little more, and a learner's what exactly m runners leave of a GPU. ValueError where several
    learners cannot each have a GPU of their own.
    """
    runners, learners = options.env_runners, options.learners
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if runners + learners <= gpus:
        return 1.0, 1.0
    if not gpus:
        raise ValueError("device: the run is on cuda, and Ray's cluster has no GPU; add some, or use --device cpu")
    if learners <= 1:
        share = 1 / math.ceil((runners + learners) / gpus)
        return share, share
    m = math.ceil(runners / gpus)  # runners of a GPU
    most = min(gpus, runners // m + 1) if runners else gpus
    if learners > most:
        raise ValueError(
            f"learners: each needs a GPU of its own, and Ray has {gpus} for them and {runners} env runners: must be at "
            f"most {most}, got {learners}"
        )
    share = round(1 / (m + 1) + 0.002, 4)
    return share, round(1 - m * share, 4)


@contextlib.contextmanager
def _cluster(options: TrainOptions, device: torch.device) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, the one this process is in, or a new one here with a logical CPU for each actor."""
    mine = not ray.is_initialized()
    if mine:
        own: dict[str, Any] = dict(
            address="local", num_cpus=options.env_runners + options.learners + 1,
            num_gpus=torch.cuda.device_count() if device.type == "cuda" else 0,
            include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        # The terminal's end is ours to handle: Ray's processes, which inherit this, save with us.
        with hangup_ignored():
            ray.init(**({} if os.environ.get("RAY_ADDRESS") else own))
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def _run(algo: BanditAlgorithm, options: TrainOptions, out: Path, done: int, device: torch.device) -> None:
    if options.resume:
        algo.restore_from_path(out / "checkpoint")
    module, env = _judged(algo, options, device)
    judge = local.Judge(options, module.policy, env)
    engine, accelerator = RayEngine(algo, options, out, done), build.build_accelerator(options, torch.device("cpu"))
    local.run_judged(engine, judge, options, out, accelerator, env, ended=lambda: _fill(module, algo))


class RayEngine:
    """An algorithm as the loop over steps sees it (`train.steps.Engine`)."""

    def __init__(self, algo: BanditAlgorithm, options: TrainOptions, out: Path, done: int) -> None:
        self._algo, self._options, self._checkpoint = algo, options, out / "checkpoint"
        self.steps_done = done

    def step(self) -> Metrics:
        started = time.perf_counter()
        result = self._algo.train()
        self.steps_done += 1
        return flat_metrics(result, self.steps_done, time.perf_counter() - started, max(1, self._options.env_runners))

    def undo(self) -> bool:
        return self._algo.undo_sampling()

    def save(self) -> None:
        folder.write(
            self._checkpoint, self._algo.save_to_path, self.steps_done, asdict(self._options),
            self._options.keep_checkpoints,
        )  # fmt: skip

    def any_rank(self, flags: list[bool]) -> list[bool]:
        return flags


def flat_metrics(result: dict[str, Any], step: int, seconds: float, runners: int) -> dict[str, float]:
    """A line of metrics.jsonl from an iteration's result; runners work at the same time, so theirs is a mean."""
    sampled = result["env_runners"]
    times = {stage: float(sampled["time"][f"{stage}_s"]) / runners for stage in ("generate", "score")}
    times |= {stage: float(result["time"][f"{stage}_s"]) for stage in ("learn", "sync")}
    times["rest"] = max(0.0, seconds - sum(times.values()))
    timed = {f"time/{stage}_s": value for stage, value in times.items()}
    return {"step": step, **result[BANDIT], "samples_per_s": sampled["num_env_steps_sampled"] / seconds, **timed}


def _judged(algo: BanditAlgorithm, options: TrainOptions, device: torch.device) -> tuple[CausalLMModule, BanditEnv]:
    """A policy and an env of this process, to evaluate and save: the runner's or learner's own where they are here."""
    runner = algo.env_runner_group.local_env_runner
    if runner is not None:
        return runner.module, runner.env
    env = EnvOfOptions(options)(0, 1, device)
    if algo.config.num_learners == 0:
        return algo.learner_group._learner.lm_module, env
    module = empty_module(algo.config, device)
    _fill(module, algo)
    return module, env


def _fill(module: CausalLMModule, algo: BanditAlgorithm) -> None:
    """The learners' weights, where they are in other processes."""
    if algo.config.num_learners:
        module.set_state(algo.learner_group.get_weights()[DEFAULT_MODULE_ID])
