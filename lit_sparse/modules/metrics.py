"""Token-level scores of a language model as one metric."""

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
