"""RLlib in one process: runner, learner and module of `BanditAlgorithm` share one policy."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

ray = pytest.importorskip("ray", reason="the rllib extra is not installed")

from fakes import byte_tokenizer, tiny_lm  # noqa: E402
from ray import cloudpickle  # noqa: E402
from ray.rllib.core import DEFAULT_MODULE_ID  # noqa: E402
from rllib_toy import NUM_PROMPTS, T, ToyEnv, make_models, reward, toy_config  # noqa: E402

from torchbandit import batch  # noqa: E402
from torchbandit.generation import Sampling  # noqa: E402
from torchbandit.learn import GSPO  # noqa: E402
from torchbandit.learn.update import Update  # noqa: E402
from torchbandit.rllib import (  # noqa: E402
    BanditAlgorithm,
    BanditConfig,
    BanditEnvRunner,
    BanditLearner,
    BanditPPOConfig,
    CausalLMModule,
)
from torchbandit.rllib.wire import pack, unpack  # noqa: E402
from torchbandit.testing.host_copy import count_host_copies  # noqa: E402


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def module_of(algo: Any) -> CausalLMModule:
    module = algo.learner_group._learner.module[DEFAULT_MODULE_ID]
    assert isinstance(module, CausalLMModule)
    return module


def weights(module: CausalLMModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns(paths: dict[str, str], dtype: str) -> None:
    config = toy_config(paths["policy"], env_fn=ToyEnv(paths["policy"], group_size=16, kl=0.001), lr=1e-2)
    config.rl_module(dtype=dtype).training(ptx_coef=0.01, ptx_data=paths["corpus.txt"])
    algo = config.build_algo()
    history = [reward(algo.train()) for _ in range(12)]
    algo.stop()
    assert sum(history[-3:]) / 3 > sum(history[:2]) / 2 + 0.3, history


def test_results(paths: dict[str, str]) -> None:
    env_fn = ToyEnv(paths["policy"], kl=0.1, name="low/bytes")
    algo = toy_config(paths["policy"], env_fn=env_fn, lr=0.0, train_batch_size_per_learner=32).build_algo()
    env, seen = algo.env_runner.env, list[float]()
    step = env.step

    def spy(td: Any) -> Any:
        out = step(td)
        seen.append(float(out["next", "reward"].mean()))
        return out

    env.step = spy
    results = [algo.train() for _ in range(2)]
    algo.stop()
    sampled, learned = results[1]["env_runners"], results[1]["learners"][DEFAULT_MODULE_ID]
    assert [r["env_runners"]["num_env_steps_sampled_lifetime"] for r in results] == [32, 64]
    assert [r["env_runners"]["num_episodes"] for r in results] == [32, 32]
    assert sampled["num_agent_steps_sampled"] == {"default_agent": 32}
    assert sampled["episode_return_mean"] == sampled["reward"]
    assert sampled["reward"] == pytest.approx(sampled["reward_terms"]["low/bytes"])
    assert len(seen) == 4 and sampled["reward"] == pytest.approx((seen[2] + seen[3]) / 2)
    assert set(sampled["reward_terms"]) == {"low/bytes", "kl"} and abs(sampled["kl"]) < 1e-4
    assert {"reward", "unscorable", "truncated", "response_length"} <= set(sampled)
    assert {"generate_s", "score_s"} == set(sampled["time"])
    assert {"loss/policy", "loss/value", "grad_norm", "skipped_updates"} <= set(learned)


def test_no_second_copy_of_the_model(paths: dict[str, str]) -> None:
    algo = toy_config(paths["policy"]).build_algo()
    assert algo.env_runner_group.local_env_runner.module is module_of(algo)
    algo.stop()


def test_the_process_keeps_its_algorithms(paths: dict[str, str]) -> None:
    """RLlib's `debugging(seed=…)` would make the whole process deterministic, and slower."""
    toy_config(paths["policy"]).build_algo().stop()
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_forward_pass_at_build(paths: dict[str, str]) -> None:
    """RLlib's catalogs and old stack run a dummy batch through the model; here nothing runs."""
    calls: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda m, _: calls.append(type(m).__name__))
    try:
        algo = toy_config(paths["policy"], env_fn=ToyEnv(paths["policy"], kl=0.1)).build_algo()
        assert calls == []
        algo.train()
        assert calls
    finally:
        handle.remove()
    algo.stop()


