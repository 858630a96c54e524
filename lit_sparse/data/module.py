"""The base of the data modules over tokenised rows."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_sparse.data.collate import Choices, Padded, Padding, Question, Questions, ScoredChoices
from lit_sparse.data.encoding import Encoder, Template, load_tokenizer
from lit_sparse.data.evaluation import questions, samples, scored_choices
from lit_sparse.data.examples import Examples, Overlong, tokenise_cached
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.data.packing import Packed, PackedRows
from lit_sparse.data.rows import ignored_keys
from lit_sparse.data.sources import Row
from lit_sparse.demo import DEMO
from lit_sparse.errors import BadInput

TRAIN, HELDOUT = "train", "heldout"


class TokenData(L.LightningDataModule, ABC):
    """Data module of rows that are tokenised once and cached. A subclass reads the rows.

    Training batches are dictionaries of int64 tensors of shape (B, S), padded on the right: `input_ids`,
    `attention_mask` and `labels`, which are -100 where no loss is taken. With `packing`, `position_ids` and
    `token_mask` replace `attention_mask`.

    Args:
        tokenizer: Folder, Hugging Face name or `demo`; from Python also a tokenizer. Without a padding token, it pads
            with its end token. The command line takes it from `model.base`.
        max_length: Maximum number of tokens in a row.
        batch_size: Rows (with packing: packed rows) in a batch on one device.
        num_workers: Worker processes that prepare batches; 0 prepares them in the training process.
        overlong: `drop` rows with more than `max_length` tokens and print their number, or `truncate` their end.
        seed: Seed of the order of training batches.
        shuffle: Train on the rows in an order that is drawn in every epoch; false keeps the order of their file.
        packing: Join short rows into rows of up to `max_length` tokens. Joined rows do not attend to each other.
        pad_to_multiple_of: Pad batches to a multiple of this length, such as 8 for tensor cores.
        template: Format of prompts and answers. `chat` uses the tokenizer's chat template; `plain` writes prompt, line
            break, answer and end token; `auto` is `chat` if the tokenizer has a template. Multiple-choice rows read
            "Question: ... Answer: ..." unless this is `chat`.
        num_samples: Number of held-out prompts whose generated answers are shown before and after training.

    Attributes:
        val_names: Name of each loader of `val_dataloader()`.
        test_names: Name of each loader of `test_dataloader()`, once `setup` has run.
        samples: Held-out prompts, once `setup` has run: `prompt_ids` (list of int), `prompt` and `reference` (texts).
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase = DEMO,
        max_length: int = 512,
        batch_size: int = 4,
        num_workers: int = 0,
        overlong: Overlong = "drop",
        seed: int = 0,
        packing: bool = False,
        pad_to_multiple_of: int = 1,
        template: Template = "auto",
        num_samples: int = 3,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        require_at_least(1, max_length=max_length, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        require_at_least(0, num_workers=num_workers, seed=seed, num_samples=num_samples)
        check_multiple(pad_to_multiple_of, max_length)
        if packing and not shuffle:
            raise BadInput("`packing` joins rows by their lengths, and cannot keep their order; set `shuffle` to true.")
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.overlong: Overlong = overlong
        self.seed, self.packing, self.pad_to_multiple_of = seed, packing, pad_to_multiple_of
        self.template: Template = template
        self.num_samples, self.shuffle = num_samples, shuffle
        self.val_names: list[str] = []
        self.test_names: list[str] = []
        self.samples: list[dict[str, Any]] = []

    @abstractmethod
    def read_rows(self) -> dict[str, list[Row]]:
        """Return the rows of "train" and of each name in `val_names`. Samples and tests use those of "heldout"."""

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """The rows by name, read once."""
        return self.read_rows()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when it is first used."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of rows into tokens."""
        return Encoder(self.tokenizer, self.template)

    def tokenise(self) -> dict[str, Examples]:
        """Return the tokenised rows by name, from the cache if they are in it."""
        return {
            name: tokenise_cached(rows, self.encoder, self.max_length, self.overlong_of(name))
            for name, rows in self.rows.items()
        }

    def overlong_of(self, name: str) -> Overlong:
        """Return what becomes of too long rows of a set: `overlong`, if a data module does not know better."""
        return self.overlong

    def prepare_data(self) -> None:
        """Read and tokenise all rows into the cache. Lightning calls this in one process per machine.

        Raises:
            BadInput: if a file is missing, or a row is invalid; the message names its file and line.
        """
        for name, examples in self.tokenise().items():
            told = {"left out": examples.dropped, "cut there": examples.cut}
            for what, count in told.items():
                if count:
                    rank_zero_info(f"{name}: {count} rows have over {self.max_length} tokens and are {what}.")
        for name, rows in self.rows.items():
            if ignored := Counter(key for row in rows for key in ignored_keys(row.data)):
                keys = ", ".join(f"{key} ({count} rows)" for key, count in ignored.items())
                rank_zero_info(f"{name}: nothing is read from {keys}.")
        rank_zero_info(self.encoder.describe())

    def setup(self, stage: str) -> None:
        """Load the tokenised rows from the cache; for "test", also make the questions that are scored."""
        self.examples = self.tokenise()  # a read of the cache, in every process
        heldout = self.rows.get(HELDOUT, [])
        self.samples = samples(heldout, self.encoder, self.max_length, self.num_samples)
        self.choices: list[ScoredChoices] = []
        self.questions: list[Question] = []
        if stage == "test":
            self.choices = scored_choices(heldout, self.encoder, self.max_length)
            self.questions = questions(heldout, self.encoder, self.max_length)
            scored = f"{len(self.choices)} multiple-choice questions and {len(self.questions)} worked answers"
            rank_zero_info(f"{HELDOUT}: {scored} are scored, of {len(heldout)} rows.")
        self.test_names = ["choices"] * bool(self.choices) + ["questions"] * bool(self.questions)

    def train_dataloader(self) -> Loader:
        """Return training batches in an order that depends on seed and epoch only, or in that of the file.

        Checkpoints hold its position.
        """
        rows, collate = self.examples[TRAIN], Padded(self.padding)
        rows = rows.take(0, overfitted(self.trainer, self.batch_size, len(rows)))
        if self.packing:
            rows, collate = PackedRows(rows, rows.lengths, self.max_length), Packed(self.padding)
        batches = Batches(rows.lengths, self.batch_size, self.seed, *rank_and_world(self.trainer), self.shuffle)
        return Loader(rows, batches, collate, self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each name in `val_names`; each yields every row once."""
        sets = [self.examples[name] for name in self.val_names]
        return [self._evaluation_loader(one, one.lengths, Padded(self.padding)) for one in sets]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each name in `test_names`: `choices` to score, `questions` to answer."""
        loaders = []
        if self.choices:
            lengths = [sum(len(one.input_ids) for one in item.examples) for item in self.choices]
            loaders.append(self._evaluation_loader(self.choices, lengths, Choices(self.padding)))
        if self.questions:
            lengths = [len(one.prompt_ids) for one in self.questions]
            loaders.append(self._evaluation_loader(self.questions, lengths, Questions(self.padding)))
        return loaders

    @property
    def padding(self) -> Padding:
        """Padding token and length multiple of the batches."""
        return Padding(self.tokenizer.get_vocab()[str(self.tokenizer.pad_token)], self.pad_to_multiple_of)

    def extremes(self) -> list[tuple[str, int, int]]:
        """Return the highest token and the number of tokens of the longest row of each set, after its name."""
        return [(name, int(one.ids.max(initial=0)), max(one.lengths, default=0)) for name, one in self.examples.items()]

    def _evaluation_loader(self, data: Any, lengths: Sequence[int], collate: Callable[[Any], Any]) -> DataLoader[Any]:
        rank, world = rank_and_world(self.trainer)
        return evaluation_loader(data, lengths, self.batch_size, collate, rank, world, self.num_workers)


def overfitted(trainer: Any, batch_size: int, rows: int) -> int:
    """Return how many of the rows, the first ones, `Trainer(overfit_batches=...)` trains on; all if it is not set.

    Lightning only limits the number of batches. With an order that is new in every epoch, each epoch would have other
    rows, and nothing would be overfitted.
    """
    asked = trainer.overfit_batches if trainer else 0
    if not asked:
        return rows
    of_all = batch_size * rank_and_world(trainer)[1]
    return min(rows, asked * of_all if isinstance(asked, int) else round(asked * rows))


def require_at_least(lowest: int, **settings: int) -> None:
    """Raise BadInput, which names the setting, if one of the settings is below `lowest`."""
    for name, value in settings.items():
        if value < lowest:
            raise BadInput(f"`{name}` is {value}; it must be {lowest} or more.")


def check_multiple(pad_to_multiple_of: int, max_length: int) -> None:
    """Raise BadInput if rows would be padded to more than the longest of them may have."""
    if pad_to_multiple_of > max_length:
        raise BadInput(
            f"`pad_to_multiple_of` is {pad_to_multiple_of}, but rows have at most `max_length` {max_length} tokens; "
            f"set it to {max_length} or less."
        )


def first_epoch(trainer: L.Trainer | None) -> int:
    """Return the epoch at which a new loader begins: above 0 if the trainer reloads it during a fit."""
    # Trainer(reload_dataloaders_every_n_epochs=...) makes new loaders, which must not repeat the first epoch's order.
    return trainer.current_epoch if trainer else 0


def rank_and_world(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return this process's rank among the data-parallel processes, and their number."""
    shared = trainer.distributed_sampler_kwargs if trainer else None
    if shared is not None:  # under tensor parallelism, several ranks share one replica's rows
        return shared["rank"], shared["num_replicas"]
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
