"""What torchbandit does with each causal language model that transformers knows: a table, of tiny random models.

    python benchmarks/models_table.py [--only qwen3 lfm2 ...] [--write docs/models-table.md]

A cell says "yes", or why not; "WRONG" and "TRACE" are faults. Each column is compared with transformers alone, one row
at a time, unpadded: greedy responses of groups, log-probs, gradients, values of a critic head, and log-probs after
saving and loading.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from torchbandit import CausalLMPolicy, Sampling
from torchbandit.generation import generate, release
from torchbandit.models import load_causal_lm, save_model
from torchbandit.scoring import log_probs, make_plan, token_values
from torchbandit.scoring.routes import route_of

V, T, GROUP = 320, 6, 2
LARGEST = 5_000_000
"""Weights beyond which an architecture is not tried."""
LONGEST_S = 45
COLUMNS = ("generation", "packed", "shared prompts", "gradient", "critic head", "save and load")
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "emb_dim": 32, "dim": 32, "intermediate_size": 64, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "n_inner": 64, "d_inner": 64, "ffn_hidden_size": 64, "dff": 64, "feed_forward_size": 64, "d_ff": 64,
    "intermediate_size_mlp": 64, "shared_intermediate_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2,
    "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_head": 8, "d_kv": 8, "max_position_embeddings": 256,
    "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "max_target_positions": 256, "max_source_positions": 256,
    "seq_length": 256, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "mamba_n_groups": 1,
    "index_head_dim": 8, "index_n_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": V, "sliding_window": 16, "attention_chunk_size": 64, "lru_width": 32,
    "chunk_size": 8, "time_step_rank": 4, "conv_kernel": 4, "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_kv_shared_layers": 0, "query_pre_attn_scalar": 8, "rnn_hidden_size": 32,
    "attention_hidden_size": 32, "expand": 2, "mamba_ngroups": 1, "num_memory_blocks": 1,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # where one architecture's sizes must agree in a way of its own
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "mamba_headdim": 16,
               "n_mamba_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "bert": {"is_decoder": True}, "roberta": {"is_decoder": True}, "electra": {"is_decoder": True},
}  # fmt: skip
for _hybrid in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"):
    OWN[_hybrid] = {"layer_types": ["linear_attention", "full_attention"]}


def tiny(kind: str) -> PreTrainedModel:
    """A random model of an architecture, of about two layers; its weights large enough that every token matters."""
    default = CONFIG_MAPPING[kind]()
    inner = default.get_text_config(decoder=True)
    if inner is not default and inner.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind, default = inner.model_type, inner
    known = default.to_dict()
    given = {name: size for name, size in SIZES.items() if name in known or hasattr(default, name)}
    layers = given.get("num_hidden_layers", 2)
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        given["layer_types"] = (kinds * layers)[:layers]
    config = _config(type(default), given | OWN.get(kind, {}))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"its sizes lie in configs of its own, and come to {size / 1e6:.0f}M weights")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and weight.is_floating_point():
            torch.nn.init.normal_(weight, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.05)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 9)[None])  # sizes that do not fit together are no fault of ours
    return load_causal_lm(model, "cpu")


def _config(kind: Any, given: dict[str, Any]) -> Any:
    """Without what the architecture derives from other sizes, where it refuses to be given it."""
    for drop in ((), ("head_dim",), ("layer_types",), ("head_dim", "layer_types", "num_key_value_heads")):
        with contextlib.suppress(Exception):
            return kind(**{name: size for name, size in given.items() if name not in drop})
    return kind(**given)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of several lengths, left-padded, in groups."""
    lengths = torch.tensor([7, 3, 7, 4])
    mask = torch.arange(7) >= (7 - lengths)[:, None]
    ids = torch.randint(3, V, (4, 7), generator=torch.Generator().manual_seed(1)).where(mask, 0)
    return ids.repeat_interleave(GROUP, 0), mask.repeat_interleave(GROUP, 0)


