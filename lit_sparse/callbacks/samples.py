"""Held-out questions that a fit answers before and after training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_sparse.data import TokenData
from lit_sparse.data.collate import Question, Questions
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse_profiling.budget import Budget, Cost
from lit_sparse_profiling.sections import SAMPLES

SAMPLE_TOKENS = 96
"""Tokens of an answer at most."""


QUESTIONS, TRIED = 2, 8
"""Questions that are asked where no number is given, and tokens that are answered first to see how long it takes."""
STEP_PASSES = 2
"""Least time of a training batch, in times of an evaluation's: a forward and a backward."""


class Samples:
    """Answers to the first held-out questions of the data.

    Args:
        count: How many questions; 0 asks none, and so do tasks and data that have no questions. None asks two if that
            takes little of the fit.

    Attributes:
        answers: For each question `prompt`, `reference`, and the text at each moment that it was asked.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.answers: list[dict[str, Any]] = []

    def ask(self, trainer: L.Trainer, module: LitSparse, moment: str, budget: Budget | None = None) -> None:
        """Let `module` answer greedily, and keep the texts under `moment`, such as "before".

        Its time and memory are the phase `samples` of the profile. Where no number of questions is given, a few tokens
        are tried first, and no question is asked if the budget does not allow all.
        """
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        count = QUESTIONS if self.count is None else self.count
        samples = data.samples[:count] if isinstance(data, TokenData) else []
        if self.answers:  # of before training, or of the run that goes on, whatever is asked for now
            earlier = {answer["prompt"] for answer in self.answers}
            samples = [sample for sample in data.samples if sample["prompt"] in earlier] if count else []
        if not samples or not isinstance(module, CausalLM):
            return
        batch = Questions(data.padding)([Question(sample["prompt_ids"], "") for sample in samples])
        asked = batch["prompt_ids"].to(module.device), batch["prompt_mask"].to(module.device)
        if self.count is None and not (self.answers if budget is None else self._fits(trainer, module, asked, budget)):
            return
        rank_zero_info(f"Answering {len(samples)} of the held-out questions {moment} training; --samples=0 asks none.")
        with module.phases(SAMPLES):
            texts = module.answer(*asked, SAMPLE_TOKENS)
        if not self.answers:
            self.answers = [{"prompt": s["prompt"], "reference": s["reference"]} for s in samples]
        said = {sample["prompt"]: text.strip() for sample, text in zip(samples, texts, strict=True)}
        for answer in self.answers:
            if answer["prompt"] in said:
                answer[moment] = said[answer["prompt"]]

    def _fits(self, trainer: L.Trainer, module: CausalLM, asked: tuple[Tensor, Tensor], budget: Budget) -> bool:
        """Return whether answering before and after training takes little of the fit, on every rank."""
        before = module.phases.own(SAMPLES)
        with module.phases(SAMPLES):
            module.answer(*asked, TRIED)
        cost = Cost(0, 2 * SAMPLE_TOKENS / TRIED * (module.phases.own(SAMPLES) - before))
        batches = sum(trainer.num_sanity_val_batches)
        if batches:
            seconds = module.phases.own("evaluation") / batches
            budget.step_seconds = STEP_PASSES * seconds * trainer.accumulate_grad_batches
        fits = trainer.strategy.reduce_boolean_decision(budget.allows(cost))
        if not fits:
            rank_zero_info(f"No question is answered: {budget.refusal(cost)}; --samples={QUESTIONS} answers them.")
        return fits
