"""Places, shrinking batches, the device's own path, weights that change: what stands behind `generate`."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import ARCHS, tiny_lm
from test_generation import STOPS, hf_greedy, prompts, rescore, seeded
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
)

import torchbandit.generation as generation
from torchbandit.generation import Generated, Sampling, generate, release
from torchbandit.generation.attention import decode_attention, decode_mode
from torchbandit.generation.body import compiled, compiled_body, decoder_layers, is_chain, watched
from torchbandit.generation.cache import Cache, LayerShape, layer_shapes
from torchbandit.generation.engine import Engine, bucket
from torchbandit.generation.lanes import Lanes, advance
from torchbandit.generation.plain import generate_plain
from torchbandit.generation.step import Stepper

MANY_STOPS = tuple(range(0, 259, 7))


def same(one: Generated, other: Generated) -> None:
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
    assert torch.equal(one.finished, other.finished)
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


def call(model: PreTrainedModel, ids: Tensor, mask: Tensor, sampling: Sampling, group_size: int = 1) -> Generated:
    return generate(
        model, ids, mask, sampling, stop_ids=MANY_STOPS, pad_id=0, generator=seeded(), group_size=group_size
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("places", [1, 5, 8])
def test_rows_take_turns_in_few_places_and_say_the_same(arch: str, places: int) -> None:
    model, (ids, mask) = tiny_lm(arch), prompts(18)
    whole = call(model, ids, mask, Sampling(20))
    release(model)
    few = call(model, ids, mask, Sampling(20, places=places))
    same(whole, few)
    engine = generation._engines[model]
    assert engine.places == places and max(engine.steps) == places
    assert 3 < whole.mask.sum(-1).float().mean() < 15, "the case must be ragged"


def test_a_freed_place_is_taken_at_once() -> None:
    """No lane idles while a row waits: steps are what perfect compaction would take, plus each row's first."""
    model, (ids, mask) = tiny_lm(), prompts(60)
    out = call(model, ids, mask, Sampling(40, places=6))
    steps = generation._engines[model].steps
    waiting_over = len(steps) - 40
    assert sum(steps[:waiting_over]) <= out.mask.sum() and set(steps[:waiting_over]) <= {6}


@pytest.mark.parametrize("group_size", [2, 3])
def test_groups_are_split_over_admissions(group_size: int) -> None:
    model, (ids, mask) = tiny_lm("qwen2"), prompts(5)
    ids, mask = ids.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)
    same(call(model, ids, mask, Sampling(20)), call(model, ids, mask, Sampling(20, places=4), group_size))


def test_the_batch_shrinks_as_rows_stop() -> None:
    model, (ids, mask) = tiny_lm(), prompts(40)
    out = call(model, ids, mask, Sampling(60))
    steps = generation._engines[model].steps
    assert steps == sorted(steps, reverse=True) and steps[0] == 40 and steps[-1] <= 4
    lengths = out.mask.sum(-1)
    assert len(steps) == lengths.max()
    for step, n in enumerate(steps):
        assert n <= bucket(int((lengths > step).sum()), coarse=False) or n == 40
    torch.testing.assert_close(out.log_probs, rescore(model, ids, mask, out, 1.0), rtol=1e-4, atol=1e-4)


