"""Random tokens, for measurements that do not depend on the text."""

from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.data.module import first_epoch, overfitted, rank_and_world, require_at_least
from lit_sparse.demo import DEMO, resolve
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import due_to_files, refusal_of


class RandomRows(Dataset[Example]):
    """Data set of `count` rows of `length` random tokens below `vocab_size`. Each is a function of (seed, index)."""

    def __init__(self, count: int, length: int, vocab_size: int, seed: int) -> None:
        self.count, self.length, self.vocab_size, self.seed = count, length, vocab_size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        ids = np.random.default_rng([self.seed, index]).integers(self.vocab_size, size=self.length).tolist()
        return Example(ids, ids)


def vocabulary(model: str) -> int:
    """Return the vocabulary size of a model, given by name or folder.

    Raises:
        BadInput: if there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(resolve(model), trust_remote_code=False).get_text_config().vocab_size
    except Exception as error:  # what transformers meets in malformed files is of any class
        if isinstance(error, BadInput) or not due_to_files(error):
            raise
        raise BadInput(
            f"No configuration of {model!r} could be loaded ({refusal_of(error)}); set `vocab_size`."
        ) from error


class Synthetic(L.LightningDataModule):
    """Data module of random tokens in rows of equal length, for plan and bench. It needs no tokenizer.

    The loss is on every token.

    Args:
        tokenizer: Model (name, folder or `config.json`) from whose vocabulary the tokens are drawn.
        vocab_size: Tokens are drawn from 0 to `vocab_size` - 1; by default, from the model's whole vocabulary.
        max_length: Number of tokens in every row.
        rows: Number of training rows.
        heldout: Number of held-out rows, which are scored.
        batch_size: Rows in a batch on one device.
        num_workers: Worker processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the tokens and of their order.

    Attributes:
        val_names: Name of each loader of `val_dataloader()`.
        test_names: Empty: random tokens have no answers to score.
        samples: Empty, likewise.
    """

    def __init__(
        self,
        tokenizer: str = DEMO,
        vocab_size: int | None = None,
        max_length: int = 512,
        rows: int = 1024,
        heldout: int = 8,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        vocab_size = vocabulary(tokenizer) if vocab_size is None else vocab_size
        require_at_least(1, vocab_size=vocab_size, max_length=max_length, rows=rows, batch_size=batch_size)
        require_at_least(0, heldout=heldout, num_workers=num_workers, seed=seed)
        self.max_length, self.batch_size, self.num_workers, self.seed = max_length, batch_size, num_workers, seed
        # Even and odd: one run's held-out rows are never the training rows of a run with another seed.
        self.train_rows = RandomRows(rows, max_length, vocab_size, 2 * seed)
        self.heldout_rows = RandomRows(heldout, max_length, vocab_size, 2 * seed + 1)
        self.val_names = ["heldout"] if heldout else []
        self.test_names: list[str] = []
        self.samples: list[dict[str, Any]] = []

    def train_dataloader(self) -> Loader:
        """Return training batches. Checkpoints hold their position."""
        lengths = [self.max_length] * overfitted(self.trainer, self.batch_size, len(self.train_rows))
        batches = Batches(lengths, self.batch_size, self.seed, *rank_and_world(self.trainer))
        return Loader(self.train_rows, batches, Padded(Padding()), self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the held-out rows, in one loader; none if there are no such rows."""
        if not self.val_names:
            return []
        lengths = [self.max_length] * len(self.heldout_rows)
        loader = evaluation_loader(
            self.heldout_rows,
            lengths,
            self.batch_size,
            Padded(Padding()),
            *rank_and_world(self.trainer),
            self.num_workers,
        )
        return [loader]
