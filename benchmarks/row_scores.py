"""Keep the loss of each row of a language model's validation sets, so that arms are compared on the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_sparse.modules import CausalLM
from lit_sparse.modules.metrics import TokenScores

FILE = "rows.json"
DECIMALS = 3
"""Of the sum of a row's losses in nats; divided by its tokens, what is cut off is far below what seeds differ by."""


class ByRow(TokenScores):
    """The scores of all tokens, and beside them the loss and the scored tokens of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def update(self, nll: Tensor, hits: Tensor, labels: Tensor) -> None:
        super().update(nll, hits, labels)
        self.sums.append(nll.sum(1))
        self.counts.append((labels[:, 1:] != -100).sum(1))


class RowScores(Callback):
    """Writes rows.json in the run's folder after each validation: for each set its rows' losses, in the loader's order.

    A set has `of`, a hash of its rows' tokens and labels in that order, `tokens`, the scored tokens of each row, and
    `nll`, the sums of their losses in nats. Nothing is scored for it a second time. For one process; a classifier's
    rows are not kept.
    """

    def __init__(self) -> None:
        self._sets: dict[str, ByRow] = {}
        self._hashes: dict[str, Any] = {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(pl_module, CausalLM) and trainer.world_size == 1:
            self._sets = {name: ByRow().to(pl_module.device) for name in data.val_names}
            self._hashes = {name: hashlib.sha256() for name in data.val_names}
            pl_module.val_scores.update(self._sets)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._sets:
            return
        found = self._hashes[list(self._sets)[dataloader_idx]]
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            found.update(f"{ids[mask].tolist()} {labels[mask].tolist()}\n".encode())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._sets or trainer.log_dir is None:
            return
        out = {
            name: {
                "of": self._hashes[name].hexdigest()[:16],
                "tokens": [count for counts in one.counts for count in counts.tolist()],
                "nll": [round(total, DECIMALS) for sums in one.sums for total in sums.tolist()],
            }
            for name, one in self._sets.items()
        }
        (Path(trainer.log_dir) / FILE).write_text(json.dumps(out), encoding="utf-8")


def rows_of(folder: Path) -> dict[str, Any]:
    """Return the rows that a run in `folder` kept; {} if it kept none."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
