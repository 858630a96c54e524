"""Collators, from rows to int64 tensors. B is the number of sequences, S the length of the padded ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse.data.encoding import Example
from lit_sparse.data.rows import IGNORED


@dataclass(frozen=True)
class Padding:
    """Padding of batches.

    Attributes:
        token: Id of the padding token. It is masked, so that any id does.
        multiple: S is rounded up to a multiple of this; 8 suits tensor cores.
    """

    token: int = 0
    multiple: int = 1

    def width(self, lengths: Sequence[int]) -> int:
        """Return S for rows of these lengths."""
        return -(-max(lengths) // self.multiple) * self.multiple

    def pad_right(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """Return `rows` padded on the right with `fill`, (B, S)."""
        width = self.width([len(row) for row in rows])
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    def pad_left(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """Return `rows` padded on the left with `fill`, (B, S): generation continues the last position."""
        width = self.width([len(row) for row in rows])
        return torch.tensor([[*[fill] * (width - len(row)), *row] for row in rows])


@dataclass(frozen=True)
class Padded:
    """Collator of `Example`s into `input_ids`, `attention_mask` and `labels`, each (B, S), and `scored` (N,).

    Labels are -100 where no loss is taken. For `scored`, see `scored_positions`.
    """

    padding: Padding

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        labels = self.padding.pad_right([one.labels for one in examples], IGNORED)
        return {
            "input_ids": self.padding.pad_right([one.input_ids for one in examples], self.padding.token),
            "attention_mask": self.padding.pad_right([[1] * len(one.input_ids) for one in examples], 0),
            "labels": labels,
            "scored": scored_positions(labels),
        }


def scored_positions(labels: Tensor) -> Tensor:
    """Return the indices (N,) of scored labels in the flattened (B, S-1) predictions; only these need logits.

    They are computed here, on the host. On the device, `nonzero` would synchronise in every step, since N is the shape
    of what follows.
    """
    # Without the first column: position t predicts the token at t + 1.
    return (labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class ScoredChoices:
    """All choices of a question as examples, and the index of the correct one."""

    examples: list[Example]
    label: int


@dataclass(frozen=True)
class Choices:
    """Collator of `ScoredChoices` into a padded batch of all N choices.

    Beside the keys of `Padded`, it has `item` and `choice` (N,), the indices of each sequence's question and choice,
    and `label`, the index of the correct choice of each question.
    """

    padding: Padding

    def __call__(self, items: Sequence[ScoredChoices]) -> dict[str, Any]:
        # Questions have different numbers of choices: they are stacked, and each remembers where it belongs.
        places = [(index, choice) for index, item in enumerate(items) for choice in range(len(item.examples))]
        return {
            **Padded(self.padding)([one for item in items for one in item.examples]),
            "item": torch.tensor([index for index, _ in places]),
            "choice": torch.tensor([choice for _, choice in places]),
            "label": torch.tensor([item.label for item in items]),
        }


@dataclass(frozen=True)
class Question:
    """A prompt to answer by generation, and the correct result."""

    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Questions:
    """Collator of `Question`s into `prompt_ids` and `prompt_mask` (B, S), padded on the left, and `answer`, B texts."""

    padding: Padding

    def __call__(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {
            "prompt_ids": self.padding.pad_left([one.prompt_ids for one in questions], self.padding.token),
            "prompt_mask": self.padding.pad_left([[1] * len(one.prompt_ids) for one in questions], 0),
            "answer": [one.answer for one in questions],
        }
