"""Texts, or pairs of texts, with a label each: data to learn to classify."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_sparse import demo
from lit_sparse.data.collate import Padding
from lit_sparse.data.encoding import load_tokenizer
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.data.module import HELDOUT, TRAIN, at_least, first_epoch, replica
from lit_sparse.data.rows import BadRow, text
from lit_sparse.data.sources import Row, blame, read, split
from lit_sparse.errors import BadInput

FORMATS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "passage"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
"""The keys of the texts beside `label`, the most telling first; the names of the usual sets."""


@dataclass(frozen=True)
class LabelledText:
    """What a row says: a text or two, and the name of its class."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledExample:
    """A tokenised row, and the number of its class."""

    input_ids: list[int]
    token_type_ids: list[int]
    label: int


class Labelled(L.LightningDataModule):
    """Texts or pairs of texts with labels, to learn to classify; detected from their keys.

    Formats: `label` beside `text`, `text` and `text_pair`, `sentence`, `sentence1` and `sentence2`, `premise` and
    `hypothesis`, `question1` and `question2`, `question` and `passage`, or `question` and `sentence`. A label is text,
    a whole number, or true or false; the classes are those of the training rows. A text with more than `max_length`
    tokens loses its end, and how many did is printed.

    Args:
        train: A json, jsonl, csv or parquet file, a Hugging Face data set with its split, such as
            "nyu-mll/glue:train", or `demo`: 4,181 medical examination questions, labelled with one of 20 subjects.
        validation: The same for validation; absent: some training rows are held out.
        heldout: How many rows those are, chosen by a hash of the row; 1,000 tell two points of accuracy apart at best.
            The rows of a class that training would otherwise lack are not held out.
        config: Which configuration of the Hugging Face data set, where it has several.
        tokenizer: Folder, Hugging Face name, `demo` or `minilm`; from Python also a tokenizer. The command line takes
            it from `model.base`.
        max_length: Tokens of a row at most, the tokenizer's own marks included.
        batch_size: Rows of a batch on one device.
        num_workers: Processes that prepare batches; 0 does it in the training process.
        seed: Of the order of training batches.
        pad_to_multiple_of: Make the length of batches a multiple of this, such as 8 for tensor cores.

    Attributes:
        val_names: Name of each loader of `val_dataloader()`.
        label_names: The classes in the order of their numbers, once `setup` has run; `Classifier` may number them anew.
    """

    def __init__(
        self,
        train: str = demo.DEMO,
        validation: str | None = None,
        heldout: int = 1000,
        config: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase = demo.MINILM,
        max_length: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        pad_to_multiple_of: int = 1,
    ) -> None:
        super().__init__()
        at_least(1, max_length=max_length, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        at_least(0, heldout=heldout, num_workers=num_workers, seed=seed)
        self.train, self.validation, self.heldout, self.config = train, validation, heldout, config
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.seed, self.pad_to_multiple_of = seed, pad_to_multiple_of
        self.val_names = [HELDOUT] if heldout or validation else []
        self.label_names: list[str] = []
        self.examples: dict[str, list[LabelledExample]] = {}

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """Training rows, and those that are scored."""
        rows = read(labelled_rows(self.train), self.config)
        if self.validation is not None:
            return {TRAIN: rows, HELDOUT: read(labelled_rows(self.validation), self.config)}
        train, heldout = keep_classes(*split(rows, self.heldout, self.train), self.train)
        return {TRAIN: train, HELDOUT: heldout} if heldout else {TRAIN: train}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when it is first used.

        Raises:
            BadInput: if its model reads fewer tokens than `max_length`.
        """
        found = load_tokenizer(self.tokenizer_name)
        if self.max_length > found.model_max_length:
            raise BadInput(
                f"`max_length` is {self.max_length}, but the tokenizer's model reads {found.model_max_length} tokens; "
                "lower it."
            )
        return found

    def prepare_data(self) -> None:
        """Brings what is downloaded, on one process of each machine.

        Raises:
            BadInput: a file is missing.
        """
        _ = self.rows, self.tokenizer

    def setup(self, stage: str) -> None:
        """Tokenises all rows, once.

        Raises:
            BadInput: a row is bad (its file and line are named), or all are of one class.
        """
        if self.examples:
            return
        parsed = {name: [parsed_row(row) for row in rows] for name, rows in self.rows.items()}
        self.label_names = classes([item.label for item in parsed[TRAIN]], self.train)
        for name, items in parsed.items():
            self._check_known(self.rows[name], items)
            self.examples[name] = self._tokenise(items, name)

    def number(self, labels: Sequence[str]) -> None:
        """Number the classes by their places in `labels`: the same classes as now, in whatever order."""
        if list(labels) == self.label_names:
            return
        places = {label: n for n, label in enumerate(labels)}
        numbers = [places[label] for label in self.label_names]
        self.label_names = list(labels)
        self.examples = {
            name: [replace(row, label=numbers[row.label]) for row in rows] for name, rows in self.examples.items()
        }

    def _check_known(self, rows: Sequence[Row], items: Sequence[LabelledText]) -> None:
        known = set(self.label_names)
        for row, item in zip(rows, items, strict=True):
            if item.label not in known:
                with blame(row):
                    raise BadRow(f"its `label` {item.label} is that of no training row")

    def _tokenise(self, items: Sequence[LabelledText], name: str) -> list[LabelledExample]:
        numbers, texts = {label: n for n, label in enumerate(self.label_names)}, [item.texts for item in items]
        encoded = [self._ids(pair, verbose=False) for pair in texts]
        overlong = [n for n, one in enumerate(encoded) if len(one["input_ids"]) > self.max_length]
        for n in overlong:
            encoded[n] = self._ids(texts[n], truncation="longest_first", max_length=self.max_length)
        if overlong:
            rank_zero_info(f"{name}: {len(overlong)} rows have over {self.max_length} tokens and lose their end.")
        return [
            LabelledExample(one["input_ids"], one["token_type_ids"], numbers[item.label])
            for one, item in zip(encoded, items, strict=True)
        ]

    def _ids(self, texts: tuple[str, ...], **options: Any) -> Any:
        first, second = (*texts, None)[:2]
        return self.tokenizer(first, second, return_token_type_ids=True, **options)

    def train_dataloader(self) -> Loader:
        """Training batches, in an order that depends on seed and epoch only; the position is kept in checkpoints."""
        rows: Any = self.examples[TRAIN]
        batches = Batches(lengths(rows), self.batch_size, self.seed, *replica(self.trainer))
        return Loader(rows, batches, self._collate, self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The held-out rows, each once."""
        return [self._evaluation(self.examples[name]) for name in self.val_names]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The same."""
        return self.val_dataloader()

    def _evaluation(self, rows: Any) -> DataLoader[Any]:
        shared = replica(self.trainer)
        return evaluation_loader(rows, lengths(rows), self.batch_size, self._collate, *shared, self.num_workers)

    @cached_property
    def pad_token(self) -> int:
        """Id of the token that batches are filled up with."""
        return self.tokenizer.get_vocab()[str(self.tokenizer.pad_token)]

    @property
    def _collate(self) -> "LabelledBatch":
        pairs = "token_type_ids" in self.tokenizer.model_input_names
        return LabelledBatch(Padding(self.pad_token, self.pad_to_multiple_of), pairs)


@dataclass(frozen=True)
class LabelledBatch:
    """Collates `LabelledExample`s: `input_ids`, `attention_mask` (B, S), `labels` (B,), all int64.

    Attributes:
        padding: What rows are filled up with on the right.
        pairs: Whether `token_type_ids` (B, S), which tell a pair's texts apart, go along.
    """

    padding: Padding
    pairs: bool

    def __call__(self, rows: Sequence[LabelledExample]) -> dict[str, Tensor]:
        batch = {
            "input_ids": self.padding.right([row.input_ids for row in rows], self.padding.token),
            "attention_mask": self.padding.right([[1] * len(row.input_ids) for row in rows], 0),
            "labels": torch.tensor([row.label for row in rows]),
        }
        if self.pairs:
            batch["token_type_ids"] = self.padding.right([row.token_type_ids for row in rows], 0)
        return batch


def labelled_rows(name: str) -> str:
    """`name` itself, or the file of the labelled demo data for "demo"."""
    return str(demo.labelled_file()) if name == demo.DEMO else name


def keep_classes(train: list[Row], heldout: list[Row], name: str) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, those in training whose class it would lack otherwise.

    Raises:
        BadInput: if no row is left to hold out.
    """
    known = {parsed_row(row).label for row in train}
    out = [row for row in heldout if parsed_row(row).label in known]
    if heldout and not out:
        raise BadInput(
            f"{name} has no other rows of the classes of the {len(heldout)} that would be held out; raise `heldout`, "
            "or set it to 0."
        )
    kept = [row for row in heldout if parsed_row(row).label not in known]
    if kept:
        rank_zero_info(f"{HELDOUT}: {len(kept)} rows are not held out, since training has no other of their classes.")
    return train + kept, out


def parsed_row(row: Row) -> LabelledText:
    """What `row` says.

    Raises:
        BadInput: naming its file and line, where it is bad.
    """
    with blame(row):
        return labelled_text(row.data)


def labelled_text(row: Mapping[str, Any]) -> LabelledText:
    """The texts and the label of `row`.

    Raises:
        BadRow: it has no label, no known keys, or a value of another kind.
    """
    for keys in FORMATS:
        if all(row.get(key) is not None for key in keys):
            return LabelledText(tuple(text(row, key) for key in keys), label_name(row))
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise BadRow(f"it has the keys {', '.join(map(str, row)) or 'none'}, and no text: one of {known} is wanted")


def label_name(row: Mapping[str, Any]) -> str:
    """The class of `row` as text, the same for 1 or true in JSON and "1" or "true" in a CSV file."""
    label = row.get("label")
    name = str(label).strip() if isinstance(label, int | str) else ""
    if name in ("True", "False"):  # which is what Python writes into a CSV file, too
        name = name.lower()
    if not name:
        raise BadRow(f"its `label` is {label!r}; a text, a whole number, or true or false is wanted")
    if re.fullmatch(r"-\d+", name):
        raise BadRow(f"its `label` is {name}, by which sets mark rows whose class is not told; leave them out")
    return name


def classes(labels: Sequence[str], name: str) -> list[str]:
    """The different labels, numbers by value and others by name.

    Raises:
        BadInput: if there are fewer than two.
    """
    found = sorted(set(labels), key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))
    if len(found) < 2:
        raise BadInput(f"all training rows of {name} are labelled {found[0]}; classes to tell apart are two or more.")
    return found


def lengths(rows: Sequence[LabelledExample]) -> list[int]:
    """Tokens of each row."""
    return [len(row.input_ids) for row in rows]
