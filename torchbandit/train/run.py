"""A whole run: build the parts, evaluate, train, evaluate again, and leave everything in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from torchbandit.env import BanditEnv
from torchbandit.learn.metrics import Metrics
from torchbandit.policy import CausalLMPolicy
from torchbandit.train import build, checkpoint, folder, report
from torchbandit.train.evaluate import Evaluation, evaluate
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import TrainOptions
from torchbandit.train.signals import say, stop_signals
from torchbandit.train.steps import Engine, run_steps


def train(options: TrainOptions) -> Path:
    """Train as `options` say and return the run's folder.

    The folder holds metrics.jsonl, curve.png, samples.md, evaluation.json, policy/ and the checkpoints.

    Raises:
        ValueError: an option, a file or a reward is not what it must be, or the folder is another run's. What was
            trained until then is saved.
        Interrupted: after SIGINT (Ctrl-C), SIGTERM or SIGHUP, once the step has ended and a checkpoint is written.
        StoppedAtOnce: after a second one, or one outside of training: what was saved before is whole.
        OSError: a file could not be written; the former checkpoint is whole.
    """
    device = build.pick_device(options)
    out = Path(options.out)
    accelerator = build.build_accelerator(options, device)
    main = accelerator.is_main_process
    with stop_signals(patient=False), folder.claim(out, options.resume) if main else contextlib.nullcontext():
        if options.resume:
            if main:
                folder.recover(out / "checkpoint")
            accelerator.wait_for_everyone()
            find_run(out, identity(options, accelerator))
        _train(options, out, accelerator, device)
    return out


def _train(options: TrainOptions, out: Path, accelerator: Accelerator, device: torch.device) -> None:
    main = accelerator.is_main_process
    tokenizer = build.build_tokenizer(options)
    env = build.build_env(options, tokenizer, device)
    trainer = BanditTrainer(
        env,
        build.build_policy(options, tokenizer, device),
        options.algorithm,
        options,
        corpus=build.build_corpus(options, options.ptx_data, tokenizer, device) if options.ptx_coef else None,
        accelerator=accelerator,
    )
    engine = LocalEngine(trainer, options, out)
    if options.resume:
        engine.load()
    judge = Judge(options, trainer.policy, env) if main else None
    run_judged(engine, judge, options, out, accelerator, env)


def run_judged(
    engine: Engine,
    judge: Judge | None,
    options: TrainOptions,
    out: Path,
    accelerator: Accelerator,
    env: BanditEnv,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Evaluate, train, evaluate again: the middle of a run on either engine.

    Args:
        judge: None on all ranks but the first.
        env: closed at the end.
        ended: called between training and the last evaluation.
    """
    if options.log_with:
        accelerator.init_trackers(options.name or "torchbandit", config=plain(asdict(options)))
    try:
        before = judge.before(out / "evaluation.json") if judge else None
        run_steps(engine, options, out, accelerator)
        accelerator.wait_for_everyone()
        ended()
        if judge is not None and before is not None:
            judge.finish(out, before)
    finally:
        env.close()
        if options.log_with:
            accelerator.end_training()


