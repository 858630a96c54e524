"""From rows to batches of tensors. B sequences, S tokens of the longest, all int64."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse.data.encoding import Example
from lit_sparse.data.rows import IGNORED


@dataclass(frozen=True)
class Padding:
    """What batches are filled up with.

    Attributes:
        token: Id of the padding token; nothing reads it.
        multiple: S becomes a multiple of this (8 suits tensor cores).
    """

    token: int = 0
    multiple: int = 1

    def width(self, lengths: Sequence[int]) -> int:
        """Tokens of the padded rows."""
        return -(-max(lengths) // self.multiple) * self.multiple

    def pad_right(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """`rows`, filled up on the right."""
        width = self.width([len(row) for row in rows])
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    def pad_left(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """`rows`, filled up on the left, as generation wants it."""
        width = self.width([len(row) for row in rows])
        return torch.tensor([[*[fill] * (width - len(row)), *row] for row in rows])


@dataclass(frozen=True)
class Padded:
    """Collates `Example`s: `input_ids`, `attention_mask`, `labels` (-100 where no loss), all (B, S); and `scored`."""

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
    """Places (N,) in the flattened (B, S-1) predictions whose label counts, so that only they need logits.

    Found here, on the host: on a GPU the training step would have to wait for the device to know how many there are.
    """
    return (labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class ScoredChoices:
    """All choices of a question as examples, and the index of the right one."""

    examples: list[Example]
    label: int


@dataclass(frozen=True)
class Choices:
    """Collates `ScoredChoices`: a padded batch of all N choices, `item` and `choice` (N,), and `label` (items,)."""

    padding: Padding

    def __call__(self, items: Sequence[ScoredChoices]) -> dict[str, Any]:
        places = [(index, choice) for index, item in enumerate(items) for choice in range(len(item.examples))]
        return {
            **Padded(self.padding)([one for item in items for one in item.examples]),
            "item": torch.tensor([index for index, _ in places]),
            "choice": torch.tensor([choice for _, choice in places]),
            "label": torch.tensor([item.label for item in items]),
        }


@dataclass(frozen=True)
class Question:
    """A prompt to be answered by generation, and the result that is right."""

    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Questions:
    """Collates `Question`s: `prompt_ids`, `prompt_mask` (B, S), padded on the left, and `answer`, B texts."""

    padding: Padding

    def __call__(self, questions: Sequence[Question]) -> dict[str, Any]:
        return {
            "prompt_ids": self.padding.pad_left([one.prompt_ids for one in questions], self.padding.token),
            "prompt_mask": self.padding.pad_left([[1] * len(one.prompt_ids) for one in questions], 0),
            "answer": [one.answer for one in questions],
        }
