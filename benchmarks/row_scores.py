"""Keep the loss of each row of the validation sets, so that arms are compared on the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.metrics import ClassScores, TokenScores

FILE = "rows.json"
DECIMALS = 3
"""Of the sum of a row's losses in nats; divided by its tokens, what is cut off is far below what seeds differ by."""
DECIMALS_OF_CLASSES = 5
"""Of the loss of a row that is classified, which nothing divides."""


class TokensByRow(TokenScores):
    """The scores of all tokens, and beside them the loss and the scored tokens of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Tensor, Tensor]] = []

    def update(self, nll: Tensor, hits: Tensor, labels: Tensor) -> None:
        super().update(nll, hits, labels)
        self.kept.append((nll.sum(1), (labels[:, 1:] != -100).sum(1)))

    def by_row(self) -> dict[str, list[Any]]:
        """Return the scored tokens of each row, and the sum of their losses in nats."""
        tokens = [count for _, counts in self.kept for count in counts.tolist()]
        return {"tokens": tokens, "nll": [round(one, DECIMALS) for sums, _ in self.kept for one in sums.tolist()]}


class ClassesByRow(ClassScores):
    """The scores of all rows that are classified, and beside them the loss of each."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def update(self, losses: Tensor, hits: Tensor) -> None:
        super().update(losses, hits)
        self.kept.append(losses)

    def by_row(self) -> dict[str, list[Any]]:
        """Return 1 for each row, since a label counts as one scored token, and its loss in nats."""
        losses = [round(one, DECIMALS_OF_CLASSES) for losses in self.kept for one in losses.tolist()]
        return {"tokens": [1] * len(losses), "nll": losses}


class RowScores(Callback):
    """Writes rows.json in the run's folder after each validation: for each set its rows' losses, in the loader's order.

    A set has `of`, a hash of its rows' tokens and labels in that order, `tokens`, the scored tokens of each row (1 for
    a row that is classified), and `nll`, the sums of their losses in nats. Nothing is scored for it a second time. For
    one process.
    """

    def __init__(self) -> None:
        self._sets: dict[str, TokensByRow] | dict[str, ClassesByRow] = {}
        self._hashes: dict[str, Any] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.world_size > 1:
            return
        if isinstance(pl_module, CausalLM):
            self._sets = {name: TokensByRow().to(pl_module.device) for name in data.val_names}
            pl_module.val_scores.update(self._sets)
        elif isinstance(pl_module, Classifier):
            self._sets = {name: ClassesByRow().to(pl_module.device) for name in data.val_names}
            pl_module.scores.update(self._sets)
        self._hashes = {name: hashlib.sha256() for name in self._sets}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._sets:
            found = self._hashes[list(self._sets)[dataloader_idx]]
            for row in described(batch):
                found.update(row.encode())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._sets or trainer.log_dir is None:
            return
        out = {name: {"of": self._hashes[name].hexdigest()[:16], **one.by_row()} for name, one in self._sets.items()}
        (Path(trainer.log_dir) / FILE).write_text(json.dumps(out), encoding="utf-8")


def described(batch: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a line for each row: its tokens without padding, and their labels or the row's."""
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        yield f"{ids[mask].tolist()} {(labels[mask] if labels.ndim else labels).tolist()}\n"


def rows_of(folder: Path) -> dict[str, Any]:
    """Return the rows that a run in `folder` kept; {} if it kept none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
