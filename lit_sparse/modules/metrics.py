"""Scores as metrics: of a language model by the token, of a classifier by the row."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenScores(Metric):
    """Loss (nats a token), perplexity, and accuracy of the likeliest token, over all labelled tokens."""

    full_state_update = False
    nll: Tensor
    hits: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nll", "hits", "tokens"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, hits: Tensor, labels: Tensor) -> None:
        """Add a batch: nll (B, S-1) with 0 where no label, hits (B, S-1) bool, labels (B, S) with -100 where none."""
        self.nll += nll.sum()
        self.hits += hits.sum()
        self.tokens += (labels[:, 1:] != -100).sum()

    def compute(self) -> dict[str, Tensor]:
        """The scores as fp64 scalars; nan where no token was labelled."""
        loss = self.nll / self.tokens
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self.hits / self.tokens}


class ClassScores(Metric):
    """Loss (nats a row) and accuracy of the likeliest class, over all rows."""

    full_state_update = False
    nll: Tensor
    hits: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nll", "hits", "rows"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, predicted: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (scalar), and its predicted and right classes (B,) int64."""
        self.nll += loss * len(labels)
        self.hits += (predicted == labels).sum()
        self.rows += len(labels)

    def compute(self) -> dict[str, Tensor]:
        """The scores as fp64 scalars; nan where there was no row."""
        return {"loss": self.nll / self.rows, "accuracy": self.hits / self.rows}


def right_choices(losses: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the choice of the lowest loss is the right one, (items,) bool.

    Args:
        losses: One a choice, (B,).
        batch: Which `item` (B,) each row is a `choice` (B,) of, and the right one of each, `label` (items,).
    """
    table = torch.full((len(batch["label"]), int(batch["choice"].max()) + 1), torch.inf, device=losses.device)
    table[batch["item"], batch["choice"]] = losses
    return table.argmin(1) == batch["label"]