def test_no_batch_goes_through_numpy(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`train()` copies metrics alone: float vectors shorter than a batch of 64 rows.

    What the decode loop looks at is left out, wherever it runs: which rows have stopped, and how long prompts are.
    """
    seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def audited(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if "torchbandit/generation/" not in sys._getframe(1).f_code.co_filename:
                seen.append((name, tuple(self.shape), self.dtype))
            return original(self, *args, **kwargs)

        return method

    algo = toy_config(paths["policy"], env_fn=ToyEnv(paths["policy"], group_size=16, kl=0.1)).build_algo()
    algo.train()
    for name in ("numpy", "tolist", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, audited(name, getattr(torch.Tensor, name)))
    algo.train()
    monkeypatch.undo()
    algo.stop()
    assert seen, "the audit saw nothing, so it audits nothing"
    copied = [call for call in seen if len(call[1]) > 1 or call[1] >= (64,) or not call[2].is_floating_point]
    assert not copied, copied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float32])
def test_wire_keeps_bits(dtype: torch.dtype) -> None:
    for shape in ((3, 5), (), (0, 2)):
        tensor = torch.randint(0, 2, shape).to(dtype)
        tree = {"a": [tensor, (1, None)], "b": 2.5}
        back = unpack(cloudpickle.loads(cloudpickle.dumps(pack(tree))))
        made = back["a"][0]
        assert made.dtype == dtype and made.shape == tensor.shape and back["b"] == 2.5 and back["a"][1] == (1, None)
        assert torch.equal(made.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_bf16_state_bit_for_bit(paths: dict[str, str], tmp_path: Path) -> None:
    config = toy_config(paths["policy"]).rl_module(dtype="bfloat16")
    algo = config.build_algo()
    algo.train()
    module = module_of(algo)
    before = weights(module)
    spec = config.get_rl_module_spec(inference_only=True)
    spec.model_config = spec.model_config | {"empty": True}
    empty = spec.build()
    sent = ray.get(ray.put(module.get_state(inference_only=True)))
    empty.set_state(sent)
    assert_same_bits(before, weights(empty))
    saved = algo.save_to_path(tmp_path / "checkpoint")
    algo.train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(module).items())
    algo.restore_from_path(saved)
    assert_same_bits(before, weights(module_of(algo)))
    algo.stop()


def test_weights_from_outside_become_the_masters(paths: dict[str, str]) -> None:
    """set_weights brings no optimizer state; stale masters would undo it at the next step."""
    config = toy_config(paths["policy"], lr=0.0).rl_module(dtype="bfloat16")
    algo = config.build_algo()
    algo.train()
    state = {name: tensor * 2 for name, tensor in weights(module_of(algo)).items()}
    module_of(algo).set_state({"weights": pack(state)})
    algo.train()
    algo.stop()
    assert_same_bits(state, weights(module_of(algo)))


RESUME = """
import json, sys, ray, torch  # noqa: E402
torch.set_num_threads(1)
from pathlib import Path  # noqa: E402
from rllib_toy import toy_config, ToyEnv  # noqa: E402
from torchbandit.rllib import BanditAlgorithm  # noqa: E402
from test_rllib import digest  # noqa: E402
policy, corpus, path, mode = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
algo = BanditAlgorithm.from_checkpoint(path)
print("DIGEST" + json.dumps(digest(algo)))
algo.stop(); ray.shutdown()
"""


def digest(algo: Any) -> dict[str, Any]:
    """What the next iteration samples and makes of it, as numbers that must not differ in a bit."""
    batches: list[dict[str, torch.Tensor]] = []
    update = algo.learner_group.update

    def spy(**kwargs: Any) -> Any:
        batches.append(dict(kwargs["batch"].policy_batches[DEFAULT_MODULE_ID]))
        return update(**kwargs)

    algo.learner_group.update = spy
    algo.train()
    algo.learner_group.update = update
    learner = algo.learner_group._learner
    moments = [v for state in learner._masters.optimizer.state_dict()["state"].values() for v in state.values()]
    total = lambda tensors: sum(float(t.double().abs().sum()) for t in tensors)
    return {
        "tokens": batches[0]["tokens/response"].tolist(),
        "prompts": batches[0]["prompt_id"].tolist(),
        "reward": batches[0]["next/reward"].tolist(),
        "weights": total(module_of(algo).state_dict().values()),
        "optimizer": total(moments),
        "terms": total(v for part in algo.env_runner.env.rewards.state_dict().values() for v in part.values()),
        "ptx": str(learner._ptx.state_dict()),
        "iteration": algo.iteration,
    }


@pytest.mark.slow
def test_resume_in_a_new_process(paths: dict[str, str], tmp_path: Path) -> None:
    """G4: the next batch, weights, optimizer, ptx rows and normalisers are those of a run that never stopped."""
    env_fn = ToyEnv(paths["policy"], kl=0.05, normalize="running")
    config = toy_config(paths["policy"], env_fn=env_fn, ptx_coef=0.1, ptx_data=paths["corpus.txt"])
    algo = config.rl_module(dtype="bfloat16").build_algo()
    for _ in range(2):
        algo.train()
    path = algo.save_to_path(tmp_path / "checkpoint")
    expected = digest(algo)
    algo.stop()
    arguments = [sys.executable, "-c", RESUME, paths["policy"], paths["corpus.txt"], str(path), "restore"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=240)
    lines = [line for line in done.stdout.splitlines() if line.startswith("DIGEST")]
    assert lines, done.stderr[-3000:]
    assert json.loads(lines[0].removeprefix("DIGEST")) == json.loads(json.dumps(expected))


def test_microbatches_change_nothing(paths: dict[str, str]) -> None:
    """Denominators are of the whole minibatch, so the cut does not show."""
    ends = []
    for size in (None, 5):
        config = toy_config(paths["policy"], micro_batch_size=size, ptx_coef=0.3, ptx_data=paths["corpus.txt"], lr=1e-3)
        algo = config.build_algo()
        result = algo.train()
        ends.append((weights(module_of(algo)), result["learners"][DEFAULT_MODULE_ID]))
        algo.stop()
    (one, told_one), (two, told_two) = ends
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)
    for name in ("loss/policy", "loss/value", "loss/ptx", "grad_norm"):
        assert told_one[name] == pytest.approx(told_two[name], rel=1e-3, abs=1e-5), name


def test_microbatches_are_laid_out_with_one_copy_to_the_host(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(
        paths["policy"], micro_batch_size=5, minibatch_size=16, ptx_coef=0.3, ptx_data=paths["corpus.txt"]
    )
    algo = config.rl_module(packing="auto").build_algo()
    original, made = Update.update, []

    def watched(self: Update, minibatch: Any) -> Any:
        with count_host_copies() as copies:
            out = original(self, minibatch)
        made.append(list(copies))
        return out

    monkeypatch.setattr(Update, "update", watched)
    algo.train()
    algo.stop()
    assert made and all(copies == ["Tensor.tolist()"] for copies in made)


def test_minibatches_cover_each_row_once(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    algo = toy_config(paths["policy"], minibatch_size=8, num_epochs=3).build_algo()
    seen: list[torch.Tensor] = []
    original = Update.update
    monkeypatch.setattr(Update, "update", lambda self, td: (seen.append(td[batch.RESPONSE]), original(self, td))[1])
    algo.train()
    algo.stop()
    assert len(seen) == 6
    epochs = [torch.cat(seen[i : i + 2]).sort(0).values for i in (0, 2, 4)]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    assert not torch.equal(seen[0], seen[2])


def test_evaluate_is_greedy_and_leaves_training_alone(paths: dict[str, str]) -> None:
    algo = toy_config(paths["policy"]).evaluation(evaluation_interval=1, evaluation_duration=32).build_algo()
    plain = toy_config(paths["policy"]).build_algo()
    runner = algo.eval_env_runner_group.local_env_runner
    assert runner.module is module_of(algo)
    for _ in range(2):
        result, other = algo.train(), plain.train()
        assert reward(result) == reward(other)
    evaluated = result["evaluation"]["env_runners"]
    assert evaluated["num_env_steps_sampled"] == 32 and 0 <= evaluated["reward"] <= 1
    batches = [runner.sample()[0].policy_batches[DEFAULT_MODULE_ID] for _ in range(1)]
    tokens = batches[0]["tokens/response"].view(4, 4, T)
    assert torch.equal(tokens, tokens[:, :1].expand_as(tokens)), "siblings differ, so this was not greedy"
    plain.evaluation_config = algo.evaluation_config
    place = str(plain.env_runner.place())
    plain.evaluate()
    assert str(plain.env_runner.place()) == place
    algo.stop()
    plain.stop()


class ShorterLearner(BanditLearner):
    keywords: ClassVar[dict[str, Any]] = {"length_coef": 0.0}

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> torch.Tensor:
        loss = super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)
        stays = (fwd_out["log_probs"].exp() * batch["learn_mask"]).sum() / batch["denominators"]["tokens"]
        self.add_metrics({"loss/length": config.length_coef * stays})
        return loss + config.length_coef * stays


class WithoutValue(BanditLearner):
    """Reads neither values nor the algorithm's loss."""

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> torch.Tensor:
        mask, tokens = batch["learn_mask"], batch["denominators"]["tokens"]
        loss: torch.Tensor = -(fwd_out["log_probs"] * batch["advantages"] * mask).sum() / tokens
        self.add_metrics({"plain": loss})
        return loss


def test_own_loss_and_keyword(paths: dict[str, str]) -> None:
    """KL, entropy and ptx are added to whatever it returns."""
    config = toy_config(paths["policy"], env_fn=ToyEnv(paths["policy"], kl=0.0), ptx_data=paths["corpus.txt"])
    config.training(learner_class=ShorterLearner, length_coef=0.5, ptx_coef=0.1, entropy_coef=0.01, loss_kl_coef=0.1)
    algo = config.build_algo()
    result = algo.train()
    algo.stop()
    told = result["learners"][DEFAULT_MODULE_ID]
    assert told["loss/length"] > 0
    assert {"loss/policy", "loss/value", "loss/kl", "loss/ptx", "loss/entropy"} <= set(told) & set(result["bandit"])
    with pytest.raises(ValueError, match=r"training\(lenght_coef=…\): no such keyword; did you mean 'length_coef'"):
        toy_config(paths["policy"]).training(learner_class=ShorterLearner, lenght_coef=0.5)


@pytest.mark.parametrize("learners", [0, 2])
def test_a_loss_without_a_value_term(paths: dict[str, str], learners: int) -> None:
    """With a critic whose values nothing reads: DDP would wait for their gradients in the second update."""
    config = toy_config(paths["policy"], 0, learners, minibatch_size=8).training(learner_class=WithoutValue)
    algo = config.build_algo()
    told = [algo.train()["learners"][DEFAULT_MODULE_ID] for _ in range(2)]
    algo.stop()
    assert all(one["grad_norm"] > 0 and "loss/plain" in one and "loss/value" not in one for one in told)


def test_lost_updates_end_the_run(paths: dict[str, str]) -> None:
    """As on the local engine; one that is lost is told, and the weights stay."""
    algo = toy_config(paths["policy"], minibatch_size=None, num_epochs=1).training(learner_class=Lost).build_algo()
    before = weights(module_of(algo))
    assert [algo.train()["bandit"]["skipped_updates"] for _ in range(2)] == [1, 1]
    with pytest.raises(ValueError, match="iteration 3: 3 updates in a row were skipped: .*nothing is learnt any more"):
        algo.train()
    assert_same_bits(before, weights(module_of(algo)))
    algo.stop()


class Lost(BanditLearner):
    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> torch.Tensor:
        return fwd_out["log_probs"].sum() * torch.nan


def test_order_of_minibatches_after_a_restore(paths: dict[str, str], tmp_path: Path) -> None:
    algo = toy_config(paths["policy"]).build_algo()
    algo.train()
    algo.train()
    saved = algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    other = BanditAlgorithm.from_checkpoint(saved)
    assert other.learner_group._learner._steps_done == 2
    other.stop()


def test_algorithm_by_name_class_or_instance(paths: dict[str, str]) -> None:
    config = BanditConfig().training(algo="gspo", clip_high=5e-4, ptx_coef=0.1)
    assert config.algorithm == GSPO(clip_high=5e-4) and config.update_options().ptx_coef == 0.1
    assert BanditConfig().training(algo=GSPO, clip=1e-3).algorithm == GSPO(clip=1e-3)
    assert BanditConfig().training(algo=GSPO(clip=1e-3), clip_high=2e-3).algorithm == GSPO(clip=1e-3, clip_high=2e-3)
    assert BanditPPOConfig().training(lam=0.9).algorithm.lam == 0.9
    early = BanditConfig().training(clip=0.1)  # before the algorithm is named
    assert early.training(algo="grpo").algorithm.clip == 0.1
    assert cloudpickle.loads(cloudpickle.dumps(config)).algorithm == config.algorithm
    assert BanditConfig().training(algo="gspo").get_default_rl_module_spec().model_config["critic"] is None
    assert BanditPPOConfig().get_default_rl_module_spec().model_config["critic"] == "head"
    assert BanditPPOConfig().training(grad_clip=None).update_options().max_grad_norm == 0


@pytest.mark.parametrize("kind", ["tensor", "pair", "function"])
def test_ptx_data(paths: dict[str, str], kind: str) -> None:
    ids = torch.randint(0, 255, (12, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    data: Any = {"tensor": ids, "pair": (ids, mask), "function": lambda device: [(ids[:5], mask[:5])]}[kind]
    algo = toy_config(paths["policy"], ptx_coef=1.0, ptx_data=data, ptx_batch_size=5, lr=1e-2).build_algo()
    history = [algo.train()["learners"][DEFAULT_MODULE_ID]["loss/ptx"] for _ in range(3)]
    algo.stop()
    assert history[-1] < history[0]


def test_unscorable_rows_are_left_out_and_too_many_stop(paths: dict[str, str]) -> None:
    algo = toy_config(paths["policy"], env_fn=Nan(paths["policy"], 0.25)).build_algo()
    result = algo.train()
    assert result["env_runners"]["unscorable"] == 0.25
    assert all(tensor.isfinite().all() for tensor in module_of(algo).state_dict().values())
    algo.stop()
    algo = toy_config(paths["policy"], env_fn=Nan(paths["policy"], 0.75)).build_algo()
    before = weights(module_of(algo))
    says = "75% of the batch has no valid score, more than half; of 16 rows here: 12 not finite"
    with pytest.raises(ValueError, match=says):
        algo.train()
    assert_same_bits(before, weights(module_of(algo)))
    algo.stop()


class Nan(ToyEnv):
    """A reward that is NaN for a share of the rows."""

    def __init__(self, policy: str, share: float) -> None:
        super().__init__(policy)
        self.share = share

    def __call__(self, *args: Any) -> Any:
        env = super().__call__(*args)
        term = env.rewards.terms[0]
        plain, share = term.fn, self.share

        def fn(td: Any) -> torch.Tensor:
            value = plain(td)
            return value.masked_fill(torch.arange(len(value)) < share * len(value), torch.nan)

        term.fn = fn
        return env


def test_a_failed_batch_gives_its_prompts_back(paths: dict[str, str]) -> None:
    algo = toy_config(paths["policy"]).build_algo()
    runner = algo.env_runner
    place = str(runner.place())
    step, runner.env.step = runner.env.step, lambda td: 1 / 0
    with pytest.raises(ZeroDivisionError):
        algo.train()
    assert str(runner.place()) == place
    runner.env.step = step
    algo.train()
    algo.stop()


# --- bad input -----------------------------------------------------------------------------------------------------


def bad(edit: Callable[[BanditConfig, dict[str, str]], Any]) -> Callable[[dict[str, str]], None]:
    def run(paths: dict[str, str]) -> None:
        config = toy_config(paths["policy"])
        edit(config, paths)
        config.build_algo()

    return run


def other_tokenizer(index: int, workers: int, device: torch.device) -> Any:
    from torchbandit.env import BanditEnv
    from torchbandit.prompts import PromptSet

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    prompts = PromptSet.from_texts(["a", "b"], tokenizer, max_length=4)
    return BanditEnv(prompts, lambda td: td["masks", "response"].sum(-1).float(), num_prompts=2)


def no_model(index: int, workers: int, device: torch.device) -> Any:
    raise RuntimeError("the reward model is not here")


class Elsewhere(ToyEnv):
    """An env that is not on the policy's device, as far as it says."""

    def __call__(self, *args: Any) -> Any:
        env = super().__call__(*args)
        env.device = torch.device("meta")
        return env


BAD: dict[str, tuple[Callable[[BanditConfig, dict[str, str]], Any], str]] = {
    "no env_fn": (lambda c, p: setattr(c, "env_fn", None), r"bandit\(env_fn=…\): must be a function.*got none"),
    "env_fn no function": (lambda c, p: c.bandit(env_fn=3), r"env_fn.*got int"),
    "env_fn returns something else": (lambda c, p: c.bandit(env_fn=lambda *a: "env"), "return a BanditEnv, got str"),
    "env_fn raises": (lambda c, p: c.bandit(env_fn=no_model), "no_model.*raised RuntimeError on node .*is not here"),
    "env_fn takes too little": (lambda c, p: c.bandit(env_fn=lambda: None), "raised TypeError"),
    "another device": (
        lambda c, p: c.bandit(env_fn=Elsewhere(p["policy"])),
        r"env_fn=Elsewhere\): must build the env on the device it is given, cpu, where the policy is, got meta",
    ),
    "another tokenizer": (lambda c, p: c.bandit(env_fn=other_tokenizer), "'<one more>' differs"),
    "no pretrained": (lambda c, p: setattr(c, "pretrained", None), r"rl_module\(pretrained=…\).*got none"),
    "live model": (lambda c, p: c.rl_module(pretrained=tiny_lm()), "a live model has to be saved first"),
    "missing folder": (lambda c, p: c.rl_module(pretrained="/no/such/folder"), "/no/such/folder.*built on node"),
    "critic of another kind": (lambda c, p: c.rl_module(critic=3), 'must be "head", a folder or a hub id, got 3'),
    "critic of nobody": (
        lambda c, p: c.rl_module(critic="head").training(algo="grpo"),
        "grpo has no use for one, got 'head'; leave it",
    ),
    "no algorithm": (lambda c, p: setattr(c, "algo", None), "algo: must be ppo, .*got none"),
    "unknown algorithm": (lambda c, p: c.training(algo="gropo"), "algo: must be .*got 'gropo'; did you mean grpo"),
    "algorithm of another kind": (lambda c, p: c.training(algo=3), "algo: 'int' must be a subclass of"),
    "option of another": (lambda c, p: c.training(algo="grpo", gamma=0.9), "gamma: is no option of grpo; ppo has it"),
    "option left behind": (
        lambda c, p: c.training(lam=0.9).training(algo="grpo"),
        "lam: is no option of grpo; ppo has it",
    ),
    "bad option": (lambda c, p: c.training(clip=-1.0), "clip: must be above 0, got -1.0"),
    "rllib's clip": (lambda c, p: c.training(clip_param=0.3), r"training\(clip_param=…\): is clip here"),
    "rllib's lambda": (lambda c, p: c.training(lambda_=0.9), r"training\(lambda_=…\): is lam here"),
    "local epochs": (lambda c, p: c.training(epochs=2), "is num_epochs here"),
    "rllib's shuffle": (lambda c, p: c.training(shuffle_batch_per_epoch=False), "no such keyword"),
    "no epochs": (lambda c, p: c.training(num_epochs=0), "num_epochs=….*at least 1, got 0"),
    "negative norm": (lambda c, p: c.training(grad_clip=-2.0), "grad_clip=….*at least 0, got -2"),
    "RLlib's none": (
        lambda c, p: c.training(ptx_coef=-1),
        r"training\(ptx_coef=…\): must not be -1, which RLlib",
    ),
    "no seed": (lambda c, p: c.debugging(seed=-1), r"debugging\(seed=…\): must not be -1"),
    "no minibatch": (lambda c, p: c.training(minibatch_size=0), "minibatch_size=….*at least 1, got 0"),
    "bad mismatch": (lambda c, p: c.training(mismatch="cap"), r"training\(mismatch=…\): must be truncate, mask or off"),
    "draws without refill": (lambda c, p: c.training(max_draws=9), "is of dynamic sampling; add refill"),
    "refill without groups": (
        lambda c, p: c.bandit(env_fn=ToyEnv(p["policy"], num_prompts=16, group_size=1)).training(refill=True),
        "refill: compares the rewards of a group, so group_size must be at least 2, got 1",
    ),
    "too small a group": (
        lambda c, p: c.bandit(env_fn=ToyEnv(p["policy"], num_prompts=16, group_size=1)).training(algo="rloo"),
        "group_size: must be at least 2 for rloo, got 1",
    ),
    "parted siblings": (lambda c, p: c.training(minibatch_size=2), "in whole groups of 4, got 2"),
    "ptx without data": (lambda c, p: c.training(ptx_coef=0.1), "needs ptx_data, got none"),
    "ptx data of another kind": (lambda c, p: c.training(ptx_coef=0.1, ptx_data=3.5), "ptx_data: must be.*got float"),
    "negative ptx": (lambda c, p: c.training(ptx_coef=-0.5), "ptx_coef.*at least 0, got -0.5"),
    "minibatch above the batch": (lambda c, p: c.training(minibatch_size=17), "minibatch_size: must divide the 16"),
    "minibatch above a given batch": (
        lambda c, p: c.training(minibatch_size=32, train_batch_size_per_learner=16),
        "minibatch_size: must divide the 16 rows of a learner.*got 32",
    ),
    "ragged minibatches": (lambda c, p: c.training(minibatch_size=6), "must divide the 16 rows of a learner"),
    "ragged batch": (
        lambda c, p: c.training(train_batch_size_per_learner=24, minibatch_size=8),
        "must be a multiple of 1 runner.*got 24; use 32",
    ),
    "both states off": (
        lambda c, p: c.env_runners(merge_env_runner_states=False, broadcast_env_runner_states=False),
        "the first weights never reach remote runners",
    ),
    "kl loss": (lambda c, p: c.training(use_kl_loss=True), "is loss_kl_coef here"),
    "top-k": (lambda c, p: c.bandit(sampling=Sampling(max_new_tokens=4, top_k=3)), "temperature above 0 alone"),
    "unknown training": (lambda c, p: c.training(ptx_cof=0.1), r"training\(ptx_cof=…\).*did you mean 'ptx_coef'"),
    "unknown runners": (lambda c, p: c.env_runners(num_env_runner=1), "did you mean 'num_env_runners'"),
    "unknown learners": (lambda c, p: c.learners(num_learner=1), "did you mean 'num_learners'"),
    "unknown reporting": (
        lambda c, p: c.reporting(min_time_per_iteration=1),
        "did you mean 'min_time_s_per_iteration'",
    ),
    "unknown bandit": (lambda c, p: c.bandit(env_fun=1), "did you mean 'env_fn'"),
    "unknown module": (lambda c, p: c.rl_module(pretraind="x"), "did you mean 'pretrained'"),
    "another learner": (lambda c, p: c.training(learner_class=object), "must be a subclass of BanditLearner"),
    "an env": (lambda c, p: c.environment(env="CartPole-v1"), "leave it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(paths: dict[str, str], case: str) -> None:
    edit, says = BAD[case]
    with pytest.raises(ValueError, match=f"(?s){says}"):
        bad(edit)(paths)


def test_more_runners_than_prompts(paths: dict[str, str]) -> None:
    config = toy_config(paths["policy"], runners=NUM_PROMPTS + 1)
    config.validate()
    runner = BanditEnvRunner(config=config, worker_index=1, num_workers=NUM_PROMPTS + 1)
    assert "num_env_runners: must be at most the 24 prompts of the set, got 25" in str(runner.report()["problem"])


def test_gpu_fractions_reach_the_actors(paths: dict[str, str]) -> None:
    """Without a GPU here: what Ray is asked for, and the bundles that tune reserves."""
    config = toy_config(paths["policy"], runners=2, learners=1).env_runners(num_gpus_per_env_runner=0.5)
    config.learners(num_gpus_per_learner=0.25)
    request = BanditAlgorithm.default_resource_request(config)
    assert sorted(bundle.get("GPU", 0) for bundle in request.bundles) == [0, 0.25, 0.5, 0.5]


def test_stochastic_evaluation_may_be_asked_for(paths: dict[str, str]) -> None:
    config = toy_config(paths["policy"]).evaluation(evaluation_config=BanditConfig.overrides(explore=True))
    assert config.get_evaluation_config_object().explore is True
    assert toy_config(paths["policy"]).get_evaluation_config_object().explore is False
