"""The task of text classification; scored by loss and accuracy."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_sparse.data import Labelled
from lit_sparse.demo import MINILM
from lit_sparse.errors import BadInput
from lit_sparse.modules.base import LitSparse
from lit_sparse.modules.loading import names_of_classes, trained_classes
from lit_sparse.modules.metrics import ClassScores

WITHOUT_HEAD = (
    "start with a new head: save the base without its own (AutoModel.from_pretrained(base).save_pretrained(folder), "
    "its tokenizer beside it), and give that folder."
)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Classifier(LitSparse):
    """Train a Hugging Face model (an encoder such as BERT, or any other with a classification head) to classify texts.

    The head, with the encoder's pooler, always trains, whatever the update strategies freeze. If the base has no head,
    one is drawn from a fixed seed, the same in every run, and counts as a part of the base.

    Args:
        base: The model: `minilm` (all-MiniLM-L6-v2, downloaded once), a folder, a Hugging Face name, a `config.json`
            (random weights, drawn from `seed_everything`), or in Python a loaded transformers model.
        labels: Names of the classes in the order of the head's outputs; by default those of the base's head, or those
            of the data if the base has no head or one without names (LABEL_0, ...). The data must have the same
            classes.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(self, base: Any = MINILM, labels: list[str] | None = None, **host: Any) -> None:
        super().__init__(base, **host)
        self.labels = list(labels) if labels is not None else None
        self.pad_token: int | None = None
        self.scores: dict[str, ClassScores] = {}

    # ---- classes

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.scores = {}
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, Labelled):
            data.renumber(self._order_labels(data.label_names))
            self._set_classes("the data", data.label_names, data.pad_token)
        elif data is not None:
            raise BadInput(
                f"Classifier needs labelled texts, but the data are {type(data).__name__}; give "
                "lit_sparse.data.Labelled, or loaders of your own."
            )

    def _order_labels(self, labels: list[str]) -> list[str]:
        """Return the data's `labels` in the order of the head's outputs, or unchanged if that order is not known.

        Raises:
            BadInput: if the base has a head for other classes.
        """
        own = self._own_labels()
        if self.labels is None and has_names(own) and sorted(own) != sorted(labels):
            raise BadInput(
                f"the base's head has the classes {shorten(own)}, but the data has {shorten(labels)}; name the rows' "
                "labels as the base does, give model.labels in the order of the head's outputs, or " + WITHOUT_HEAD
            )
        order = self.labels or (own if has_names(own) else labels)
        return list(order) if sorted(order) == sorted(labels) else labels

    def _own_labels(self) -> list[str]:
        """Return the classes of the base's head in the order of its outputs; [] if it has no head."""
        return trained_classes(self._given[0] if self._given else self.base)

    def _set_classes(self, source: str, labels: list[str], pad_token: int | None) -> None:
        """Set the classes and the padding token where they are not set yet.

        Raises:
            BadInput: if other classes are set.
        """
        if self.labels is not None and self.labels != labels:
            raise BadInput(
                f"the classes are {shorten(self.labels)}, but {source} has {shorten(labels)}; give the same classes in "
                "the same order."
            )
        self.labels = list(labels)
        self.pad_token = pad_token if self.pad_token is None else self.pad_token

    @property
    def config_options(self) -> dict[str, Any]:
        if self.labels is None:
            return {}
        names = dict(enumerate(self.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: n for n, name in names.items()}}

    def build(self) -> PreTrainedModel:
        if self.model is None:
            self._check_count(len(self._own_labels()))
        model = super().build()
        self._check_count(len(names_of_classes(model.config)))
        if self.pad_token is not None:  # a decoder classifies at the last token of a row that is not padding
            model.config.pad_token_id = self.pad_token
        return model

    def _check_count(self, own: int) -> None:
        """Refuse a head for `own` classes (0: no head) if this task has another number.

        Raises:
            BadInput: if the numbers differ, or no classes are known.
        """
        if self.labels is None and not own:
            raise BadInput("Classifier knows no classes; train it on lit_sparse.data.Labelled, or give model.labels.")
        if self.labels is not None and own not in (0, len(self.labels)):
            way_out = f"load it with num_labels={len(self.labels)}." if self._given else WITHOUT_HEAD
            raise BadInput(f"the base's head has {own} classes, but {len(self.labels)} were asked for; {way_out}")

    @property
    def classes(self) -> dict[str, Any]:
        return {"labels": self.labels, "pad_token": self.pad_token}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_sparse"]["classes"] = self.classes

    def take_task(self, checkpoint: Mapping[str, Any]) -> None:
        if "classes" not in checkpoint["lit_sparse"]:
            raise BadInput("the checkpoint is of another task than Classifier; give the task of the run that wrote it.")
        kept = checkpoint["lit_sparse"]["classes"]
        if kept["labels"] is not None:
            self._set_classes("the checkpoint", **kept)

    # ---- loss

    def graded_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        output = self.build()(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False)
        hits = (output.logits.argmax(-1) == batch["labels"]).sum()
        return F.cross_entropy(output.logits.float(), batch["labels"]), output, hits

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        output = self.build()(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False)
        return output.logits.argmax(-1), batch["labels"], output

    def row_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
        output = self.build()(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False)
        hits = (output.logits.argmax(-1) == batch["labels"]).sum()
        losses = F.cross_entropy(output.logits.float(), batch["labels"], reduction="none")
        return losses, torch.ones_like(batch["labels"]), hits, output

    def scored_count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor(len(batch["labels"]), device=batch["labels"].device)

    # ---- validation and test

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.autocast():
            losses, _, hits, _ = self.compute(self.row_losses, batch)
        name = self._set_name(dataloader_idx)
        if name not in self.scores:
            self.scores[name] = ClassScores().to(self.device)
        self.scores[name].update(losses, hits)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        for name, scores in self.scores.items():
            for key, value in scores.compute().items():
                self.log(f"{name}_{key}", value.float(), prog_bar=key == "accuracy")
            scores.reset()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def _set_name(self, index: int) -> str:
        """Return the data module's name of an evaluation set; `val0`, `val1`, ... for loaders without a data module."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        return data.val_names[index] if isinstance(data, Labelled) else f"val{index}"


def has_names(labels: list[str]) -> bool:
    """Return whether the classes have names, other than the LABEL_0, LABEL_1, ... that transformers fills in."""
    return labels != [f"LABEL_{n}" for n in range(len(labels))]


def shorten(labels: list[str]) -> str:
    """Return the first three of `labels` and their number, for an error message."""
    return f"{', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''} ({len(labels)})"