class LocalEngine:
    """A trainer as the loop over steps sees it (`steps.Engine`)."""

    def __init__(self, trainer: BanditTrainer, options: TrainOptions, out: Path) -> None:
        self._trainer, self._options, self._checkpoint = trainer, options, out / "checkpoint"
        self._rank = trainer.accelerator.process_index
        self._identity = identity(options, trainer.accelerator)
        self._position: dict[str, Any] = {}
        self._learning = False
        # Before the optimizer moves anything. (A fused one leaves no trace in the versions of the weights.)
        trainer.optimizer.optimizer.register_step_pre_hook(self._note_learning)

    @property
    def steps_done(self) -> int:
        return self._trainer.steps_done

    def step(self) -> Metrics:
        self._position, self._learning = self._trainer.position(), False
        return self._trainer.step()

    def undo(self) -> bool:
        # A step that has begun to change the weights cannot be taken again as it would have been.
        if self._trainer.world_size > 1 or self._learning:
            return False
        self._trainer.load_state_dict(self._trainer.state_dict() | self._position)
        return True

    def _note_learning(self, *_: Any) -> None:
        self._learning = True

    def save(self) -> None:
        # The main process goes last: it is the one that puts the new checkpoint in place.
        for turn in (self._rank != 0, self._rank == 0):
            error: OSError | None = None
            if turn:
                try:
                    checkpoint.save(
                        self._checkpoint, self._trainer.policy, self._trainer.state_dict(), self._identity, self._rank,
                        self._options.keep_checkpoints,
                    )  # fmt: skip
                except OSError as failed:
                    error = failed
            if any(self.any_rank([error is not None])):
                raise error or OSError("checkpoint: another process could not write its part; its message says why")

    def load(self) -> None:
        """Go on where the checkpoint was written."""
        state = checkpoint.load(self._checkpoint, self._trainer.policy, self._identity, self._rank)
        self._trainer.load_state_dict(state)

    def any_rank(self, flags: list[bool]) -> list[bool]:
        if self._trainer.world_size == 1:
            return flags
        counts = torch.tensor(flags, dtype=torch.float32, device=self._trainer.env.device)
        sums = self._trainer.accelerator.reduce(counts, reduction="sum")
        assert isinstance(sums, torch.Tensor)
        return [count > 0 for count in sums.tolist()]


class Judge:
    """Evaluates a policy on held-out prompts, or on the first training prompts where none were given."""

    def __init__(self, options: TrainOptions, policy: CausalLMPolicy, env: BanditEnv) -> None:
        self._options, self._policy = options, policy
        self._env = build.build_env(
            options, policy.tokenizer, env.device, terms=env.rewards.terms,
            prompts=options.eval_prompts or options.prompts,
        )  # fmt: skip
        self._corpus = build.build_corpus(options, options.eval_ptx_data, policy.tokenizer, env.device)

    def __call__(self) -> Evaluation:
        limit = self._options.max_eval_prompts
        if limit is None and self._options.eval_prompts is None:
            limit = 512  # training prompts serve, and there may be millions
        return evaluate(
            self._policy, self._env, corpus=self._corpus, num_samples=self._options.num_samples, max_prompts=limit,
            seed=self._options.seed,
        )  # fmt: skip

    def before(self, path: Path) -> Evaluation:
        """The state before training: of the first start, where the run is a resumed one."""
        found = (report.read_before(path) if self._options.resume else None) or self()
        report.write_evaluation(path, found, None)
        return found

    def finish(self, out: Path, before: Evaluation) -> None:
        """Evaluate again, leave everything in the run's folder, and say how it went."""
        after = self()
        try:
            self._policy.save_pretrained(out / "policy")
            report.write_samples(out / "samples.md", before, after)
            report.write_curve(out / "metrics.jsonl", out / "curve.png")
            report.write_evaluation(out / "evaluation.json", before, after)  # the last: now the run is finished
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{out}: could not be written ({error}); the checkpoint is whole: make room, and the same command with "
                "--resume writes the rest"
            ) from error
        say(report.summary(before, after))
        say(f"\n{out}: metrics.jsonl curve.png samples.md evaluation.json policy/ checkpoint/")


def find_run(out: Path, run: Mapping[str, Any], free: Collection[str] = folder.FREE) -> int:
    """Steps that the run in `out` has done; ValueError where it is another run's or has nothing left to do."""
    done = int(folder.find(out / "checkpoint", run, free)["steps_done"])
    if done == run["steps"] and report.is_finished(out / "evaluation.json"):
        raise ValueError(f"steps: the run at {out} has done its {done} steps; ask for more with --steps")
    return done


def identity(options: TrainOptions, accelerator: Accelerator) -> dict[str, Any]:
    """What a run must have in common with the checkpoint that it resumes; ranks take turns, so their number too."""
    return asdict(options) | {"processes": accelerator.num_processes}


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers and strings."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
