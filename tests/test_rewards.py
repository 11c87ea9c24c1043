"""Reward terms and their sum: keys, order of steps, unscorable rows, errors, state."""

from __future__ import annotations

import functools

import pytest
import torch
from fakes import byte_tokenizer, fake_batch
from tensordict import TensorDict
from torch.testing import assert_close

from torchbandit.rewards import LengthPenalty, RewardPipeline, RewardTerm

NAN, INF = float("nan"), float("inf")
TOKENIZER = byte_tokenizer()


def given(values):
    """A term that returns `values`, whatever the batch."""
    fixed = torch.as_tensor(values, dtype=torch.float32)
    return lambda td: fixed.clone()


def row_values(B=8, seed=0):
    return torch.randn(B, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def real_lengths(td):
    return td["masks", "response"].sum(-1)


def test_sum_of_weighted_terms():
    td, x = fake_batch(), row_values()
    terms = [RewardTerm(given(x), "a", weight=2.0), RewardTerm(given(x), "b", weight=-0.5, clip=(0.0, 5.0))]
    out = RewardPipeline(terms)(td)
    assert_close(out["reward"], (2 * x - 0.5 * x.clamp(0, 5)).unsqueeze(-1))
    assert_close(out["reward_terms", "a"], x)
    assert_close(out["reward_terms", "b"], x)  # raw: before clip and weight
    assert out["reward"].shape == (8, 1) and out["reward"].dtype == torch.float32
    assert out["unscorable"].dtype == torch.bool and not out["unscorable"].any()
    assert "token_reward" not in out.keys()
    assert not {"done", "terminated", "truncated"} & set(out.keys())


def test_bare_callables_are_named_after_the_function():
    def brevity(td):
        return -real_lengths(td).float()

    assert RewardPipeline(brevity).terms[0].name == "brevity"
    assert RewardPipeline(lambda td: brevity(td)).terms[0].name == "reward"
    assert RewardPipeline(functools.partial(brevity)).terms[0].name == "brevity"
    td = fake_batch()
    assert_close(RewardPipeline(brevity)(td)["reward"].flatten(), -real_lengths(td).float())


def test_sequence_terms_land_on_the_last_response_token():
    td, x = fake_batch(empty_rows=1), row_values()
    per_token = torch.rand(8, 7)
    out = RewardPipeline([RewardTerm(given(x), "row"), RewardTerm(given(per_token), "token", weight=-1.0)])(td)
    mask = td["masks", "response"]
    expected = torch.zeros(8, 7)
    for row in range(7):
        length = int(mask[row].sum())
        expected[row, :length] = -per_token[row, :length]
        expected[row, length - 1] += x[row]
    assert_close(out["token_reward"], expected)
    assert_close(out["token_reward"].sum(-1)[:7], out["reward"].flatten()[:7])
    assert_close(out["reward_terms", "token"], (per_token * mask).sum(-1))
    assert out["unscorable"].tolist() == [False] * 7 + [True]


def test_order_is_penalty_normalise_clip_weight():
    td, x = fake_batch(), row_values()
    td["finished"] = torch.tensor([True, False] * 4)
    term = RewardTerm(given(x), "a", weight=3.0, clip=1.0, normalize="batch", missing_eos_penalty=4.0)
    out = RewardPipeline(term)(td)
    paid = (x - 4.0 * ~td["finished"]).double()
    expected = 3.0 * ((paid - paid.mean()) / paid.std(correction=0)).clamp(-1, 1)
    assert_close(out["reward"].flatten(), expected.float())
    assert_close(out["reward_terms", "a"], x)


def test_trap_15_missing_eos_penalty():
    """Huang et al. 2024: a response that was cut off is worse than any that stopped."""
    td, x = fake_batch(num_prompts=8), row_values(16)
    stopped = (td["tokens", "response"] == 258).any(-1)
    assert 0 < stopped.sum() < 16
    expected = x - 10.0 * ~stopped
    term = RewardTerm(given(x), missing_eos_penalty=10.0)
    assert_close(RewardPipeline(term, tokenizer=TOKENIZER)(td)["reward"].flatten(), expected)  # told by eos
    td["finished"] = ~stopped  # other stop ids: the policy's word counts, not eos
    out = RewardPipeline(term, tokenizer=TOKENIZER)(td)
    assert_close(out["reward"].flatten(), x - 10.0 * stopped)
    tokens = RewardPipeline([term, RewardTerm(given(torch.zeros(16, 7)), "t")], tokenizer=TOKENIZER)(td)["token_reward"]
    assert_close(tokens.sum(-1), out["reward"].flatten())


def test_missing_eos_penalty_of_a_per_token_term_is_paid_once():
    td = fake_batch()
    td["finished"] = torch.tensor([True, False] * 4)
    out = RewardPipeline(RewardTerm(given(torch.ones(8, 7)), missing_eos_penalty=5.0))(td)
    assert_close(out["reward"].flatten(), real_lengths(td) - 5.0 * ~td["finished"])
    last = td["masks", "response"].long().cumsum(-1).argmax(-1)
    assert out["token_reward"][1, last[1]] == -4.0


def test_missing_eos_penalty_needs_to_know_what_finished_is():
    with pytest.raises(ValueError, match=r'"finished".*has_stopped'):
        RewardPipeline(RewardTerm(given(row_values()), missing_eos_penalty=1.0))(fake_batch())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("normalize", [None, "batch", "running"])
def test_trap_14_rows_that_cannot_be_scored_are_nan_and_left_out(bad, normalize):
    """Not 0, and not in the mean of the others."""
    td, x = fake_batch(), row_values()
    x[3] = bad
    other = torch.rand(8, 7)
    terms = [RewardTerm(given(x), "a", normalize=normalize, clip=100.0), RewardTerm(given(other), "b")]
    out = RewardPipeline(terms)(td)
    keep = torch.arange(8) != 3
    assert out["unscorable"].tolist() == (~keep).tolist()
    assert out["reward"][3].isnan().all()
    mask = td["masks", "response"]
    assert out["token_reward"][3][mask[3]].isnan().all()
    assert (out["token_reward"][3][~mask[3]] == 0).all()
    honest = x[keep]
    if normalize is not None:
        honest = (honest - honest.mean()) / honest.std(correction=0)
    assert_close(out["reward"].flatten()[keep], honest + (other * mask).sum(-1)[keep], rtol=1e-4, atol=1e-4)


def test_values_outside_the_mask_do_not_count():
    """Neither NaN beside a response, nor ids after its stop."""
    td = fake_batch()
    mask = td["masks", "response"]
    x = torch.rand(8, 7)
    expected = RewardPipeline(given(x), tokenizer=TOKENIZER)(td)
    junk = td.clone()
    junk["tokens", "response"][~mask] = -100
    junk["tokens", "prompt"][~td["masks", "prompt"]] = 10**9
    out = RewardPipeline(given(x.masked_fill(~mask, NAN)), tokenizer=TOKENIZER)(junk)
    assert_close(out["token_reward"], expected["token_reward"])
    assert not out["unscorable"].any()


def test_unscorable_masks_and_ids():
    td = fake_batch()
    td["masks", "response"][:] = True
    td["masks", "response"][0, 2] = False  # a hole
    td["masks", "response"][1] = False  # empty
    td["masks", "response"][2, 0] = False  # does not begin at once
    td["masks", "prompt"][3] = torch.arange(9) < 4  # right-padded
    td["tokens", "response"][4, 1] = 259  # beyond the vocabulary of 259
    td["tokens", "response"][5, 1] = -1
    td["tokens", "prompt"][6, -1] = 10**12
    before = td.clone()
    seen = {}

    def look(td):
        seen.update(prompt=td["tokens", "prompt"], response=td["tokens", "response"])
        return torch.zeros(8)

    out = RewardPipeline(look, tokenizer=TOKENIZER)(td)
    assert out["unscorable"].tolist() == [True] * 7 + [False]
    assert out["reward"].isnan().flatten().tolist() == [True] * 7 + [False]
    for tokens in seen.values():  # a model's embedding would read past its end
        assert tokens.min() >= 0 and tokens.max() < 259
    assert (td == before).all()


def test_input_is_left_as_it_was_and_terms_see_the_step():
    td = fake_batch()
    before, keys = td.clone(), set(td.keys(True))

    def look(td):
        assert {("tokens", "response"), ("masks", "response"), "finished", "prompt_id"} <= set(td.keys(True))
        return torch.zeros(8)

    RewardPipeline(look, tokenizer=TOKENIZER)(td)
    assert set(td.keys(True)) == keys and (td == before).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(8, 1), r'reward term "a": must return a float tensor \[8\] or \[8, 7\] on cpu, .*squeeze'),
        (torch.zeros(7), r'reward term "a".*got float32 \[7\] on cpu'),
        (torch.zeros(()), r'reward term "a".*got float32 \[\] on cpu'),
        (torch.zeros(8, 6), r'reward term "a".*got float32 \[8, 6\]'),
        (torch.zeros(8, dtype=torch.int64), r'reward term "a".*got int64 \[8\].*\.float\(\)'),
        (torch.zeros(8, device="meta"), r'reward term "a".*on meta; move it'),
        ([0.0] * 8, r'reward term "a".*got list; .*HostReward'),
    ],
)
def test_results_of_the_wrong_kind_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        RewardPipeline(RewardTerm(lambda td: value, "a"))(fake_batch())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("tokens", "response"), torch.zeros(8, 7)),
        (("masks", "response"), torch.ones(8, 7)),
        (("masks", "response"), torch.ones(8, 6, dtype=torch.bool)),
        (("masks", "prompt"), torch.ones(8, 9, dtype=torch.int64)),
        ("finished", torch.ones(8, 1, dtype=torch.bool)),
    ],
)
def test_keys_of_the_wrong_kind_are_refused(key, value):
    td = fake_batch()
    td[key] = value
    name = f'"{key}"' if isinstance(key, str) else f'\\("{key[0]}","{key[1]}"\\)'
    with pytest.raises(ValueError, match=f"{name}: must be"):
        RewardPipeline(given(row_values()))(td)


