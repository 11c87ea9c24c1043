"""What would be scored wrongly without a word is scored rightly, or refused with what to do."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
import transformers
from fakes import fake_batch, tiny_lm, tiny_reward_model
from test_scoring import LAYOUTS, TOL, layout
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from torchbandit.scoring import log_probs, make_plan, prepare, sequence_scores

ARGS = naive.tensors(fake_batch())
LONGEST = int((ARGS[1].sum(1) + ARGS[3].sum(1)).max())
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 259}


def build(kind: str, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(getattr(transformers, f"{kind}Config")(**options))
        for weight in model.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=0.15)
    return model.eval()


def classifier(kind: str, **options: Any) -> PreTrainedModel:
    return build(kind, AutoModelForSequenceClassification, num_labels=1, **options)


@pytest.mark.filterwarnings("ignore:.*scored padded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_what_it_predicts_gives_no_log_probs(dtype: torch.dtype) -> None:
    """BERT opened as a causal LM, without is_decoder: each token's prediction would see the token."""
    with pytest.raises(ValueError, match="must be causal, got Bert"):
        log_probs(build("Bert", **BERT).to(dtype), *ARGS)
    assert log_probs(build("Bert", **BERT, is_decoder=True).to(dtype), *ARGS).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*scored padded")
def test_a_decoder_of_an_encoders_kind_is_scored() -> None:
    decoder = build("Bert", **BERT, is_decoder=True)
    torch.testing.assert_close(log_probs(decoder, *ARGS), naive.log_probs(decoder, ARGS)[0], **TOL)


@pytest.mark.filterwarnings("ignore:.*scored padded")
def test_a_head_that_does_more_is_found_in_a_model_that_cannot_be_packed() -> None:
    model = tiny_lm()
    forward = model.forward

    def warmer(*inputs: Any, **options: Any) -> Any:
        out = forward(*inputs, **options)
        out.logits = out.logits * 1.03
        return out

    model.forward = warmer
    want, _ = naive.log_probs(model, ARGS)
    model.config.layer_types = ["full_attention", "another_kind"]
    torch.testing.assert_close(log_probs(model, *ARGS), want, **TOL)


@pytest.mark.filterwarnings("ignore:.*scored padded")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 259, "max_seq_len": 64}),
        ("Electra", BERT | {"is_decoder": True, "embedding_size": 16}),
        ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                    "window_size": 5, "vocab_size": 259, "max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_models_whose_code_differs_are_scored_padded(kind: str, options: dict[str, Any]) -> None:
    """A bias of distances that needs a mask; a projection before the head; windows of its own."""
    model = build(kind, **options)
    for name in LAYOUTS:
        got = log_probs(model, *ARGS, plan=layout(name, ARGS))
        torch.testing.assert_close(got, naive.log_probs(model, ARGS)[0], **TOL)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_beyond_learned_positions_are_refused(kind: str) -> None:
    plan = layout(kind, ARGS)
    enough = tiny_lm("gpt2", n_positions=16)
    torch.testing.assert_close(log_probs(enough, *ARGS, plan=plan), naive.log_probs(enough, ARGS)[0], **TOL)
    with pytest.raises(ValueError, match=f"at most {LONGEST - 1} tokens.*learned no more positions"):
        log_probs(tiny_lm("gpt2", n_positions=LONGEST - 1), *ARGS, plan=plan)
    with pytest.raises(ValueError, match="learned no more positions"):
        sequence_scores(tiny_reward_model("gpt2", n_positions=LONGEST - 1), *ARGS, plan=plan)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_follows_the_longest_row_is_refused(kind: str) -> None:
    """Beyond its first context the longest row of a batch would change the scores of all others."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
        rope |= factors
    wide = tiny_lm("llama", rope_parameters=rope, max_position_embeddings=16)
    torch.testing.assert_close(log_probs(wide, *ARGS), naive.log_probs(wide, ARGS)[0], **TOL)
    if kind == "longrope":
        rope["original_max_position_embeddings"] = LONGEST - 1
    narrow = tiny_lm("llama", rope_parameters=rope, max_position_embeddings=LONGEST - 1)
    with pytest.raises(ValueError, match=f"at most {LONGEST - 1} tokens.*{kind} rotary embedding of all"):
        log_probs(narrow, *ARGS)


def test_dropout_is_refused() -> None:
    """Trap 15 for a live model in train mode: log-probs would be drawn at random."""
    model = tiny_lm("gpt2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0)
    want = log_probs(model, *ARGS)
    model.train()
    with pytest.raises(ValueError, match="must be without dropout, got transformer.h.0.attn.resid_dropout"):
        log_probs(model, *ARGS)
    sure = tiny_lm("llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="without dropout, got model.layers.0.self_attn.attention_dropout"):
        log_probs(sure, *ARGS)
    transformers.set_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(log_probs(model, *ARGS), want)


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature: must be at least 0"):
        log_probs(tiny_lm(), *ARGS, temperature=-1.0)


@pytest.mark.filterwarnings("ignore:.*scored padded")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: tiny_lm(), "must be a sequence classifier, got LlamaForCausalLM"),
        (lambda: tiny_reward_model(num_labels=2), r"it gives \[2\] numbers a row"),
        (lambda: classifier("FNet", **{k: v for k, v in BERT.items() if k != "num_attention_heads"}),
         "padding beside a row changes its score"),
        (lambda: classifier("CTRL", vocab_size=259, n_embd=32, n_layer=2, n_head=4, dff=64, pad_token_id=0),
         "looks for the end by its pad token's id"),
    ],
)  # fmt: skip
def test_models_that_are_no_honest_reward_models_are_refused(model: Any, words: str) -> None:
    rm = model()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"reward model: .*{words}"):
            sequence_scores(rm, *ARGS)
    if rm.get_output_embeddings() is None:
        with pytest.raises(ValueError, match=words):
            prepare(rm)


def test_a_classifier_that_does_more_than_its_head_is_not_taken_for_it() -> None:
    """It is scored by its own pooling where that can be trusted, and refused otherwise."""
    rm = tiny_reward_model(pad_token_id=258)
    forward = rm.forward

    def bounded(*inputs: Any, **options: Any) -> Any:
        out = forward(*inputs, **options)
        out.logits = out.logits.sigmoid()
        return out

    rm.forward = bounded
    with pytest.raises(ValueError, match="cannot be scored"):
        sequence_scores(rm, *ARGS)


def test_an_encoder_scores_by_its_own_pooling() -> None:
    rm = classifier("Bert", **BERT)
    want = torch.stack([rm(torch.cat((p, r))[None]).logits[0, 0] for _, p, r in naive.rows(ARGS)])
    for packing in (True, False):
        plan = make_plan(ARGS[1], ARGS[3], packing=packing)
        torch.testing.assert_close(sequence_scores(rm, *ARGS, plan=plan), want, **TOL)
