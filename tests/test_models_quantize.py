"""Quantised weights: what becomes small, what stays, and that packed and compiled scoring take them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch._inductor.config
from fakes import fake_batch, tiny_lm, tiny_reward_model
from test_scoring_compiled import counter  # noqa: F401 (a fixture)
from torch._dynamo.utils import counters
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from torchbandit.generation import body, residual
from torchbandit.generation.cache import Cache, layer_shapes
from torchbandit.models import ModelSpec, load_causal_lm, load_reward_model, quantize
from torchbandit.models.estimate import weight_bytes
from torchbandit.scoring import log_probs, make_plan, sequence_scores

SIZES = dict(hidden_size=64, intermediate_size=128)  # bitsandbytes takes its weights 64 at a time


def asks(kind: str) -> object:
    library = quantize.LIBRARY[kind]
    missing = importlib.util.find_spec(library) is None
    return pytest.param(kind, marks=pytest.mark.skipif(missing, reason=f"{library} is not installed"))


ON_CPU = [asks("int8"), asks("nf4")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, model in (("lm", tiny_lm(**SIZES)), ("rm", tiny_reward_model(**SIZES)), ("gpt2", tiny_lm("gpt2"))):
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def quantized_names(model: PreTrainedModel) -> set[str]:
    modules = ((n, m) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor))
    return {name for name, module in modules if quantize.is_quantized(module.weight)}


@pytest.mark.parametrize("kind", ON_CPU)
def test_trap_13_heads_embeddings_and_norms_stay(kind: str, folders: dict[str, Path]) -> None:
    lm = load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")
    rm = load_reward_model(ModelSpec(folders["rm"], quantization=kind), "cpu")
    for model, head in ((lm, "lm_head"), (rm, "score")):
        found = quantized_names(model)
        assert found == set(quantize.inside_layers(model)) and len(found) == 14, "seven matrices in each of two layers"
        weight = model.get_submodule(head).weight
        assert type(weight.data) is torch.Tensor and weight.dtype == torch.float32
        assert model.get_input_embeddings().weight.dtype == model.model.norm.weight.dtype == torch.float32
        assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ON_CPU)
def test_loading_leaves_the_compiler_as_it_is(kind: str, folders: dict[str, Path]) -> None:
    """What is compiled later, a policy's training say, is not tuned for minutes."""
    before = torch._inductor.config.get_config_copy()  # type: ignore[attr-defined]
    precision = torch.get_float32_matmul_precision()
    load_reward_model(ModelSpec(folders["rm"], quantization=kind), "cpu")
    assert torch._inductor.config.get_config_copy() == before  # type: ignore[attr-defined]
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("kind", [asks("nf4")])
def test_trap_13_a_quantised_score_head_is_seen(kind: str, folders: dict[str, Path]) -> None:
    """The wrong variant: a config that keeps nothing."""
    wrong = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["nothing"])
    model = AutoModelForSequenceClassification.from_pretrained(
        folders["rm"], quantization_config=wrong, device_map={"": "cpu"}
    )
    assert "score" in quantized_names(model)
    with pytest.raises(ValueError, match="score must stay in high precision"):
        quantize.check(model, quantize.outside_layers(tiny_reward_model(**SIZES)), "it")


@pytest.mark.parametrize("kind", ON_CPU)
def test_scores_are_near_those_of_float32(kind: str, folders: dict[str, Path]) -> None:
    args = naive.tensors(fake_batch(num_prompts=16))
    lm = load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")
    rm = load_reward_model(ModelSpec(folders["rm"], quantization=kind), "cpu")
    with torch.no_grad():
        ours = torch.stack([sequence_scores(rm, *args), log_probs(lm, *args).sum(-1)])
        exact = torch.stack([sequence_scores(tiny_reward_model(**SIZES), *args),
                             log_probs(tiny_lm(**SIZES), *args).sum(-1)])  # fmt: skip
    assert not torch.equal(ours, exact)
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.corrcoef(torch.stack([mine, theirs]))[0, 1] > {"int8": 0.999, "nf4": 0.9}[kind]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ON_CPU)
def test_packed_padded_and_compiled_agree(
    kind: str, compiled: bool, folders: dict[str, Path], counter: object  # noqa: F811
) -> None:  # fmt: skip
    args = naive.tensors(fake_batch())
    lm = load_causal_lm(ModelSpec(folders["lm"], quantization=kind, compile=compiled), "cpu")
    rm = load_reward_model(ModelSpec(folders["rm"], quantization=kind, compile=compiled), "cpu")
    with torch.no_grad():
        for model, score in ((lm, log_probs), (rm, sequence_scores)):
            padded = score(model, *args, plan=make_plan(args[1], args[3], packing=False))
            packed = score(model, *args, group_size=2, plan=make_plan(args[1], args[3], packing=True, group_size=2))
            torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)
    assert (counter.frame_count > 0) == compiled


