"""Inputs of the kinds that people bring: columns of all sorts, rows without a prompt, chats, templates."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import byte_tokenizer

from torchbandit import BanditEnv, PromptSet

CHAT = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and "
    "enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "2+2?"}
BEGUN = [USER, {"role": "assistant", "content": "Sure: the"}]


def chatty(template: str = CHAT) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(tmp_path: Path, rows: list[Any], **options: Any) -> list[str]:
    file = write(tmp_path / "p.jsonl", rows)
    return PromptSet.from_file(file, chatty(), **({"max_length": 400} | options)).texts()


# Columns


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [3], []], [9, "none", 2], [{"a": {"b": [1]}}, {}, {"a": None}], ["book", None, "web"], [1, None, 3],
        [True, 2, 3], [1, 2, 2**70], [[1, [2]], [3, [4]], [5, 6]], [None, None, None], [[1], [], ["a"]],
    ],
)  # fmt: skip
def test_a_column_of_any_kind_stays_as_it_stands(tmp_path: Path, values: list[Any]) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "ab", "level": i, "x": x} for i, x in enumerate(values)])
    prompts = PromptSet.from_file(file, byte_tokenizer(), max_length=9)
    assert prompts.host_columns == {"x": values} and prompts.columns["level"].tolist() == [0, 1, 2]
    assert prompts.values("x", [2, 0]) == [values[2], values[0]] and prompts.values("level", [2]) == [2]


def test_what_a_row_lacks_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}])
    assert PromptSet.from_file(file, byte_tokenizer(), max_length=9).host_columns == {"x": [1, None], "y": [None, 2]}
    only = PromptSet.from_file(file, byte_tokenizer(), max_length=9, columns=["y"])
    assert only.host_columns == {"y": [None, 2]}
    with pytest.raises(ValueError, match=r"p.jsonl: must have a column 'z', got \['prompt', 'x'\]; see columns"):
        PromptSet.from_file(file, byte_tokenizer(), max_length=9, columns=["z"])


def test_numbers_reach_host_functions_as_they_stand() -> None:
    prompts = PromptSet.from_texts(["a", "b"], byte_tokenizer(), max_length=9, columns={"x": [0.1, 16777217]})
    assert prompts.columns["x"].dtype == torch.float32 and prompts.values("x", [0, 1]) == [0.1, 16777217]
    given = PromptSet.from_texts(["a", "b"], byte_tokenizer(), max_length=9, columns={"x": torch.tensor([[1], [2]])})
    assert given.values("x", [1]) == [[2]]


def test_cells_are_numbers_where_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,level,share,code,mixed,gap\n7,1,0.5,007,1,1\n8,-2,1.25,008,x,\n")
    prompts = PromptSet.from_file(tmp_path / "p.csv", byte_tokenizer(), max_length=9)
    assert prompts.texts() == ["7", "8"] and set(prompts.columns) == {"level", "share"}
    assert prompts.columns["level"].tolist() == [1, -2] and prompts.columns["share"].tolist() == [0.5, 1.25]
    assert prompts.host_columns == {"code": ["007", "008"], "mixed": ["1", "x"], "gap": ["1", ""]}
    assert {type(v) for values in prompts.host_columns.values() for v in values} == {str}


# Rows without a prompt


def test_every_bad_row_is_named_or_skipped(tmp_path: Path) -> None:
    bad = [{"prompt": None, "n": 1}, {"prompt": "", "n": 2}, {"n": 3}, {"prompt": 7, "n": 4}, {"prompt": [], "n": 5}]
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "n": 0}, *bad, {"prompt": "b", "n": 6}])
    with pytest.raises(
        ValueError, match=r"5 of 7 rows .*p.jsonl:2: .* null; .*:3: .*empty; .*:4: .*key 'prompt'.*:5: .*:6"
    ):
        PromptSet.from_file(file, byte_tokenizer(), max_length=9)
    prompts = PromptSet.from_file(file, byte_tokenizer(), max_length=9, on_bad_row="skip")
    assert prompts.texts() == ["a", "b"] and prompts.num_skipped == 5 and "5 skipped" in repr(prompts)
    assert prompts.columns["n"].tolist() == [0, 6], "columns go with their prompts"
    with pytest.raises(ValueError, match="rows have no prompt that can be used"):
        PromptSet.from_texts([None, ""], byte_tokenizer(), max_length=9, on_bad_row="skip")
    with pytest.raises(ValueError, match="on_bad_row: must be error or skip, got 'ignore'"):
        PromptSet.from_texts(["a"], byte_tokenizer(), max_length=9, on_bad_row="ignore")


def test_a_prompt_of_a_template(tmp_path: Path) -> None:
    rows = [{"question": "why", "choices": ["x", "y"], "n": 1}, {"question": "who", "choices": ["z"], "n": 2}]
    how = "Q: {question}\nA{{}}: {choices[0]}"
    assert texts(tmp_path, rows, prompt_template=how) == ["Q: why\nA{}: x", "Q: who\nA{}: z"]
    prompts = PromptSet.from_file(
        tmp_path / "p.jsonl", chatty(), max_length=99, prompt_template="{question}", chat=True
    )
    assert prompts.texts()[0] == "<user>why<eos><assistant>" and prompts.columns["n"].tolist() == [1, 2]
    assert prompts.host_columns["question"] == ["why", "who"], "what it is made of stays a column"
    assert PromptSet.from_texts(["a"], chatty(), max_length=9, prompt_template="<{prompt}>").texts() == ["<a>"]
    for template, says in (
        ("{answer}", "names 'answer', and the row has"), ("{choices}", "'choices' is a list; name a part"),
        ("{question", "cannot be filled"), ("{}", "names|cannot"), ("{choices[1]}", "jsonl:2: prompt_template"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            texts(tmp_path, rows, prompt_template=template)
    with pytest.raises(ValueError, match=r"p.jsonl:1: the prompt must be a text, got null"):
        texts(tmp_path, [{"question": None}], prompt_template="Q: {question}")


# Chats


def test_a_begun_answer_is_continued(tmp_path: Path) -> None:
    want = "<user>2+2?<eos><assistant>Sure: the"
    assert (
        texts(tmp_path, [{"prompt": BEGUN}]) == [want] == PromptSet.from_texts([BEGUN], chatty(), max_length=99).texts()
    )
    assert texts(tmp_path, [{"a": BEGUN}], prompt_key="a", last_turn="continue") == [want]
    empty = [USER, {"role": "assistant", "content": ""}]
    assert texts(tmp_path, [{"prompt": empty}]) == ["<user>2+2?<eos><assistant>"]


def test_an_answer_that_is_there_is_never_part_of_the_prompt_unasked(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"p.jsonl:2: the chat under 'messages' ends .*\(so do 1 of 2\).*--last-turn drop"
    ):
        texts(tmp_path, [{"messages": [USER]}, {"messages": BEGUN}], prompt_key="messages")
    got = texts(tmp_path, [{"messages": [USER]}, {"messages": BEGUN}], prompt_key="messages", last_turn="drop")
    assert got == ["<user>2+2?<eos><assistant>"] * 2
    with pytest.raises(ValueError, match="p.jsonl:1: .*more than the assistant's turns"):
        texts(tmp_path, [{"messages": BEGUN[1:]}], prompt_key="messages", last_turn="drop")


def test_a_system_prompt_is_put_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, USER]
    rows = [{"prompt": [USER]}, {"prompt": own}, {"prompt": "hi"}]
    assert texts(tmp_path, rows, system_prompt="Be brief.", chat=True) == [
        "<system>Be brief.<eos><user>2+2?<eos><assistant>",
        "<system>own<eos><user>2+2?<eos><assistant>",
        "<system>Be brief.<eos><user>hi<eos><assistant>",
    ]  # fmt: skip


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_handed_to_the_template(tmp_path: Path, as_text: bool) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"prompt": [USER], "tools": json.dumps([tool]) if as_text else [tool]}, {"prompt": [USER], "tools": None}]
    first, second = texts(tmp_path, rows)
    assert first == f"<tools>{json.dumps([tool])}</tools><user>2+2?<eos><assistant>"
    assert second == "<user>2+2?<eos><assistant>"
    assert texts(tmp_path, [{"prompt": [USER], "tools": "hammer"}]) == [second], "a column that only bears the name"
    with pytest.warns(UserWarning, match="tools: the chat template reads no tools"):
        texts(tmp_path, rows, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")


def test_another_template_and_its_variables(tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text("{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}")
    rows = [{"prompt": [USER]}]
    for template in (tmp_path / "short.jinja", str(tmp_path / "short.jinja"), (tmp_path / "short.jinja").read_text()):
        assert texts(tmp_path, rows, chat_template=template, chat_template_kwargs={"mark": "!"}) == ["2+2?!"]
    thinking = texts(tmp_path, rows, chat_template_kwargs={"enable_thinking": False})
    assert thinking == ["<user>2+2?<eos><assistant><think></think>"]
    for options, says in (
        ({"chat_template_kwargs": {"thinking": False}}, "'thinking': the template reads no variable of that name"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools': is set by other means"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs: must be a mapping"),
        (
            {"chat_template": "none.jinja"},
            "chat_template: must be a Jinja template or a file with one, got 'none.jinja' .No such file",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            texts(tmp_path, rows, **options)
    for name, value in (("system_prompt", "x"), ("chat_template", CHAT), ("last_turn", "drop")):
        with pytest.raises(ValueError, match=f"{name}: is of chats, and the prompts are plain strings"):
            texts(tmp_path, [{"prompt": "a"}], **{name: value})


def test_trap_33_a_chat_is_not_cut_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "n": 1}, {"prompt": [{"role": "user", "content": "x" * 50}], "n": 2}]
    with pytest.raises(ValueError, match=r"1 of 2 prompts are longer than 30 tokens .*p.jsonl:2; .*overlong=\"drop\""):
        texts(tmp_path, rows, max_length=30)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than 30 .* left out"):
        prompts = PromptSet.from_file(tmp_path / "p.jsonl", chatty(), max_length=30, overlong="drop")
    assert prompts.texts() == ["<user>2+2?<eos><assistant>"] and prompts.columns["n"].tolist() == [1]
    assert prompts.num_dropped == 1 and "1 dropped" in repr(prompts)
    with pytest.warns(UserWarning, match="cut to their last 30"):
        assert texts(tmp_path, rows, max_length=30, overlong="cut")[1] == "x" * 18 + "<eos><assistant>"
    with pytest.raises(ValueError, match="longer than 3 tokens"):
        PromptSet.from_texts(["abcdef"], byte_tokenizer(), max_length=3, overlong="error")


# The time


def test_a_run_that_goes_on_has_the_prompts_of_its_first_rendering() -> None:
    tokenizer = chatty("{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")

    def env(at: int | None = None) -> BanditEnv:
        prompts = PromptSet.from_texts([[USER], [USER], "x"], tokenizer, max_length=99, chat=True, rendered_at=at)
        return BanditEnv(prompts, lambda td: td["masks", "response"].sum(-1).float(), num_prompts=2)

    first = env(10**9)
    assert first.prompts.texts()[2].endswith(" September 2001x")
    first.reset()
    state, want = copy.deepcopy(first.state_dict()), first.reset()
    later = env()
    assert later.prompts.texts() != first.prompts.texts(), "now is not 2001"
    later.load_state_dict(state)
    got = later.reset()
    assert (
        later.prompts.texts() == first.prompts.texts() and (got["tokens", "prompt"] == want["tokens", "prompt"]).all()
    )
    assert later.rewards.prompts is later.prompts and pickle.loads(pickle.dumps(later.prompts)).rendered_at == 10**9
    assert PromptSet.from_texts(["a"], tokenizer, max_length=9).rendered_at is None
