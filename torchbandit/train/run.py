"""A whole run: build the parts, evaluate, train, evaluate again, and leave everything in one folder."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm import tqdm

from torchbandit.env import BanditEnv
from torchbandit.policy import CausalLMPolicy
from torchbandit.train import build, checkpoint, report
from torchbandit.train.evaluate import Evaluation, evaluate
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import TrainOptions


class Interrupted(Exception):
    """Ctrl-C: the step was finished and a checkpoint written."""


def train(options: TrainOptions) -> Path:
    """Train as `options` say and return the run's folder.

    The folder holds metrics.jsonl, curve.png, samples.md, evaluation.json, policy/ and checkpoint/.

    Raises:
        ValueError: an option, a file or a reward is not what it must be. What was trained until then is saved.
        Interrupted: after Ctrl-C (SIGINT) or SIGTERM, once the step has ended and a checkpoint is written.
        OSError: a file could not be written; the former checkpoint is whole.
    """
    device = build.pick_device(options)
    out = Path(options.out)
    accelerator = build.build_accelerator(options, device)
    main = accelerator.is_main_process
    if main:
        claim(out, options)
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
    if options.resume:
        run = identity(options, accelerator)
        state = checkpoint.load(out / "checkpoint", trainer.policy, run, accelerator.process_index)
        trainer.load_state_dict(state)
        if trainer.steps_done >= options.steps and report.is_finished(out / "evaluation.json"):
            raise ValueError(
                f"steps: the run at {out} has done its {trainer.steps_done} steps; ask for more with --steps"
            )
    judge = Judge(options, trainer.policy, env) if main else None
    if options.log_with:
        accelerator.init_trackers(options.name or "torchbandit", config=plain(asdict(options)))
    try:
        before = judge.before(out / "evaluation.json") if judge else None
        _loop(trainer, options, out)
        accelerator.wait_for_everyone()
        if judge is not None and before is not None:
            judge.finish(out, before)
    finally:
        env.close()
        if options.log_with:
            accelerator.end_training()
    return out


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
        return evaluate(
            self._policy, self._env, corpus=self._corpus, num_samples=self._options.num_samples, seed=self._options.seed
        )

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
        tqdm.write(report.summary(before, after))
        tqdm.write(f"\n{out}: metrics.jsonl curve.png samples.md evaluation.json policy/ checkpoint/")


def _loop(trainer: BanditTrainer, options: TrainOptions, out: Path) -> None:
    accelerator = trainer.accelerator
    main = accelerator.is_main_process

    def save(state: dict[str, Any]) -> None:
        # The main process goes last: it is the one that puts the new checkpoint in place.
        if not main:
            checkpoint.save(out / "checkpoint", trainer.policy, state, {}, accelerator.process_index)
        accelerator.wait_for_everyone()
        if main:
            checkpoint.save(out / "checkpoint", trainer.policy, state, identity(options, accelerator))
        accelerator.wait_for_everyone()

    with stop_signals() as stopped, contextlib.ExitStack() as stack:
        reporter = stack.enter_context(
            report.Reporter(out, steps=options.steps, done=trainer.steps_done)
        ) if main else None  # fmt: skip
        while trainer.steps_done < options.steps:
            ready = trainer.position()
            try:
                metrics = trainer.step()
            except Exception:
                if trainer.world_size == 1 and trainer.steps_done:
                    save(trainer.state_dict() | ready)
                raise
            if reporter is not None:
                reporter(metrics)
            if options.log_with:
                accelerator.log(
                    {name: value for name, value in metrics.items() if name != "step"}, step=int(metrics["step"])
                )
            stop = bool(trainer.any_rank(bool(stopped)))
            due = options.save_every and trainer.steps_done % options.save_every == 0
            if due or stop or trainer.steps_done == options.steps:
                save(trainer.state_dict())
            if stop and trainer.steps_done < options.steps:
                raise Interrupted(
                    f"stopped after step {trainer.steps_done} of {options.steps}; the checkpoint is written, "
                    "go on with the same command and --resume"
                )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM so that the step can end; a second one interrupts at once."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        tqdm.write("stopping after this step; once more to stop now")

    try:
        former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where Python refuses handlers
        former = {}
    try:
        yield seen
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def claim(out: Path, options: TrainOptions) -> None:
    """Make the folder; a run that is there already is not overwritten."""
    if not options.resume and (out / "checkpoint").exists():
        raise ValueError(f"out: {out} holds a run already; go on with --resume, or name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be made ({error.strerror}); name another folder") from error


def identity(options: TrainOptions, accelerator: Accelerator) -> dict[str, Any]:
    """What a run must have in common with the checkpoint that it resumes; ranks take turns, so their number too."""
    return asdict(options) | {"processes": accelerator.num_processes}


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers and strings."""
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()}
