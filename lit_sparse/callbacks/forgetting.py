"""What a fit forgets: general text and zero-shot questions, scored before and after it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_sparse import demo
from lit_sparse.anatomy import evaluating
from lit_sparse.checkpoints import forked_rng
from lit_sparse.data import TokenData
from lit_sparse.data.collate import Choices, Padded, Padding, ScoredChoices
from lit_sparse.data.encoding import Encoder, Example, load_tokenizer
from lit_sparse.data.evaluation import scored_choices
from lit_sparse.data.examples import encode
from lit_sparse.data.loader import evaluation_loader
from lit_sparse.data.module import TRAIN, require_at_least
from lit_sparse.data.rows import IGNORED
from lit_sparse.data.sources import READERS, Row, read, row_digest
from lit_sparse.data.text import Text, read_files
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.modules.metrics import TokenScores, right_choices

QUESTIONS = ("piqa", "sciq", "arc_easy", "hellaswag")


class Forgetting(Callback):
    """Scores a causal language model before and after a fit, on what the fit does not train on.

    General text by its loss (nats a token) and perplexity; multiple-choice questions, zero-shot, by the choice of the
    highest log-likelihood a token. The scores are in `before` and `after`, and in the record's outcome: list this
    callback before a `Recorder` (`lit-sparse fit` does so). Rows that the fit trains on are left out, and
    passages that stand in its plain text; training goes on to the same bits as without.

    Args:
        rows: Passages of text, and questions of each set, chosen by a hash of the row.
        text: A data file with the general text, or `demo`: passages of English novels (LAMBADA, arXiv 1606.06031).
        questions: Names of demo data sets (`piqa`, `sciq`, `arc_easy`, `hellaswag`), or data files.
        batch_size: Passages, or questions, of a batch.
        max_length: Tokens of a row at most; longer passages lose their end, longer questions are left out.
        exclude: Data files, demo sets or plain text, whose rows are left out too, where all of a row is the same, or
            which a passage stands in: what an earlier phase was trained on, or recorded importance on.
        tokenizer: Folder, Hugging Face name or `demo`; none takes that of the data, or of the module's base.

    Attributes:
        before: The scores before training; a resumed fit has them from its checkpoint, or none, where the run that it
            goes on with had no such callback.
        after: The scores after training.
    """

    def __init__(
        self,
        rows: int = 200,
        text: str = demo.DEMO,
        questions: Sequence[str] = QUESTIONS,
        batch_size: int = 8,
        max_length: int = 512,
        exclude: Sequence[str] = (),
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> None:
        require_at_least(1, rows=rows, batch_size=batch_size, max_length=max_length)
        self.rows, self.text, self.questions = rows, text, list(questions)
        self.batch_size, self.max_length, self.tokenizer = batch_size, max_length, tokenizer
        self.exclude = list(exclude)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self._passages: Any = []
        self._choices: dict[str, list[ScoredChoices]] = {}
        self._padding = Padding()

    # ---- the course of a fit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, CausalLM):
            raise BadInput(
                f"Forgetting scores what a language model makes of text, but the task is {type(pl_module).__name__}; "
                "leave the callback out."
            )
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        own = data.tokenizer if isinstance(data, TokenData) else None
        tokenizer = load_tokenizer(self.tokenizer or own or pl_module.base)
        self._padding = Padding(tokenizer.get_vocab()[str(tokenizer.pad_token)])
        self._encode(Encoder(tokenizer), Trained(self.exclude, data))

    def _encode(self, encoder: Encoder, trained: Trained) -> None:
        passages = untrained(rows_of(self.text, "text"), trained, self.rows, self.text)
        self._passages = encode(passages, encoder, self.max_length, "truncate")
        for name in self.questions:
            rows = untrained(rows_of(name, name), trained, self.rows, name)
            self._choices[name] = scored_choices(rows, encoder, self.max_length)
            if not self._choices[name]:
                raise BadInput(
                    f"Forgetting found no multiple-choice question of up to {self.max_length} tokens in {name}; raise "
                    "max_length, or give rows with question, choices, and label."
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        if trainer.global_step > 0 and not self.before:
            rank_zero_info(
                "Forgetting was not part of the run that is resumed: there are no scores from before training."
            )
        elif not self.before:  # a resumed fit has them already
            self.before = self.scores(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        self.after = self.scores(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = dict(state_dict["before"])

    # ---- scores

    def scores(self, module: CausalLM) -> dict[str, float]:
        """`general_loss`, `general_perplexity`, and `NAME_zero_shot` (share of right answers) of each question set."""
        with (
            module.phases("forgetting"),
            forked_rng(module.device),
            torch.no_grad(),
            evaluating(module),
            module.autocast(),
        ):
            found = self._text_scores(module)
            for name, items in self._choices.items():
                found[f"{name}_zero_shot"] = self._share_right(module, items)
        return found

    def _text_scores(self, module: CausalLM) -> dict[str, float]:
        total = TokenScores().to(module.device)
        for batch in self._batches(self._passages, self._passages.lengths, Padded(self._padding), module):
            nll, hits = module.compute(module.scores, batch)
            total.update(nll, hits, batch["labels"])
        return {f"general_{name}": total.compute()[name].item() for name in ("loss", "perplexity")}

    def _share_right(self, module: CausalLM, items: list[ScoredChoices]) -> float:
        sizes = [choice_tokens(item.examples) for item in items]
        batches = self._batches(items, sizes, Choices(self._padding), module)
        return sum(int(right(module.compute(module.scores, batch)[0], batch).sum()) for batch in batches) / len(items)

    def _batches(self, rows: Any, sizes: list[int], collate: Any, module: CausalLM) -> Any:
        loader = evaluation_loader(rows, sizes, self.batch_size, collate)
        return (move_data_to_device(batch, module.device) for batch in loader)


def right(nll: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether the choice of the lowest mean nll a token is the right one, (items,) bool, from nll (B, S-1)."""
    return right_choices(nll.sum(1) / (batch["labels"][:, 1:] != IGNORED).sum(1), batch)


