"""Labelled texts: which keys are read, which rows are bad, and what a batch holds."""

import csv
import json
from pathlib import Path

import pytest
import torch

from lit_sparse.data import Labelled
from lit_sparse.data.module import HELDOUT, TRAIN
from lit_sparse.data.sources import read, split
from lit_sparse.errors import BadInput
from tests.modules.words import word_tokenizer

ROWS = [{"sentence1": f"a b {n}", "sentence2": "c", "label": n % 3} for n in range(9)]


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(path: Path, rows: list[dict], **options) -> Labelled:
    data = Labelled(written(path, rows), tokenizer=word_tokenizer(), **{"heldout": 3, "max_length": 16, **options})
    data.setup("fit")
    return data


def test_classes_are_those_of_the_training_rows_in_order(tmp_path):
    data = labelled(tmp_path / "rows.jsonl", [{"text": f"a {n}", "label": 9 - n} for n in range(8)], heldout=0)
    assert data.label_names == ["2", "3", "4", "5", "6", "7", "8", "9"]
    named = labelled(tmp_path / "named.jsonl", [{"text": f"a {n}", "label": "yx"[n % 2]} for n in range(4)], heldout=0)
    assert named.label_names == ["x", "y"]
    assert [one.label for one in named.examples["train"]] == [1, 0, 1, 0]


def test_json_and_csv_say_the_same(tmp_path):
    ours = labelled(tmp_path / "rows.jsonl", ROWS, heldout=0)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    theirs = Labelled(str(tmp_path / "rows.csv"), tokenizer=word_tokenizer(), heldout=0, max_length=16)
    theirs.setup("fit")
    assert theirs.label_names == ours.label_names == ["0", "1", "2"]
    assert theirs.examples == ours.examples


def test_a_batch_is_padded_and_says_what_is_padding(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "a b c", "label": 1}]
    data = labelled(tmp_path / "rows.jsonl", rows, heldout=0)
    batch = data._collate(data.examples["train"])
    short, long = (len(one.input_ids) for one in data.examples["train"])
    assert batch["input_ids"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert batch["labels"].tolist() == [0, 1]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_pair_is_two_texts(tmp_path):
    data = labelled(tmp_path / "rows.jsonl", ROWS, heldout=0)
    single = labelled(tmp_path / "single.jsonl", [{"text": r["sentence1"], "label": r["label"]} for r in ROWS])
    assert len(data.examples["train"][0].input_ids) > len(single.examples["train"][0].input_ids)


def test_a_long_text_loses_its_end(tmp_path):
    rows = [{"text": "a " * 50, "label": 0}, {"text": "b", "label": 1}]
    data = labelled(tmp_path / "rows.jsonl", rows, heldout=0, max_length=8)
    assert [len(one.input_ids) <= 8 for one in data.examples["train"]] == [True, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "its `label` is None"),
        ({"text": "a", "label": 1.5}, "its `label` is 1.5; a text, a whole number"),
        ({"text": "a", "label": -1}, "by which sets mark rows whose class is not told"),
        ({"words": "a", "label": 1}, "it has the keys words, label, and no text"),
        ({"text": 3, "label": 1}, "text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    with pytest.raises(BadInput, match=reason) as refused:
        labelled(tmp_path / "rows.jsonl", [*ROWS[:2], row], heldout=0)
    assert "rows.jsonl" in str(refused.value)
    assert "3" in str(refused.value)


def test_a_class_that_was_not_trained_is_named(tmp_path):
    other = written(tmp_path / "other.jsonl", [{"text": "a", "label": 7}])
    with pytest.raises(BadInput, match="its `label` 7 is that of no training row"):
        labelled(tmp_path / "rows.jsonl", ROWS, validation=other)


def test_a_rare_class_stays_in_training(tmp_path):
    rows = [{"text": f"a {n}", "label": "yx"[n % 2]} for n in range(20)] + [{"text": "b", "label": "rare"}]
    chosen, _ = split(read(written(tmp_path / "rows.jsonl", rows)), 19, "rows")
    assert "rare" not in {row.data["label"] for row in chosen}
    data = labelled(tmp_path / "rows.jsonl", rows, heldout=19)
    assert data.label_names == ["rare", "x", "y"]
    assert {"rare"} < {row.data["label"] for row in data.rows[TRAIN]}
    assert "rare" not in {row.data["label"] for row in data.rows[HELDOUT]}
    assert len(data.rows[TRAIN]) + len(data.rows[HELDOUT]) == 21


def test_rows_that_are_alone_in_their_class_cannot_be_held_out(tmp_path):
    with pytest.raises(BadInput, match="has no other rows of the classes of the 3 that would be held out"):
        labelled(tmp_path / "rows.jsonl", [{"text": f"a {n}", "label": n} for n in range(9)])


def test_true_and_false_are_the_same_classes_in_each_format(tmp_path):
    rows = [{"text": f"a {n}", "label": label} for n, label in enumerate((True, False, "true", "False"))]
    data = labelled(tmp_path / "rows.jsonl", rows, heldout=0)
    assert data.label_names == ["false", "true"]
    assert [one.label for one in data.examples[TRAIN]] == [1, 0, 1, 0]


def test_classes_are_numbered_anew(tmp_path):
    data = labelled(tmp_path / "rows.jsonl", ROWS)
    before = {name: [data.label_names[one.label] for one in rows] for name, rows in data.examples.items()}
    data.number(["2", "0", "1"])
    assert data.label_names == ["2", "0", "1"]
    assert {name: [data.label_names[one.label] for one in rows] for name, rows in data.examples.items()} == before


def test_one_class_is_none_to_tell_apart(tmp_path):
    with pytest.raises(BadInput, match="labelled 1; classes to tell apart are two or more"):
        labelled(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 1}], heldout=0)
