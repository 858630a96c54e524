"""Reading of every file format, and errors that name file and line."""

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


def test_unknown_hub_name_is_one_sentence(monkeypatch):
    def load_dataset(path, name, split):
        raise FileNotFoundError("not on the Hub\nnor anywhere")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
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


def test_split_needs_rows_to_train_on():
    rows = [Row("line", {"text": str(index)}) for index in range(4)]
    with pytest.raises(BadInput, match="4 different rows, too few to hold out 4"):
        split(rows, 4, "rows")