def test_the_plain_loop_says_the_same() -> None:
    model, (ids, mask) = tiny_lm("neox"), prompts(12)
    for sampling in (Sampling(20), Sampling(20, 0), Sampling(20, 1.3, top_k=30, top_p=0.9)):
        plain = torch.no_grad()(generate_plain)(model, ids, mask, sampling, MANY_STOPS, 0, seeded(), 1)
        same(plain, call(model, ids, mask, sampling))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_devices_own_path_equals_transformers(arch: str) -> None:
    """Lengths and places read from tensors, as on CUDA, with the reference in the kernel's stead."""
    model, (ids, mask) = tiny_lm(arch), prompts(12)
    with torch.no_grad():
        shapes = layer_shapes(model, 64)
        engine = Engine(shapes, 5, 64, 24, model.device, dtype=model.dtype, host_bound=False)
        out = engine.run(model, ids, mask, Sampling(24, 0), STOPS, 0, None, 1)
    assert torch.equal(out.tokens, hf_greedy(model, ids, mask, 24, STOPS))


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("arch", ARCHS)
def test_layers_compile_once_for_any_depth_and_batch(arch: str, at_once: int) -> None:
    depth: dict[str, Any] = {"n_layer": 6} if arch == "gpt2" else {"num_hidden_layers": 6}
    model, cpu = tiny_lm(arch, **depth), torch.device("cpu")
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    with torch.no_grad():
        cache, lanes = Cache(layer_shapes(model, 64), 20, 64, cpu), Lanes(20, 8, cpu)
        stepper = Stepper(cache, lanes, host_bound=False)
        stepper.probe(model)
        assert stepper.chained
        for layer in cache.layers:  # each its own: one that reads another's part is found out
            layer.both.normal_()
        with decode_mode(model):
            for n in (8, 12, 6):  # 8 is also the head size, and must not be taken for it
                lanes.length.copy_(torch.arange(20))
                lanes.token.copy_(torch.arange(20))
                with compiled_body(model, cache, at_once, backend=backend):
                    mine = stepper._logits(model, n, None, False)
                torch.testing.assert_close(mine, stepper._logits(model, n, None, False))
    parts = {"gpt2": 2, "llama": 3, "qwen2": 3, "neox": 3}[arch]  # layers, last norm, rotary embedding
    assert len(sizes) == parts, sizes
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert max(sizes) > 25 * at_once, "the layers are in it"


def test_each_layer_of_a_chain_runs_as_its_own_class() -> None:
    model, cpu = tiny_lm(num_hidden_layers=4), torch.device("cpu")

    class Doubled(type(decoder_layers(model)[1])):  # type: ignore[misc]
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(hidden, *args, **kwargs) * 2

    for index in (1, 3):
        decoder_layers(model)[index].__class__ = Doubled
    with torch.no_grad():
        stepper = Stepper(Cache(layer_shapes(model, 64), 4, 64, cpu), Lanes(4, 8, cpu), host_bound=False)
        stepper.probe(model)
        assert stepper.chained
        with decode_mode(model):
            plain = stepper._logits(model, 3, None, False)
            with compiled_body(model, stepper.cache, 2, backend="eager"):
                torch.testing.assert_close(stepper._logits(model, 3, None, False), plain)


def test_layers_are_a_chain_where_each_reads_the_last_ones_output_and_what_all_read() -> None:
    x, y, mask, places = (torch.zeros(2) for _ in range(4))
    for calls, chain in (
        ([((x, 1), {"mask": mask}, y), ((y, 1), {"mask": mask}, x)], True),
        ([((x,), {}, y)], True),
        ([], False),
        ([((x, 1), {"mask": mask}, y), ((y.clone(), 1), {"mask": mask}, x)], False),  # something stands between them
        ([((x, 1), {"mask": mask}, y), ((y, 1), {"mask": mask.clone()}, x)], False),
        ([((x, places), {}, y), ((y, mask), {}, x)], False),
        ([((x,), {"mask": mask}, y), ((y,), {"places": mask}, x)], False),
        ([((x,), {}, (y,)), ((y,), {}, (x,))], False),  # what passes it on would have to be a tuple too
        ([((x,), {}, y), ((y,), {}, (x,))], False),
        ([((), {"hidden": x}, y), ((), {"hidden": y}, x)], False),
    ):
        assert is_chain(calls) == chain


def test_layers_of_two_kinds_are_compiled_one_by_one() -> None:
    """Gemma 3's local layers are handed other rotations than its global ones."""
    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64, sliding_window_pattern=2,
    )  # fmt: skip
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config).eval()
        stepper = Stepper(Cache(layer_shapes(model, 64), 4, 64, model.device), Lanes(4, 8, model.device))
        stepper.probe(model)
        assert not stepper.chained
        with watched(decoder_layers(model)) as calls:
            model(torch.zeros(1, 3, dtype=torch.int64))
        assert len(calls) == 4 and not any(layer._forward_hooks for layer in decoder_layers(model))


