"""Packing: several examples in one row that do not attend to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from lit_sparse.data.collate import Padding, scored_positions
from lit_sparse.data.encoding import Example
from lit_sparse.data.rows import IGNORED
from lit_sparse.errors import BadInput


@dataclass(frozen=True)
class Packed:
    """Collator of lists of `Example`s, each list a row.

    The batch has `input_ids`, `labels`, `position_ids` and `token_mask`, each (B, S), and `scored` as in `Padded`.

    `position_ids` restart at 0 with each example. From them, a Hugging Face model without `attention_mask` and cache
    makes the block-diagonal mask for its attention implementation. `token_mask`, 1 for tokens and 0 for padding, is for
    counting and must not reach the model. The first label of an example is -100: the token before it is the end of
    another example.
    """

    padding: Padding

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        ids = [[token for one in row for token in one.input_ids] for row in rows]
        labels = [[label for one in row for label in [IGNORED, *one.labels[1:]]] for row in rows]
        padded_labels = self.padding.pad_right(labels, IGNORED)
        positions = [[place for one in row for place in range(len(one.input_ids))] for row in rows]
        return {
            "input_ids": self.padding.pad_right(ids, self.padding.token),
            "labels": padded_labels,
            "scored": scored_positions(padded_labels),
            "position_ids": self.padding.pad_right(positions, 0),
            "token_mask": self.padding.pad_right([[1] * len(row) for row in ids], 0),
        }


class PackedRows(Dataset[list[Example]]):
    """Data set of rows of at most `max_length` tokens, into which examples are packed.

    Best fit decreasing: the longest example first, each into the fullest row with room for it.

    Args:
        examples: Data set of `Example`s.
        lengths: Number of tokens of each example, at most `max_length`.
        max_length: Maximum number of tokens in a row.

    Attributes:
        rows: Indices of the examples in each row.
        lengths: Number of tokens of each row.
    """

    def __init__(self, examples: Dataset[Example], lengths: Sequence[int], max_length: int) -> None:
        self.examples = examples
        self.rows: list[list[int]] = []
        with_room: list[list[list[int]]] = [[] for _ in range(max_length + 1)]  # rows by their free tokens
        for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
            length = lengths[index]
            room = next((room for room in range(length, max_length) if with_room[room]), None)
            row = self._new_row() if room is None else with_room[room].pop()
            row.append(index)
            with_room[(max_length if room is None else room) - length].append(row)
        self.lengths = [sum(lengths[index] for index in row) for row in self.rows]

    def _new_row(self) -> list[int]:
        self.rows.append([])
        return self.rows[-1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[one] for one in self.rows[index]]


TOLERANCE = 0.1
"""Mean difference of logits, in standard deviations, that counts as rounding. bfloat16 in 30 layers makes 0.01."""

ROUNDING = 64
"""Units in the last place of the largest logit that count as rounding between two orders of summation, in a mixture of
experts. Tiny ones in fp32 make 0 to 10; text that is seen makes more than 100,000."""


def check_packing(model: PreTrainedModel, rows: int = 2) -> None:
    """Check that `model` does not let the examples of a packed row attend to each other.

    An example's logits must not depend on what precedes it in the row, bit for bit, and must equal those of the example
    alone up to rounding. In a mixture of experts the first holds up to rounding too: an expert computes all its tokens
    in one product, whose order of summation depends on their number.

    Args:
        model: A Hugging Face causal language model.
        rows: Packed rows of a batch. transformers' flash attention keeps examples apart in a single one only.

    Raises:
        BadInput: if the examples affect each other, as in a model with recurrent state or with positions of its own.
    """
    # Multiples of primes give ids spread over the vocabulary, without a random generator to disturb.
    size, tokens = 9, model.config.get_text_config().vocab_size
    first, second = torch.arange(1, 7) * 997 % tokens, torch.arange(size) * 1009 % tokens
    behind_one, behind_other = (
        packed_logits(model, [before, second], rows)[-size:] for before in (first, first.flip(0))
    )
    alone = packed_logits(model, [second])
    apart, bound = (behind_one - behind_other).abs().max(), alone.new_zeros(())
    if any(hasattr(module, "num_experts") for module in model.modules()):
        bound = torch.minimum(ROUNDING * precision(model) * alone.abs().max(), TOLERANCE * alone.std())
    if apart > bound or (behind_one - alone).abs().mean() > TOLERANCE * alone.std():
        raise BadInput(
            f"{type(model).__name__} lets the examples of a packed row see each other; set `packing` to false, or "
            "choose another attention implementation (flash attention keeps them apart with data.batch_size 1)."
        )


def precision(model: PreTrainedModel) -> float:
    """Return the machine epsilon of the computation: of autocast if it is on, else of the least precise weights."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.finfo(torch.get_autocast_dtype(device)).eps
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


@torch.no_grad()
def packed_logits(model: PreTrainedModel, sequences: Sequence[Tensor], rows: int = 1) -> Tensor:
    """Return the logits (tokens, vocabulary) of `sequences` in the first of equal packed rows, in fp32, no dropout."""
    device, training = next(model.parameters()).device, model.training
    ids, positions = torch.cat(list(sequences)), torch.cat([torch.arange(len(one)) for one in sequences])
    model.eval()
    try:
        ids, positions = (values.to(device).expand(rows, -1) for values in (ids, positions))
        out = model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.train(training)
    return out.logits[0].float()
