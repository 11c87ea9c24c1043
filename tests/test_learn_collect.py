"""Batches to learn from: refill, on one rank and on two; the greedy responses of ReMax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from collect_ranks import TEACHES, G, make_env, refilled
from fakes import byte_tokenizer, tiny_lm
from torch.testing import assert_close

from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.learn import DAPO, GRPO, RLOO, ReMax
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import KLPenalty, RewardTerm
from torchbandit.testing.host_copy import count_host_copies
from torchbandit.train.loop import BanditTrainer
from torchbandit.train.options import LoopOptions

HERE = Path(__file__).parent


def groups(td):
    return td["group_id"][::G].tolist()


def refill_metrics(metrics):
    return {name.removeprefix("refill/"): value.item() for name, value in metrics.items() if name.startswith("refill/")}


def test_constant_groups_are_replaced_and_the_surplus_dropped():
    """Draws of 4: 0 1 2 3 | 4 5 6 7 | 8 9 10 11, of which 0, 2, 5, 6, 7 are of equal rewards."""
    td, metrics = refilled(make_env({0, 2, 5, 6, 7}, 4))
    assert groups(td) == [1, 3, 4, 8]
    assert td["learn_mask"].all() and td["tokens", "response"][:, 0].tolist() == [0, 1] * 4
    assert refill_metrics(metrics) == {"draws": 3, "groups_drawn": 12, "groups_kept": 4, "groups_thrown_away": 8}
    assert metrics["constant_groups"] == pytest.approx(5 / 12)  # of all that was drawn


def test_a_batch_that_cannot_be_filled_keeps_constant_groups_masked():
    td, metrics = refilled(make_env(set(range(2, 99)), 4), max_draws=3)
    assert groups(td) == [0, 1, 2, 3]
    assert td["learn_mask"].any(-1)[::G].tolist() == [True, True, False, False]
    assert refill_metrics(metrics) == {"draws": 3, "groups_drawn": 12, "groups_kept": 2, "groups_thrown_away": 10}


def test_without_refill_there_is_one_draw_and_nothing_is_masked():
    td, metrics = refilled(make_env({0, 2}, 4), refill=False)
    assert groups(td) == [0, 1, 2, 3] and "learn_mask" not in td.keys() and not refill_metrics(metrics)


def test_refill_keeps_to_the_mask_of_the_algorithm_s_own_collect():
    class SkipsFirst(GRPO):
        def collect(self, draw):
            td = draw()
            td["learn_mask"] = td["masks", "response"] & (torch.arange(2) > 0)
            return td

    for constant in ((), {0, 2}):
        td, _ = refilled(make_env(constant, 4), algorithm=SkipsFirst())
        assert td["learn_mask"].tolist() == [[False, True]] * 8


def test_one_copy_to_the_host_a_draw_and_none_without_refill():
    for constant, options, copies in (
        ({0, 2}, dict(refill=False), 0),
        ((), {}, 1),
        ({0, 2}, {}, 2),
        (set(range(99)), dict(max_draws=4), 3),  # after the last draw nothing is left to decide
    ):
        env = make_env(constant, 4)
        refilled(env)  # what is read once
        env = make_env(constant, 4)
        with count_host_copies() as made:
            refilled(env, **options)
        assert len(made) == copies, made


def test_two_ranks_decide_together_and_do_what_one_does(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(HERE / "collect_ranks.py")]
    runs = [
        subprocess.Popen([*script, str(rank), "2", str(tmp_path / "meet"), str(tmp_path / "out")], env=env)
        for rank in range(2)
    ]
    assert [run.wait(200) for run in runs] == [0, 0]
    ranks = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    for name, constant in TEACHES.items():
        a, b = (rank[name] for rank in ranks)
        assert a["metrics"] == pytest.approx(b["metrics"], nan_ok=True), name
        td, metrics = refilled(make_env(constant, 8))
        if name == "one rank lacks":  # rank 0 of 2 has draws 0 2 4 6, and lacks two; one process of 8 has all in two
            assert a["groups"] == [4, 6, 10, 12] and b["groups"] == [1, 3, 5, 7]
            assert a["metrics"]["refill/draws"] == 2 and a["metrics"]["refill/groups_kept"] == 8
            continue
        assert sorted(a["groups"] + b["groups"]) == sorted(groups(td)), name
        assert sorted(a["learned"] + b["learned"]) == sorted(td["learn_mask"].any(-1)[::G].tolist())
        assert a["metrics"] == pytest.approx({key: value.item() for key, value in metrics.items()}, rel=1e-5), name


# --- with a model ----------------------------------------------------------------------------------------------------


def make_trainer(algorithm, reward, seed=0, generate=None, **options):
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts([f"prompt {i}" for i in range(16)], tokenizer, max_length=16)
    env = BanditEnv(prompts, reward, num_prompts=4, group_size=2)
    policy = CausalLMPolicy(tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=6))
    options = LoopOptions(lr=1e-3, seed=seed, **options)
    return BanditTrainer(env, policy, algorithm, options, generate=generate)


def odd_ids(td):
    """0 or 1: many groups are constant."""
    return (td["tokens", "response"][:, 0] % 2).float()


def mean_id(td):
    mask = td["masks", "response"]
    return ((td["tokens", "response"] * mask).sum(-1) / mask.sum(-1).clamp(min=1) / 259).float()


def timeless(line):
    return {key: value for key, value in line.items() if not key.startswith(("time/", "samples_per_s"))}


def test_refill_resumes_exactly():
    whole = make_trainer(DAPO(), odd_ids, refill=True)
    lines = [timeless(whole.step()) for _ in range(4)]
    assert any(line["refill/draws"] > 1 for line in lines)
    first = make_trainer(DAPO(), odd_ids, refill=True)
    for _ in range(2):
        first.step()
    again = make_trainer(DAPO(), odd_ids, refill=True)
    again.policy.load_state_dict(first.policy.state_dict())
    again.load_state_dict(first.state_dict())
    assert [timeless(again.step()) for _ in range(2)] == lines[2:]


def remax_terms():
    return [RewardTerm(mean_id, normalize="running"), KLPenalty(tiny_lm(seed=3), coef=0.1, target=0.5, horizon=50)]


def test_remax_s_greedy_rows_leave_no_trace():
    """What else is drawn, scored and counted is as without them; no row of theirs is in the batch."""
    plain, remax = make_trainer(RLOO(), remax_terms()), make_trainer(ReMax(), remax_terms())
    batches = {plain: [], remax: []}
    for trainer, seen in batches.items():
        trainer.update.prepare = lambda td, seen=seen: (seen.append(td), {})
        trainer.learn = lambda targets: {"skipped_in_a_row_max": torch.zeros(())}
        for _ in range(3):
            trainer.step()
    for one, other in zip(batches[plain], batches[remax], strict=True):
        assert other.keys() - one.keys() == {"baseline_reward"} and len(one) == len(other) == 8
        assert_close(other["baseline_reward"][::2], other["baseline_reward"][1::2])
        assert all(torch.equal(one[key], other[key]) for key in (("tokens", "response"), ("next", "reward")))
    states = [trainer.env.state_dict() for trainer in batches]
    assert str(states[0]) == str(states[1]) and states[0]["rewards"]
    assert torch.equal(plain.policy.generator.get_state(), remax.policy.generator.get_state())
    assert plain.env.rewards.kl_coef == remax.env.rewards.kl_coef != 0.1
    assert plain.env.packing_metrics == remax.env.packing_metrics != {}


def test_remax_s_baseline_is_the_greedy_response_s_reward():
    trainer = make_trainer(ReMax(), mean_id)
    seen = []
    trainer.update.prepare = lambda td: (seen.append(td), {})
    trainer.learn = lambda targets: {"skipped_in_a_row_max": torch.zeros(())}
    trainer.step()
    (td,) = seen
    greedy = trainer.policy.generate(trainer.env.gather(td["prompt_id"], td["group_id"]), greedy=True, group_size=1)
    assert_close(td["baseline_reward"], mean_id(greedy))
    advantages = ReMax().targets(td, group_size=2, reduce=None)["advantages"]
    assert_close(advantages, td["next", "reward"].squeeze(-1) - mean_id(greedy))


def test_remax_refuses_a_term_that_is_normalised_over_the_batch_by_name():
    trainer = make_trainer(ReMax(), [RewardTerm(mean_id, normalize="batch")])
    with pytest.raises(ValueError, match=r'reward term "mean_id": is normalised over a batch.*use normalize="running"'):
        trainer.step()


def test_rows_whose_greedy_response_has_no_score_are_left_out():
    calls = []

    def reward(td):
        calls.append(td)
        return mean_id(td) if len(calls) == 1 else torch.where(td["group_id"] < 2, torch.nan, mean_id(td))

    trainer = make_trainer(ReMax(), reward)
    seen = []
    trainer.update.prepare = lambda td: (seen.append(td), {})
    trainer.learn = lambda targets: {"skipped_in_a_row_max": torch.zeros(())}
    trainer.step()
    targets = ReMax().targets(seen[0], group_size=2, reduce=None)
    assert targets["learn_mask"].any(-1).tolist() == [False] * 4 + [True] * 4 and len(calls) == 2
    assert targets["advantages"].isfinite().all() and (targets["advantages"][:4] == 0).all()
