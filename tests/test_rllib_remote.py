"""RLlib with actors: runners and learners of their own, what happens when they fail, and two nodes."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID  # noqa: E402
from rllib_toy import ToyEnv, make_models, reward, toy_config  # noqa: E402

from torchbandit.rllib import BanditAlgorithm, BanditEnvRunner  # noqa: E402

pytestmark = pytest.mark.slow
LOGGER = "torchbandit.rllib.algorithm"


class FlakyEnv(ToyEnv):
    """Worker 2's reward raises while a file is there."""

    def __init__(self, policy: str, flag: Path, **options: Any) -> None:
        super().__init__(policy, **options)
        self.flag = flag

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> Any:
        env = super().__call__(worker_index, num_workers, device)
        term = env.rewards.terms[0]
        plain, flag = term.fn, self.flag

        def fn(td: Any) -> torch.Tensor:
            if worker_index == 2 and flag.exists():
                raise RuntimeError("the reward model is out of order")
            return plain(td)

        term.fn = fn
        return env


class Run:
    """An algorithm on 2 runners and 1 learner, and every draw that it has trained on."""

    def __init__(self, folder: Path) -> None:
        self.paths, self.flag = make_models(folder), folder / "broken"
        config = toy_config(self.paths["policy"], 2, 1, env_fn=FlakyEnv(self.paths["policy"], self.flag), lr=1e-2)
        self.algo = config.rl_module(dtype="bfloat16").build_algo()
        self.draws: list[int] = []
        update = self.algo.learner_group.update

        def spy(**kwargs: Any) -> Any:
            group_id = torch.as_tensor(kwargs["batch"].policy_batches[DEFAULT_MODULE_ID]["group_id"])
            self.draws += group_id[::4].tolist()
            return update(**kwargs)

        self.algo.learner_group.update = spy
        # Whichever test comes first, it finds the same algorithm.
        self.first = [reward(self.algo.train()) for _ in range(12)], list(self.draws)

    def each(self, fn: Any) -> dict[int, Any]:
        """What `fn` says on every runner."""
        told = self.algo.env_runner_group.foreach_env_runner(lambda r: (r.worker_index, fn(r)), local_env_runner=False)
        return dict(told)

    def assert_weights_everywhere(self) -> None:
        learner = self.algo.learner_group.get_weights()[DEFAULT_MODULE_ID]["weights"]
        states = self.each(lambda r: r.get_state(components=COMPONENT_RL_MODULE)[COMPONENT_RL_MODULE])
        assert states.keys() == {1, 2}
        for state in states.values():
            theirs = state[DEFAULT_MODULE_ID]["weights"]
            assert theirs.keys() == learner.keys()
            for name, bits in learner.items():
                assert bits.dtype == theirs[name].dtype and bits.raw.tobytes() == theirs[name].raw.tobytes(), name


def assert_no_prompt_lost(draws: list[int]) -> None:
    """Every runner's draws are its own turns, without a gap and without repeats."""
    assert len(set(draws)) == len(draws), "a draw was trained on twice"
    for rank in (0, 1):
        own = sorted(d for d in draws if d % 2 == rank)
        assert own == list(range(rank, rank + 2 * len(own), 2)), (rank, own)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    # Ray would set OMP_NUM_THREADS to an actor's CPUs where nobody has set it.
    env = {"env_vars": {"OMP_NUM_THREADS": "3"}}
    quiet: dict[str, Any] = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.init("local", num_cpus=8, num_gpus=1, runtime_env=env, **quiet)
    run = Run(tmp_path_factory.mktemp("toy"))
    yield run
    run.algo.stop()
    ray.shutdown()


def test_learns(run: Run) -> None:
    history, draws = run.first
    assert sum(history[-3:]) / 3 > sum(history[:2]) / 2 + 0.2, history
    assert len(draws) == 12 * 8
    assert_no_prompt_lost(draws)


def test_bf16_weights_arrive_bit_for_bit(run: Run) -> None:
    dtypes = {bits.dtype for bits in run.algo.learner_group.get_weights()[DEFAULT_MODULE_ID]["weights"].values()}
    assert "bfloat16" in dtypes
    run.assert_weights_everywhere()


def test_threads(run: Run) -> None:
    """As many as the actor has CPUs, whatever the environment says; and RLlib's seeding switches no algorithms."""

    def told(part: Any) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    assert set(run.each(told).values()) == {(1, False)}
    assert [result.get() for result in run.algo.learner_group.foreach_learner(told)] == [(1, False)]


def test_runners_start_empty_and_apart(run: Run) -> None:
    """No weights file is read in a runner, and no two runners sample alike."""
    assert all(run.each(lambda r: r.module.model_config["empty"]).values())
    seeds = run.each(lambda r: r.generator.initial_seed())
    assert seeds[1] != seeds[2]


