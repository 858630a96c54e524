"""What all data modules over tokenised rows have in common."""

from abc import ABC, abstractmethod
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
from lit_sparse.data.examples import Examples, Overlong, tokenised
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.data.packing import Packed, PackedRows
from lit_sparse.data.sources import Row
from lit_sparse.demo import DEMO
from lit_sparse.errors import BadInput

TRAIN, HELDOUT = "train", "heldout"


class TokenData(L.LightningDataModule, ABC):
    """Rows, tokenised once and cached, as training, validation and test batches. A subclass says which rows.

    Training batches are dictionaries of int64 tensors (B, S): `input_ids`, `attention_mask` and `labels` (-100 where no
    loss is taken), padded on the right; with `packing` `position_ids` and `token_mask` instead of `attention_mask`.

    Args:
        tokenizer: Folder, Hugging Face name or `demo`; from Python also a tokenizer. It gets its end token for padding
            if it has none. The command line takes it from `model.base`.
        max_length: Tokens of a row at most.
        batch_size: Rows (with packing: packed rows) of a batch on one device.
        num_workers: Processes that prepare batches; 0 does it in the training process.
        overlong: What becomes of a row with more tokens: `drop` it, or `truncate` its end. What is dropped is counted
            and printed.
        seed: Of the order of training batches.
        packing: Join short rows into rows of up to `max_length` tokens, which do not see each other.
        pad_to_multiple_of: Make the length of batches a multiple of this, such as 8 for tensor cores.
        template: How prompts and answers are written: `chat` by the tokenizer's chat template, `plain` as prompt, line
            break, answer and end token, `auto` for chat where the tokenizer has a template. Multiple-choice rows read
            "Question: ... Answer: ..." unless `chat` is asked for.
        num_samples: Held-out prompts whose answers are shown before and after training.

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
    ) -> None:
        super().__init__()
        at_least(1, max_length=max_length, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        at_least(0, num_workers=num_workers, seed=seed, num_samples=num_samples)
        self.tokenizer_name = tokenizer
        self.max_length, self.batch_size, self.num_workers = max_length, batch_size, num_workers
        self.overlong: Overlong = overlong
        self.seed, self.packing, self.pad_to_multiple_of = seed, packing, pad_to_multiple_of
        self.template: Template = template
        self.num_samples = num_samples
        self.val_names: list[str] = []
        self.test_names: list[str] = []
        self.samples: list[dict[str, Any]] = []

    @abstractmethod
    def read_rows(self) -> dict[str, list[Row]]:
        """The rows of "train" and of each name in `val_names`; those of "heldout" give samples and tests."""

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        """What `read_rows` gives, read once."""
        return self.read_rows()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when it is first used."""
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns rows into tokens."""
        return Encoder(self.tokenizer, self.template)

    def tokenise(self) -> dict[str, Examples]:
        """The tokenised rows of each name, out of the cache where they are in it."""
        return {name: tokenised(rows, self.encoder, self.max_length, self.overlong) for name, rows in self.rows.items()}

    def prepare_data(self) -> None:
        """Reads and tokenises all rows into the cache, on one process of each machine.

        Raises:
            BadInput: a file is missing or a row is bad; its file and line are named.
        """
        for name, examples in self.tokenise().items():
            if examples.dropped:
                rank_zero_info(f"{name}: {examples.dropped} rows have over {self.max_length} tokens and are left out.")
        rank_zero_info(f"Prompts and answers are written in the {self.encoder.template} format.")

    def setup(self, stage: str) -> None:
        """Takes the tokenised rows from the cache; for "test" also what is scored."""
        self.examples = self.tokenise()
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
        """Training batches, in an order that depends on seed and epoch only; the position is kept in checkpoints."""
        rows, collate = self._overfitted(self.examples[TRAIN]), Padded(self.padding)
        if self.packing:
            rows, collate = PackedRows(rows, rows.lengths, self.max_length), Packed(self.padding)
        batches = Batches(rows.lengths, self.batch_size, self.seed, *replica(self.trainer))
        return Loader(rows, batches, collate, self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each name in `val_names`, every row once."""
        sets = [self.examples[name] for name in self.val_names]
        return [self._evaluation(one, one.lengths, Padded(self.padding)) for one in sets]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for each name in `test_names`: `choices` to be scored, `questions` to be answered."""
        loaders = []
        if self.choices:
            lengths = [sum(len(one.input_ids) for one in item.examples) for item in self.choices]
            loaders.append(self._evaluation(self.choices, lengths, Choices(self.padding)))
        if self.questions:
            lengths = [len(one.prompt_ids) for one in self.questions]
            loaders.append(self._evaluation(self.questions, lengths, Questions(self.padding)))
        return loaders

    @property
    def padding(self) -> Padding:
        """What batches are filled up with."""
        return Padding(self.tokenizer.get_vocab()[str(self.tokenizer.pad_token)], self.pad_to_multiple_of)

    def _overfitted(self, examples: Examples) -> Examples:
        """As many rows as `Trainer(overfit_batches=...)` asks for, so that every epoch has the same ones."""
        asked = self.trainer.overfit_batches if self.trainer else 0  # pyright: ignore[reportAttributeAccessIssue]
        if not asked:
            return examples
        of_all = self.batch_size * replica(self.trainer)[1]
        rows = asked * of_all if isinstance(asked, int) else round(asked * len(examples))
        return examples.part(0, min(rows, len(examples)))

    def _evaluation(self, data: Any, lengths: Sequence[int], collate: Callable[[Any], Any]) -> DataLoader[Any]:
        rank, world = replica(self.trainer)
        return evaluation_loader(data, lengths, self.batch_size, collate, rank, world, self.num_workers)


def at_least(lowest: int, **settings: int) -> None:
    """Refuses a setting below `lowest`."""
    for name, value in settings.items():
        if value < lowest:
            raise BadInput(f"`{name}` is {value}; it must be {lowest} or more.")


def first_epoch(trainer: L.Trainer | None) -> int:
    """The epoch a new loader begins with: a later one where the trainer reloads it in mid-fit."""
    return trainer.current_epoch if trainer else 0


def replica(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's number among those that share the data, and their count."""
    shared = trainer.distributed_sampler_kwargs if trainer else None
    if shared is not None:  # knows about tensor parallelism, under which several ranks see the same rows
        return shared["rank"], shared["num_replicas"]
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
