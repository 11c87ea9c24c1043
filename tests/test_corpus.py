"""Pretraining rows: cut, drawn in turn, resumed; bad files named."""

from __future__ import annotations

import json

import pytest
import torch
from fakes import byte_tokenizer

from torchbandit.corpus import Corpus


def test_documents_end_with_eos_and_never_share_a_row():
    corpus = Corpus.from_texts(["abcdef", "xy", ""], byte_tokenizer(), max_length=4)
    rows = [ids[mask].tolist() for ids, mask in zip(corpus.ids, corpus.mask, strict=True)]
    a, x = byte_tokenizer()("abcdef")["input_ids"], byte_tokenizer()("xy")["input_ids"]
    # The empty document is a lone eos, which predicts nothing.
    assert rows == [a[:4], [*a[4:], 258], [*x, 258]]


def test_ranks_take_turns_and_a_state_goes_on():
    texts = [f"document {i}" for i in range(12)]
    whole = Corpus.from_texts(texts, byte_tokenizer())
    ranks = [Corpus.from_texts(texts, byte_tokenizer()) for _ in range(2)]
    for rank, corpus in enumerate(ranks):
        corpus.shard(rank, 2)
    both = whole.next(6)[0]
    halves = [corpus.next(3)[0] for corpus in ranks]
    assert torch.equal(both, torch.stack(halves, 1).flatten(0, 1))
    again = Corpus.from_texts(texts, byte_tokenizer())
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.next(5)[0], whole.next(5)[0])
    assert len(whole.next(100)[0]) == 12  # never more than there are


def test_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    for name in ("a.jsonl", "a.txt"):
        corpus = Corpus.from_file(tmp_path / name, byte_tokenizer())
        assert byte_tokenizer().batch_decode(corpus.ids) == ["one<eos>", "two<eos>"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": "one", "note": "x"}, {"text": "two", "note": "y"}])),
        ("a.JSONL", '{"text": "one", "note": "x"}\n{"text": "two", "note": "y"}\n'),
        ("a.csv", "text,note\none,x\ntwo,y\n"),
        ("a.tsv", "text\tnote\r\none\tx\r\ntwo\ty\r\n"),
    ],
)
def test_documents_are_a_column_of_any_format(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for key, want in (("text", ["one<eos>", "two<eos>"]), ("note", ["x<eos>", "y<eos>"])):
        corpus = Corpus.from_file(tmp_path / name, byte_tokenizer(), key=key)
        assert byte_tokenizer().batch_decode(corpus.ids) == want


def test_lines_end_at_newlines_alone(tmp_path):
    lines = [{"text": "first\u2028second"}, {"text": "a\u0085b"}, {"text": "plain"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert len(Corpus.from_file(tmp_path / "a.jsonl", byte_tokenizer())) == 3
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "x \\ud83d"}\n')
    with pytest.raises(ValueError, match="b.jsonl:2: 'text' holds half a character"):
        Corpus.from_file(tmp_path / "b.jsonl", byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "No such file"),
        ("bad.jsonl", '{"text": "a"}\nnot json', "bad.jsonl:2: must be one JSON object"),
        ("key.jsonl", '{"prompt": "a"}', "key.jsonl:1: must have the column 'text', got"),
        ("kind.jsonl", '{"text": 3}', "'text' must be a text, got int"),
        ("empty.txt", "\n\n \n", "must hold at least one document"),
        ("lone.jsonl", '{"text": ""}', "at least one row of two tokens"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        Corpus.from_file(tmp_path / name, byte_tokenizer())
