"""Labelled texts and pairs of texts, for classification."""

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
from lit_sparse.data.module import (
    HELDOUT,
    TRAIN,
    check_multiple,
    first_epoch,
    overfitted,
    rank_and_world,
    require_at_least,
)
from lit_sparse.data.rows import BadRow, text_field
from lit_sparse.data.sources import Row, locate_errors, read, split
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
"""Keys of the texts beside `label` in common data sets. Pairs first: `text` alone is also in rows of pairs."""


@dataclass(frozen=True)
class LabelledText:
    """A parsed row: one or two texts, and the name of its class."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledExample:
    """A tokenised row, and the index of its class."""

    input_ids: list[int]
    token_type_ids: list[int]
    label: int


class Labelled(L.LightningDataModule):
    """Data module of labelled texts or pairs of texts, whose format is detected from their keys.

    Formats: `label` beside `text`, `text` and `text_pair`, `sentence`, `sentence1` and `sentence2`, `premise` and
    `hypothesis`, `question1` and `question2`, `question` and `passage`, or `question` and `sentence`. A label is a
    text, a whole number, or true or false. The classes are those of the training rows. Rows with more than `max_length`
    tokens are truncated, and their number is printed.

    Args:
        train: A json, jsonl, csv or parquet file, a Hugging Face data set with its split, such as
            "nyu-mll/glue:train", or `demo`: 4,181 medical examination questions, labelled with one of 20 subjects.
        validation: The same for validation. Without it, some training rows are held out.
        heldout: Number of held-out training rows, chosen by a hash of the row. 1,000 rows resolve two points of
            accuracy at best. Rows whose class would otherwise be missing in training are not held out.
        config: Configuration of the Hugging Face data set, if it has several.
        tokenizer: Folder, Hugging Face name, `demo` or `minilm`; from Python also a tokenizer. The command line takes
            it from `model.base`.
        max_length: Maximum number of tokens in a row, the tokenizer's special tokens included.
        batch_size: Rows in a batch on one device.
        num_workers: Worker processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the order of training batches.
        pad_to_multiple_of: Pad batches to a multiple of this length, such as 8 for tensor cores.
        shuffle: Train on the rows in an order that is drawn in every epoch; false keeps the order of their file.

    Attributes:
        val_names: Name of each loader of `val_dataloader()`.
        label_names: Class names by index, once `setup` has run; `Classifier` may reorder them.
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
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, max_length=max_length, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        require_at_least(0, heldout=heldout, num_workers=num_workers, seed=seed)
        check_multiple(pad_to_multiple_of, max_length)
        self.train, self.validation, self.heldout, self.config = train, validation, heldout, config
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.seed, self.pad_to_multiple_of, self.shuffle = seed, pad_to_multiple_of, shuffle
        self.val_names = [HELDOUT] if heldout or validation else []
        self.label_names: list[str] = []
        self.examples: dict[str, list[LabelledExample]] = {}

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """The training rows and the held-out rows, read once."""
        rows = read(source_of(self.train), self.config)
        if self.validation is not None:
            return {TRAIN: rows, HELDOUT: read(source_of(self.validation), self.config)}
        train, heldout = keep_classes(*split(rows, self.heldout, self.train), self.train)
        return {TRAIN: train, HELDOUT: heldout} if heldout else {TRAIN: train}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when it is first used.

        Raises:
            BadInput: if `max_length` is above the model's maximum.
        """
        found = load_tokenizer(self.tokenizer_name)
        if self.max_length > found.model_max_length:
            raise BadInput(
                f"`max_length` is {self.max_length}, but the tokenizer's model reads {found.model_max_length} tokens; "
                "lower it."
            )
        return found

    def prepare_data(self) -> None:
        """Read the rows and the tokenizer, which downloads them if need be. Called in one process per machine.

        Raises:
            BadInput: if a file is missing.
        """
        _ = self.rows, self.tokenizer

    def setup(self, stage: str) -> None:
        """Tokenise all rows, once.

        Raises:
            BadInput: if a row is invalid (the message names its file and line), or if all have the same class.
        """
        if self.examples:  # setup runs for each stage: a second time would undo `renumber`
            return
        parsed = {name: [parse_row(row) for row in rows] for name, rows in self.rows.items()}
        self.label_names = class_names([item.label for item in parsed[TRAIN]], self.train)
        for name, items in parsed.items():
            self._check_known(self.rows[name], items)
            self.examples[name] = self._tokenise(items, name)

    def renumber(self, labels: Sequence[str]) -> None:
        """Renumber the classes in the order of `labels`, which are the same classes as now.

        A checkpoint's head has its classes in a fixed order, which the data must follow.
        """
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
                with locate_errors(row):
                    raise BadRow(f"its `label` {item.label} is that of no training row")

    def _tokenise(self, items: Sequence[LabelledText], name: str) -> list[LabelledExample]:
        numbers, texts = {label: n for n, label in enumerate(self.label_names)}, [item.texts for item in items]
        rank_zero_info(f"Tokenising {len(items)} rows of {name}.")
        # First without truncation: afterwards, nothing tells which rows were too long.
        encoded = [self._tokenise_texts(pair, verbose=False) for pair in texts]
        overlong = [n for n, one in enumerate(encoded) if len(one["input_ids"]) > self.max_length]
        for n in overlong:
            encoded[n] = self._tokenise_texts(texts[n], truncation="longest_first", max_length=self.max_length)
        if overlong:
            rank_zero_info(f"{name}: {len(overlong)} rows have over {self.max_length} tokens and are truncated.")
        return [
            LabelledExample(one["input_ids"], one["token_type_ids"], numbers[item.label])
            for one, item in zip(encoded, items, strict=True)
        ]

    def _tokenise_texts(self, texts: tuple[str, ...], **options: Any) -> Any:
        first, second = (*texts, None)[:2]
        return self.tokenizer(first, second, return_token_type_ids=True, **options)

    def train_dataloader(self) -> Loader:
        """Return training batches in an order that depends on seed and epoch only. Checkpoints hold its position."""
        rows: Any = self.examples[TRAIN]
        rows = rows[: overfitted(self.trainer, self.batch_size, len(rows))]
        batches = Batches(token_counts(rows), self.batch_size, self.seed, *rank_and_world(self.trainer), self.shuffle)
        return Loader(rows, batches, self._collate, self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the held-out rows, each once."""
        return [self._evaluation_loader(self.examples[name]) for name in self.val_names]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return the held-out rows, as `val_dataloader` does."""
        return self.val_dataloader()

    def _evaluation_loader(self, rows: Any) -> DataLoader[Any]:
        shared = rank_and_world(self.trainer)
        return evaluation_loader(rows, token_counts(rows), self.batch_size, self._collate, *shared, self.num_workers)

    @cached_property
    def pad_token(self) -> int:
        """Id of the padding token."""
        return self.tokenizer.get_vocab()[str(self.tokenizer.pad_token)]

    @property
    def _collate(self) -> "LabelledBatch":
        pairs = "token_type_ids" in self.tokenizer.model_input_names
        return LabelledBatch(Padding(self.pad_token, self.pad_to_multiple_of), pairs)


@dataclass(frozen=True)
class LabelledBatch:
    """Collator of `LabelledExample`s into `input_ids`, `attention_mask` (B, S) and `labels` (B,), all int64.

    Attributes:
        padding: Padding on the right.
        pairs: Add `token_type_ids` (B, S), by which some models (BERT) tell a pair's texts apart.
    """

    padding: Padding
    pairs: bool

    def __call__(self, rows: Sequence[LabelledExample]) -> dict[str, Tensor]:
        batch = {
            "input_ids": self.padding.pad_right([row.input_ids for row in rows], self.padding.token),
            "attention_mask": self.padding.pad_right([[1] * len(row.input_ids) for row in rows], 0),
            "labels": torch.tensor([row.label for row in rows]),
        }
        if self.pairs:
            batch["token_type_ids"] = self.padding.pad_right([row.token_type_ids for row in rows], 0)
        return batch


def source_of(name: str) -> str:
    """Return `name`, or the file of the labelled demo data for "demo"."""
    return str(demo.labelled_file()) if name == demo.DEMO else name


def keep_classes(train: list[Row], heldout: list[Row], name: str) -> tuple[list[Row], list[Row]]:
    """Move held-out rows whose class training lacks to the training rows; return both.

    Raises:
        BadInput: if no held-out row is left.
    """
    known = {parse_row(row).label for row in train}
    out = [row for row in heldout if parse_row(row).label in known]
    if heldout and not out:
        raise BadInput(
            f"The training rows of {name} lack the classes of all {len(heldout)} held-out rows; raise `heldout`, or "
            "set it to 0."
        )
    kept = [row for row in heldout if parse_row(row).label not in known]
    if kept:
        rank_zero_info(f"{HELDOUT}: {len(kept)} rows are not held out, since training has no other row of their class.")
    return train + kept, out


def parse_row(row: Row) -> LabelledText:
    """Parse `row`.

    Raises:
        BadInput: if the row is invalid; the message names its file and line.
    """
    with locate_errors(row):
        return labelled_text(row.data)


def labelled_text(row: Mapping[str, Any]) -> LabelledText:
    """Return the texts and the label of `row`.

    Raises:
        BadRow: if it has no label or no known keys, or a value of another type.
    """
    for keys in FORMATS:
        if all(row.get(key) is not None for key in keys):
            return LabelledText(tuple(text_field(row, key) for key in keys), label_name(row))
    known = "; ".join(", ".join(keys) for keys in FORMATS)
    raise BadRow(f"it has the keys {', '.join(map(str, row)) or 'none'}, and no text; give one of {known}")


def label_name(row: Mapping[str, Any]) -> str:
    """Return the class of `row` as text: the same for 1 and true in JSON as for "1" and "true" in a CSV file.

    Raises:
        BadRow: if the label is missing, of another type, or negative.
    """
    label = row.get("label")
    name = str(label).strip() if isinstance(label, int | str) else ""
    if name in ("True", "False"):  # str(True), which Python also writes into CSV files
        name = name.lower()
    if not name:
        raise BadRow(f"its `label` is {label!r}; give a text, a whole number, or true or false")
    if re.fullmatch(r"-\d+", name):
        raise BadRow(
            f"its `label` is {name}, which marks rows without a published class (GLUE's test split); leave them out"
        )
    return name


def class_names(labels: Sequence[str], name: str) -> list[str]:
    """Return the distinct labels, numbers sorted by value before others sorted by name.

    Raises:
        BadInput: if there are fewer than two.
    """
    found = sorted(set(labels), key=lambda label: (0, int(label), "") if label.isdecimal() else (1, 0, label))
    if len(found) < 2:
        raise BadInput(f"All training rows of {name} have the label {found[0]}; give rows of two classes or more.")
    return found


def token_counts(rows: Sequence[LabelledExample]) -> list[int]:
    """Return the number of tokens of each row."""
    return [len(row.input_ids) for row in rows]
