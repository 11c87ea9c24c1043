"""Every layout of scoring equals one row at a time (G3), rows are independent (G2), and the traps."""

from __future__ import annotations

import naive
import pytest
import torch
from fakes import ARCHS, byte_tokenizer, fake_batch, tiny_lm, tiny_reward_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchbandit.responses import stop_mask
from torchbandit.scoring import (
    Plan,
    Rows,
    corpus_loss,
    heads,
    log_probs,
    make_plan,
    make_plans,
    sequence_scores,
    token_scores,
    token_values,
)
from torchbandit.testing.host_copy import count_host_copies, no_host_copy

TOL = {"atol": 2e-5, "rtol": 1e-4}
LAYOUTS = ("padded", "sorted", "packed", "shared")


def layout(kind: str, args: naive.Args, group_size: int = 2, token_budget: int = 60) -> Plan:
    """A plan that takes the named route, over several packs."""
    plan = make_plan(
        args[1], args[3], group_size=group_size if kind == "shared" else 1, packing=kind != "padded",
        token_budget=token_budget, share_prompts=kind == "shared",
    )  # fmt: skip
    if kind == "sorted":
        # What a model that cannot pack gets.
        plan._packs["packed"] = plan.padded()
    return plan


def right_padded(args: naive.Args) -> naive.Args:
    """The same batch, its prompts padded on the other side."""
    order = torch.argsort((~args[1]).byte(), dim=1, stable=True)
    return args[0].gather(1, order), args[1].gather(1, order), args[2], args[3]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_log_probs_and_gradients_equal_naive(arch: str, kind: str) -> None:
    model, args = tiny_lm(arch), naive.tensors(fake_batch(empty_rows=1))
    heat = torch.linspace(0.5, 1.5, 8)
    weight = torch.randn(args[3].shape, generator=torch.Generator().manual_seed(3))
    want, want_entropy = naive.log_probs(model, args, heat)
    ((want + 0.3 * want_entropy) * weight).sum().backward()
    want_grads = naive.gradients(model)
    got = token_scores(model, *args, temperature=heat, plan=layout(kind, args), entropy=True)
    assert got.entropy is not None and got.log_probs.dtype == torch.float32
    ((got.log_probs + 0.3 * got.entropy) * weight).sum().backward()
    grads = naive.gradients(model)
    torch.testing.assert_close(got.log_probs, want, **TOL)
    torch.testing.assert_close(got.entropy, want_entropy, **TOL)
    assert grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_scores_and_values_equal_naive(arch: str, kind: str) -> None:
    model, args = tiny_reward_model(arch), naive.tensors(fake_batch(empty_rows=2))
    plan = layout(kind, args)
    want = naive.scores(model, args)
    assert want.isnan().sum() == 2
    torch.testing.assert_close(sequence_scores(model, *args, plan=plan), want, equal_nan=True, **TOL)
    torch.testing.assert_close(token_values(model, *args, plan=plan), naive.values(model, args), **TOL)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_value_head_shares_the_forward_pass(kind: str) -> None:
    model, args = tiny_lm(), naive.tensors(fake_batch())
    head = nn.Linear(32, 1)
    got = token_scores(model, *args, plan=layout(kind, args), value_head=head)
    assert got.values is not None and got.entropy is None
    model.score = head
    torch.testing.assert_close(got.values, naive.values(model, args), **TOL)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_are_independent(kind: str) -> None:
    """G2: row order, padding width, junk outside the masks and splitting the batch change nothing."""
    model, args = tiny_lm("gpt2"), naive.tensors(fake_batch())
    want = log_probs(model, *args, plan=layout(kind, args))
    pairs = torch.tensor([3, 0, 2, 1])
    order = (pairs[:, None] * 2 + torch.arange(2)).flatten()
    moved = tuple(x[order] for x in args)
    torch.testing.assert_close(log_probs(model, *moved, plan=layout(kind, moved)), want[order], **TOL)
    junk = torch.full((8, 3), -7)
    wide = (
        torch.cat((junk, args[0].masked_fill(~args[1], 10**9)), 1), torch.cat((junk > 0, args[1]), 1),
        torch.cat((args[2].masked_fill(~args[3], -1), junk), 1), torch.cat((args[3], junk > 0), 1),
    )  # fmt: skip
    torch.testing.assert_close(log_probs(model, *wide, plan=layout(kind, wide))[:, :-3], want, **TOL)
    halves = [tuple(x[i : i + 4] for x in args) for i in (0, 4)]
    parts = torch.cat([log_probs(model, *half, plan=layout(kind, half)) for half in halves])
    torch.testing.assert_close(parts, want, **TOL)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_corpus_loss_is_cross_entropy(arch: str) -> None:
    model = tiny_lm(arch)
    ids = torch.randint(0, 259, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12) < torch.tensor([[12], [5], [1]])
    total, count = corpus_loss(model, ids, mask)
    want = sum(
        nn.functional.cross_entropy(model(row[m][None]).logits[0, :-1], row[m][1:], reduction="sum")
        for row, m in zip(ids[:2], mask[:2], strict=True)
    )
    torch.testing.assert_close(total, want)
    assert count == 15
    total.backward()


