"""PromptSet and PromptStream."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from torchbandit.prompts import PromptSet, PromptStream

BOS, EOS, PAD = 257, 258, 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bos_tokenizer(eos: bool = False, chat: bool = True):
    """The byte tokenizer, made to put <bos> in front of every text (and <eos> behind it)."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>" if eos else "<bos> $A", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


def byte_ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def real_rows(prompts: PromptSet, prompt_id=None) -> list[list[int]]:
    ids, mask, _ = prompts.gather(torch.arange(len(prompts)) if prompt_id is None else prompt_id)
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# The table


def test_gather_left_pads_to_the_longest_prompt():
    prompts = PromptSet.from_texts(["abc", "a", "abcd"], byte_tokenizer(), max_length=10)
    ids, mask, columns = prompts.gather(torch.tensor([1, 2, 1]))
    assert prompts.width == 4 and len(prompts) == 3 and columns is None and prompts.is_dense
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    a, b, c, d = byte_ids("abcd")
    assert ids.tolist() == [[PAD, PAD, PAD, a], [a, b, c, d], [PAD, PAD, PAD, a]]
    assert mask.tolist() == [[False] * 3 + [True], [True] * 4, [False] * 3 + [True]]
    assert prompts.lengths.tolist() == [3, 1, 4]


@given(rows=st.lists(st.lists(st.integers(0, 258), min_size=1, max_size=40), min_size=1, max_size=12), data=st.data())
@settings(max_examples=60, deadline=None)
def test_dense_and_flat_tables_give_the_rows_back(rows, data):
    prompts = PromptSet.from_tokens(rows, tokenizer=byte_tokenizer())
    width = max(map(len, rows))
    assert prompts.is_dense == (2 * sum(map(len, rows)) >= width * len(rows))
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=20))
    ids, mask, _ = prompts.gather(torch.tensor(picks))
    for i, pick in enumerate(picks):
        pad = width - len(rows[pick])
        assert ids[i].tolist() == [PAD] * pad + rows[pick]
        assert mask[i].tolist() == [False] * pad + [True] * len(rows[pick])


def test_one_long_prompt_among_short_ones_makes_the_table_flat():
    rows = [[1, 2]] * 50 + [list(range(200))]
    prompts = PromptSet.from_tokens(rows, tokenizer=byte_tokenizer())
    assert not prompts.is_dense and "flat" in repr(prompts)
    assert real_rows(prompts) == rows


def test_pad_may_equal_eos_and_stand_in_a_prompt():
    prompts = PromptSet.from_tokens([[EOS, 5], [7]], tokenizer=byte_tokenizer(pad_is_eos=True))
    ids, mask, _ = prompts.gather(torch.tensor([0, 1]))
    assert prompts.pad_id == EOS
    assert ids.tolist() == [[EOS, 5], [EOS, 7]] and mask.tolist() == [[True, True], [False, True]]


def test_pad_id_is_in_the_vocabulary():
    class Odd:  # PreTrainedTokenizer refuses a pad id of -1, the config of some checkpoints has one
        def __init__(self, pad, eos):
            self.pad_token_id, self.eos_token_id, self.bos_token_id = pad, eos, None

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 2}

    got = [PromptSet.from_tokens([[1]], tokenizer=Odd(*ids)).pad_id for ids in ((1, 2), (None, 2), (-1, 2), (3, 9))]
    assert got == [1, 2, 2, 0]
    with pytest.raises(ValueError, match="pad or an eos token, got neither"):
        PromptSet.from_tokens([[1]], tokenizer=Odd(None, None))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ready_tokens_with_a_mask_of_either_side(side):
    ids = torch.arange(1, 9).view(2, 4)
    mask = torch.tensor([[True] * 4, [False] * 3 + [True] if side == "left" else [True] + [False] * 3])
    prompts = PromptSet.from_tokens((ids, mask), tokenizer=byte_tokenizer())
    assert real_rows(prompts) == [[1, 2, 3, 4], [8] if side == "left" else [5]]


