"""Shapes and contents of padded batches."""

import torch

from lit_sparse.data.collate import Choices, Padded, Padding, Question, Questions, ScoredChoices
from lit_sparse.data.encoding import Example
from lit_sparse_profiling.stopwatch import count_tokens

SHORT, LONG = Example([5, 6], [-100, 6]), Example([7, 8, 9], [-100, -100, 9])


def test_padded_on_the_right():
    batch = Padded(Padding(token=1))([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, -100, 9]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert count_tokens(batch) == (5, 6)


def test_width_is_a_multiple():
    assert Padded(Padding(multiple=8))([SHORT, LONG])["labels"].shape == (2, 8)


def test_choices_know_their_item():
    batch = Choices(Padding())([ScoredChoices([SHORT, LONG], 1), ScoredChoices([SHORT, SHORT, LONG], 0)])
    assert batch["input_ids"].shape == (5, 3)
    assert batch["item"].tolist() == [0, 0, 1, 1, 1]
    assert batch["choice"].tolist() == [0, 1, 0, 1, 2]
    assert batch["label"].tolist() == [1, 0]


def test_questions_are_padded_on_the_left():
    batch = Questions(Padding(token=1))([Question([5], "7"), Question([6, 7, 8], "9")])
    assert batch["prompt_ids"].tolist() == [[1, 1, 5], [6, 7, 8]]
    assert batch["prompt_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["answer"] == ["7", "9"]