def choice_tokens(examples: Sequence[Example]) -> int:
    """Tokens of all choices of a question."""
    return sum(len(example.input_ids) for example in examples)


def rows_of(name: str, dataset: str) -> list[Row]:
    """The rows of a data file, or of a demo data set: `dataset`, where `name` is "demo"."""
    name = dataset if name == demo.DEMO else name
    return read(str(demo.dataset_file(name)) if name in demo.DATASETS else name)


class Trained:
    """What is trained on: rows, found again where all of a row is the same, and plain texts, where a passage is found
    whatever its line breaks.

    Args:
        names: Data files and demo sets, which have rows; any other file is plain text.
        data: The data of a fit.
    """

    def __init__(self, names: Sequence[str], data: Any = None) -> None:
        plain = [name for name in names if Path(name).expanduser().is_file() and Path(name).suffix not in READERS]
        rows = [row for name in names if name not in plain for row in rows_of(name, "text")]
        texts, own = read_files(plain), data.rows[TRAIN] if isinstance(data, TokenData) else []
        (texts if isinstance(data, Text) else rows).extend(own)
        self._marks = {row_digest(row) for row in rows}
        self._texts = [unbroken(row.data["text"]) for row in texts]

    def has(self, row: Row) -> bool:
        """Whether `row`, or the passage that it is, is among them."""
        passage = row.data.get("text")
        stands = isinstance(passage, str) and any(unbroken(passage) in text for text in self._texts)
        return stands or row_digest(row) in self._marks


def unbroken(text: str) -> str:
    """`text` in one line."""
    return re.sub(r"\s+", " ", text).strip()


def untrained(rows: Sequence[Row], trained: Trained, count: int, name: str) -> list[Row]:
    """The `count` rows of the smallest hashes that are not trained on; all, if there are fewer.

    Raises:
        BadInput: if none is left.
    """
    marked = {row_digest(row): row for row in rows}
    ordered = (marked[mark] for mark in sorted(marked))
    found = list(islice((row for row in ordered if not trained.has(row)), count))
    if not found:
        raise BadInput(f"all rows of {name} are trained on, so that they cannot tell what is forgotten; give others.")
    return found
