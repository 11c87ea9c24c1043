"""GRPO and its kin against TRL's own loss: the same numbers and gradients, and each difference by name."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from torchbandit import losses
from torchbandit.learn import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO
from torchbandit.learn.update import Update

pytest.importorskip("trl", reason="trl is not installed: pip install torchbandit[test]")
from tensordict import TensorDict
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd

G, WIDTH = 4, 7
CLOSE = dict(rtol=1e-5, atol=1e-6)


def ragged(seed, apart=0.4, empty=0):
    """Targets and log-probs, float32: rows of 1 to T tokens, the last `empty` of none."""
    gen = torch.Generator().manual_seed(seed)
    rows = 3 * G
    lengths = torch.randint(1, WIDTH + 1, (rows,), generator=gen)
    lengths[rows - empty :] = 0
    old = -torch.randn(rows, WIDTH, generator=gen).abs()
    targets = TensorDict(
        {
            "learn_mask": torch.arange(WIDTH) < lengths[:, None],
            "advantages": losses.grpo_advantages(torch.randn(rows, generator=gen), G),
            "log_probs": {"response": old},
            "ref_log_probs": old + 0.5 * torch.randn(rows, WIDTH, generator=gen),
        },
        batch_size=[rows],
    )
    new = (old + apart * torch.randn(rows, WIDTH, generator=gen)).requires_grad_()
    return targets, new


def ours(algorithm, targets, new, kl=0.0, estimator="k3"):
    mask = targets["learn_mask"]
    denominators = {"tokens": mask.sum().float(), "rows": mask.any(-1).sum().float()}
    out = TensorDict({"log_probs": new}, batch_size=targets.batch_size)
    loss, _ = algorithm.loss(out, targets, denominators=denominators)
    if kl:
        update = SimpleNamespace(
            algorithm=algorithm, options=SimpleNamespace(loss_kl_coef=kl, loss_kl_estimator=estimator)
        )
        loss = loss + Update._kl(update, out, targets, denominators)[0]
    return loss, torch.autograd.grad(loss, new)[0]


def trl_s(targets, new, kl=0.0, loss_type="grpo", low=0.2, high=0.2, delta=None, level="token", corrected=False):
    """GRPOTrainer's loss of these log-probs; the stub stands for a trainer of one process and one microbatch."""
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=True),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=corrected, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=kl,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=WIDTH,
        _entropy_bonus_enabled=False,
    )
    mask = targets["learn_mask"].long()
    none = torch.zeros(len(targets), 1).long()
    inputs = dict(
        prompt_ids=none,
        prompt_mask=none,
        completion_ids=torch.zeros_like(mask),
        completion_mask=mask,
        advantages=targets["advantages"],
        old_per_token_logps=targets["log_probs", "response"],
        ref_per_token_logps=targets["ref_log_probs"],
        num_items_in_batch=mask.sum(),
    )
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    return loss, torch.autograd.grad(loss, new)[0]


PAIRS = {
    "grpo": (GRPO(), dict(loss_type="grpo")),
    "grpo, two-sided": (GRPO(clip_high=0.28, dual_clip=1.5), dict(loss_type="grpo", high=0.28, delta=1.5)),
    "dr_grpo": (DrGRPO(), dict(loss_type="dr_grpo")),
    "dapo": (DAPO(), dict(loss_type="dapo", high=0.28)),
    "gspo": (GSPO(), dict(loss_type="grpo", level="sequence", low=3e-4, high=4e-4)),
    "gspo, token": (GSPO(ratio="response_token"), dict(loss_type="grpo", level="sequence", low=3e-4, high=4e-4)),
    "cispo": (CISPO(clip_high=0.5), dict(loss_type="cispo", high=1.5)),
    "cispo, defaults": (CISPO(), dict(loss_type="cispo", high=5.0)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_trl_s(name, seed):
    algorithm, options = PAIRS[name]
    targets, new = ragged(seed, 0.001 if "gspo" in name else 0.4)
    (loss, grad), (right, right_grad) = ours(algorithm, targets, new), trl_s(targets, new, **options)
    assert_close(loss, right, **CLOSE)
    assert_close(grad, right_grad, **CLOSE)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["k3", "weighted_k3"])
@pytest.mark.parametrize("name", PAIRS)
def test_and_so_they_are_with_the_kl_in_the_loss(name, estimator):
    """TRL's `use_bias_correction_kl`, on by default, is weighted_k3."""
    algorithm, options = PAIRS[name]
    targets, new = ragged(4, 0.001 if "gspo" in name else 0.4)
    corrected = estimator == "weighted_k3"
    (loss, grad) = ours(algorithm, targets, new, 0.3, estimator)
    right, right_grad = trl_s(targets, new, 0.3, corrected=corrected, **options)
    if corrected and "gspo" in name:  # TRL weighs each token's KL by the response's ratio, which the KL's is not
        assert (grad - right_grad).abs().max() > 1e-3
        return
    assert_close(loss, right, **CLOSE)
    assert_close(grad, right_grad, **CLOSE)
    assert (grad - ours(algorithm, targets, new)[1]).abs().max() > 1e-3


def test_the_eps_of_the_deviation_is_1e_4_there():
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0))
    groups = reward.view(-1, G)
    right = (groups - groups.mean(1, keepdim=True)) / (nanstd(groups, dim=1, keepdim=True) + 1e-4)
    assert_close(losses.group_advantages(reward, G, eps=1e-4), right.flatten(), **CLOSE)
    assert_close(losses.group_advantages(reward, G), right.flatten(), rtol=1e-3, atol=0)
    over_batch = (groups - groups.mean(1, keepdim=True)) / (nanstd(reward) + 1e-4)
    assert_close(losses.group_advantages(reward, G, scale="batch", eps=1e-4), over_batch.flatten(), **CLOSE)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo"])
def test_rows_without_tokens_count_in_trl_s_mean_over_rows(name):
    """Here the mean is over the rows that are learnt from."""
    algorithm, options = PAIRS[name]
    targets, new = ragged(5, 0.001 if name == "gspo" else 0.4, empty=2)
    (loss, grad), (right, right_grad) = ours(algorithm, targets, new), trl_s(targets, new, **options)
    assert_close(loss * 10 / 12, right, **CLOSE)
    assert_close(grad * 10 / 12, right_grad, **CLOSE)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_but_not_in_its_mean_over_tokens(name):
    algorithm, options = PAIRS[name]
    targets, new = ragged(6, empty=2)
    assert_close(ours(algorithm, targets, new), trl_s(targets, new, **options), **CLOSE)


def test_rloo_s_gradient_is_that_of_ppo_s_min_over_the_response_s_ratio():
    """As TRL's RLOOTrainer writes it: another value, the same gradient."""
    targets, new = ragged(7, 0.1)
    mask = targets["learn_mask"]
    log_ratio = ((new - targets["log_probs", "response"]) * mask).sum(-1)
    r, advantages = log_ratio.exp(), targets["advantages"]
    right = -torch.min(r * advantages, r.clamp(0.8, 1.2) * advantages).mean()
    assert_close(ours(RLOO(), targets, new)[1], torch.autograd.grad(right, new)[0], **CLOSE)
