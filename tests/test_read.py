"""The one reader: what people bring comes out as the same rows, and what cannot be read is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from torchbandit.read import Cell, Row, check_text, is_stream, rows

ROWS = [{"prompt": f"word {i}", "answer": str(i * 7 % 11), "level": i % 3} for i in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = "\r\n".join(["prompt,answer,level", *(",".join(map(str, row.values())) for row in ROWS)]).encode()
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def read(source: Any, **options: Any) -> list[Row]:
    return list(rows(source, **({"option": "--prompts", "key": "prompt"} | options)))


def values(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [row.values for row in read(source, **options)]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


TEXT = [{name: str(value) for name, value in row.items()} for row in ROWS]
"""As a CSV file has them: a cell is text."""


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("a.jsonl", JSONL, ROWS),
        ("A.JSONL", JSONL, ROWS),
        ("a.ndjson", JSONL, ROWS),
        ("a.json", JSONL, ROWS),
        ("a.json", json.dumps(ROWS).encode(), ROWS),
        ("a.json", json.dumps(ROWS, indent=1).encode(), ROWS),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), ROWS),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), ROWS),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL, ROWS),
        ("a.jsonl", JSONL.replace(b"\n", b"\r\n"), ROWS),
        ("a.jsonl", b"\n" + JSONL.replace(b"\n", b"\n\n").rstrip(), ROWS),
        ("a.jsonl", JSONL.decode().encode("utf-16"), ROWS),
        ("a.csv", CSV, TEXT),
        ("a.CSV", b"\xef\xbb\xbf" + CSV, TEXT),
        ("a.csv", CSV.replace(b",", b";"), TEXT),
        ("a.tsv", CSV.replace(b",", b"\t").replace(b"\r\n", b"\n"), TEXT),
        ("a", JSONL, ROWS),
        ("a", json.dumps(ROWS).encode(), ROWS),
        ("a", CSV, TEXT),
        ("a.data", CSV.replace(b",", b"\t"), TEXT),
        ("a.txt", b"\n".join(r["prompt"].encode() for r in ROWS), [{"prompt": r["prompt"]} for r in ROWS]),
        ("a", b"\r\n".join(r["prompt"].encode() for r in ROWS), [{"prompt": r["prompt"]} for r in ROWS]),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes, want: Any, packed: str) -> None:
    assert values(put(tmp_path / (name + packed.upper()), PACK[packed](content) if packed else content)) == want
    if packed:  # by the first bytes, where the name does not say so
        assert values(put(tmp_path / name, PACK[packed](content))) == want


def test_a_name_that_is_wrong_about_compression(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a.jsonl.gz", JSONL)) == ROWS


def test_a_newline_byte_alone_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\rEight"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert values(put(tmp_path / "a.jsonl", (line + "\n").encode() * 2)) == [{"prompt": text}] * 2
    bare = text.replace("\r", "")
    assert values(put(tmp_path / "a.txt", (bare + "\n").encode() * 2)) == [{"prompt": bare}] * 2
    assert values(put(tmp_path / "a.csv", f"prompt,n\n{bare},1\n".encode())) == [{"prompt": bare, "n": "1"}]


def test_cells_may_be_quoted_long_and_hold_newlines(tmp_path: Path) -> None:
    long = "x" * 200_000
    file = put(tmp_path / "a.csv", f'prompt,note\r\n"a ""b"", c\nd",1\r\n\r\n{long},\r\n,é\r\n'.encode())
    found = read(file)
    assert [row.values for row in found] == [
        {"prompt": 'a "b", c\nd', "note": "1"}, {"prompt": long, "note": ""}, {"prompt": "", "note": "é"},
    ]  # fmt: skip
    assert [row.where for row in found] == [f"{file}:{line}" for line in (2, 5, 6)]
    assert type(found[0].values["note"]) is Cell
    assert values(put(tmp_path / "pandas.csv", b",prompt\n0,a\n1,b\n")) == [
        {"Unnamed: 0": "0", "prompt": "a"}, {"Unnamed: 0": "1", "prompt": "b"},
    ]  # fmt: skip


def test_places_are_lines_as_an_editor_counts_them(tmp_path: Path) -> None:
    assert [row.where for row in read(put(tmp_path / "a.jsonl", b'\n{"a": 1}\n\n{"a": 2}'))] == [
        f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4",
    ]  # fmt: skip
    array = put(tmp_path / "a.json", b'[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}]\n')
    assert [row.where for row in read(array)] == [f"{array}:{line}" for line in (2, 4, 5)]


def test_documents_are_parted_by_blank_lines(tmp_path: Path) -> None:
    file = put(tmp_path / "a.txt", b"one\r\n more\r\n\r\n \t\r\n\r\ntwo\r\n")
    found = read(file, key="text", documents=True)
    assert [row.values for row in found] == [{"text": "one\n more"}, {"text": "two"}]
    assert [row.where for row in found] == [f"{file}:1", f"{file}:6"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', r"a.jsonl:2: must be one JSON object in UTF-8, got .*at column 8"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl:2: must be one JSON object, a row with named values, got list \[1\]"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl:2: must be one JSON object in UTF-8.* at column 8\)"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, r"a.jsonl:2: must be one JSON object"),
        ("a.json", b'[{"a": 1},\n {"a": oops}]', r"a.json:2: must be one JSON object .*oops.* at column 8\)"),
        ("a.json", b'[{"a": 1},\n {"a": 2}\n', r"a.json:3: the array must end with \]; is the file whole\?"),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', r"a.json:2: the array must have a comma between two rows"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}', r"a.json: must hold one array, got '\{\"a\": 2\}' behind its end"),
        ("a.json", b'[{"a": 1},\n 7]', r"a.json:2: must be one JSON object, a row with named values, got int 7"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a.csv:3: must have 2 cells, as the header has \(a, b\), got 1; quote"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", r"a.csv:3: must have 2 cells.* got 3; quote"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', r"a.csv:3: cannot be read as a row of cells .*check its quotes"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: the header must name each column once, got 'a' twice"),
        ("a.csv", b"a\n1\n\xe9\n", r"a.csv:3: .*UTF-8, got .* at column 1\)"),
        ("a.txt", b'{"prompt": "a"}\n', r"a.txt:1: must be text, as the name says, got a JSON object; name the file"),
        ("a.jsonl.gz", gzip.compress(JSONL * 99)[:-20], r"a.jsonl.gz: its compression is broken or ends too early"),
        ("a.jsonl.xz", lzma.compress(JSONL * 99)[:-20], r"a.jsonl.xz: its compression is broken or ends too early"),
        ("a.jsonl.bz2", bz2.compress(JSONL * 99)[:-20], r"a.jsonl.bz2: its compression is broken or ends too early"),
        ("a.xlsx", b"PK\x03\x04 and so on", r"a.xlsx: cannot be read: it is a zip archive \(or an Excel table\)"),
        ("a.bin", b"\0\1\2\3", r"a.bin: cannot be read: its bytes are no text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("documents", [False, True])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, says: str, documents: bool) -> None:
    with pytest.raises(ValueError, match=says):
        read(put(tmp_path / name, content), documents=documents)


def test_folders_globs_and_splits(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.JSONL"):
        put(tmp_path / name, json.dumps({"prompt": name}).encode())
    (tmp_path / ".hidden").mkdir()
    for name in ("README.md", ".gitattributes", "_SUCCESS", ".hidden/x.jsonl"):
        put(tmp_path / name, b"about")
    both = [{"prompt": "a.JSONL"}, {"prompt": "b.jsonl"}]
    assert (
        values(tmp_path) == both and values(f"{tmp_path}/*.[jJ]*") == both and values(f"{tmp_path}/**/b*") == both[1:]
    )
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub" / "test-00000.jsonl.gz", gzip.compress(b'{"prompt": "t"}'))
    with pytest.raises(ValueError, match=r"must be one split, got files of \(no split\), test; write .*:train, or a g"):
        read(tmp_path)
    assert values(f"{tmp_path}:test") == [{"prompt": "t"}] == values(f"{tmp_path}/sub")
    with pytest.raises(ValueError, match="has no file of a split 'dev', but"):
        read(f"{tmp_path}:dev")
    with pytest.raises(ValueError, match=r"only a folder or a dataset of the hub has splits, and .*b.jsonl is a file"):
        read(f"{tmp_path}/b.jsonl:train")
    put(tmp_path / "picture.png", b"")
    with pytest.raises(ValueError, match=r"must hold data files alone .* got picture.png; name the files with a glob"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["none.jsonl", "/none/at/all", "./none", "none.csv.gz", "tests/none", "a b"])
def test_what_is_not_there_is_named_and_the_hub_is_not_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ValueError, match=f"{name}: cannot be read: No such file or directory; check --prompts"):
        read(name)
    with pytest.raises(ValueError, match="none.jsonl: cannot be read: no file matches"):
        read("*none.jsonl")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(JSONL)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    assert is_stream(tmp_path / "pipe") and values(tmp_path / "pipe") == ROWS
    writer.join()
    assert is_stream("-") and not is_stream(tmp_path) and not is_stream(tmp_path / "none")


@pytest.mark.parametrize(("content", "want"), [(JSONL, ROWS), (CSV, TEXT), (json.dumps(ROWS, indent=1).encode(), ROWS)])
def test_stdin(content: bytes, want: Any) -> None:
    code = "import json; from torchbandit.read import rows; print(json.dumps(list(rows('-', option='', key='prompt'))))"
    done = subprocess.run([sys.executable, "-c", code], input=content, capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert [row for _, row in found] == want and found[0][0].startswith("<stdin>:")


def test_stdin_is_streamed() -> None:
    """The first rows are there before the input ends; it need not fit into memory."""
    code = "from torchbandit.read import rows; print(next(rows('-', option='', key='prompt')).values['n'], flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"n": 1, "fill": "%s"}\n' % (b"x" * 200_000))
        process.stdin.flush()
        assert process.stdout.readline() == b"1\n"
        process.stdin.close()


def test_parquet_and_arrow(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.feather
    import pyarrow.parquet

    table = arrow.Table.from_pylist([row | {"chat": [{"role": "user"}], "none": None} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name, new in (("file.arrow", arrow.ipc.new_file), ("stream.arrow", arrow.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as sink:
            sink.write_table(table)
    for name in ("a.parquet", "a.feather", "file.arrow", "stream.arrow"):
        content = (tmp_path / name).read_bytes()
        for path in (tmp_path / name, put(tmp_path / "bare", content), put(tmp_path / "b.gz", gzip.compress(content))):
            found = read(path)
            assert [row.values for row in found] == table.to_pylist() and found[2].where == f"{path}[2]"
        with pytest.raises(ValueError, match=f"{name}: must be a whole"):
            read(put(tmp_path / name, content[: len(content) // 2]))


def test_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with arrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as sink:
        sink.write(JSONL)
    assert values(tmp_path / "a.jsonl.zst") == ROWS
    for package in ("compression", "compression.zstd", "zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"a.jsonl.zst: zstd needs .* pyarrow: pip install torchbandit\[data\]"):
        read(tmp_path / "a.jsonl.zst")
    put(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(ImportError, match=r"a.parquet: Parquet needs pyarrow: pip install torchbandit\[data\]"):
        read(tmp_path / "a.parquet")


def test_saved_datasets_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    one = datasets.Dataset.from_list(ROWS)
    one.with_format("torch").save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == ROWS and read(tmp_path / "one")[1].where == f"{tmp_path}/one[1]"
    datasets.DatasetDict(train=one, test=one.select([0])).save_to_disk(tmp_path / "two")
    assert values(f"{tmp_path}/two:test") == ROWS[:1] == values(tmp_path / "two" / "test")
    with pytest.raises(ValueError, match=r"must be one split, got train, test; write .*two:train"):
        read(tmp_path / "two")
    with pytest.raises(ValueError, match="has no split 'dev', but train, test"):
        read(f"{tmp_path}/two:dev")
    asked = []

    def load(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        return datasets.DatasetDict(train=one) if split is None else one.select([1])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values("owner/name:test") == ROWS[1:2] == values("owner/name:main:test[:10%]")
    assert values("squad") == ROWS, "the only split"
    assert asked == [("owner/name", None, "test"), ("owner/name", "main", "test[:10%]"), ("squad", None, None)]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"owner/name:test: no file .* hub: it needs datasets: pip install torchb"):
        read("owner/name:test")


def test_half_a_character_is_no_text() -> None:
    for value in ("x \ud83d", ["a", {"b": "\udc00"}]):
        with pytest.raises(ValueError, match=r"a:3: 'k' holds half a character, the lone surrogate \\ud"):
            check_text(value, "a:3", "k")
    check_text(["\U0001f600", 3, None], "a:3", "k")
