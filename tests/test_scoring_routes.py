"""What may be packed is packed; what may not is found out, said once, and scored rightly all the same."""

from __future__ import annotations

import warnings
from typing import Any

import naive
import pytest
import torch
import transformers
from fakes import fake_batch, tiny_lm
from test_scoring import LAYOUTS, TOL, layout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchbandit.scoring import log_probs, make_plan, routes
from torchbandit.scoring.heads import Head

SMALL: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 258,
}  # fmt: skip
PACKED = {
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "Mistral": {"sliding_window": 6},
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Cohere": {"logit_scale": 0.5},
    "Granite": {"logits_scaling": 3.0},
}
PADDED = {
    "Gemma2": ({"head_dim": 8, "sliding_window": 5}, "softcap"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "0 of its 2 layers"),
    "Mamba": ({"state_size": 4}, "layers"),
}


def build(kind: str, extra: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**(SMALL | extra)))
        for weight in model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.15)
    return model.eval()


@pytest.mark.parametrize("kind", list(PACKED))
def test_packed_architectures(kind: str) -> None:
    model, args = build(kind, PACKED[kind]), naive.tensors(fake_batch())
    want, _ = naive.log_probs(model, args)
    want.sum().backward()
    want_grads = naive.gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route = routes.route_of(model)
    assert route.packs and route.ours and not route.whole
    for name in LAYOUTS:
        got = log_probs(model, *args, plan=layout(name, args))
        torch.testing.assert_close(got, want, **TOL, msg=lambda m, n=name: f"{n}: {m}")
        got.sum().backward()
        for key, grad in naive.gradients(model).items():
            torch.testing.assert_close(grad, want_grads[key], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", list(PADDED))
def test_what_cannot_be_packed_is_padded_and_said_once(kind: str) -> None:
    extra, reason = PADDED[kind]
    model, args = build(kind, extra), naive.tensors(fake_batch())
    want, _ = naive.log_probs(model, args)
    with pytest.warns(UserWarning, match=f"scored padded.*{reason}"):
        got = log_probs(model, *args, plan=layout("shared", args))
    torch.testing.assert_close(got, want, **TOL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_probs(model, *args)


def test_a_model_that_looks_across_rows_is_found_out() -> None:
    """The wrong variant: trusting a model because its attention is pluggable."""
    model, args = tiny_lm(), naive.tensors(fake_batch())

    def smear(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    model.model.layers[0].mlp.register_forward_hook(smear)
    want, _ = naive.log_probs(model, args)
    with pytest.warns(UserWarning, match="beside another row"):
        torch.testing.assert_close(log_probs(model, *args), want, **TOL)
    routes.remember(model, routes.Route(True, True, False, None))
    wrong = log_probs(model, *args)
    assert (wrong - want).abs().max() > 1e-2


def test_a_head_that_does_more_is_found_out() -> None:
    model, args = tiny_lm(), naive.tensors(fake_batch())
    forward = model.forward

    def warmer(*inputs: Any, **options: Any) -> Any:
        out = forward(*inputs, **options)
        out.logits = out.logits * 1.7
        return out

    model.forward = warmer
    want, _ = naive.log_probs(model, args)
    assert routes.route_of(model).whole
    torch.testing.assert_close(log_probs(model, *args), want, **TOL)


def test_windows_and_shared_prompts() -> None:
    """A window that hides something keeps prompts unshared; a wide one does not matter."""
    args = naive.tensors(fake_batch())
    plan = layout("shared", args)
    narrow, wide = build("Mistral", {"sliding_window": 6}), build("Mistral", {"sliding_window": 64})
    log_probs(narrow, *args, plan=plan)
    assert "shared" not in plan._packs and "packed" in plan._packs
    log_probs(wide, *args, plan=plan)
    assert "shared" in plan._packs


def test_sharing_is_taken_where_it_pays_and_told() -> None:
    mask = torch.ones(16, 100, dtype=torch.bool)
    long, short = torch.ones(16, 20, dtype=torch.bool), torch.ones(16, 100, dtype=torch.bool)
    assert make_plan(mask, long, group_size=8).metrics["packing/shared"] == 1
    assert make_plan(mask, long, group_size=8).metrics["packing/saved"] == pytest.approx(1 - (200 + 320) / 1920)
    assert make_plan(mask[:, :4], short, group_size=8).metrics["packing/shared"] == 0
    assert make_plan(mask, long).metrics["packing/shared"] == 0
    assert make_plan(mask, long, packing=False, group_size=8).metrics == {}


def test_siblings_with_other_prompts_are_refused() -> None:
    args = naive.tensors(fake_batch(group_size=1))
    with pytest.raises(ValueError, match="siblings of one prompt"):
        make_plan(args[1], args[3], group_size=2)
    td = fake_batch()
    td["tokens", "prompt"][1, -1] += 1
    args = naive.tensors(td)
    got = log_probs(tiny_lm(), *args, plan=layout("shared", args))
    assert got[:2][args[3][:2]].isnan().all() and not got[2:].isnan().any()


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradient_checkpointing(arch: str, kind: str) -> None:
    """Layers are computed again after the attention of the forward pass has been taken down."""
    model, args = tiny_lm(arch), naive.tensors(fake_batch())
    plan = layout(kind, args)
    log_probs(model, *args, plan=plan).sum().backward()
    want = naive.gradients(model)
    own = model.config._attn_implementation
    model.gradient_checkpointing_enable()
    from torchbandit.models import disable_dropout

    disable_dropout(model)
    model.train()
    log_probs(model, *args, plan=plan).sum().backward()
    assert model.config._attn_implementation == own
    for name, grad in naive.gradients(model).items():
        torch.testing.assert_close(grad, want[name])


def test_full_vocabulary_kl() -> None:
    ours, theirs = tiny_lm(seed=0), tiny_lm(seed=5)
    hidden = torch.randn(40, 32, requires_grad=True)
    heat = torch.linspace(0.5, 2, 40)
    got = Head(ours).kl_to(hidden, Head(theirs), hidden.detach(), heat)
    p, q = (m.lm_head(hidden if m is ours else hidden.detach()) / heat[:, None] for m in (ours, theirs))
    want = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), hidden, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), hidden)[0])


