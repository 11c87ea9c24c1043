"""The contract of an environment, tested on values, which the hot path never looks at. (B, P, T, G: see batch.py.)"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchbandit import batch
from torchbandit.batch import Key, masked_sum, require, show
from torchbandit.env import BanditEnv
from torchbandit.models import num_ids
from torchbandit.responses import has_stopped, is_contiguous, is_left_padded, stop_mask

if TYPE_CHECKING:
    from torchbandit.policy import CausalLMPolicy


def check_env(
    env: BanditEnv,
    policy: CausalLMPolicy | None = None,
    *,
    max_new_tokens: int = 8,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> None:
    """Fail, in words, where an environment breaks the contract; leave it as it was found.

    Checked: keys, shapes, dtypes and devices; prompts left-padded, siblings contiguous; `step` leaves its input as it
    was; every row terminates; NaN if and only if unscorable, an empty response and a mask with holes among them;
    token rewards sum to the reward; permuting rows permutes rewards; neither padding width nor junk behind a mask
    changes anything; a state dict brings back the same batch, the same prompts and the same rewards.

    Args:
        env: a `BanditEnv`, or whatever has its methods.
        policy: answers the prompts, and is checked too; None answers with random tokens of the vocabulary.
        max_new_tokens: width of the random answers.
        tolerance: how far equal rewards may differ, relative and absolute: models in bfloat16 need some 0.05.
        seed: of the random answers and the permutation.
    Raises:
        AssertionError: the environment or the policy breaks the contract; the message says where.
        ValueError: a key is missing, or its shape, dtype or device differs.
    """
    state = copy.deepcopy(env.state_dict())
    gen = torch.Generator().manual_seed(seed)
    try:
        td = env.reset()
        _check_reset(env, td)
        before = td.clone()
        answered = _random_answer(env, td, max_new_tokens, gen) if policy is None else policy.generate(td)
        _same(before, td, "generate changed the batch it was given")
        _check_response(env, answered, policy)
        frozen = copy.deepcopy(env.state_dict())

        def step(rows: TensorDictBase) -> TensorDict:
            env.load_state_dict(copy.deepcopy(frozen))
            return env.step(rows)

        before = answered.clone()
        out = step(answered)
        _same(before, answered, "step changed the batch it was given")
        _check_step(env, answered, out)
        _check_rows(env, answered, out, step, tolerance, gen)
        _check_unscorable(answered, step)
        _check_state(env, answered, frozen, tolerance)
    finally:
        env.load_state_dict(state)


def _demand(fact: bool | Tensor, says: str) -> None:
    if not bool(fact):
        raise AssertionError(says)


def _same(a: TensorDictBase, b: TensorDictBase, says: str, tolerance: float = 0.0) -> None:
    """Same keys, same values, NaN equal to NaN."""
    left, right = (dict(td.items(include_nested=True, leaves_only=True)) for td in (a, b))
    _demand(left.keys() == right.keys(), f"{says}: keys {sorted(map(str, left.keys() ^ right.keys()))} came or went")
    for key, value in left.items():
        if not isinstance(value, Tensor):
            continue
        close = torch.isclose(value, right[key], rtol=tolerance, atol=tolerance, equal_nan=True)
        if not bool(close.all()):
            worst = (value.double() - right[key].double()).abs().nan_to_num(torch.inf).max()
            raise AssertionError(f"{says}: {show(key)} differs by up to {worst:.3g}")


def _check_reset(env: BanditEnv, td: TensorDictBase) -> None:
    B, G, device = env.num_prompts * env.group_size, env.group_size, env.device
    _demand(td.batch_size == torch.Size([B]), f"reset: batch_size must be [{B}], got {list(td.batch_size)}")
    prompt = require(td, batch.PROMPT, shape=(B, env.prompts.width), dtype=torch.int64, device=device)
    mask = require(td, batch.PROMPT_MASK, shape=tuple(prompt.shape), dtype=torch.bool, device=device)
    _demand(mask.any(-1).all(), f"{show(batch.PROMPT_MASK)}: a prompt must have at least one token")
    _demand(is_left_padded(mask).all(), f"{show(batch.PROMPT_MASK)}: prompts must be left-padded, without holes")
    vocabulary = num_ids(env.prompts.tokenizer)
    inside = (prompt >= 0) & (prompt < vocabulary)
    _demand(inside.all(), f"{show(batch.PROMPT)}: every id, padding included, must be 0 to {vocabulary - 1}")
    for key in (batch.PROMPT_ID, batch.GROUP_ID):
        groups = require(td, key, shape=(B,), dtype=torch.int64, device=device).view(-1, G)
        _demand((groups == groups[:, :1]).all(), f"{show(key)}: the {G} siblings of a prompt must be contiguous")
    siblings = prompt.view(-1, G, prompt.shape[1])
    _demand((siblings == siblings[:, :1]).all(), f"{show(batch.PROMPT)}: siblings must have one prompt")
    groups = td[batch.GROUP_ID].view(-1, G)[:, 0]
    _demand(len(groups.unique()) == len(groups), f"{show(batch.GROUP_ID)}: must be unique to a draw")


def _random_answer(env: BanditEnv, td: TensorDictBase, width: int, gen: torch.Generator) -> TensorDict:
    """Uniform tokens, some rows stopped and some cut off, with the log-probs of a uniform policy."""
    B, vocabulary, eos = td.batch_size[0], num_ids(env.prompts.tokenizer), env.prompts.tokenizer.eos_token_id
    tokens = torch.randint(vocabulary, (B, width), generator=gen)
    stop_at = torch.randint(width + 2, (B, 1), generator=gen)
    if eos is not None:
        tokens = torch.where(torch.arange(width) == stop_at, eos, tokens)
    mask = stop_mask(tokens, [] if eos is None else [eos])
    out: TensorDict = td.copy()
    out.set(batch.RESPONSE, tokens.to(env.device))
    out.set(batch.RESPONSE_MASK, mask.to(env.device))
    out.set(batch.LOG_PROBS, (-torch.tensor(float(vocabulary)).log() * mask).to(env.device))
    return out


def _check_response(env: BanditEnv, td: TensorDictBase, policy: CausalLMPolicy | None) -> None:
    B, device = env.num_prompts * env.group_size, env.device
    tokens = require(td, batch.RESPONSE, shape=(B, -1), dtype=torch.int64, device=device)
    shape = tuple(tokens.shape)
    mask = require(td, batch.RESPONSE_MASK, shape=shape, dtype=torch.bool, device=device)
    _demand(is_contiguous(mask).all(), f"{show(batch.RESPONSE_MASK)}: must be a run of True, then False")
    log_probs = require(td, batch.LOG_PROBS, shape=shape, dtype=torch.float32, device=device)
    _demand((log_probs[~mask] == 0).all(), f"{show(batch.LOG_PROBS)}: must be 0 outside the mask")
    _demand((log_probs[mask] <= 1e-5).all(), f"{show(batch.LOG_PROBS)}: must be finite and at most 0")
    if policy is None:
        return
    finished = require(td, batch.FINISHED, shape=(B,), dtype=torch.bool, device=device)
    require(td, batch.TEMPERATURE, shape=(B,), dtype=torch.float32, device=device)
    width = policy.sampling.max_new_tokens
    _demand(shape[1] == width, f"{show(batch.RESPONSE)}: T must be max_new_tokens = {width}, got {shape[1]}")
    _demand(
        (mask == stop_mask(tokens, policy.stop_ids)).all(), f"{show(batch.RESPONSE_MASK)}: must end at the stop token"
    )
    stopped = has_stopped(tokens, mask, policy.stop_ids)
    _demand((finished == stopped).all(), f"{show(batch.FINISHED)}: must be True where the last token is a stop token")


def _check_step(env: BanditEnv, td: TensorDictBase, out: TensorDictBase) -> None:
    B, device = td.batch_size[0], env.device
    kept = out.exclude("next").select(*td.keys(include_nested=True, leaves_only=True), strict=False)
    _same(td, kept, "step must return the keys it was given, as they were")
    reward = require(out, batch.REWARD, shape=(B, 1), dtype=torch.float32, device=device)
    unscorable = require(out, batch.UNSCORABLE, shape=(B,), dtype=torch.bool, device=device)
    done, terminated, truncated = (
        require(out, key, shape=(B, 1), dtype=torch.bool, device=device)
        for key in (batch.DONE, batch.TERMINATED, batch.TRUNCATED)
    )
    _demand(terminated.all() and done.all(), "step: every row of a bandit is done and terminated")
    finished = require(out, batch.FINISHED, shape=(B,), dtype=torch.bool, device=device)
    _demand((truncated[:, 0] == ~finished).all(), f"{show(batch.TRUNCATED)}: must be True where not finished")
    _demand(
        (reward[:, 0].isnan() == unscorable).all(),
        f"{show(batch.REWARD)}: must be NaN where unscorable and nowhere else",
    )
    _demand((~reward.isinf()).all(), f"{show(batch.REWARD)}: must not be infinite")
    token_reward = out.get(batch.TOKEN_REWARD, None)
    if token_reward is not None:
        mask = out[batch.RESPONSE_MASK]
        require(out, batch.TOKEN_REWARD, shape=tuple(mask.shape), dtype=torch.float32, device=device)
        _demand((token_reward[~mask] == 0).all(), f"{show(batch.TOKEN_REWARD)}: must be 0 outside the mask")
        sums = masked_sum(token_reward, mask, -1)[~unscorable]
        close = torch.isclose(sums, reward[~unscorable, 0], rtol=1e-4, atol=1e-4)
        _demand(close.all(), f"{show(batch.TOKEN_REWARD)}: must sum to {show(batch.REWARD)}")
    terms = out.get(batch.REWARD_TERMS, None)
    _demand(terms is not None and len(terms.keys()) > 0, f"{show(batch.REWARD_TERMS)}: must hold each term's raw value")
    for name in out[batch.REWARD_TERMS].keys():
        require(out, (*batch.REWARD_TERMS, name), shape=(B,), dtype=torch.float32, device=device)


def _check_rows(
    env: BanditEnv,
    td: TensorDictBase,
    out: TensorDictBase,
    step: Callable[[TensorDictBase], TensorDict],
    tolerance: float,
    gen: torch.Generator,
) -> None:
    """Rows are independent, and only masks tell what is real."""
    # Groups change places, and siblings within their group: that keeps them contiguous.
    order = torch.argsort(torch.rand(env.num_prompts, env.group_size, generator=gen), -1)
    order = (order + torch.arange(env.num_prompts)[:, None] * env.group_size)[torch.randperm(len(order), generator=gen)]
    rows = order.flatten().to(env.device)
    says = "permuting rows must permute the results"
    _same(out["next"][rows], step(td[rows])["next"], says, tolerance)

    vocabulary = num_ids(env.prompts.tokenizer)
    junk = td.clone()
    for key, mask_key in ((batch.PROMPT, batch.PROMPT_MASK), (batch.RESPONSE, batch.RESPONSE_MASK)):
        noise = torch.randint(vocabulary, tuple(td[key].shape), generator=gen).to(env.device)
        junk.set(key, torch.where(td[mask_key], td[key], noise))
    _same(out["next"], step(junk)["next"], "ids behind a mask (after the stop token) must change nothing", tolerance)

    wide = td.clone()
    padded: tuple[Key, ...] = (batch.PROMPT, batch.PROMPT_MASK)
    for part in padded:
        wide.set(part, torch.cat((torch.zeros_like(td[part][:, :1]), td[part]), 1))
    padded = (batch.RESPONSE, batch.RESPONSE_MASK, batch.LOG_PROBS, batch.VALUES)
    for part in padded:
        if td.get(part, None) is not None:
            wide.set(part, torch.cat((td[part], torch.zeros_like(td[part][:, :2])), 1))
    widened = step(wide)
    padded = (batch.TOKEN_REWARD, batch.REF_LOG_PROBS)
    for part in padded:
        if widened.get(part, None) is not None:
            widened.set(part, widened[part][:, :-2])
    _same(out["next"], widened["next"], "the width of the padding must change nothing", tolerance)


def _check_unscorable(td: TensorDictBase, step: Callable[[TensorDictBase], TensorDict]) -> None:
    """What has no honest score must not get one."""
    broken = td.clone()
    mask = torch.zeros_like(td[batch.RESPONSE_MASK])
    mask[1::2, 1:] = True  # even rows are empty, odd ones have a hole at the front
    broken.set(batch.RESPONSE_MASK, mask)
    if broken.get(batch.LOG_PROBS, None) is not None:
        broken.set(batch.LOG_PROBS, broken[batch.LOG_PROBS] * mask)
    out = step(broken)
    for name, rows in (("an empty response", slice(0, None, 2)), ("a mask with a hole", slice(1, None, 2))):
        _demand(out[batch.UNSCORABLE][rows].all(), f"{show(batch.UNSCORABLE)}: must be True for {name}")
    _demand(out[batch.REWARD].isnan().all(), f"{show(batch.REWARD)}: must be NaN where unscorable")


def _equal(a: Any, b: Any) -> bool:
    """Nested states of tensors and plain values."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _check_state(env: BanditEnv, td: TensorDictBase, frozen: dict[str, Any], tolerance: float) -> None:
    def further() -> tuple[TensorDict, TensorDict, TensorDict]:
        env.load_state_dict(copy.deepcopy(frozen))
        return env.reset(), env.step(td), env.step(td)

    first, *rewards = further()
    moved = copy.deepcopy(env.state_dict())  # so that loading has something to undo
    second, *again = further()
    _same(first, second, "reset after load_state_dict must draw the same batch")
    for a, b in zip(rewards, again, strict=True):
        _same(a["next"], b["next"], "step after load_state_dict must give the same rewards", tolerance)
    env.load_state_dict(copy.deepcopy(moved))
    _demand(_equal(env.state_dict(), moved), "state_dict must be, after load_state_dict, what was loaded")
    third = env.reset()
    repeated = (third[batch.GROUP_ID][:, None] == first[batch.GROUP_ID]).any()
    _demand(~repeated, f"{show(batch.GROUP_ID)}: the next batch must be of new draws")
