"""The task of a causal language model: predict the next token; scored by loss, choices, and generated answers."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lit_sparse.anatomy import backbone, is_linear, is_quantized_linear, model_inputs
from lit_sparse.calls import dummy_forward, evaluating
from lit_sparse.data import Labelled, Synthetic, TokenData, final_number
from lit_sparse.data.packing import check_packing
from lit_sparse.errors import BadInput
from lit_sparse.loss import IGNORED, likeliest_tokens, next_token_loss_and_hits, next_token_scores
from lit_sparse.modules.base import LitSparse
from lit_sparse.modules.checks import check_tokens, positions
from lit_sparse.modules.ends import set_ends
from lit_sparse.modules.metrics import TokenScores, right_choices

ANSWER_TOKENS = 200
"""New tokens at most in an answer that is compared with its reference."""


class CausalLM(LitSparse):
    """Train a Hugging Face causal language model with update strategies."""

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.trainer.datamodule, Labelled):  # pyright: ignore[reportAttributeAccessIssue]
            raise BadInput(
                "CausalLM learns from text, but the data are Labelled; give other data, or task: Classifier."
            )
        self.val_scores: dict[str, TokenScores] = {}
        self.test_scores: dict[str, MeanMetric] = {}

    def check_data(self) -> None:
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, TokenData):
            check_tokens(self.build(), data)
            set_ends(self.build(), data.encoder)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, TokenData) and data.packing:
            with self.autocast():  # what trains may be in another type than what does not
                check_packing(self.build(), min(2, data.batch_size))

    def take_task(self, checkpoint: Mapping[str, Any]) -> None:
        if "classes" in checkpoint["lit_sparse"]:
            raise BadInput("the checkpoint is of another task than CausalLM; give the task of the run that wrote it.")

    # ---- loss

    def graded_loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        inputs = model_inputs(batch)
        if not self.head_is_plain:
            output = self.build()(**inputs)
            labels = batch["labels"][:, 1:].flatten()
            logits = output.logits[:, :-1].flatten(0, 1).float()
            total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            loss = total / self.scored_count(batch).clamp(min=1)  # a mean of no token would be NaN
            return loss, output, (logits.argmax(-1) == labels).sum()
        output = backbone(self.build())(**inputs)
        loss, hits = next_token_loss_and_hits(
            output.last_hidden_state, *self.head, batch["labels"], batch.get("scored")
        )
        return loss, output, hits

    def predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        inputs, scored = model_inputs(batch), batch["labels"][:, 1:] != IGNORED
        wanted = batch["labels"][:, 1:][scored]
        if not self.head_is_plain:
            output = self.build()(**inputs)
            return output.logits[:, :-1][scored].argmax(-1), wanted, output
        output = backbone(self.build())(**inputs)
        return likeliest_tokens(output.last_hidden_state[:, :-1][scored], *self.head), wanted, output

    def scored_count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def look_at_head(self) -> None:
        assert self.head_is_plain in (True, False)  # which takes a forward pass of its own, once

    def row_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Any]:
        nll, hits, output = self._scores(batch)
        return nll.sum(1), (batch["labels"][:, 1:] != IGNORED).sum(1), hits.sum(), output

    def scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per-token nll (B, S-1) fp32, 0 where no label, and whether the label was the likeliest token, bool."""
        return self._scores(batch)[:2]

    @torch.no_grad()
    def _scores(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        inputs = model_inputs(batch)
        if not self.head_is_plain:
            output = self.build()(**inputs)
            logits, labels = output.logits[:, :-1].float(), batch["labels"][:, 1:]
            nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
            return nll, (logits.argmax(-1) == labels) & (labels != IGNORED), output
        output = backbone(self.build())(**inputs)
        nll, hits = next_token_scores(output.last_hidden_state, *self.head, batch["labels"], batch.get("scored"))
        return nll, hits, output

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output embedding's weight (V, H) and bias."""
        head = self.build().get_output_embeddings()
        return head.weight, head.bias  # pyright: ignore

    @property
    def head_is_plain(self) -> bool:
        """True if the logits are the head's linear map of the last hidden states and nothing else (Gemma 2 caps them).

        Found out by comparing the two for three dummy tokens, once; only then are the logits never held whole.
        """
        model = self.build()
        head = model.get_output_embeddings()
        if (
            head is None or not is_linear(head) or is_quantized_linear(head)
        ):  # an adapter sits on it, or bits are packed
            return False
        if self._head_is_plain is None:
            hidden = dummy_forward(backbone(model), "last_hidden_state")
            with torch.no_grad():
                ours, theirs = F.linear(hidden, *self.head), dummy_forward(model)
            cap = getattr(
                model.config.get_text_config(), "final_logit_softcapping", None
            )  # hardly seen in small logits
            self._head_is_plain = cap is None and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-6)
            if not self._head_is_plain:
                rank_zero_info(f"{type(model).__name__} changes its logits after the head: they are held whole.")
        return self._head_is_plain

    _head_is_plain: bool | None = None

    # ---- validation

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.autocast():
            nll, hits = self.compute(self.scores, batch)
        name = self._set_name("val", dataloader_idx)
        if name not in self.val_scores:
            self.val_scores[name] = TokenScores().to(self.device)
        self.val_scores[name].update(nll, hits, batch["labels"])

    def _set_name(self, kind: Literal["val", "test"], index: int) -> str:
        """Return the data module's name of an evaluation set; `val0`, `val1`, ... with bare loaders."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(data, TokenData | Synthetic):
            return f"{kind}{index}"
        return (data.val_names if kind == "val" else data.test_names)[index]

    def on_validation_epoch_end(self) -> None:
        for name, scores in self.val_scores.items():
            for key, value in scores.compute().items():
                self.log(f"{name}_{key}", value.float(), prog_bar=key == "loss")
            scores.reset()

    # ---- test

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        right = self._chosen_right(batch) if "item" in batch else self._answered_right(batch)
        name = self._set_name("test", dataloader_idx)
        if name not in self.test_scores:
            self.test_scores[name] = MeanMetric().to(self.device)
        self.test_scores[name].update(right.float())

    def on_test_epoch_end(self) -> None:
        for name, scores in self.test_scores.items():
            self.log(f"{name}_accuracy", scores.compute())
            scores.reset()

    def _chosen_right(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return whether the likeliest choice is the right one, (items,) bool."""
        with self.autocast():
            nll, _ = self.compute(self.scores, batch)
        return right_choices(nll.sum(1), batch)

    def _answered_right(self, batch: Mapping[str, Any]) -> Tensor:
        """Return whether the greedy answer's last number is the reference's, (B,) bool (exact match as for GSM8K)."""
        answers = self.answer(batch["prompt_ids"], batch["prompt_mask"], ANSWER_TOKENS)
        right = [final_number(a) == b for a, b in zip(answers, batch["answer"], strict=True)]
        return torch.tensor(right, device=batch["prompt_ids"].device)

    @torch.no_grad()
    def answer(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: int) -> list[str]:
        """Greedy continuations of left-padded prompts (B, S), `tokens` long or up to the last position, decoded."""
        model, data = self.build(), self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(data, TokenData):
            raise BadInput(
                f"answers need a tokenizer, but {type(data).__name__} has none; use data of lit_sparse.data."
            )
        tokenizer, room = data.tokenizer, positions(model)
        if room is not None:
            tokens = max(1, min(tokens, room - prompt_ids.shape[1]))
        with self.autocast(), evaluating(model):
            generate = partial(
                model.generate,  # pyright: ignore[reportArgumentType]
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                synced_gpus=bool(self._sharded),  # all processes go on until the last one's answers are done
            )
            out = self.compute(generate)
        return tokenizer.batch_decode(out[:, prompt_ids.shape[1] :], skip_special_tokens=True)
