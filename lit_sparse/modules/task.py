"""The interface of a task: the loss of a batch, its predictions, and what the model needs for them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
from torch import Tensor


class Task(L.LightningModule, ABC):
    """What a task (next tokens, classes) defines of a module; the rest of the host knows no task."""

    auto_class: ClassVar[Any]
    """The transformers Auto class that loads the model of this task."""

    @abstractmethod
    def graded_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        """Return the mean loss of a batch, the model's output, and the number of right predictions.

        The loss is a scalar with a graph. The output is for penalties. A prediction is right if the label is the
        likeliest token (or class); there are `scored_count` of them, and an integer scalar of right ones.
        """

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Return the mean loss of a batch (scalar with a graph), and the model's output, for penalties."""
        return self.graded_loss(batch)[:2]

    @abstractmethod
    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        """Return the likeliest token (or class) at each of the `scored_count` places, the labels, and the output.

        The first two are (N,) int64; the output is the model's, for penalties.
        """

    @abstractmethod
    def row_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Return the summed loss of each row, (B,) fp32, its scored tokens, (B,), right predictions, and the output.

        As `graded_loss`, but told apart by row, and without a graph.
        """

    def look_at_head(self) -> None:
        """Find out what `row_losses` has to know of the model, in passes of other rows than a batch's."""

    @abstractmethod
    def scored_count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of tokens (or rows) of a batch over which `loss` is the mean, an integer scalar."""

    @property
    def config_options(self) -> dict[str, Any]:
        """Entries of the base's configuration that the task sets when it loads the base."""
        return {}

    def check_data(self) -> None:
        """Check the trainer's data against the model, once it is loaded and before anything is computed."""

    def take_task(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from a checkpoint what the task needs to build the model.

        Raises:
            BadInput: if the checkpoint is of another task.
        """
