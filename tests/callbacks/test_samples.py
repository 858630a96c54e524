"""How many questions are answered where no number is given, on a clock that moves only on request."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_sparse.callbacks.samples import SAMPLE_TOKENS, TRIED, Samples
from lit_sparse.data import Text
from lit_sparse.modules import CausalLM
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling import phases
from lit_sparse_profiling.budget import Budget
from lit_sparse_profiling.phases import Phases
from tests.modules.words import word_tokenizer


@pytest.mark.parametrize(
    ("steps", "token_seconds", "agreed", "fits"),
    [(100, 0.01, True, True), (100, 0.1, True, False), (1000, 0.1, True, True), (100, 0.01, False, False)],
    ids=["quick answers", "slow answers", "slow answers in a long fit", "another rank has no time"],
)
def test_answers_take_a_tenth_of_a_fit_or_are_left_out(
    steps: int, token_seconds: float, agreed: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches of evaluation took 2 s, so that a training step of two micro-batches takes 2 s at least."""
    now = [0.0]
    monkeypatch.setattr(phases, "perf_counter", lambda: now[0])
    measured, asked = Phases(), list[int]()
    with measured("evaluation"):
        now[0] += 2.0

    def answer(ids: Any, mask: Any, tokens: int) -> list[str]:
        asked.append(tokens)
        now[0] += tokens * token_seconds
        return ["", ""]

    module: Any = SimpleNamespace(phases=measured, answer=answer)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: decision and agreed)
    trainer: Any = SimpleNamespace(num_sanity_val_batches=[3, 1], accumulate_grad_batches=2, strategy=strategy)
    tokens = torch.zeros(2, 4), torch.ones(2, 4)
    assert Samples(None)._fits(trainer, module, tokens, Budget(measured, steps)) is fits
    assert asked == [TRIED]
    whole = 2.0 + steps * 2.0
    assert ((2 * SAMPLE_TOKENS * token_seconds + 2 * TRIED * token_seconds) <= 0.1 * whole and agreed) is fits


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_that_goes_on_answers_the_questions_it_has(count: int) -> None:
    """Whatever number is asked for now: `before` and `after` stand side by side."""
    prepared = [{"prompt": f"q{n}", "reference": "", "prompt_ids": [n]} for n in range(3)]
    data = Text("unused.txt", heldout=0, tokenizer=word_tokenizer())
    data.samples = prepared
    module = CausalLM(tiny_llm())
    module.answer = lambda ids, mask, tokens: [f"a{one}" for one in ids[:, -1].tolist()]  # pyright: ignore
    samples, trainer = Samples(count), SimpleNamespace(datamodule=data)
    samples.answers = [{"prompt": f"q{n}", "reference": "", "before": "b"} for n in range(2)]
    samples.ask(trainer, module, "after")  # pyright: ignore[reportArgumentType]
    assert [answer["after"] for answer in samples.answers] == ["a0", "a1"]