def test_weights_updated_in_place_or_replaced_are_the_ones_that_run() -> None:
    model, (ids, mask) = tiny_lm(), prompts()
    before = call(model, ids, mask, Sampling(6, 0))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=seeded(3)))
    after = call(model, ids, mask, Sampling(6, 0))
    assert not torch.equal(before.log_probs, after.log_probs)
    torch.testing.assert_close(after.log_probs, rescore(model, ids, mask, after, 1.0), rtol=1e-4, atol=1e-4)
    model.double()
    assert torch.equal(after.tokens, call(model, ids, mask, Sampling(6, 0)).tokens)


def test_calls_of_other_sizes_follow_each_other() -> None:
    model, (ids, mask) = tiny_lm(), prompts(20)
    first = call(model, ids[:4], mask[:4], Sampling(5))
    call(model, ids, mask, Sampling(30))
    engine = generation._engines[model]
    again = call(model, ids[:4], mask[:4], Sampling(5))
    assert generation._engines[model] is engine, "a smaller call needs nothing new"
    same(first, again)


def test_nothing_outlives_its_model() -> None:
    model, (ids, mask) = tiny_lm(), prompts()
    call(model, ids, mask, Sampling(4))
    engine = weakref.ref(generation._engines[model])
    assert engine() is not None
    del model
    gc.collect()
    assert engine() is None


def test_a_model_with_a_sliding_window_takes_the_plain_loop_and_says_so_once() -> None:
    model, (ids, mask) = tiny_lm("qwen2"), prompts(12)
    model.config.sliding_window, model.config.use_sliding_window = 6, True
    with pytest.warns(UserWarning, match="plain loop: Qwen2ForCausalLM has a sliding window of 6"):
        out = call(model, ids, mask, Sampling(20, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(out, call(model, ids, mask, Sampling(20, 0)))


SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=259, intermediate_size=64,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), "Gemma2Attention uses softcap"),
        (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32), "OPTForCausalLM does not decode from a cache"),
        (BloomConfig(**SMALL, n_head=4, n_layer=2), "has attention that is not plain"),
        (MambaConfig(**SMALL), "has attention that is not plain"),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_what_the_fast_path_cannot_take_falls_back_and_says_so_once(config: Any, says: str) -> None:
    torch.manual_seed(0)
    model, (ids, mask) = AutoModelForCausalLM.from_config(config).eval(), prompts(6)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
    want = hf_greedy(model, ids, mask, 12, STOPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [call_greedy(model, ids, mask, 1), call_greedy(model, ids, mask, 1)]
        rows = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        siblings = call_greedy(model, *rows, 2)
    said = [str(warning.message) for warning in caught if "plain loop" in str(warning.message)]
    assert len(said) == 1 and says in said[0], said
    assert all(torch.equal(out.tokens, want) for out in outs)
    assert torch.equal(siblings.tokens, want.repeat_interleave(2, 0))


def call_greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, group_size: int) -> Generated:
    return generate(
        model, ids, mask, Sampling(12, 0), stop_ids=STOPS, pad_id=0, generator=None, group_size=group_size
    )  # fmt: skip


def test_the_attention_of_the_model_is_given_back() -> None:
    model, (ids, mask) = tiny_lm(), prompts()
    name = model.config._attn_implementation
    call(model, ids, mask, Sampling(4))
    assert model.config._attn_implementation == name


def test_an_empty_prompt_is_refused() -> None:
    model, (ids, mask) = tiny_lm(), prompts()
    mask[4] = False
    with pytest.raises(ValueError, match="row 4 has none"):
        call(model, ids, mask, Sampling(4))


def test_buckets_grow_by_half_or_a_third() -> None:
    sizes = sorted({bucket(n, coarse=False) for n in range(1, 600)})
    assert sizes[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24] and all(bucket(n, coarse=False) >= n for n in range(1, 600))
    assert bucket(3, coarse=True) == 8


