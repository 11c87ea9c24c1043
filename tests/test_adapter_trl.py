"""Reward terms in TRL's hands: the same rewards as the env's, and one step of GRPOTrainer."""

from __future__ import annotations

import host_functions
import pytest
import torch
from fakes import byte_tokenizer, tiny_lm, tiny_reward_model
from torch.testing import assert_close

from torchbandit.adapters.trl import TRLReward
from torchbandit.env import BanditEnv
from torchbandit.generation import Sampling
from torchbandit.policy import CausalLMPolicy
from torchbandit.prompts import PromptSet
from torchbandit.rewards import HostReward, KLPenalty, RewardModel, RewardTerm

TEXTS = [f"prompt number {i}" + "!" * (i % 5) for i in range(8)]


def length(td):
    return td["masks", "response"].sum(-1).float()


def scored(reward, columns=None):
    """A stepped batch, and what TRL would hand over for it."""
    tokenizer = byte_tokenizer()
    prompts = PromptSet.from_texts(TEXTS, tokenizer, max_length=64, columns=columns)
    env = BanditEnv(prompts, reward, num_prompts=4, group_size=2)
    td = env.step(CausalLMPolicy(tiny_lm(), tokenizer, sampling=Sampling(max_new_tokens=8)).generate(env.reset()))
    rows = td["prompt_id"].tolist()
    ids = [row[real].tolist() for row, real in zip(td["tokens", "response"], td["masks", "response"], strict=True)]
    given = {name: [column[i] for i in rows] for name, column in (columns or {}).items()}
    texts = tokenizer.batch_decode(ids)
    return td["next", "reward"].squeeze(-1), dict(
        prompts=[TEXTS[i] for i in rows], completions=texts, completion_ids=ids, trainer_state=object(), **given
    )


def test_rewards_are_the_env_s():
    terms = [RewardModel(tiny_reward_model()), RewardTerm(length, weight=0.1, missing_eos_penalty=2.0)]
    expected, given = scored(terms)
    got = TRLReward(terms, byte_tokenizer())(**given)
    assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-4)


def test_columns_and_unscorable_rows():
    term = lambda td: torch.where(td["columns", "answer"] == 3, torch.nan, td["columns", "answer"].float())
    expected, given = scored(term, {"answer": list(range(8)), "word": list("abcdefgh")})
    got = TRLReward(term, byte_tokenizer())(**given)
    assert got == [None if x != x else x for x in expected.tolist()]


def test_host_reward_reads_its_strings():
    term = HostReward(host_functions.count, byte_tokenizer(), num_workers=1)
    try:
        expected, given = scored(term)
        assert TRLReward(term, byte_tokenizer())(**given) == expected.tolist()
    finally:
        term.close()


def test_a_kl_penalty_is_trl_s_own():
    with pytest.raises(ValueError, match="set its beta"):
        TRLReward([length, KLPenalty(tiny_lm())], byte_tokenizer())


@pytest.mark.slow
def test_one_step_of_grpo(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokenizer = byte_tokenizer()
    tiny_lm().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []

    def recorded(td):
        seen.append(td["columns", "answer"].tolist())
        return length(td)

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=6, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(tmp_path / "model"), reward_funcs=TRLReward(recorded, tokenizer, name="tokens"), args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS, "answer": list(range(8))}),
    )  # fmt: skip
    trainer.train()
    line = next(line for line in trainer.state.log_history if "completions/mean_length" in line)
    assert line["rewards/tokens/mean"] == pytest.approx(line["completions/mean_length"])
    assert len(seen) == 1 and len(seen[0]) == 4