def test_the_head_never_sees_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_BYTES", 16 * 259 * 4)
    model, args = tiny_lm(), naive.tensors(fake_batch(num_prompts=8, group_size=4))
    log_probs(model, *args)  # finds the model's route, which runs the head on a few tokens of its own
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    got = log_probs(model, *args)
    total = int(args[3].sum())
    assert sum(seen) == total and max(seen) <= 16
    want, _ = naive.log_probs(tiny_lm(), args)
    torch.testing.assert_close(got, want, **TOL)
    got.sum().backward()
    assert sum(seen) == 2 * total, "backward recomputes each chunk once"


def test_bad_tensors_are_named() -> None:
    model, args = tiny_lm(), naive.tensors(fake_batch())
    with pytest.raises(ValueError, match="response_ids, response_mask: must be int64 and bool"):
        log_probs(model, args[0], args[1], args[2], args[3].float())
    with pytest.raises(ValueError, match="plan: must be of these masks"):
        log_probs(model, *args, plan=make_plan(args[1][:2], args[3][:2]))
    with pytest.raises(ValueError, match="group_size: must be a positive divisor"):
        make_plan(args[1], args[3], group_size=3)
    with pytest.raises(ValueError, match="LM head"):
        log_probs(tiny_reward_model(), *args)
    with pytest.raises(ValueError, match="packing"):
        make_plan(args[1], args[3], packing="yes")


def test_plans_of_several_batches_cost_one_copy_and_are_those_of_each() -> None:
    batches = [fake_batch(3, 2, seed=1), fake_batch(1, 4, 5, 3, seed=2), fake_batch()[:0], fake_batch(2, 2, seed=3)]
    batches[3]["group_id"][1] = 9  # no sibling
    rows = [
        Rows(*(naive.tensors(td)[i] for i in (1, 3)), g, td["group_id"])
        for td, g in zip(batches, (2, 4, 1, 2), strict=True)
    ]
    with count_host_copies() as copies:
        plans = make_plans(rows, share_prompts=True)
    assert copies == ["Tensor.tolist()"]
    assert [plan.share_prompts for plan in plans] == [True, True, False, False]
    model = tiny_lm()
    for td, plan in zip(batches, plans, strict=True):
        args = naive.tensors(td)
        want = make_plan(args[1], args[3], group_size=plan.group_size, share_prompts=True)
        assert (plan.table.prompts, plan.table.replies) == (want.table.prompts, want.table.replies)
        want_logps = naive.log_probs(model, args)[0] if len(td) else torch.zeros(0, 7)
        torch.testing.assert_close(log_probs(model, *args, plan=plan), want_logps, **TOL)
    with no_host_copy():
        assert len(make_plans(rows, packing=False)) == 4


def test_no_rows_have_no_scores() -> None:
    args = naive.tensors(fake_batch()[:0])
    for packing in (True, False):
        plan = make_plan(args[1], args[3], packing=packing)
        assert sequence_scores(tiny_reward_model(), *args, plan=plan).shape == (0,)
        assert token_values(tiny_reward_model(), *args, plan=plan).shape == (0, 7)


def test_rows_that_a_plan_was_not_made_of_get_nan() -> None:
    """A stale plan fits in shape; it would read other tokens."""
    args, rm = naive.tensors(fake_batch(seed=1)), tiny_reward_model()
    other = args[3].clone()
    longer = other[0].long().sum() % other.shape[1] + 1
    other[0] = torch.arange(other.shape[1]) < longer
    for kind in LAYOUTS:
        stale = layout(kind, (args[0], args[1], args[2], other))
        got, scores = log_probs(tiny_lm(), *args, plan=stale), sequence_scores(rm, *args, plan=stale)
        assert got[0][args[3][0]].isnan().all() and scores[0].isnan(), kind
        torch.testing.assert_close(got[1:], naive.log_probs(tiny_lm(), args)[0][1:], **TOL)
        torch.testing.assert_close(scores[1:], naive.scores(rm, args)[1:], equal_nan=True, **TOL)