def test_gather_and_stream_read_nothing_back():
    """G1 on a CPU: no operator that hands a number to Python runs in a draw."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Guard(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim"), name
            return func(*args, **(kwargs or {}))

    for rows in ([[1, 2], [3]], [[1]] * 9 + [list(range(40))]):
        prompts = PromptSet.from_tokens(rows, tokenizer=byte_tokenizer(), columns={"x": list(range(len(rows)))})
        stream = PromptStream(prompts, seed=1)
        with Guard():
            for _ in range(4):
                prompts.gather(stream.next(2)[0])


def test_gather_checks_metadata():
    prompts = PromptSet.from_tokens([[1]], tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"prompt_id: must be int64 \[n\] on cpu, got int32 \[1\]"):
        prompts.gather(torch.zeros(1, dtype=torch.int32))


def test_to_moves_table_and_columns():
    prompts = PromptSet.from_tokens([[1, 2], [3]], tokenizer=byte_tokenizer(), columns={"x": [1, 2]})
    moved = prompts.to("meta")
    ids, mask, columns = moved.gather(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert moved.columns["x"].device.type == "meta"  # gather would copy them at every step
    assert {moved.device.type, ids.device.type, mask.device.type, columns["x"].device.type} == {"meta"}
    assert ids.shape == (3, 2) and prompts.device.type == "cpu" and len(moved) == 2


# Texts and chats


def test_trap_07_double_or_missing_bos():
    tokenizer = bos_tokenizer()
    plain = PromptSet.from_texts(["hi", "<bos>hi"], tokenizer, max_length=50)
    assert real_rows(plain) == [[BOS, *byte_ids("hi")]] * 2
    # The wrong variant: the tokenizer as it is puts a second BOS before one that the text brings.
    assert tokenizer("<bos>hi")["input_ids"][:2] == [BOS, BOS]
    chat = PromptSet.from_texts(["hi"], tokenizer, max_length=50, chat=True)
    assert real_rows(chat) == [[BOS, *byte_ids("[user]hi[assistant]")]]
    messages = [[{"role": "user", "content": "hi"}]]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert real_rows(PromptSet.from_texts(messages, tokenizer, max_length=50)) == want
    # a template without a BOS is one that the model was trained with: none is added
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    bare = PromptSet.from_texts(["hi"], tokenizer, max_length=50, chat=True)
    assert real_rows(bare) == [byte_ids("[user]hi[assistant]")]


def test_an_eos_that_the_tokenizer_appends_is_left_out():
    prompts = PromptSet.from_texts(["hi"], bos_tokenizer(eos=True), max_length=50)
    assert real_rows(prompts) == [[BOS, *byte_ids("hi")]]


def test_a_tokenizer_without_bos_adds_none():
    assert real_rows(PromptSet.from_texts(["hi"], byte_tokenizer(), max_length=50)) == [byte_ids("hi")]


def test_long_prompts_keep_bos_and_end_and_say_so():
    with pytest.warns(
        UserWarning, match=r"max_length: 1 of 2 prompts are longer than 4 .*longest has 7.*last 4"
    ) as got:
        prompts = PromptSet.from_texts(["abcdef", "ab"], bos_tokenizer(), max_length=4)
    assert got[0].filename == __file__
    assert real_rows(prompts) == [[BOS, *byte_ids("def")], [BOS, *byte_ids("ab")]]
    assert prompts.texts() == ["def", "ab"] and prompts.num_truncated == 1 and "1 cut" in repr(prompts)
    with pytest.warns(UserWarning):
        chat = PromptSet.from_texts(["abcdef"], bos_tokenizer(), max_length=13, chat=True, overlong="cut")
    assert real_rows(chat) == [[BOS, *byte_ids("f[assistant]")]]
    with pytest.warns(UserWarning):
        assert real_rows(PromptSet.from_texts(["abc"], bos_tokenizer(), max_length=1)) == [byte_ids("c")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptSet.from_texts(["abc"], bos_tokenizer(), max_length=4)


def test_texts_are_what_the_policy_reads():
    tokenizer = bos_tokenizer()
    prompts = PromptSet.from_texts(["hi", "you"], tokenizer, max_length=50, chat=True)
    assert prompts.texts(torch.tensor([1, 0, 1])) == [f"<bos>[user]{text}[assistant]" for text in ("you", "hi", "you")]
    ready = PromptSet.from_tokens([byte_ids("you"), byte_ids("hi")], tokenizer=tokenizer)
    assert ready.texts([1]) == ["hi"] and ready.texts() == ["you", "hi"]


def test_a_pickled_set_gives_the_same():
    prompts = PromptSet.from_texts(["ab", "c"], byte_tokenizer(), max_length=9, columns={"x": [1, 2], "s": ["p", "q"]})
    again = pickle.loads(pickle.dumps(prompts))
    assert real_rows(again) == real_rows(prompts) and again.fingerprint == prompts.fingerprint
    assert again.host_columns == {"s": ["p", "q"]}


# Columns


def test_columns_of_numbers_travel_and_strings_stay():
    prompts = PromptSet.from_texts(
        ["a", "b"],
        byte_tokenizer(),
        max_length=4,
        columns={
            "int": [1, 2],
            "float": [1, 2.5],
            "bool": [True, False],
            "vector": [[1, 2, 3], [4, 5, 6]],
            "tensor": torch.ones(2, 2, dtype=torch.float16),
            "text": ["x", None],
            "object": [{"k": 1}, {}],
        },
    )
    _, _, columns = prompts.gather(torch.tensor([1, 1, 0]))
    assert columns.batch_size == (3,)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in columns.items()} == {
        "int": (torch.int64, (3,)),
        "float": (torch.float32, (3,)),
        "bool": (torch.bool, (3,)),
        "vector": (torch.int64, (3, 3)),
        "tensor": (torch.float16, (3, 2)),
    }
    assert columns["vector"].tolist() == [[4, 5, 6], [4, 5, 6], [1, 2, 3]]
    assert columns["float"].tolist() == [2.5, 2.5, 1]
    assert prompts.host_columns == {"text": ["x", None], "object": [{"k": 1}, {}]}


@pytest.mark.parametrize(
    "values, message",
    [
        ([1], "column 'x': must have one value a prompt, 3, got 1"),
        (torch.zeros(2, 3), "column 'x': must have one value a prompt, 3, got 2"),
        (torch.tensor(1), "column 'x': must have one value a prompt, 3, got 0"),
    ],
)
def test_bad_columns(values, message):
    with pytest.raises(ValueError, match=message):
        PromptSet.from_texts(["a", "b", "c"], byte_tokenizer(), max_length=4, columns={"x": values})


# Files and datasets


def test_jsonl_with_columns_chats_and_blank_lines(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"q": "hi", "n": 3, "s": "x"},
        "",
        {"q": [{"role": "user", "content": "yo"}], "n": 4, "s": "y"},
    )
    prompts = PromptSet.from_jsonl(path, bos_tokenizer(), prompt_key="q", max_length=50)
    assert prompts.texts() == ["hi", "<bos>[user]yo[assistant]"]
    assert prompts.columns["n"].tolist() == [3, 4] and prompts.host_columns == {"s": ["x", "y"]}
    only = PromptSet.from_jsonl(str(path), bos_tokenizer(), prompt_key="q", max_length=50, columns=["s"])
    assert not only.columns and list(only.host_columns) == ["s"]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "p.jsonl: must hold at least one row like .* got none"),
        (["", "  "], "p.jsonl: must hold at least one row"),
        ([{"prompt": "a"}, "{oops"], r"p.jsonl:2: must be one JSON object in UTF-8, got \{oops"),
        ([{"prompt": "a"}, "", [1]], r"p.jsonl:3: must be one JSON object, a row with named values, got list"),
        ([{"prompt": "a"}, {"text": "b"}], r"p.jsonl:2: must have the key 'prompt', got \['text'\]; see prompt_key"),
        ([{"prompt": "a"}, {"prompt": 7}], r"p.jsonl:2: the prompt must be a string, or a list of mess.* got int 7"),
        ([{"prompt": []}], r"p.jsonl:1: the prompt must hold at least one token, got '\[\]', which is empty"),
        ([{"prompt": ["a"]}], r"p.jsonl:1: the prompt must be a string"),
        ([{"prompt": "a"}, {"prompt": ""}], r"p.jsonl:2: the prompt must hold at least one token, got ''"),
        ([{"text": "a"}, {"text": "b"}], r"p.jsonl:1: must have the key 'prompt', got \['text'\], as all 2 rows"),
        ([{"prompt": [{"role": "user", "content": None}]}], r"p.jsonl:1: a message of the prompt must have content"),
        ([r'{"prompt": "x \ud83d"}'], r"p.jsonl:1: 'prompt' holds half a character, the lone surrogate \\ud83d"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], r"p.jsonl:1: .*the tokenizer has none; set tokenizer.chat"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        PromptSet.from_jsonl(write(tmp_path / "p.jsonl", *lines), byte_tokenizer(), max_length=9)


def test_missing_undecodable_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read: No such file.*check the path"):
        PromptSet.from_jsonl(tmp_path / "none.jsonl", byte_tokenizer(), max_length=9)
    with pytest.raises(ValueError, match="must hold data files .* got none; check the path"):
        PromptSet.from_jsonl(tmp_path, byte_tokenizer(), max_length=9)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl:2: must be one JSON object in UTF-8"):
        PromptSet.from_jsonl(tmp_path / "latin.jsonl", byte_tokenizer(), max_length=9)
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert PromptSet.from_jsonl(tmp_path / "marked.jsonl", byte_tokenizer(), max_length=9).texts() == ["a"]


def test_bad_texts_and_options():
    with pytest.raises(ValueError, match=r"max_length: must be an int of at least 1 .* got 0"):
        PromptSet.from_texts(["a"], byte_tokenizer(), max_length=0)
    with pytest.raises(ValueError, match="texts: must be a list of strings, got one string"):
        PromptSet.from_texts("a", byte_tokenizer(), max_length=9)
    with pytest.raises(ValueError, match="prompts: must be at least one, got none"):
        PromptSet.from_texts([], byte_tokenizer(), max_length=9)
    with pytest.raises(ValueError, match=r"texts\[1\]: the tokenizer's chat template cannot render .* no system"):
        tokenizer = bos_tokenizer()
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
        )
        texts = ["a", [{"role": "system", "content": "b"}]]
        PromptSet.from_texts(texts, tokenizer, max_length=9, chat=True)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([[1], [259, 2]], r"tokens\[1\]: token ids must be 0 to 258.*got 259"),
        ([[1], [], [-1]], r"tokens\[1\]: must hold at least one token"),
        ([[1, -1]], r"tokens\[0\]: token ids must be 0 to 258.*got -1"),
        ([[1], ["a"]], r"tokens\[1\]: token ids must be ints"),
        ([[1], [0.5]], r"tokens\[1\]: token ids must be ints"),
        ([[2**70]], r"tokens\[0\]: token ids must be ints"),
        ((torch.ones(1, 3).long(), torch.tensor([[True, False, True]])), r"tokens\[0\]: .* got a mask with holes"),
        ((torch.ones(1, 3).long(), torch.ones(1, 3)), r"mask bool \[N, L\], got int64 \[1, 3\] and float32 \[1, 3\]"),
        ((torch.ones(2, 3).long(), torch.tensor([[True] * 3, [False] * 3])), r"tokens\[1\]: must hold at least one"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        PromptSet.from_tokens(tokens, tokenizer=byte_tokenizer())


def test_dataset_of_dicts():
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    for dataset in (rows, iter(rows)):
        prompts = PromptSet.from_dataset(dataset, byte_tokenizer(), max_length=9)
        assert prompts.texts() == ["a", "b"] and prompts.columns["n"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="row 1: must have the key 'prompt'"):
        PromptSet.from_dataset([{"prompt": "a"}, {"p": "b"}], byte_tokenizer(), max_length=9)
    with pytest.raises(ValueError, match="dataset: must hold at least one row"):
        PromptSet.from_dataset([], byte_tokenizer(), max_length=9)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_hugging_face_dataset(form):
    datasets = pytest.importorskip("datasets", reason="the datasets package is not installed")
    hf = datasets.Dataset.from_list(
        [{"q": "a", "n": 1, "v": [1.0, 2.0], "s": "x"}, {"q": "b", "n": 2, "v": [3.0, 4.0], "s": "y"}]
    )
    prompts = PromptSet.from_dataset(hf.with_format(form), byte_tokenizer(), prompt_key="q", max_length=9)
    assert prompts.texts() == ["a", "b"] and prompts.columns["n"].tolist() == [1, 2]
    assert prompts.columns["v"].tolist() == [[1, 2], [3, 4]] and prompts.host_columns == {"s": ["x", "y"]}
    streamed = PromptSet.from_dataset(hf.to_iterable_dataset(), byte_tokenizer(), prompt_key="q", max_length=9)
    assert real_rows(streamed) == real_rows(prompts)
    with pytest.raises(ValueError, match="row 0: must have the key 'prompt', got .*, as all 2 rows; see prompt_key"):
        PromptSet.from_dataset(hf, byte_tokenizer(), max_length=9)
    with pytest.raises(ValueError, match=r"dataset: must be one split, got a dict of splits \['train'\]"):
        PromptSet.from_dataset(datasets.DatasetDict(train=hf), byte_tokenizer(), max_length=9)


def test_repr_says_what_there_is():
    prompts = PromptSet.from_texts(["a", "abc"], byte_tokenizer(), max_length=9, columns={"n": [1, 2], "s": ["x", "y"]})
    assert repr(prompts) == "PromptSet(2 prompts; 1 to 3 tokens, mean 2.0; dense on cpu; n: int64 [2]; s: host)"


def test_many_prompts_are_tokenised_in_batches(tmp_path, monkeypatch):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}", "n": i}) + "\n" for i in range(20_000)))
    tokenizer, calls = byte_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    prompts = PromptSet.from_jsonl(path, tokenizer, max_length=512)
    assert len(calls) < 10
    assert len(prompts) == 20_000 and prompts.columns["n"][-1] == 19_999
    assert prompts.texts([17_000]) == ["prompt 17000"]
    assert real_rows(prompts, torch.tensor([17_000])) == [byte_ids("prompt 17000")]


# The stream


def take(stream: PromptStream, nums: list[int]) -> list[tuple[int, int]]:
    pairs = []
    for num in nums:
        prompt_id, group_id = stream.next(num)
        assert prompt_id.shape == group_id.shape == (num,)
        assert prompt_id.dtype == group_id.dtype == torch.int64
        pairs += zip(group_id.tolist(), prompt_id.tolist(), strict=True)
    return pairs


def make_stream(num_prompts: int, seed: int, rank: int = 0, world_size: int = 1) -> PromptStream:
    stream = PromptStream(num_prompts, seed)
    stream.shard(rank, world_size)
    return stream


@st.composite
def schedules(draw):
    num_prompts = draw(st.integers(1, 12))
    nums = draw(st.lists(st.integers(1, num_prompts), min_size=1, max_size=8))
    return num_prompts, nums, draw(st.integers(-3, 2**63)), draw(st.integers(1, 5))


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_ranks_together_cover_each_epoch_once(schedule):
    num_prompts, nums, seed, world_size = schedule
    pairs = [
        pair for rank in range(world_size) for pair in take(make_stream(num_prompts, seed, rank, world_size), nums)
    ]
    total = sum(nums) * world_size
    assert sorted(draw for draw, _ in pairs) == list(range(total))  # unique over steps and ranks
    by_draw = dict(pairs)
    for first in range(0, total - num_prompts + 1, num_prompts):
        assert sorted(by_draw[first + i] for i in range(num_prompts)) == list(range(num_prompts))
    tail = [by_draw[draw] for draw in range(total - total % num_prompts, total)]
    assert max(Counter(tail).values(), default=1) == 1
    assert by_draw == dict(take(make_stream(num_prompts, seed), [1] * total))  # whatever the world size and batch


@given(schedules(), st.integers(1, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_resume_is_exact_also_with_another_world_size(schedule, new_world, data):
    num_prompts, nums, seed, world_size = schedule
    stop = data.draw(st.integers(0, len(nums)))
    before, streams = [], [make_stream(num_prompts, seed, rank, world_size) for rank in range(world_size)]
    for stream in streams:
        before += take(stream, nums[:stop])
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    same = make_stream(num_prompts, 0)
    same.shard(world_size - 1, world_size)
    take(same, nums[:1])  # a stream that has already moved
    same.load_state_dict(states[0])
    assert take(same, nums[stop:]) == take(streams[-1], nums[stop:])
    after = []
    for rank in range(new_world):
        resumed = PromptStream(num_prompts, seed=99)
        resumed.shard(rank, new_world)
        resumed.load_state_dict(states[0])
        after += take(resumed, nums)
    total = sum(nums[:stop]) * world_size + sum(nums) * new_world
    assert dict(before + after) == dict(take(make_stream(num_prompts, seed), [1] * total))
    assert len(before + after) == total


def test_resume_in_another_process_in_the_middle_of_an_epoch():
    stream = make_stream(7, seed=5, rank=1, world_size=2)
    take(stream, [3, 2])
    code = (
        "import json, sys; from torchbandit.prompts import PromptStream; s = PromptStream(7, 0); s.shard(1, 2);"
        "s.load_state_dict(json.loads(sys.argv[1])); print(json.dumps([t.tolist() for t in s.next(6)]))"
    )
    state = json.dumps(stream.state_dict())
    out = subprocess.run([sys.executable, "-c", code, state], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [t.tolist() for t in stream.next(6)]


def test_epochs_and_seeds_differ():
    def epochs(seed):
        stream = PromptStream(50, seed)
        return [stream.next(50)[0].tolist() for _ in range(3)]

    orders = epochs(0) + epochs(1) + epochs(2**32) + epochs(-1)
    assert len({tuple(order) for order in orders}) == 12


def test_the_order_of_a_seed_is_fixed():
    """A checkpoint of an older version goes on with the same prompts."""
    assert PromptStream(8, seed=0).next(8)[0].tolist() == [4, 6, 2, 5, 7, 0, 1, 3]


def test_draws_do_not_share_memory_with_the_permutation():
    stream = PromptStream(6, seed=3)
    start = stream.state_dict()
    drawn, _ = stream.next(6)
    kept = drawn.clone()
    drawn.zero_()
    stream.load_state_dict(start)
    assert torch.equal(stream.next(6)[0], kept)


def test_stream_of_a_prompt_set_lives_on_its_device():
    prompts = PromptSet.from_tokens([[1], [2]], tokenizer=byte_tokenizer()).to("meta")
    assert {t.device.type for t in PromptStream(prompts).next(2)} == {"meta"}
    stream = PromptStream(3)
    stream.next(3), stream.next(2)
    assert stream.epoch == 1 and stream.draws == 5


def test_bad_stream_arguments():
    stream = PromptStream(3)
    for num in (0, 4):
        with pytest.raises(ValueError, match=f"num_prompts: must be 1 to 3, .* got {num}; lower num_prompts"):
            stream.next(num)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank: must be 0 to world_size - 1"):
            stream.shard(rank, world_size)
    with pytest.raises(ValueError, match="prompts: must be at least 1, got 0"):
        PromptStream(0)
    with pytest.raises(ValueError, match="state: must have the key 'draws', got"):
        stream.load_state_dict({"seed": 1})


def test_a_state_of_other_prompts_is_refused():
    tokenizer = byte_tokenizer()
    sets = [
        PromptSet.from_texts(t, tokenizer, max_length=9) for t in (["ab", "c"], ["ac", "c"], ["a", "bc"], ["c", "ab"])
    ]
    assert len({prompts.fingerprint for prompts in sets}) == 4
    state = PromptStream(sets[0]).state_dict()
    PromptStream(PromptSet.from_texts(["ab", "c"], tokenizer, max_length=9)).load_state_dict(state)
    for prompts in sets[1:]:
        with pytest.raises(ValueError, match=r"state: fingerprint must be .* resume with the prompt file"):
            PromptStream(prompts).load_state_dict(state)
    with pytest.raises(ValueError, match="state: num_prompts must be 3, as of these prompts, got 2"):
        PromptStream(3).load_state_dict(state)
