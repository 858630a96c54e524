"""Held-out questions that a fit answers before and after training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.data import TokenData
from lit_sparse.data.collate import Question, Questions
from lit_sparse.modules import CausalLM, LitSparse

SAMPLE_TOKENS = 96
"""Tokens of an answer at most."""


class Samples:
    """Answers to the first held-out questions of the data.

    Args:
        count: How many questions; 0 asks none, and so do tasks and data that have no questions.

    Attributes:
        answers: For each question `prompt`, `reference`, and the text at each moment that it was asked.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.answers: list[dict[str, Any]] = []

    def ask(self, trainer: L.Trainer, module: LitSparse, moment: str) -> None:
        """Let `module` answer greedily, and keep the texts under `moment`, such as "before".

        Its time and memory are the phase `samples` of the profile.
        """
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        samples = data.samples[: self.count] if isinstance(data, TokenData) else []
        if not samples or not isinstance(module, CausalLM):
            return
        rank_zero_info(f"Answering {len(samples)} of the held-out questions {moment} training; --samples=0 asks none.")
        with module.phases("samples"):
            batch = Questions(data.padding)([Question(sample["prompt_ids"], "") for sample in samples])
            texts = module.answer(
                batch["prompt_ids"].to(module.device), batch["prompt_mask"].to(module.device), SAMPLE_TOKENS
            )
        if not self.answers:
            self.answers = [{"prompt": s["prompt"], "reference": s["reference"]} for s in samples]
        for answer, text in zip(self.answers, texts, strict=True):
            answer[moment] = text.strip()