def greedy(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    """The whole row read again for each token."""
    row = prompt
    for _ in range(T):
        row = torch.cat((row, model(input_ids=row[None], use_cache=False).logits[0, -1:].argmax(-1)))
    return row[len(prompt) :]


def naive(model: PreTrainedModel, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=torch.cat((prompt, response))[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]


def near(got: torch.Tensor, want: torch.Tensor) -> str:
    far = float((got - want).abs().max())
    return "yes" if far < 2e-3 * max(1.0, float(want.abs().max())) else f"WRONG by {far:.2g}"


class Tokens:
    """As much of a tokenizer as a policy reads."""

    pad_token_id, eos_token_id = 0, 2

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(V)}


def try_out(kind: str) -> dict[str, str]:
    """The cells of one architecture."""
    try:
        model = tiny(kind)
    except Exception as error:
        return {"generation": f"no tiny model: {_line(error)}"}
    cells: dict[str, str] = {}
    prompts, mask = rows()
    # Responses that do not depend on generation, so that a fault there is one cell's.
    responses = torch.randint(3, V, (len(prompts), T), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(responses, dtype=torch.bool)
    batch = (prompts, mask, responses, real)

    def generation() -> str:
        with torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made = generate(model, prompts, mask, Sampling(max_new_tokens=T, temperature=0.0), stop_ids=(), pad_id=0,
                            generator=None, group_size=GROUP)  # fmt: skip
            for i, (row, kept) in enumerate(zip(prompts, mask, strict=True)):
                want = greedy(model, row[kept])
                if not torch.equal(made.tokens[i], want):
                    return "WRONG"
                if "WRONG" in (told := near(made.log_probs[i], naive(model, row[kept], want))):
                    return told
        release(model)
        told = " ".join(str(w.message) for w in said)
        return "rereads" if "whole row" in told else "plain" if "plain loop" in told else "fast"

    def packed() -> str:
        plan = make_plan(mask, real, packing=True)
        return _scored(plan) if route_of(model).packs else _scored(plan).replace("yes", "padded")

    def shared() -> str:
        plan = make_plan(mask, real, packing=True, group_size=GROUP, share_prompts=True)
        return _scored(plan) if route_of(model).packs else _scored(plan).replace("yes", "no")

    def _scored(plan: Any) -> str:
        with torch.no_grad():
            got = log_probs(model, *batch, plan=plan)
            want = torch.stack([naive(model, p[m], r) for p, m, r in zip(prompts, mask, responses, strict=True)])
        return near(got, want)

    def gradient() -> str:
        model.requires_grad_(True)
        log_probs(model, *batch).sum().backward()
        got = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
        model.zero_grad()
        sum(naive(model, p[m], r).sum() for p, m, r in zip(prompts, mask, responses, strict=True)).backward()
        want = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
        model.zero_grad()
        far = max(
            (float((got[n] - want[n]).norm() / want[n].norm().clamp_min(1e-3)) for n in want if n in got), default=1.0
        )
        return "yes" if far < 1e-2 and got.keys() == want.keys() else f"WRONG by {far:.2g}"

    def critic() -> str:
        tokens: Any = Tokens()
        policy = CausalLMPolicy(model, tokens, critic="head", sampling=Sampling(max_new_tokens=T))
        assert policy.value_head is not None
        torch.nn.init.normal_(policy.value_head.weight)
        td = TensorDict({"tokens": {"prompt": prompts, "response": responses},
                         "masks": {"prompt": mask, "response": real}}, batch_size=[len(prompts)])  # fmt: skip
        with torch.no_grad():
            got = policy.values(td)
            alone = [token_values(model, p[m][None], m[m][None], r[None], k[None], value_head=policy.value_head)[0]
                     for p, m, r, k in zip(*batch, strict=True)]  # fmt: skip
        return near(got, torch.stack(alone))

    def saved() -> str:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save_model(model, Path(folder))
            again = load_causal_lm(folder, "cpu")
            return near(log_probs(again, *batch), log_probs(model, *batch))

    steps: tuple[Callable[[], str], ...] = (generation, packed, shared, gradient, critic, saved)
    for column, step in zip(COLUMNS, steps, strict=True):
        try:
            cells[column] = step()
        except ValueError as error:
            message = _line(error)
            cells[column] = f"refused: {message}" if "\n" not in str(error) else f"TRACE: {message}"
        except Exception as error:
            cells[column] = f"TRACE: {type(error).__name__}: {_line(error)}"
    return cells


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Late(BaseException):
    """An architecture took too long; no `except Exception` on the way may take it for its own."""


def _late(*_: object) -> None:
    raise _Late


def markdown(found: dict[str, dict[str, str]]) -> str:
    """Short cells, and the reasons below."""
    lines = ["| architecture | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for kind, cells in found.items():
        short = []
        for column in COLUMNS:
            cell = cells.get(column, "")
            word, _, why = cell.partition(": ")
            if why:
                reasons.setdefault(why.split(";")[0], []).append(kind)
            short.append(word)
        lines.append(f"| {kind} | " + " | ".join(short) + " |")
    lines += ["", *(f"- {why.replace('|', '/')}: {', '.join(dict.fromkeys(kinds))}" for why, kinds in reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--write", type=Path, help="write the table here as markdown")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    signal.signal(signal.SIGALRM, _late)
    for kind in options.only:
        begin = time.perf_counter()
        signal.alarm(LONGEST_S)
        try:
            found[kind] = try_out(kind)
        except _Late:
            found[kind] = {"generation": f"no tiny model: takes longer than {LONGEST_S} s"}
        finally:
            signal.alarm(0)
        cells = " | ".join(f"{name}: {cell[:150]}" for name, cell in found[kind].items())
        print(f"{kind} ({time.perf_counter() - begin:.1f} s): {cells}", flush=True)
    if options.write:
        options.write.write_text(markdown(found), encoding="utf-8")
    faults = [kind for kind, cells in found.items() if any(c.startswith(("WRONG", "TRACE")) for c in cells.values())]
    print(f"{len(found)} architectures, faults: {', '.join(faults) or 'none'}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