def test_a_token_that_nothing_precedes_has_no_log_prob() -> None:
    args = naive.tensors(fake_batch(num_prompts=2))
    args[1][0] = False
    for kind in ("padded", "packed"):
        got = log_probs(tiny_lm(), *args, plan=layout(kind, args))
        assert got[0, 0].isnan() and got.isnan().sum() == 1


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(LAYOUTS), seed=st.integers(0, 10**6), groups=st.integers(1, 5), group_size=st.integers(1, 4),
    width=st.integers(1, 12), reply=st.integers(1, 12), extra=st.integers(0, 5), budget=st.integers(1, 200),
)  # fmt: skip
def test_any_batch_any_layout(
    kind: str, seed: int, groups: int, group_size: int, width: int, reply: int, extra: int, budget: int
) -> None:
    """Whatever the sizes: permuted by group, padded wider with junk and cut into other packs, the scores stay."""
    lm, rm = _MODELS
    td = fake_batch(groups, group_size, width, reply, seed=seed, empty_rows=seed % 2)
    args = naive.tensors(td)
    with torch.no_grad():
        want, scores = naive.log_probs(lm, args)[0], naive.scores(rm, args)
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed)).repeat_interleave(group_size)
        order = order * group_size + torch.arange(group_size).repeat(groups)
        junk = torch.randint(-9, 10**6, (len(order), extra))
        no = torch.zeros(junk.shape, dtype=torch.bool)
        moved = (
            torch.cat((junk, args[0]), 1)[order], torch.cat((no, args[1]), 1)[order],
            torch.cat((args[2], junk), 1)[order], torch.cat((args[3], no), 1)[order],
        )  # fmt: skip
        plan = layout(kind, moved, group_size, budget)
        got = log_probs(lm, *moved, plan=plan)
        torch.testing.assert_close(got[:, :reply], want[order], **TOL)
        assert (got[:, reply:] == 0).all()
        torch.testing.assert_close(sequence_scores(rm, *moved, plan=plan), scores[order], equal_nan=True, **TOL)


_MODELS = (tiny_lm("gpt2"), tiny_reward_model("llama"))


# --- traps -----------------------------------------------------------------------------------------------------------


def _by_pad_id(model: nn.Module, args: naive.Args, pad_id: int) -> Tensor:
    """The wrong variant of several traps: real tokens are those that differ from the pad id."""
    ids = torch.cat((args[0], args[2]), 1)
    hidden = model.base_model(ids, attention_mask=(ids != pad_id).long()).last_hidden_state
    last = (torch.arange(ids.shape[1]) * (ids != pad_id)).argmax(1)
    return model.score(hidden[torch.arange(len(ids)), last]).squeeze(-1)


def test_trap_01_pad_is_eos() -> None:
    eos = byte_tokenizer(pad_is_eos=True).pad_token_id
    args = naive.tensors(fake_batch(pad_id=eos))
    model = tiny_reward_model()
    stopped = ((args[2] == eos) & args[3]).any(1)
    assert stopped.any()
    want, got, wrong = naive.scores(model, args), sequence_scores(model, *args), _by_pad_id(model, args, eos)
    torch.testing.assert_close(got, want, equal_nan=True, **TOL)
    assert ((wrong - want).abs()[stopped] > 1e-3).all()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_trap_02_padding_side(kind: str) -> None:
    left, model = naive.tensors(fake_batch()), tiny_lm("gpt2")
    right = right_padded(left)
    assert not torch.equal(left[1], right[1])
    want = log_probs(model, *left, plan=layout(kind, left))
    torch.testing.assert_close(log_probs(model, *right, plan=layout(kind, right)), want, **TOL)
    # Wrong: side by side in the table, where one side leaves a gap in the middle that no mask tells of.
    ids = torch.cat((right[0], right[2]), 1)
    wrong = model(ids).logits.log_softmax(-1)[:, right[0].shape[1] - 1 : -1].gather(2, right[2][..., None]).squeeze(-1)
    assert (wrong - want)[right[3]].abs().max() > 0.1


def test_trap_03_positions_under_left_padding() -> None:
    args, model = naive.tensors(fake_batch()), tiny_lm("gpt2")
    want, _ = naive.log_probs(model, args)
    torch.testing.assert_close(log_probs(model, *args), want, **TOL)
    ids, mask = torch.cat((args[0], args[2]), 1), torch.cat((args[1], args[3]), 1).long()
    at = torch.arange(ids.shape[1]).expand_as(ids)
    wrong = model(ids, attention_mask=mask, position_ids=at).logits.log_softmax(-1)[:, args[0].shape[1] - 1 : -1]
    wrong = wrong.gather(2, args[2][..., None]).squeeze(-1)
    assert (wrong - want)[args[3]].abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "most", "mean"), [(torch.bfloat16, 0.15, 0.02), (torch.float16, 0.02, 0.003)])