def test_options_without_meaning_are_refused():
    fn = given(row_values())
    for options, message in (
        ({"clip": -1.0}, "clip"),
        ({"clip": (2.0, 1.0)}, "clip"),
        ({"normalize": "whiten"}, "normalize"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
        ({"name": ""}, "name"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardTerm(fn, **options)
    with pytest.raises(ValueError, match="name of its own"):
        RewardPipeline([lambda td: td, lambda td: td])
    with pytest.raises(ValueError, match="empty list"):
        RewardPipeline([])
    with pytest.raises(ValueError, match="callable"):
        RewardPipeline("reward_model/")


def test_length_penalty():
    td = fake_batch()
    out = RewardPipeline(LengthPenalty(0.5, start=3))(td)
    assert_close(out["reward_terms", "length"], (real_lengths(td) - 3).clamp(min=0).float())
    assert_close(out["reward"].flatten(), -0.5 * (real_lengths(td) - 3).clamp(min=0))


def test_running_normaliser_is_that_of_all_rows_seen():
    """Three batches of differing size and a huge mean, against float64 over everything at once."""
    td = fake_batch()
    batches = [row_values(8, seed) * (seed + 1) + 1e6 for seed in range(3)]
    batches[1][2] = NAN
    current = []
    pipeline = RewardPipeline(RewardTerm(lambda td: current[0], "a", normalize="running"))
    seen = []
    for x in batches:
        current[:] = [x]
        out = pipeline(td)
        good = ~x.isnan()
        seen.append(x[good].double())
        past = torch.cat(seen)
        expected = (x.double() - past.mean()) / past.std(correction=0)
        assert_close(out["reward"].flatten()[good], expected[good].float())
    state = pipeline.state_dict()["a"]
    assert state["count"] == 23 and state["mean"].dtype == torch.float64
    assert_close(state["mean"], torch.cat(seen).mean())


@pytest.mark.parametrize("normalize", ["batch", "running"])
def test_a_batch_without_a_scorable_row_changes_nothing(normalize):
    td, current = fake_batch(), [row_values()]
    pipeline = RewardPipeline(RewardTerm(lambda td: current[0], "a", normalize=normalize))
    pipeline(td)
    before = pipeline.state_dict()
    current[0] = torch.full((8,), NAN)
    assert pipeline(td)["unscorable"].all()
    assert_close(pipeline.state_dict(), before)


@pytest.mark.parametrize("normalize", ["batch", "running"])
def test_per_token_terms_are_normalised_over_real_tokens(normalize):
    td, x = fake_batch(), torch.rand(8, 7) * 4 + 2
    x[5, 0] = NAN
    out = RewardPipeline(RewardTerm(given(x), normalize=normalize))(td)
    counted = td["masks", "response"] & (torch.arange(8) != 5)[:, None]
    expected = (x - x[counted].mean()) / x[counted].std(correction=0)
    assert_close(out["token_reward"][counted], expected[counted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", ["batch", "running"])
def test_two_ranks_hold_the_statistics_of_one_process_with_both_batches(normalize):
    """`reduce` stands in for all_reduce: the ranks run in lockstep as threads."""
    import threading

    whole, x = fake_batch(num_prompts=4), row_values()
    x[6] = NAN

    def build(values):
        return RewardPipeline(RewardTerm(given(values), "a", normalize=normalize))

    single = build(x)
    expected = [single(whole)["reward"].flatten() for _ in range(2)]
    slots, barrier = [None, None], threading.Barrier(2)

    def reduce_of(rank):
        def reduce(value):
            slots[rank] = value
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        return reduce

    results, states = [None, None], [None, None]

    def run(rank):
        half = slice(4 * rank, 4 * rank + 4)
        pipeline = build(x[half])
        pipeline.shard(reduce_of(rank))
        results[rank] = [pipeline(whole[half])["reward"].flatten() for _ in range(2)]
        states[rank] = pipeline.state_dict()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    for step in range(2):
        assert_close(torch.cat([results[0][step], results[1][step]]), expected[step], equal_nan=True)
    assert_close(states[0], states[1])
    assert_close(states[0], single.state_dict())


def test_state_goes_on_where_it_stopped():
    td, current = fake_batch(), [None]

    def build():
        return RewardPipeline([RewardTerm(lambda td: current[0], "a", normalize="running"), LengthPenalty(0.1)])

    straight, first, second = build(), build(), build()
    for seed in range(4):
        current[0] = row_values(8, seed)
        if seed == 2:
            second.load_state_dict(first.state_dict())
        expected = straight(td)["reward"]
        resumed = (first if seed < 2 else second)(td)["reward"]
        assert torch.equal(expected, resumed)
    assert not torch.equal(second.state_dict()["a"]["mean"], first.state_dict()["a"]["mean"])


def test_state_of_other_terms_is_refused():
    a = RewardPipeline(RewardTerm(given(row_values()), "a", normalize="running"))
    b = RewardPipeline(RewardTerm(given(row_values()), "b"))
    plain = RewardPipeline(RewardTerm(given(row_values()), "a"))
    with pytest.raises(ValueError, match=r"unknown: \['a'\], missing: \['b'\]"):
        b.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match=r'term "a".*normalize'):
        plain.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match=r'term "a".*normalize'):
        a.load_state_dict(plain.state_dict())


def test_a_term_may_serve_two_pipelines():
    """Training and evaluation share a term; their statistics stay apart."""
    term = RewardTerm(given(row_values()), "a", normalize="running")
    train, evaluation = RewardPipeline(term), RewardPipeline(term)
    train(fake_batch())
    assert evaluation.state_dict()["a"]["count"] == 0


def test_rows_are_independent():
    """G2 for the sum: permuting rows permutes rewards."""
    td, x = fake_batch(empty_rows=1), row_values()
    td["x"] = x
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    token = RewardTerm(lambda td: td["x"][:, None] * 0.1 + td["masks", "response"].float(), "token")
    pipeline = RewardPipeline([RewardTerm(lambda td: td["x"], "row"), token])
    straight, permuted = pipeline(td), pipeline(td[order])
    assert isinstance(permuted, TensorDict)
    for key in ("reward", "token_reward", "unscorable"):
        assert_close(permuted[key], straight[key][order], equal_nan=True)
