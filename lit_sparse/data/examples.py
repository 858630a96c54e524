"""Tokenised rows as flat arrays, and their cache on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from lit_sparse.data.encoding import Encoder, Example
from lit_sparse.data.rows import IGNORED, parse
from lit_sparse.data.sources import Row, locate_errors, row_digest
from lit_sparse.demo import cache_folder
from lit_sparse.errors import BadInput
from lit_sparse.storage.whole import damage, sign

Overlong = Literal["drop", "truncate"]

CACHE_VERSION = 2
"""Increment it when the same rows and settings give other tokens than before."""


class Examples(Dataset[Example]):
    """Sequences of different lengths, stored end to end.

    They are arrays because a Python integer in a list takes 36 bytes instead of 4, and is copied into every worker.

    Attributes:
        ids: Token ids, (tokens,) int32.
        labels: Labels, -100 where no loss is taken, (tokens,) int32.
        starts: Start of each sequence, and finally the number of tokens, (sequences + 1,) int64.
        dropped: Number of rows that were dropped because they were too long.
        cut: Number of rows whose end was truncated.
    """

    def __init__(self, ids: Any, labels: Any, starts: Any, dropped: int = 0, cut: int = 0) -> None:
        self.ids, self.labels, self.starts, self.dropped, self.cut = ids, labels, starts, dropped, cut

    @classmethod
    def of(cls, examples: Sequence[Example], dropped: int = 0, cut: int = 0) -> "Examples":
        """Make the arrays from `examples`."""
        starts = np.cumsum([0, *(len(example.input_ids) for example in examples)], dtype=np.int64)
        ids = np.fromiter((token for example in examples for token in example.input_ids), np.int32, starts[-1])
        labels = np.fromiter((label for example in examples for label in example.labels), np.int32, starts[-1])
        return cls(ids, labels, starts, dropped, cut)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids[part].tolist(), self.labels[part].tolist())

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
        return np.diff(self.starts).tolist()

    def take(self, begin: int, end: int) -> "Examples":
        """Return the sequences `begin` to `end - 1`, as views of the arrays."""
        starts = self.starts[begin : end + 1]
        tokens = slice(starts[0], starts[-1])
        return Examples(self.ids[tokens], self.labels[tokens], starts - starts[0])

    def save(self, path: Path) -> None:
        """Write the arrays to `path` atomically: other processes may read the cache at the same time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # A unique draft in the same folder: two processes may write the same entry, and a rename must not be a copy.
        # Not a file of tempfile, which its owner alone can read: users share a cache.
        draft = path.with_name(f".{uuid4().hex}")
        try:
            with draft.open("xb") as file:
                arrays = {"ids": self.ids, "labels": self.labels, "starts": self.starts}
                np.savez(file, **arrays, dropped=np.int64(self.dropped), cut=np.int64(self.cut))
            sign(draft)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read the arrays that `save` wrote to `path`."""
        with np.load(path) as arrays:
            counts = int(arrays["dropped"]), int(arrays["cut"])
            return cls(arrays["ids"], arrays["labels"], arrays["starts"], *counts)


def load_or_make(settings: Sequence[object], make: Callable[[], Examples], rows: int) -> Examples:
    """Return the cached examples of these settings, or make and cache them, and say of how many rows.

    Args:
        settings: Everything on which the examples depend, as texts and numbers.
        make: Makes the examples.
        rows: Number of rows that they are made of.

    Raises:
        BadInput: if the cache cannot be written.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, *settings]).encode()).hexdigest()
    path = cache_folder() / "tokens" / f"{key}.npz"
    if path.is_file():
        found = damage(path)
        if found is None:
            return Examples.load(path)
        rank_zero_info(f"{path} is damaged ({found}); it is made again.")
    rank_zero_info(f"Tokenising {rows:,} rows, once, into {path.parent}.")
    examples = make()
    try:
        examples.save(path)
    except OSError as error:
        raise BadInput(
            f"Tokenised data cannot be written to {path.parent} ({error.strerror}); point LIT_SPARSE_CACHE elsewhere."
        ) from error
    return examples


def tokenise_cached(rows: Sequence[Row], encoder: Encoder, max_length: int, overlong: Overlong) -> Examples:
    """Return the examples of `rows` from the cache, or encode and cache them; see `encode`."""
    settings = ["rows", encoder.fingerprint(), max_length, overlong, [row_digest(row) for row in rows]]
    return load_or_make(settings, lambda: encode(rows, encoder, max_length, overlong), len(rows))


def encode(rows: Iterable[Row], encoder: Encoder, max_length: int, overlong: Overlong) -> Examples:
    """Tokenise `rows`. Rows with more than `max_length` tokens are dropped or truncated.

    Raises:
        BadInput: if a row is invalid (the message names its file and line), or if every row was dropped.
    """
    kept, dropped, cut = [], 0, 0
    for row in rows:
        with locate_errors(row):
            whole = encoder.encode(parse(row.data))
        example = fit_length(whole, max_length, overlong)
        if example is None:
            dropped += 1
        else:
            kept.append(example)
            cut += example is not whole
    if not kept:
        raise BadInput(
            f"None of {dropped} rows fits into max_length={max_length} tokens; raise it or shorten the rows."
        )
    return Examples.of(kept, dropped, cut)


def fit_length(example: Example, max_length: int, overlong: Overlong) -> Example | None:
    """Return `example` with at most `max_length` tokens; None if it is dropped or has no label after truncation."""
    if len(example.input_ids) <= max_length:
        return example
    # As in `Encoder.encode`, the first label never counts.
    labels = example.labels[:max_length]
    if overlong == "drop" or all(label == IGNORED for label in labels[1:]):
        return None
    return Example(example.input_ids[:max_length], labels)