@pytest.mark.parametrize("how", ["ray.kill", "SIGKILL"])
def test_killed_runner_comes_back(run: Run, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on without it; it comes back with the learner's weights and its own place in the prompts."""
    pid = run.each(lambda r: os.getpid())[2]
    if how == "ray.kill":
        ray.kill(run.algo.env_runner_group._worker_manager._actors[2], no_restart=False)
    else:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        give_up = time.monotonic() + 200  # a process that imports torch may take long on a busy machine
        while "are back" not in caplog.text and time.monotonic() < give_up:
            result = run.algo.train()
            assert result["env_runners"]["num_env_steps_sampled"] == 32
    assert "env runner 2 died" in caplog.text and "env runner(s) [2] are back" in caplog.text
    assert run.each(lambda r: os.getpid())[2] != pid
    run.algo.train()
    assert_no_prompt_lost(run.draws)
    run.assert_weights_everywhere()


def test_reward_model_that_raises_in_one_replica(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    pid = run.each(lambda r: os.getpid())[2]
    run.flag.touch()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        result = run.algo.train()
    assert result["env_runners"]["num_env_steps_sampled"] == 32 and result["num_failed_samples"] == 1
    assert "env runner 2 could not sample on node" in caplog.text
    assert "RuntimeError: the reward model is out of order" in caplog.text
    run.flag.unlink()
    caplog.clear()
    run.algo.train()
    assert not caplog.text and run.each(lambda r: os.getpid())[2] == pid
    assert_no_prompt_lost(run.draws)


def test_places_are_in_the_checkpoint(run: Run, tmp_path: Path) -> None:
    path = run.algo.save_to_path(tmp_path / "checkpoint")
    places = {i: str(p) for i, p in run.each(lambda r: r.place()).items()}
    run.algo.train()
    assert {i: str(p) for i, p in run.each(lambda r: r.place()).items()} != places
    del run.draws[-8:]
    run.algo.restore_from_path(path)
    assert {i: str(p) for i, p in run.each(lambda r: r.place()).items()} == places
    run.assert_weights_everywhere()
    run.algo.train()
    assert_no_prompt_lost(run.draws)


class OnCpu(BanditEnvRunner):
    """Does not look for the GPU that Ray believes in."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        config = config.copy(copy_frozen=False)
        config.num_gpus_per_env_runner = 0
        super().__init__(config=config, **kwargs)


def test_two_runners_on_one_gpu(run: Run) -> None:
    config = toy_config(run.paths["policy"], 2).env_runners(num_gpus_per_env_runner=0.5, env_runner_cls=OnCpu)
    algo = config.build_algo()
    told = algo.env_runner_group.foreach_env_runner(lambda r: ray.get_gpu_ids())
    give_up = time.monotonic() + 30
    while (free := ray.available_resources().get("GPU", 0)) and time.monotonic() < give_up:  # told with a delay
        time.sleep(0.2)
    algo.stop()
    assert told == [[0], [0]] and free == 0


def test_missing_weights_name_node_and_path(run: Run) -> None:
    with pytest.raises(ValueError, match=r"env runner \d on node .*raised ValueError.*/no/such/reward/model"):
        toy_config(run.paths["policy"], 1, env_fn=NoModel(run.paths["policy"])).build_algo()


class NoModel(ToyEnv):
    """Wants a reward model that no node has."""

    def __call__(self, worker_index: int, num_workers: int, device: torch.device) -> Any:
        from torchbandit.models import load_reward_model

        load_reward_model("/no/such/reward/model", device)


def test_two_learners_do_what_one_does(run: Run) -> None:
    """One update on the same 16 rows: whole, or shared by two learners whose gradients DDP averages."""
    ends = []
    for learners in (0, 2):
        options: dict[str, Any] = dict(minibatch_size=None, num_epochs=1, lr=1e-3, train_batch_size_per_learner=16)
        if learners:
            options["train_batch_size_per_learner"] = 8
        algo = toy_config(run.paths["policy"], 0, learners, **options).build_algo()
        result = algo.train()
        weights = algo.learner_group.get_weights()[DEFAULT_MODULE_ID]["weights"]
        ends.append((weights, result["learners"][DEFAULT_MODULE_ID]["loss/policy"]))
        algo.stop()
    from torchbandit.rllib.wire import unpack

    (one, loss_one), (two, loss_two) = ends
    assert loss_one == pytest.approx(loss_two, abs=1e-5)
    for name in one:
        torch.testing.assert_close(unpack(one[name]), unpack(two[name]), rtol=1e-3, atol=2e-5)


def test_tune_over_two_coefficients(run: Run, tmp_path: Path) -> None:
    from ray import tune

    config = toy_config(run.paths["policy"], ptx_coef=tune.grid_search([0.0, 0.5]), ptx_data=run.paths["corpus.txt"])
    run_config = tune.RunConfig(stop={"training_iteration": 1}, storage_path=str(tmp_path), verbose=0)
    results = tune.Tuner(BanditAlgorithm, param_space=config, run_config=run_config).fit()
    assert not results.errors, results.errors
    ptx = {r.config["ptx_coef"]: "loss/ptx" in r.metrics["learners"][DEFAULT_MODULE_ID] for r in results}
    assert ptx == {0.0: False, 0.5: True}