@pytest.mark.parametrize("kind", [asks("int8")])
def test_compiled_int8_products_stay_products(kind: str, folders: dict[str, Path]) -> None:
    """Inductor knows their pattern, and a kernel for it that a pack of tokens must not meet."""
    args = naive.tensors(fake_batch(num_prompts=2))
    rm = load_reward_model(ModelSpec(folders["rm"], dtype="bfloat16", quantization=kind, compile=True), "cpu")
    before = counters["inductor"]["woq_matcher_count"]
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        compiled = sequence_scores(rm, *args)
    assert counters["inductor"]["fxgraph_cache_bypass"] or counters["aot_autograd"]["total"], "it was not compiled"
    assert counters["inductor"]["woq_matcher_count"] == before
    rm.torchbandit_compile = False
    with torch.no_grad():
        torch.testing.assert_close(compiled, sequence_scores(rm, *args), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", [*ON_CPU, None])
def test_the_decode_step_is_told_of_int8_too(
    kind: str | None, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")  # type: ignore[arg-type]
    told = (("pattern_matcher", False),) if kind == "int8" else ()
    told = (*told, ("triton.autotune_pointwise", False))
    seen: list[Any] = []
    monkeypatch.setattr(body, "compiled", lambda *_, **how: seen.append(how["options"]))
    with body.compiled_body(model, Cache(layer_shapes(model, 8), 2, 8, torch.device("cpu"))):
        assert seen == [told] * len(body.decoder_layers(model))


@pytest.mark.parametrize("kind", [*ON_CPU, None])
def test_quantised_products_are_left_out_of_residual_sums(kind: str | None, folders: dict[str, Path]) -> None:
    model = load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")  # type: ignore[arg-type]
    layers = body.decoder_layers(model)
    with torch.no_grad(), body.watched(layers) as calls:
        model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        found = [residual.two_sums(layer, call) for layer, call in zip(layers, calls, strict=True)]
    assert found == [kind is None] * len(layers)


@pytest.mark.parametrize("kind", ON_CPU)
def test_the_estimate_is_what_it_takes(kind: str, folders: dict[str, Path]) -> None:
    model = load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")
    estimate = weight_bytes(tiny_lm(**SIZES), torch.float32, kind)
    taken = sum(t.numel() * t.element_size() for t in tensors_of(model))
    assert estimate == pytest.approx(taken, rel=0.01)
    assert estimate < 0.6 * weight_bytes(tiny_lm(**SIZES), torch.float32)


def tensors_of(model: PreTrainedModel) -> list[torch.Tensor]:
    from torchbandit.models.offload import plain_tensors

    return plain_tensors(model)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ("nf4", "int8", "fp8"):
        with pytest.raises(ImportError, match=r"pip install 'torchbandit\[quant\]'"):
            load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")


@pytest.mark.parametrize("kind", [asks("fp8")])
def test_fp8_asks_for_a_card_that_has_it(kind: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="fp8.* on cpu: .*CUDA"):
        load_causal_lm(ModelSpec(folders["lm"], quantization=kind), "cpu")


@pytest.mark.parametrize("kind", [asks("int8")])
def test_a_model_without_linear_layers_is_refused(kind: str, folders: dict[str, Path]) -> None:
    """GPT-2's projections are of another class, which torchao passes over in silence."""
    with pytest.raises(ValueError, match="no linear layers that can be quantised"):
        load_causal_lm(ModelSpec(folders["gpt2"], quantization=kind), "cpu")


@pytest.mark.parametrize("kind", [asks("nf4")])
def test_nf4_on_the_cpu_names_a_size_it_cannot_take(kind: str, tmp_path: Path) -> None:
    tiny_lm(hidden_size=96).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="multiple of 64, got 96 in model.layers.0.self_attn.q_proj"):
        load_causal_lm(ModelSpec(tmp_path, quantization=kind, dtype="bfloat16"), "cpu")


def test_what_is_trained_is_not_quantised(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="must be None for a model that is trained"):
        load_causal_lm(ModelSpec(folders["lm"], quantization="nf4"), "cpu", trainable=True)
    with pytest.raises(ValueError, match="must be None or one of"):
        ModelSpec(folders["lm"], quantization="int3")
