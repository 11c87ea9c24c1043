"""Sibling projections as one product: the same numbers, the same parameters, no second copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ARCHS, tiny_lm
from test_generation import STOPS, hf_greedy, prompts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from torchbandit.generation import Sampling, fuse
from torchbandit.generation.attention import decode_mode
from torchbandit.generation.body import compiled_body, decoder_layers
from torchbandit.generation.cache import Cache, Unfit, layer_shapes
from torchbandit.generation.engine import Engine
from torchbandit.generation.lanes import Lanes
from torchbandit.generation.step import Stepper
from torchbandit.masters import MasterOptimizer
from torchbandit.train import checkpoint

FAMILIES = {"gpt2": 0, "llama": 4, "qwen2": 4, "neox": 0}  # of two layers; the others' own product is one already


def rehomed(arch: str = "llama", **how: Any) -> PreTrainedModel:
    model = tiny_lm(arch, **how)
    fuse.rehome(decoder_layers(model))
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_moving_changes_no_parameter_and_takes_no_second_copy(arch: str) -> None:
    model, other = tiny_lm(arch), tiny_lm(arch)
    layers, objects = decoder_layers(model), dict(model.named_parameters())
    assert fuse.rehome(layers) == bool(FAMILIES[arch])
    assert not fuse.rehome(layers), "once"
    for name, weight in model.named_parameters():
        assert weight is objects[name] and weight.requires_grad and weight.is_leaf and weight.is_contiguous()
        assert torch.equal(weight, dict(other.named_parameters())[name])
    storages = {w.untyped_storage()._cdata: w.untyped_storage().nbytes() for w in model.parameters()}
    assert sum(storages.values()) == sum(w.nbytes for w in model.parameters())
    found = list(fuse.families(layers))
    assert len(found) == FAMILIES[arch]
    for family in found:
        joint = fuse.joined([x.weight for x in family.linears])
        assert joint is not None and torch.equal(joint, torch.cat([x.weight for x in family.linears]))


@pytest.mark.parametrize("arch", ARCHS)
def test_fused_generation_equals_transformers(arch: str) -> None:
    model, (ids, mask) = rehomed(arch), prompts(12)
    with torch.no_grad():
        engine = Engine(layer_shapes(model, 64), 5, 64, 24, model.device, dtype=model.dtype, host_bound=False)
        modules = list(model.modules())
        with fuse.fused(decoder_layers(model)):
            assert sum(isinstance(m, fuse.Product) for m in model.modules()) == FAMILIES[arch]
            out = engine.run(model, ids, mask, Sampling(24, 0), STOPS, 0, None, 1)
        assert list(model.modules()) == modules
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 24, STOPS))


@pytest.mark.parametrize("arch", ARCHS)
def test_gated_generation_equals_transformers(arch: str) -> None:
    model, (ids, mask) = rehomed(arch), prompts(12)
    with torch.no_grad():
        engine = Engine(layer_shapes(model, 64), 5, 64, 24, model.device, dtype=model.dtype, host_bound=False)
        gates, modules = fuse.gates(decoder_layers(model)), list(model.modules())
        assert len(gates) == FAMILIES[arch] // 2
        with fuse.fused(decoder_layers(model), gates):
            assert sum(isinstance(m, fuse.Gated) for m in model.modules()) == len(gates)
            assert sum(isinstance(m, fuse.Product) for m in model.modules()) == FAMILIES[arch] // 2
            out = engine.run(model, ids, mask, Sampling(24, 0), STOPS, 0, None, 1)
        assert list(model.modules()) == modules
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 24, STOPS))


def test_only_what_computes_silu_gates_is_one() -> None:
    layers = decoder_layers(rehomed())
    (first, second) = (layer.mlp for layer in layers)
    first.act_fn = nn.GELU()
    bounded = type(second).forward
    try:
        type(second).forward = lambda self, x: bounded(self, x.clamp(-30, 30))
        assert fuse.gates(layers) == set(), "a bound that small activations never meet"
        type(second).forward = lambda self, x, more: bounded(self, x) + more
        assert fuse.gates(layers) == set(), "a call of another kind"
    finally:
        type(second).forward = bounded
    assert fuse.gates(layers) == {second}
    for other in ({"mlp_bias": True}, {"intermediate_size": 60}):  # pieces of 16 bytes are read
        assert fuse.gates(decoder_layers(rehomed(**other))) == set()


def test_a_gate_that_has_changed_since_it_was_found_is_left_alone() -> None:
    layers = decoder_layers(rehomed(num_hidden_layers=4))
    gates = fuse.gates(layers)
    layers[0].mlp.register_forward_hook(lambda *_: None)
    layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    layers[2].mlp.gate_proj = nn.Sequential(layers[2].mlp.gate_proj)  # as adapters do
    with fuse.fused(layers, gates):
        assert [isinstance(layer.mlp, fuse.Gated) for layer in layers] == [False, False, False, True]


@pytest.mark.parametrize(("arch", "at_once"), [("llama", 1), ("qwen2", 1), ("llama", 2)])
def test_layers_compile_once_into_four_products(arch: str, at_once: int) -> None:
    model, cpu, products = rehomed(arch, num_hidden_layers=6), torch.device("cpu"), []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        cache, lanes = Cache(layer_shapes(model, 64), 20, 64, cpu), Lanes(20, 8, cpu)
        stepper = Stepper(cache, lanes, host_bound=False)
        with decode_mode(model):
            for n in (8, 12):
                lanes.length.copy_(torch.arange(20))
                lanes.token.copy_(torch.arange(20))
                with compiled_body(model, cache, at_once, backend=backend), fuse.fused(decoder_layers(model)):
                    mine = stepper._logits(model, n, None, False)
                torch.testing.assert_close(mine, stepper._logits(model, n, None, False))
    assert sorted(products) == [0, 0, 4 * at_once], products  # once: qkv, o, gate and up, down


def test_training_reaches_the_product_and_is_what_it_was_without() -> None:
    models = [tiny_lm("qwen2"), tiny_lm("qwen2")]
    optimizers = [MasterOptimizer(model.bfloat16().parameters(), lr=1e-2) for model in models]
    fuse.rehome(decoder_layers(models[0]))  # after the optimizer was made
    ids, _ = prompts()
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).logits.float().logsumexp(-1).mean().backward()
            optimizer.step(1.0)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    for family in fuse.families(decoder_layers(models[0])):
        joint = fuse.joined([x.weight for x in family.linears])
        assert joint is not None and torch.equal(joint, torch.cat([x.weight for x in family.linears]))


def test_saved_loaded_copied_and_moved_models_are_whole(tmp_path: Path) -> None:
    model = rehomed("qwen2")
    model.save_pretrained(tmp_path / "hf")
    assert sum(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors")) < 1.1 * sum(
        w.nbytes for w in model.state_dict().values()
    )
    checkpoint.save(tmp_path / "ours", model, {}, {})
    fresh = tiny_lm("qwen2", seed=7)
    checkpoint.load(tmp_path / "ours", fresh, {})
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    into = rehomed("qwen2", seed=8)
    into.load_state_dict(state)
    others = (AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), fresh, into, copy.deepcopy(model))
    for other in others:
        for name, weight in other.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
    moved = copy.deepcopy(model).double()  # parameters part again, and are laid together anew
    layers = decoder_layers(moved)
    with fuse.fused(layers):
        assert not any(isinstance(m, fuse.Product) for m in moved.modules())
    assert fuse.rehome(layers)


class Wrapped(nn.Linear):
    """As an adapter or a quantised layer would."""


def _adapter(attention: Any) -> None:
    attention.k_proj = Wrapped(32, 16, bias=False)


def _tied(attention: Any) -> None:
    attention.v_proj.weight = attention.k_proj.weight


def _view(attention: Any) -> None:
    flat = torch.zeros(2, 16, 32)
    attention.k_proj.weight.data = flat[0]


def _shared_memory(attention: Any) -> None:
    attention.v_proj.weight.data = attention.k_proj.weight.data


def _hook(attention: Any) -> None:
    attention.q_proj.register_forward_hook(lambda *_: None)


def _dtype(attention: Any) -> None:
    attention.q_proj.half()


def _bias(attention: Any) -> None:
    attention.q_proj.bias = nn.Parameter(torch.zeros(32))


@pytest.mark.parametrize("change", [_adapter, _tied, _view, _shared_memory, _hook, _dtype, _bias])
def test_what_is_not_plain_stays_as_it_is(change: Callable[[Any], None]) -> None:
    model = tiny_lm()
    attention: Any = decoder_layers(model)[0].self_attn
    change(attention)
    where = [child.weight.data_ptr() for child in attention.children()]
    fuse.rehome(decoder_layers(model))
    assert [child.weight.data_ptr() for child in attention.children()] == where
    with fuse.fused(decoder_layers(model)):
        assert not any(isinstance(child, fuse.Part) for child in attention.children())
        assert isinstance(decoder_layers(model)[1].self_attn.q_proj, fuse.Part)


def test_a_product_is_computed_once_an_input_whatever_the_order() -> None:
    product = fuse.Product(torch.randn(6, 4), None)
    parts = [fuse.Part(product, 0, 2, False), fuse.Part(product, 2, 6, True)]
    x, y = torch.randn(3, 4), torch.randn(3, 4)

    def check(part: int, of: Tensor) -> None:
        start, stop = ((0, 2), (2, 6))[part]
        torch.testing.assert_close(parts[part](of), of @ product.weight[start:stop].T)

    for part, of in ((0, x), (1, x), (1, y), (0, y), (0, x), (1, y), (0, y)):
        check(part, of)
        assert part == 0 or product.read is product.made is None, "nothing is kept once the last has its part"


def test_a_step_that_cannot_be_recorded_fused_is_recorded_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = tiny_lm(), torch.device("cpu")
    with torch.no_grad():
        lanes = Lanes(4, 8, cpu)
        stepper = Stepper(Cache(layer_shapes(model, 64), 4, 64, cpu), lanes)
    tried: list[frozenset[str]] = []

    def record(self: Stepper, _model: object, _n: int) -> str:
        assert lanes.place.eq(4).all() and not lanes.active.any()
        tried.append(self.fast)
        if self.fast:
            raise RuntimeError("the compiler would not")
        return "recorded"

    monkeypatch.setattr(Stepper, "_rehearse_and_record", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    lanes.active.fill_(True)
    with pytest.warns(UserWarning, match="without combos, gates, layers, products, sums: the compiler would not"):
        made: Any = stepper._record(model, 2)
    assert made == "recorded" and [len(fast) for fast in tried] == [5, 0]
    assert lanes.place.tolist() == [0, 1, 2, 3] and lanes.active.all()


def test_a_step_that_cannot_be_recorded_at_all_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = tiny_lm(), torch.device("cpu")
    with torch.no_grad():
        stepper = Stepper(Cache(layer_shapes(model, 64), 4, 64, cpu), Lanes(4, 8, cpu))

    def record(*_: object) -> None:
        raise RuntimeError("the compiler would not")

    monkeypatch.setattr(Stepper, "_rehearse_and_record", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.warns(UserWarning), pytest.raises(Unfit, match="of LlamaForCausalLM cannot be recorded: the compiler"):
        stepper._record(model, 2)