def test_the_reference_attention_reads_each_lane_to_its_length() -> None:
    import torch.nn.functional as F

    gen = seeded()
    query, keys, values = (torch.randn(*shape, generator=gen) for shape in ((3, 2, 4, 8), (5, 2, 16, 8), (5, 2, 16, 8)))
    lanes = torch.tensor([[4, 0], [1, 15], [2, 6]], dtype=torch.int32)
    out = decode_attention(query, keys, values, lanes.view(3, 1, 1, 2), 0.3)
    for lane, (place, last) in enumerate(lanes.tolist()):
        k, v = (x[place, :, : last + 1].repeat_interleave(1, 0) for x in (keys, values))
        torch.testing.assert_close(out[lane], F.scaled_dot_product_attention(query[lane], k, v, scale=0.3))


def test_the_device_itself_stops_a_lane_at_the_limit() -> None:
    """The host learns late, or not at all; what a lane does beyond its limit must be written nowhere."""
    lanes = Lanes(3, 5, torch.device("cpu"))
    lanes.begin(3, (9,))
    lanes.active[:2] = True
    lanes.length.fill_(4)
    drawn = torch.tensor([[1, 1, 1], [2, 9, 2], [3, 3, 3], [4, 4, 4]])
    seen = []
    for tokens in drawn:
        advance(
            tokens, tokens.float(), lanes.place, lanes.token, lanes.length, lanes.count, lanes.active,
            lanes.tokens, lanes.log_probs, lanes.limit, lanes.stops,
        )  # fmt: skip
        seen.append(lanes.active.tolist())
    assert seen == [[True, True, False], [True, False, False], [False] * 3, [False] * 3]
    assert lanes.count.tolist() == [3, 2, 0]
    assert lanes.tokens[:, :-1].tolist() == [[1, 2, 3, 0, 0], [1, 9, 0, 0, 0], [0] * 5, [0] * 5]
    assert lanes.length.tolist() == [0, 0, 0], "an idle lane reads as little as can be"


def test_places_are_what_memory_affords_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, cuda = [LayerShape(8, 64, torch.bfloat16)] * 16, torch.device("cuda")
    one = generation.bytes_per_place(shapes, 512)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _d: (10 * one, 99 * one))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _d: 5 * one)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _d: 2 * one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generation._affordable(shapes, 512, 9, cuda) == (9, False)  # 0.8 * 13, less the scratch place
    with pytest.warns(UserWarning, match="20 rows of 512 tokens exceed .* 9 run at a time"):
        assert generation._affordable(shapes, 512, 20, cuda) == (9, True)
    with pytest.raises(ValueError, match="not one response"):
        generation._affordable(shapes, 512 * 20, 20, cuda)


def test_layer_shape_names_what_a_token_costs() -> None:
    assert generation.bytes_per_place([LayerShape(8, 64, torch.bfloat16)] * 16, 512) == 16 * 2 * 8 * 64 * 2 * 512


def test_small_kernels_are_combined_where_the_compiler_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    known = torch._inductor.list_options()
    assert "combo_kernels" in known
    for options in (known, [x for x in known if x != "combo_kernels"]):
        monkeypatch.setattr(torch._inductor, "list_options", lambda options=options: options)
        for combos in (True, False):
            assert compiled.__wrapped__(abs, combos)(-3) == 3
    assert [how.get("options") for how in asked] == [{"combo_kernels": True}, None, None, None]
    assert compiled.__wrapped__(abs, False, (("pattern_matcher", False),))(-3) == 3
    assert asked[-1]["options"] == {"pattern_matcher": False}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
def test_a_second_process_finds_the_stepcompiled(tmp_path: Path) -> None:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    found = []
    for _ in range(2):
        command = [sys.executable, str(Path(__file__).parent / "compiled_step.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found == [{"hit": 0, "miss": 3}, {"hit": 3, "miss": 0}]
