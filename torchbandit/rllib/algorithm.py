"""RLlib's Algorithm on whole batches: sample, learn, broadcast, and bring back what has died."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils import metrics as names

from torchbandit.learn.find import check_groups
from torchbandit.learn.metrics import Metrics
from torchbandit.learn.update import SKIPPED_IN_A_ROW, why_skipped
from torchbandit.rllib.broadcast import Broadcast
from torchbandit.rllib.env_runner import PLACE, BanditEnvRunner, joined
from torchbandit.rllib.learner import TOLD
from torchbandit.rllib.module import same_algorithms
from torchbandit.rllib.wire import to_array, to_tensor

logger = logging.getLogger(__name__)
PLACES = "runner_places"
BANDIT = "bandit"


class BanditLoop(Algorithm):
    """The loop of `BanditAlgorithm`, which adds its default config to it. Works in `tune.Tuner` too."""

    def setup(self, config: Any) -> None:
        """Build runners and learners; ValueError where one could not be built, or rows do not divide."""
        self._places: dict[int, dict[str, Any]] = {}
        self._before: tuple[Any, dict[int, dict[str, Any]]] | None = None  # places, until a step begins to learn
        self._told: Metrics = {}
        try:
            with same_algorithms():
                super().setup(config)
            self._join_parts()
        except Exception:
            self.cleanup()  # what was built would keep its CPUs and GPUs, and the next try would wait for them
            raise

    def _join_parts(self) -> None:
        self._broadcast = Broadcast(self.learner_group, self.config.sample_timeout_s)
        reports = self._reports(self.env_runner_group)
        for group in (self.env_runner_group, self.eval_env_runner_group):
            runner = None if group is None else group.local_env_runner
            if runner is not None and self.config.num_learners == 0:
                runner.share_module(self.learner_group._learner.lm_module)
        if self.eval_env_runner_group is not None:
            self._reports(self.eval_env_runner_group)
        self._check_rows(reports)
        self._places = {r["worker"]: r[PLACE] for r in reports if r["worker"]}

    def _reports(self, group: Any) -> list[dict[str, Any]]:
        reports = group.foreach_env_runner(lambda runner: runner.report())
        for report in reports:
            if report["problem"] is not None:
                raise ValueError(f"env runner {report['worker']} on node {report['node']}: {report['problem']}")
        if not reports:
            raise ValueError("env runners: none of them answers; see the actors' logs above for the reason")
        return list(reports)

    def _check_rows(self, reports: list[dict[str, Any]]) -> None:
        """Rows must divide over runners, learners and minibatches; a ragged share would hang DDP."""
        config, runners, learners = self.config, len(reports), max(1, self.config.num_learners)
        sizes = {(r["rows"], r["group_size"], r["prompt_width"]) for r in reports}
        if len(sizes) > 1:
            raise ValueError(
                "bandit(env_fn=…): must return envs of one num_prompts, group_size and prompt width on every runner, "
                f"got (rows, group_size, width) of {sorted(sizes)}; build the same PromptSet everywhere"
            )
        ((self._rows, self._group_size, _),) = sizes
        check_groups(config.algorithm, self._group_size, refill=config.refill)
        round_of_all = self._rows * runners
        self._total_rows = config.total_train_batch_size or round_of_all
        told = f"{runners} runner(s) x {self._rows} rows a batch"
        if self._total_rows % round_of_all:
            fitting = -(-self._total_rows // round_of_all) * round_of_all
            raise ValueError(
                f"train_batch_size_per_learner: x {learners} learner(s) must be a multiple of {told} = {round_of_all}, "
                f"got {self._total_rows}; use {fitting} in all, or leave it out"
            )
        if self._total_rows % (learners * self._group_size):
            raise ValueError(
                f"num_learners: must divide the {self._total_rows // self._group_size} groups of a batch ({told}), got "
                f"{learners}; change num_prompts or the number of learners"
            )
        share, size = self._total_rows // learners, config.minibatch_size
        if size and (share % size or size % self._group_size):
            raise ValueError(
                f"minibatch_size: must divide the {share} rows of a learner ({self._total_rows} rows over {learners} "
                f"learner(s)) in whole groups of {self._group_size}, got {size}"
            )

    def training_step(self) -> None:
        """Sample, learn, and send the new weights to every runner that has a module of its own."""
        runner = self.env_runner_group.local_env_runner
        self._before = (None if runner is None else runner.position()), dict(self._places)
        with self.metrics.log_time((names.TIMERS, names.ENV_RUNNER_SAMPLING_TIMER)):
            batch = self._sample()
        self._before = None
        started = time.perf_counter()
        with self.metrics.log_time((names.TIMERS, names.LEARNER_UPDATE_TIMER)):
            seen = self.metrics.peek((names.ENV_RUNNER_RESULTS, names.NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
            results = self.learner_group.update(
                batch=batch, timesteps={names.NUM_ENV_STEPS_SAMPLED_LIFETIME: seen}, group_size=self._group_size
            )
            self._told |= [result.pop(TOLD) for result in results][-1]  # of all learners together, in each of them
            self.metrics.aggregate(results, key=names.LEARNER_RESULTS)
        if (why := why_skipped(self._told.pop(SKIPPED_IN_A_ROW))) is not None:
            raise ValueError(f"iteration {self.iteration + 1}: {why}")
        learned = time.perf_counter()
        if self.config.num_learners or self.env_runner_group.num_remote_env_runners():
            with self.metrics.log_time((names.TIMERS, names.SYNCH_WORKER_WEIGHTS_TIMER)):
                self._broadcast(self.env_runner_group)
        # RLlib's timers are moving averages; these are of this iteration.
        self.metrics.log_value(("time", "learn_s"), learned - started, window=1)
        self.metrics.log_value(("time", "sync_s"), time.perf_counter() - learned, window=1)

    def undo_sampling(self) -> bool:
        """After a `train()` that has failed: all runners go back to before it; False if it had begun to learn."""
        if self._before is None:
            return False
        place, self._places = self._before
        if place is not None:
            self.env_runner_group.local_env_runner.go_to(place)
        self._send_places()
        return True

    def step(self) -> dict[str, Any]:
        """RLlib's iteration; its result has the local engine's metrics by their names under "bandit"."""
        result: dict[str, Any] = super().step()
        return result | {BANDIT: dict(self._told)}

    def _sample(self) -> MultiAgentBatch:
        runner = self.env_runner_group.local_env_runner
        if self.env_runner_group.num_remote_env_runners() == 0:
            batch = runner.sample(num_timesteps=self._total_rows)[0]
            metrics = [runner.get_metrics()]
            answers = [runner.health()]
            rows = dict(batch.policy_batches[DEFAULT_MODULE_ID])
        else:
            answers = self._sample_remotely()
            metrics = [a["metrics"] for a in answers]
            columns = answers[0]["rows"].keys()
            rows = {key: torch.cat([to_tensor(a["rows"][key]) for a in answers]) for key in columns}
        self._told = joined([a["told"] for a in answers])
        if (unscorable := self._told["unscorable"]) > 0.5:
            why = "; ".join(sorted({a["why_unscorable"] for a in answers if a["why_unscorable"]}))
            raise ValueError(
                f"iteration {self.iteration + 1}: {unscorable:.0%} of the batch has no valid score, more than half; "
                f"{why}"
            )
        self.metrics.aggregate(metrics, key=names.ENV_RUNNER_RESULTS)
        if self.config.num_learners > 0:
            rows = {key: to_array(value) for key, value in rows.items()}
        return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(rows)}, env_steps=self._total_rows)

    def _sample_remotely(self) -> list[dict[str, Any]]:
        """Ask healthy runners for whole batches until there are enough; one that fails is left out and named."""
        group = self.env_runner_group
        missing, failed = self._total_rows // self._rows, dict[int, str]()
        answers: list[dict[str, Any]] = []
        while missing > len(answers):
            able = [i for i in group.healthy_env_runner_ids() if i not in failed]
            if not able and not self._bring_back(failed):
                told = "; ".join(f"env runner {i}: {why}" for i, why in sorted(failed.items())) or "all have died"
                raise RuntimeError(f"iteration {self.iteration + 1}: no env runner can sample any more: {told}")
            asked = able[: missing - len(answers)]
            if not asked:
                continue
            got = group.foreach_env_runner(
                BanditEnvRunner.sample_for_driver,
                remote_worker_ids=asked,
                local_env_runner=False,
                timeout_seconds=self.config.sample_timeout_s,
            )
            for answer in got:
                worker = answer["worker"]
                if "problem" in answer:
                    failed[worker] = f"on node {answer['node']}: {answer['problem']}"
                    logger.warning("env runner %d could not sample %s; the others go on", worker, failed[worker])
                else:
                    self._places[worker] = answer[PLACE]
                    answers.append(answer)
            for worker in set(asked) - {answer["worker"] for answer in got}:
                failed[worker] = "died, or gave no answer in time"
                logger.warning("env runner %d %s; the others go on", worker, failed[worker])
        self.metrics.log_value("num_failed_samples", len(failed), reduce="sum")
        return sorted(answers, key=lambda answer: int(answer["worker"]))

    def _bring_back(self, failed: dict[int, str]) -> bool:
        """With no runner left: wait for one that Ray starts again. True if one has come."""
        deadline = time.monotonic() + min(self.config.env_runner_restore_timeout_s, 300.0)
        dead = set(self.env_runner_group._worker_manager.actor_ids()) - set(
            self.env_runner_group.healthy_env_runner_ids()
        )
        while dead and time.monotonic() < deadline:
            if restored := self.restore_env_runners(self.env_runner_group):
                for worker in restored:
                    failed.pop(worker, None)
                return True
            time.sleep(0.5)
        return False

    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Give runners that Ray has started again the learner's weights and, in training, their own place."""
        restored: list[int] = list(env_runner_group.probe_unhealthy_env_runners() or [])
        if restored:
            self._counters["total_num_restored_workers"] += len(restored)
            self._broadcast.through_store(env_runner_group, restored)
            if env_runner_group is self.env_runner_group:
                self._send_places(restored)
            logger.warning("env runner(s) %s are back, with the learner's weights", restored)
        return restored

    def _send_places(self, workers: list[int] | None = None) -> None:
        places = self._places
        first = next(iter(places.values()), None)

        def take(runner: BanditEnvRunner) -> None:
            place = places.get(runner.worker_index, first)
            if place is not None:
                runner.go_to(place, generator=runner.worker_index in places)

        self.env_runner_group.foreach_env_runner(take, remote_worker_ids=workers, local_env_runner=False)

    def evaluate(self, parallel_train_future: Any = None) -> Any:
        """RLlib's `evaluate()`; on the training env it leaves training's place in the prompts as it was."""
        if self.eval_env_runner_group is not None:
            return super().evaluate(parallel_train_future)
        if (runner := self.env_runner_group.local_env_runner) is None:
            raise ValueError(
                "evaluate: with num_env_runners > 0 there is no local runner to evaluate on; set "
                ".evaluation(evaluation_num_env_runners=1) or an evaluation_interval"
            )
        before = runner.place()
        try:
            return super().evaluate(parallel_train_future)
        finally:
            runner.go_to(before)

    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, and the place of every remote runner."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._places and self._check_component(PLACES, components, not_components):
            state[PLACES] = self._places
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up `get_state()`; with another number of runners they all go on from the first one's place."""
        super().set_state(state)
        if PLACES in state and self.env_runner_group.num_remote_env_runners():
            self._places = state[PLACES]
            self._send_places()

    def save_to_path(self, path: str | Path | None = None, **kwargs: Any) -> str:
        """As RLlib's, which takes no relative path."""
        return str(super().save_to_path(_whole(path), **kwargs))

    @classmethod
    def from_checkpoint(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As RLlib's, which takes no relative path."""
        return super().from_checkpoint(_whole(path), *args, **kwargs)

    def restore_from_path(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """As RLlib's, with the weights on every runner when it returns."""
        super().restore_from_path(_whole(path), *args, **kwargs)
        for group in filter(None, (self.env_runner_group, self.eval_env_runner_group)):
            self._broadcast.through_store(group)


def _whole(path: str | Path | None) -> str | Path | None:
    """A local path from the root; a URI (s3://…) as it is."""
    return path if path is None or "://" in str(path) else Path(path).absolute()
