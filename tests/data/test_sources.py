"""Reading of every file format, and errors that name file and line."""

import csv
import json
import random
import sys
from types import SimpleNamespace

import pytest

from lit_sparse.data.sources import Row, read, split
from lit_sparse.errors import BadInput

ROWS = [{"prompt": f"p{index}", "completion": f"c{index}"} for index in range(3)]


def write(path, content):
    path.write_text(content)
    return str(path)


def test_every_file_format_gives_the_same_rows(tmp_path):
    lines = "\n".join(map(json.dumps, ROWS))
    paths = [
        write(tmp_path / "list.json", json.dumps(ROWS)),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "lines.jsonl", lines + "\n\n"),
        write(
            tmp_path / "table.csv", "prompt,completion\n" + "".join("{prompt},{completion}\n".format(**r) for r in ROWS)
        ),
    ]
    for path in paths:
        assert [row.data for row in read(path)] == ROWS, path


def test_parquet_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert [row.data for row in read(str(tmp_path / "rows.parquet"))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl line 2: a list"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json row 2: a int"),
        ("a.json", "[", r"a\.json: not valid JSON"),
        ("a.json", f'[{{"text": {"1" * 5000}}}]', r"a\.json: not valid JSON"),
        ("a.jsonl", f'{{"text": "x"}}\n{{"text": {"1" * 5000}}}\n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"text": 1, "text": 2}', r"a\.jsonl line 1: the key 'text' is there twice"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv line 3: more or fewer fields"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv line 2: more or fewer fields"),
        ("a.jsonl", "", "has no rows"),
        ("a.txt", "x", "is not a data file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, says):
    with pytest.raises(BadInput, match=says):
        read(write(tmp_path / name, content))


def test_missing_file_is_named():
    with pytest.raises(BadInput, match=r"no data file nowhere\.jsonl"):
        read("nowhere.jsonl")


def test_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"somebody/set.*lit-sparse\[data\]"):
        read("somebody/set")


def test_hub_name_split_and_config_are_passed_on(monkeypatch):
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("openai/gsm8k:test", "main")[2] == Row("openai/gsm8k:test row 3", ROWS[2])
    read("openai/gsm8k")
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train")]


class DatasetsError(Exception):
    """The base of what the package `datasets` raises where its files do not fit together."""


@pytest.mark.parametrize("kind", [FileNotFoundError, DatasetsError])
def test_unknown_hub_name_is_one_sentence(monkeypatch, kind):
    def load_dataset(path, name, split):
        raise kind("not on the Hub\nnor anywhere")

    errors = SimpleNamespace(DatasetsError=DatasetsError)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, exceptions=errors))
    with pytest.raises(BadInput, match=r"no/where is not a file here.*not on the Hub nor anywhere"):
        read("no/where")


def test_split_is_stable_disjoint_and_complete():
    rows = [Row(f"line {index}", {"text": f"row {index}"}) for index in range(100)]
    train, heldout = split(rows, 10, "rows")
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {row.where for row in split(shuffled, 10, "rows")[1]} == {row.where for row in heldout}
    assert len(heldout) == 10
    assert {row.where for row in train} | {row.where for row in heldout} == {row.where for row in rows}
    assert sorted(int(row.data["text"][4:]) for row in heldout) == [1, 2, 11, 13, 26, 42, 57, 65, 90, 91]


def test_copies_of_a_row_stay_on_one_side():
    rows = [Row(f"line {index}", {"text": f"row {index % 10}"}) for index in range(30)]
    train, heldout = split(rows, 3, "rows")
    assert len(heldout) == 9
    assert not {row.data["text"] for row in train} & {row.data["text"] for row in heldout}


def test_a_small_file_holds_out_a_quarter(caplog):
    rows = [Row("line", {"text": str(index)}) for index in range(40)]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        train, heldout = split(rows, 64, "rows")
        assert [len(part) for part in split(rows[:2], 64, "rows")] == [1, 1]
        assert [len(part) for part in split(rows, 30, "rows")] == [10, 30]
        assert [len(part) for part in split(rows, 0, "rows")] == [40, 0]
    assert (len(train), len(heldout)) == (30, 10)
    assert caplog.messages == [
        "rows has 40 different rows, too few to hold out 64: 10 are held out.",
        "rows has 2 different rows, too few to hold out 64: 1 are held out.",
        "rows has 40 different rows, of which 30 are held out; lower `heldout` to train on more.",
    ]
    with pytest.raises(BadInput, match="1 different rows, too few to hold out 4; set `heldout` to 0"):
        split(rows[:1], 4, "rows")


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.jsonl", "a.CSV"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_endings_in_capitals_and_byte_order_marks_do_not_matter(tmp_path, name, mark):
    content = b"text\r\na\r\n\r\n" if name.endswith("CSV") else b'{"text": "a"}\r\n\n'
    (tmp_path / name).write_bytes(mark + content)
    assert [row.data for row in read(str(tmp_path / name))] == [{"text": "a"}]


def test_a_long_field_and_lines_within_texts_are_read(tmp_path):
    long = "a" * 200_000
    path = write(tmp_path / "a.csv", f'text\n{long}\n"two\nlines"\n')
    assert [row.data["text"] for row in read(path)] == [long, "two\nlines"]
    assert csv.field_size_limit() < len(long)  # of this process, as it was
    (tmp_path / "b.csv").write_bytes(b"text\n\xff\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        list(read(str(tmp_path / "b.csv")))
    assert csv.field_size_limit() < len(long)
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}\n')  # no line ends there
    assert [row.data["text"] for row in read(path)] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl line 2: not UTF-8 \(byte 0xe9\)"),
        ("a.json", b'[{"text": "\xe9"}]', r"a\.json line 1: not UTF-8"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv line 3: not UTF-8"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), r"a\.jsonl is in UTF-16; save it as UTF-8"),
        ("a.csv", "text\nx\n".encode("utf-16"), r"a\.csv is in UTF-16"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud83d"}\n', r"a\.jsonl line 2: a text has half of a surrogate pair"),
        ("a.json", b'[{"messages": [{"content": "\\udc00"}]}]', r"a\.json row 1: a text has half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x", "text": "y"}\n', r"a\.jsonl line 1: the key 'text' is there twice"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv line 1: the header has 'prompt' twice"),
        ("a.csv", b"prompt,completion\na,b\nprompt,completion\n", r"a\.csv line 3: the header again"),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', r"a\.csv line 3: not valid CSV \(unexpected end of data\)"),
    ],
)
def test_unreadable_bytes_are_placed(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=says):
        read(str(tmp_path / name))


def test_a_parquet_file_that_was_cut_short_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.PARQUET")
    assert [row.data for row in read(str(tmp_path / "rows.PARQUET"))] == ROWS
    whole = (tmp_path / "rows.PARQUET").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "rows.PARQUET").write_bytes(content)
        with pytest.raises(BadInput, match=r"rows\.PARQUET cannot be read as Parquet .*; is it complete\?"):
            read(str(tmp_path / "rows.PARQUET"))
