"""Losses that are not finite: the steps that they belong to are skipped and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.errors import BadInput
from lit_sparse.ranks import all_reduce_sum


class LossGuard:
    """Tells before an optimizer step whether one of its losses is not finite, on any rank.

    The answer goes to the host as soon as the last forward pass has it, so that reading it does not wait for the
    backward pass, which keeps the device busy meanwhile.

    Args:
        most: Steps in a row that may be skipped.

    Attributes:
        total, in_row: Steps skipped so far, and those in a row.
        skips: Whether this step is skipped.
    """

    def __init__(self, most: int) -> None:
        self.most, self.total, self.in_row, self.skips = most, 0, 0, False
        self._lost: Tensor | None = None
        self._answer = torch.zeros(())
        self._answered: torch.cuda.Event | None = None

    def note(self, loss: Tensor, ask: bool) -> None:
        """Take the loss of a micro-batch, before its backward pass.

        Args:
            ask: Whether `lost` will be called next: of the last micro-batch, at least. The same on all ranks.
        """
        lost = (~loss.detach().isfinite()).float()
        self._lost = lost if self._lost is None else self._lost.to(lost.device) + lost
        if ask:
            self._answer = all_reduce_sum(self._lost.clone()).to("cpu", non_blocking=True)  # into pinned memory
            if lost.is_cuda:
                self._answered = torch.cuda.Event()
                self._answered.record()

    def lost(self) -> bool:
        """Return whether a loss of the window, as far as it was asked for, is not finite on any rank."""
        if self._answered is not None:
            self._answered.synchronize()
            self._answered = None
        return bool(self._answer)

    def close(self) -> bool:
        """End the window; return whether its step is to be skipped, which is then counted.

        Raises:
            BadInput: if more steps in a row were skipped than may be.
        """
        self.skips, self._lost = self.lost(), None
        self.in_row = self.in_row + 1 if self.skips else 0
        self.total += self.skips
        if self.in_row > self.most:
            raise BadInput(
                f"the losses of {self.in_row} steps in a row are not finite, and were skipped; lower model.lr and go "
                "on from the last checkpoint, look for odd rows in the data, or raise model.max_skipped."
            )
        return self.skips

    def told(self, step: int, loss: float) -> str:
        """Return a sentence on the step that is skipped."""
        return (
            f"Step {step} is skipped: its loss is {loss} ({self.in_row} in a row, at most {self.most}; {self.total} in "
            "all)."
        )
