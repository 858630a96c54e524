"""Score what a fit forgets: general text and zero-shot questions, before and after training."""

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
from lit_sparse.calls import evaluating
from lit_sparse.checkpoints import forked_rng
from lit_sparse.data import TokenData
from lit_sparse.data.collate import Choices, Padded, Padding, ScoredChoices
from lit_sparse.data.encoding import Encoder, Example, load_tokenizer
from lit_sparse.data.evaluation import scored_choices
from lit_sparse.data.examples import encode
from lit_sparse.data.loader import evaluation_loader
from lit_sparse.data.module import TRAIN, require_at_least
from lit_sparse.data.rows import IGNORED, Choice, parse
from lit_sparse.data.sources import READERS, Row, locate_errors, read, row_digest
from lit_sparse.data.text import Text, is_hub_name, read_texts
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.modules.metrics import TokenScores, right_choices

QUESTIONS = ("piqa", "sciq", "arc_easy", "hellaswag")


class Forgetting(Callback):
    """Scores a causal language model before and after a fit, on data that the fit does not train on.

    General text is scored by its loss (nats a token) and perplexity. Multiple-choice questions are answered zero-shot,
    with the choice of the highest log-likelihood a token. The scores are in `before` and `after`, and in the outcome of
    the record: list this callback before a `Recorder` (`lit-sparse fit` does so). Rows that the fit trains on are left
    out, and so are passages that its plain text contains. Training is bitwise the same as without this callback.

    Args:
        rows: Number of passages, and of questions from each set, chosen by a hash of the row.
        text: A data file with the general text, or `demo`: passages of English novels (LAMBADA, arXiv 1606.06031).
        questions: Names of demo data sets (`piqa`, `sciq`, `arc_easy`, `hellaswag`), or data files.
        batch_size: Passages, or questions, in a batch.
        max_length: Most tokens of a row; longer passages are truncated, longer questions left out.
        exclude: Data files, demo sets or plain text used by an earlier phase, to train or to record importance. Rows
            equal to one of theirs, and passages that their plain text contains, are left out.
        tokenizer: Folder, Hugging Face name or `demo`; by default that of the data, or of the module's base.

    Attributes:
        before: The scores before training. A resumed fit reads them from its checkpoint; they are missing if the run
            had no such callback.
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
        """Compute `general_loss`, `general_perplexity`, and `NAME_zero_shot` (share of right answers) of each set."""
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
    """Return which questions are answered right, (items,) bool: by the lowest mean of nll (B, S-1) a token."""
    return right_choices(nll.sum(1) / (batch["labels"][:, 1:] != IGNORED).sum(1), batch)


def choice_tokens(examples: Sequence[Example]) -> int:
    """Return the number of tokens of all choices of a question."""
    return sum(len(example.input_ids) for example in examples)


def rows_of(name: str, dataset: str) -> list[Row]:
    """Read the rows of a data file or demo set; `name` "demo" stands for the demo set `dataset`."""
    name = dataset if name == demo.DEMO else name
    return read(str(demo.dataset_file(name)) if name in demo.DATASETS else name)


class Trained:
    """Finds rows that are trained on: equal rows, and passages within plain text, whatever their line breaks.

    Args:
        names: Data files and demo sets, which have rows; a file of another kind is plain text.
        data: The data of a fit.
    """

    def __init__(self, names: Sequence[str], data: Any = None) -> None:
        plain = [name for name in names if Path(name).expanduser().is_file() and Path(name).suffix not in READERS]
        rows = [row for name in names if name not in plain for row in rows_of(name, "text")]
        texts, own = read_texts(plain), data.rows.get(TRAIN, []) if isinstance(data, TokenData) else []
        if isinstance(data, Text) and data.stream:
            own = streamed(data)
        (texts if isinstance(data, Text) else rows).extend(own)
        self._marks = {row_digest(row) for row in rows}
        self._texts = [unbroken(row.data["text"]) for row in texts]

    def has(self, row: Row) -> bool:
        """Return true if `row` is one of the rows, or the plain text has its passage, or its question and answer."""
        passage = row.data.get("text")
        if row.data.keys() >= {"question", "choices", "label"}:
            with locate_errors(row):
                item = parse(row.data)
            passage = f"{item.question} {item.choices[item.label]}" if isinstance(item, Choice) else None
        stands = isinstance(passage, str) and any(unbroken(passage) in text for text in self._texts)
        return stands or row_digest(row) in self._marks


def streamed(data: Text) -> list[Row]:
    """Return the text that a stream reads here; of a data set on the Hub, say that nothing of it can be left out."""
    names = [data.train] if isinstance(data.train, str) else data.train
    if any(map(is_hub_name, names)):
        rank_zero_info(
            f"Forgetting cannot tell what the stream of {', '.join(names)} has, and leaves nothing of it out: give it "
            "text and questions that are not there."
        )
        return []
    return read_texts(names)


def unbroken(text: str) -> str:
    """Replace every run of white space in `text` by one blank."""
    return re.sub(r"\s+", " ", text).strip()


def untrained(rows: Sequence[Row], trained: Trained, count: int, name: str) -> list[Row]:
    """Return up to `count` rows that are not trained on, those of the smallest hashes.

    Raises:
        BadInput: if none is left.
    """
    marked = {row_digest(row): row for row in rows}
    ordered = (marked[mark] for mark in sorted(marked))
    found = list(islice((row for row in ordered if not trained.has(row)), count))
    if not found:
        raise BadInput(f"all rows of {name} are trained on, so that they cannot tell what is forgotten; give others.")
    return found
