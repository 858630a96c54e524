"""Logs of a training: the trainable weights, and the scores of each optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_sparse.modules.precision import HALF
from lit_sparse.modules.resume import Resumable
from lit_sparse.modules.window import Window
from lit_sparse.optim import total_norm

LOGGED = (
    *("train_loss", "train_accuracy", "scored_tokens", "lr", "grad_norm"),
    *("tokens_per_second", "peak_memory_gib", "skipped_steps"),
)
"""Names of what is logged in training, and is no score of an evaluation."""


class Scored(Resumable):
    """The part of the host that logs.

    Attributes:
        of_training: Names of what is logged in training, and is no score of an evaluation.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.of_training = {*LOGGED}
        self._window = Window()

    def on_fit_start(self) -> None:
        trained, all_weights = sum(p.numel() for _, p in self.updates.named), self.base_parameters
        rank_zero_info(f"{trained:,} of {all_weights:,} weights are trained ({trained / all_weights:.2%}).")
        frozen = str(self.frozen_dtype).removeprefix("torch.")
        trained = "what is trained and its optimizer in float32"
        if self._sharded and self.frozen_dtype in HALF:
            trained = "the masters of what is trained in float32"
        if not self.updates.masters:
            trained = f"what is trained stays in {frozen}"
        rank_zero_info(f"Frozen weights and computation are in {frozen}, {trained}.")

    @property
    def _micro_batches(self) -> int:
        return self.trainer.accumulate_grad_batches

    def _close_window(self) -> None:
        """Log the step's scores; divide gradients by its scored tokens, before any hook of the step sees them.

        A step whose loss is not finite is skipped: parameters without a gradient are left alone by every optimizer.
        """
        loss, accuracy, tokens, scale = self._window.close(self._micro_batches)
        if self.guard.close():
            rank_zero_info(self.guard.told(self.global_step + 1, float(loss)))
            self.log("skipped_steps", float(self.guard.total))
        elif scale is not None:
            self.updates.scale_gradients(scale)
        self._count_tokens(tokens)
        self._log_scores(loss, accuracy)

    def _log_scores(self, loss: Tensor, accuracy: Tensor) -> None:
        # Lightning reads a value that is for the bar at every step, bar or not, and so waits for the device.
        self.log("train_loss", loss, prog_bar=self.trainer.progress_bar_callback is not None)
        self.log("train_accuracy", accuracy)

    def _count_tokens(self, tokens: Tensor) -> None:
        # Kept on the device: to read it here would wait for the step.
        self.tokens_seen = self.tokens_seen.to(tokens.device) + tokens.long()
        self.log("scored_tokens", self.tokens_seen.float())

    def _log_numbers(self, numbers: Mapping[str, Tensor]) -> None:
        self.of_training |= numbers.keys()
        self.log_dict(dict(numbers))

    def _log_norm(self) -> None:
        grads = [parameter.grad for _, parameter in self.updates.named if parameter.grad is not None]
        if grads:
            self.log("grad_norm", total_norm(grads))