def test_trap_04_batch_shape_moves_bf16(dtype: torch.dtype, most: float, mean: float) -> None:
    """In 16 bits a row's log-probs depend on its company. What is promised is a distance to float32, per dtype."""
    args = naive.tensors(fake_batch(num_prompts=8))
    model = tiny_lm("llama", hidden_size=64).to(dtype)
    want, _ = naive.log_probs(tiny_lm("llama", hidden_size=64).to(dtype).float(), args)
    together = log_probs(model, *args)
    alone = torch.cat([log_probs(model, *(x[i : i + 1] for x in args)) for i in range(16)])
    for got in (together, alone):
        assert (got - want).abs().max() < most and (got - want)[args[3]].abs().mean() < mean
    assert not torch.equal(together, want), "bitwise equality is not to be had, nor promised"


def test_trap_06_the_sampled_ids_are_scored() -> None:
    """Two ids that decode to one text are two responses: scoring must not pass through text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["AB"])
    merged = tokenizer.convert_tokens_to_ids("AB")
    split = [tokenizer.get_vocab()[c] for c in "AB"]
    model = tiny_lm(vocab_size=260)
    prompt = torch.tensor([[5, 6, 7]])
    responses = torch.tensor([split])
    assert tokenizer.decode(split) == tokenizer.decode([merged])
    retokenised = tokenizer(tokenizer.decode(split), add_special_tokens=False)["input_ids"]
    assert retokenised == [merged] != split
    ones = torch.ones_like
    got = log_probs(model, prompt, ones(prompt) > 0, responses, ones(responses) > 0)
    want = model(torch.cat((prompt, responses), 1)).logits.log_softmax(-1)[0, 2:4].gather(1, responses.T).squeeze(1)
    torch.testing.assert_close(got[0], want, **TOL)
    wrong = model(torch.tensor([[5, 6, 7, merged]])).logits.log_softmax(-1)[0, 2, merged]
    assert (wrong - got.sum()).abs() > 0.1


def test_trap_08_the_score_is_read_on_the_stop_token() -> None:
    """A custom stop token that is not eos, with junk after it."""
    stop, model = 42, tiny_reward_model()
    prompt = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    response = torch.tensor([[9, 8, stop, 77, 258], [1, 2, 3, 4, 5]])
    mask = stop_mask(response, [stop])
    args = (prompt, torch.ones_like(prompt) > 0, response, mask)
    got = sequence_scores(model, *args)
    row = model.base_model(torch.cat((prompt[0], response[0, :3]))[None]).last_hidden_state
    torch.testing.assert_close(got[0], model.score(row[0, -1]).squeeze(), **TOL)
    early, late = model.score(row[0, -2]).squeeze(), _by_pad_id(model, args, 258)[0]
    assert (got[0] - early).abs() > 1e-3 and (got[0] - late).abs() > 1e-3


def test_trap_09_one_distribution_on_both_sides() -> None:
    args, model = naive.tensors(fake_batch()), tiny_lm()
    want, _ = naive.log_probs(model, args, 0.7)
    torch.testing.assert_close(log_probs(model, *args, temperature=0.7), want, **TOL)
    per_row = torch.full((8,), 0.7)
    torch.testing.assert_close(log_probs(model, *args, temperature=per_row), want, **TOL)
    torch.testing.assert_close(log_probs(model, *args, temperature=0.0), log_probs(model, *args), **TOL)
    assert (log_probs(model, *args) - want)[args[3]].abs().max() > 0.1


def test_trap_10_equal_models_have_no_kl() -> None:
    """Masked, with pads out: a model against itself in another layout has KL 0, token for token."""
    args, model = naive.tensors(fake_batch(pad_id=258)), tiny_lm()
    a = log_probs(model, *args, plan=layout("packed", args))
    b = log_probs(model, *args, plan=layout("padded", args))
    ratio = b - a
    assert (ratio.exp() - 1 - ratio >= -1e-7).all() and ratio.abs().max() < 1e-4
    assert (a[~args[3]] == 0).all()


def test_trap_12_log_sum_exp_in_float32() -> None:
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = nn.Linear(32, 4096, bias=False).bfloat16()
    targets = torch.arange(64)
    logits = head(hidden)
    want = logits.double().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    got = heads._target(logits, targets, None)[0]
    wrong = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    assert (wrong.double() - want).abs().max() > 1e-2
