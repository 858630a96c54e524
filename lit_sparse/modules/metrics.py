"""Evaluation metrics: of a language model per token, of a classifier per row. Ranks are summed, not averaged."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenScores(Metric):
    """Compute loss (nats per token), perplexity, and accuracy of the likeliest token, over all labelled tokens.

    The state is in fp64: a float32 count stops growing at 2^24 tokens.
    """

    full_state_update = False
    nll: Tensor
    hits: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nll", "hits", "tokens"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, hits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            nll: Negative log-likelihood of each next token, (B, S-1), in nats; 0 where there is no label.
            hits: Whether the likeliest token is the label, (B, S-1) bool.
            labels: (B, S) int64; -100 where there is no label.
        """
        self.nll += nll.sum()
        self.hits += hits.sum()
        self.tokens += (labels[:, 1:] != -100).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the scores as fp64 scalars; nan if no token was labelled."""
        loss = self.nll / self.tokens
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self.hits / self.tokens}


class ClassScores(Metric):
    """Compute loss (nats per row) and accuracy of the likeliest class, over all rows."""

    full_state_update = False
    nll: Tensor
    hits: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nll", "hits", "rows"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, hits: Tensor) -> None:
        """Add a batch: the loss of each row in nats, (B,), and how many rows have the right class, a scalar."""
        self.nll += losses.sum()
        self.hits += hits
        self.rows += len(losses)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores as fp64 scalars; nan if there was no row."""
        return {"loss": self.nll / self.rows, "accuracy": self.hits / self.rows}


def right_choices(losses: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return for each multiple-choice item whether its choice with the lowest loss is the correct one, (items,) bool.

    Args:
        losses: Loss of each row, (B,); a row is one choice of one item.
        batch: `item` (B,) and `choice` (B,) of each row, and `label` (items,), the number of the correct choice.
    """
    table = torch.full((len(batch["label"]), int(batch["choice"].max()) + 1), torch.inf, device=losses.device)
    table[batch["item"], batch["choice"]] = losses
    return table.argmin(1) == batch["label"]
