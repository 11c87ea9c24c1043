"""Residual sums within the products before them: which layers are of that kind, and the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import ARCHS, tiny_lm
from test_generation import STOPS, hf_greedy, prompts
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchbandit.generation import Sampling, fuse, residual
from torchbandit.generation.attention import decode_mode
from torchbandit.generation.body import compiled_body, decoder_layers
from torchbandit.generation.cache import Cache, layer_shapes
from torchbandit.generation.engine import Engine
from torchbandit.generation.lanes import Lanes
from torchbandit.generation.step import Stepper

SUMS = {"gpt2": 0, "llama": 2, "qwen2": 2, "neox": 0}  # layers; the others' products have biases, or one sum of three


def probed(model: PreTrainedModel) -> Stepper:
    cpu = torch.device("cpu")
    with torch.no_grad():
        stepper = Stepper(Cache(layer_shapes(model, 64), 20, 64, cpu), Lanes(20, 8, cpu), host_bound=False)
        stepper.probe(model)
    stepper.lanes.length.copy_(torch.arange(20))
    stepper.lanes.token.copy_(torch.arange(20))
    return stepper


def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
    return graph


@pytest.mark.parametrize(("arch", "gated"), [*((arch, False) for arch in ARCHS), ("llama", True)])
def test_summed_generation_equals_transformers(arch: str, gated: bool) -> None:
    model, (ids, mask) = tiny_lm(arch, num_hidden_layers=4), prompts(12)
    layers = decoder_layers(model)
    fuse.rehome(layers)
    stepper = probed(model)
    assert stepper.two_sums == (set(layers) if SUMS[arch] else set())
    with torch.no_grad():
        engine = Engine(layer_shapes(model, 64), 5, 64, 24, model.device, dtype=model.dtype, host_bound=False)
        modules = list(model.modules())
        gates = fuse.gates(layers) if gated else ()
        with fuse.fused(layers, gates), residual.summed(layers, stepper.two_sums) as ready:
            assert ready == bool(SUMS[arch])
            how = {"forwards": residual.forwards} if ready else {}
            with compiled_body(model, engine.cache, 2 if stepper.chained else 1, backend=backend, **how):
                out = engine.run(model, ids, mask, Sampling(24, 0), STOPS, 0, None, 1)
        assert list(model.modules()) == modules
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 24, STOPS))


def test_a_chain_leaves_alone_what_it_is_given() -> None:
    model = tiny_lm(num_hidden_layers=4)
    stepper, layers, given = probed(model), decoder_layers(model), list[tuple[Tensor, Tensor]]()
    layers[2].register_forward_pre_hook(lambda _, args: given.append((args[0], args[0].clone())))
    with contextlib.ExitStack() as way:
        way.enter_context(torch.no_grad())
        way.enter_context(decode_mode(model))
        way.enter_context(residual.summed(layers, stepper.two_sums))
        way.enter_context(compiled_body(model, stepper.cache, 2, residual.forwards, backend=backend))
        stepper._logits(model, 8, None, False)
    ((hidden, before),) = given
    assert torch.equal(hidden, before)


class Scaled(nn.Module):
    """Multiplies what a branch adds, as some models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 0.5 * self.inner(*args, **kwargs)


def wider(layer: Any) -> None:
    layer.mlp.down_proj = nn.Linear(64, 32)


def hooked(layer: Any) -> None:
    layer.self_attn.o_proj.register_forward_hook(lambda *_: None)


def adapted(layer: Any) -> None:
    layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj)


@pytest.mark.parametrize("change", [wider, hooked, adapted])
def test_layers_that_end_otherwise_are_left_as_they_are(change: Callable[[Any], None]) -> None:
    model = tiny_lm()
    stepper, layers = probed(model), decoder_layers(model)
    change(layers[1])
    assert probed(model).two_sums == {layers[0]}
    modules = list(model.modules())
    with residual.summed(layers, stepper.two_sums) as ready:  # changed since it was found
        assert not ready and list(model.modules()) == modules


def test_layers_that_add_up_otherwise_are_left_as_they_are() -> None:
    model = tiny_lm()
    layers, kind = decoder_layers(model), type(decoder_layers(model)[0])
    own = kind.forward
    for other in (
        lambda self, hidden, **kw: own(self, hidden, **kw) + 1e-3,
        lambda self, hidden, **kw: own(self, 2 * hidden, **kw),
    ):
        with contextlib.ExitStack() as undo:
            kind.forward = other
            undo.callback(setattr, kind, "forward", own)
            assert probed(model).two_sums == set()
    layers[0].input_layernorm, layers[1].mlp.up_proj = None, Scaled(layers[1].mlp.up_proj)
    with torch.no_grad():
        call = ((torch.randn(1, 1, 32),), {}, torch.randn(1, 1, 32))
        layers[1].self_attn.o_proj.weight = nn.Parameter(torch.randn(32, 31))
        assert not residual.two_sums(layers[1], call), "shapes that do not fit"
        assert not residual.two_sums(layers[0], call), "another class's idea of the names"


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_sums_of_another_precision_than_their_products_are_left_as_they_are() -> None:
    layer = decoder_layers(tiny_lm())[0].bfloat16()
    layer.input_layernorm, layer.post_attention_layernorm = Rounded(), Rounded()
    how = {"position_embeddings": (torch.ones(1, 1, 8).bfloat16(), torch.zeros(1, 1, 8).bfloat16())}
    for dtype, same in ((torch.bfloat16, True), (torch.float32, False)):
        hidden = torch.randn(1, 1, 32, dtype=dtype)
        with torch.no_grad():
            assert residual.two_sums(layer, ((hidden,), how, layer(hidden, **how))) == same


def test_the_sum_is_made_in_place_and_the_weight_is_the_parameter() -> None:
    total, x, weight = torch.randn(3, 1, 8), torch.randn(3, 1, 4), torch.randn(8, 4)
    want, at = total + x @ weight.T, total.data_ptr()
    residual.add_product(total, x, weight)
    torch.testing.assert_close(total, want)
    assert total.data_ptr() == at
    model = tiny_lm()
    layers = decoder_layers(model)
    weights = [layer.mlp.down_proj.weight for layer in layers]
    with residual.summed(layers, set(layers)) as ready:
        assert ready and all(layer.mlp.down_proj.weight is w for layer, w in zip(layers, weights, strict=True))
