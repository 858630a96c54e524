"""Random tokens, for measurements in which the text does not matter."""

from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.data.module import at_least, first_epoch, replica
from lit_sparse.demo import DEMO, resolve
from lit_sparse.errors import BadInput


class RandomRows(Dataset[Example]):
    """`count` rows of `length` random tokens below `vocab_size`, each a function of (seed, its number)."""

    def __init__(self, count: int, length: int, vocab_size: int, seed: int) -> None:
        self.count, self.length, self.vocab_size, self.seed = count, length, vocab_size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        ids = np.random.default_rng([self.seed, index]).integers(self.vocab_size, size=self.length).tolist()
        return Example(ids, ids)


def vocabulary(model: str) -> int:
    """How many tokens the model of that name knows.

    Raises:
        BadInput: if there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(resolve(model)).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise BadInput(f"no vocabulary of {model!r} is known: {str(error).strip().splitlines()[0]}") from error


class Synthetic(L.LightningDataModule):
    """Rows of random tokens, all of the same length and all learnt: for plan and bench. Needs no tokenizer.

    Args:
        tokenizer: The model (a name, a folder or a `config.json`) whose vocabulary the tokens are drawn from.
        vocab_size: Tokens are drawn from 0 to `vocab_size` - 1; none is the model's whole vocabulary.
        max_length: Tokens of every row.
        rows: Rows of an epoch.
        heldout: Rows that are scored.
        batch_size: Rows of a batch on one device.
        num_workers: Processes that prepare batches; 0 does it in the training process.
        seed: Of the tokens and of their order.

    Attributes:
        val_names: Name of each loader of `val_dataloader()`.
        test_names: None.
        samples: None.
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
        at_least(1, vocab_size=vocab_size, max_length=max_length, rows=rows, batch_size=batch_size)
        at_least(0, heldout=heldout, num_workers=num_workers, seed=seed)
        self.max_length, self.batch_size, self.num_workers, self.seed = max_length, batch_size, num_workers, seed
        self.train_rows = RandomRows(rows, max_length, vocab_size, 2 * seed)
        self.heldout_rows = RandomRows(heldout, max_length, vocab_size, 2 * seed + 1)
        self.val_names = ["heldout"] if heldout else []
        self.test_names: list[str] = []
        self.samples: list[dict[str, Any]] = []

    def train_dataloader(self) -> Loader:
        """Training batches; the position is kept in checkpoints."""
        lengths = [self.max_length] * len(self.train_rows)
        batches = Batches(lengths, self.batch_size, self.seed, *replica(self.trainer))
        return Loader(self.train_rows, batches, Padded(Padding()), self.num_workers, first_epoch(self.trainer))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The held-out rows."""
        if not self.val_names:
            return []
        lengths = [self.max_length] * len(self.heldout_rows)
        loader = evaluation_loader(
            self.heldout_rows, lengths, self.batch_size, Padded(Padding()), *replica(self.trainer), self.num_workers
        )
        return [loader]
