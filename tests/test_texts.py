"""The text of a response is what the model wrote."""

from __future__ import annotations

import pytest
import torch
from fakes import byte_tokenizer
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from torchbandit.responses import stop_ids_told, tell_stop_ids
from torchbandit.texts import response_texts, texts_after


def sentencepiece() -> PreTrainedTokenizerFast:
    """Of Llama 2's kind: a space in front of every text, which the decoder strips."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "▁▁",
        "<think>",
    ]
    core = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "▁")], byte_fallback=True,
            unk_token="<unk>", fuse_unk=True,
        )
    )  # fmt: skip
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>", "<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prompt", ["def f(x):\n", "<s>", "é", "a ", "<s><think>"])
@pytest.mark.parametrize("body", ["    y = x", " one", "two", "é è"])
def test_trap_34_a_continuation_keeps_its_first_space(prompt: str, body: str) -> None:
    tokenizer = sentencepiece()
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer("a" + body, add_special_tokens=False)["input_ids"][2:]  # behind "▁a"
    assert texts_after(tokenizer, [before, []], [ids, ids]) == [body, body]
    plain = byte_tokenizer()
    parts = [plain(text, add_special_tokens=False)["input_ids"] for text in (prompt, body)]
    assert texts_after(plain, parts[:1], parts[1:]) == [body]


def test_half_a_character_at_the_end_of_a_prompt_spoils_nothing() -> None:
    tokenizer = byte_tokenizer()
    first, second = tokenizer("é")["input_ids"]
    assert texts_after(tokenizer, [[first]], [[*tokenizer("ab")["input_ids"]]]) == ["ab"]
    assert texts_after(tokenizer, [[first]], [[second, *tokenizer("ab")["input_ids"]]]) == ["\ufffdab"]
    assert texts_after(tokenizer, [], []) == []


def test_trap_23_special_tokens_are_text_but_for_the_one_that_ends_it() -> None:
    tokenizer = sentencepiece()
    think, eos = tokenizer.convert_tokens_to_ids(["<think>", "</s>"])
    a = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = [[think, *a[1:], eos], [a[1], think, 0], [a[1], think, 0]]
    mask = torch.tensor([[True] * 3, [True, True, False], [True, True, False]])
    td = TensorDict(
        {
            "tokens": {"prompt": torch.tensor([a] * 3), "response": torch.tensor(rows)},
            "masks": {"prompt": torch.ones(3, 2, dtype=torch.bool), "response": mask},
            "finished": torch.tensor([True, False, True]),
        },
        batch_size=[3],
    )
    assert response_texts(td, tokenizer) == ["<think>a", "a<think>", "a"]
    assert response_texts(td, tokenizer, [1, 0], skip_special_tokens=True) == ["a", "a"]


def test_trap_25_what_a_policy_stops_at_is_told_once() -> None:
    tokenizer = byte_tokenizer()
    assert stop_ids_told(tokenizer) == (258,)
    tell_stop_ids(tokenizer, [258, 10])
    assert stop_ids_told(tokenizer) == (258, 10)