def test_no_host_copy_without_packing() -> None:
    """G1: after a model's first use, `packing=False` reads nothing back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCopy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model, args = tiny_lm(), naive.tensors(fake_batch())
    routes.route_of(model)
    tolist = Tensor.tolist
    copies = []
    try:
        Tensor.tolist = lambda self: (copies.append(self.numel()), tolist(self))[1]  # type: ignore[method-assign]
        with NoCopy(), torch.no_grad():
            log_probs(model, *args, plan=make_plan(args[1], args[3], packing=False))
            assert copies == []
            for share in (True, False):
                plan = make_plan(args[1], args[3], group_size=2, share_prompts=share)
                log_probs(model, *args, plan=plan)
                log_probs(model, *args, plan=plan)
            assert len(copies) == 2 and max(copies) <= 3 * 8, "the lengths, once a plan"
    finally:
        Tensor.tolist = tolist  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_peft_adapters_are_scored_as_their_wrapper_scores(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="adapters need the peft package")
    args = naive.tensors(fake_batch())
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    bare = tiny_lm()
    without, _ = naive.log_probs(bare, args)
    wrapped = peft.get_peft_model(bare, config).eval()
    want, _ = naive.log_probs(wrapped, args)
    assert (want - without).abs().max() > 0.01, "the adapters must matter"
    got = log_probs(wrapped, *args, plan=layout(kind, args))
    torch.testing.assert_close(got, want, **TOL)
    got.sum().backward()
    assert {n for n, p in wrapped.named_parameters() if p.grad is not None} == {
        n for n, _ in wrapped.named_parameters() if "lora_" in n
    }


def test_peft_prompt_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the peft package")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="before the prompt"):
        log_probs(peft.get_peft_model(tiny_lm(), config), *naive.tensors(fake_batch()))
