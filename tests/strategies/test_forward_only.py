"""Shared parts of forward-only methods: the tape of their steps, and settings that are none."""

import pytest
import torch

from lit_sparse.errors import BadInput
from lit_sparse.strategies import HELENE, LISA, MeZO, Updates
from lit_sparse.strategies.forward_only import Tape, recipe
from lit_sparse.testing import tiny_llm
from lit_sparse.zeroth_order.optimizer import Recorded


def test_a_tape_has_rows_of_unlike_lengths_and_goes_on():
    tape = Tape({"MeZO.momentum": "0.5"})
    tape.note(0.1, [2.0])
    tape.note(0.2, [3.0, 4.0])
    tape.note(0.3, [float("inf"), 4.0])
    nan = float("nan")
    wanted = torch.tensor([[0.1, 2, nan], [0.2, 3, 4], [0.3, nan, nan]], dtype=torch.float64)
    torch.testing.assert_close(tape.log, wanted, rtol=0, atol=0, equal_nan=True)
    later = Tape({"MeZO.momentum": "0.5"})
    later.load(tape.state())
    later.note(0.4, [1.0])
    assert later.log.shape == (4, 3)
    assert not later.changed
    other = Tape({"MeZO.momentum": "0.9"})
    other.load(tape.state())
    assert other.changed == "MeZO.momentum was 0.5"
    again = Tape({"MeZO.momentum": "0.9"})
    again.load(other.state())
    assert again.changed == other.changed


def test_what_only_measures_is_no_part_of_a_recipe():
    ours = recipe([MeZO(epsilon=0.1, micro_batch=2, sides="one"), LISA()])
    assert ours == recipe([MeZO(), LISA()])
    assert ours != recipe([MeZO(seed=1), LISA()])
    assert ours != recipe([MeZO(), LISA(active_layers=1)])
    assert recipe([HELENE(gnb="batch")]) == recipe([HELENE()])
    assert recipe([HELENE(beta1=0.5)]) != recipe([HELENE()])


def test_a_resumed_run_with_other_queries_goes_on_and_says_so():
    model, begun = tiny_llm(), Updates([MeZO()])
    begun.attach(model)
    begun.step(1, begun.optimizer(0.01), lambda: model(input_ids=torch.arange(6)[None]).logits.logsumexp(-1).mean())
    resumed = Updates([MeZO(queries=2)])
    resumed.restore(model, begun.state_dict())
    optimizer = resumed.optimizer(0.01)
    resumed.step(2, optimizer, lambda: model(input_ids=torch.arange(6)[None]).logits.logsumexp(-1).mean())
    (state,) = resumed.state_dict()
    assert state["state"]["log"].shape == (2, 3)
    assert state["state"]["changed"] == "MeZO.queries was 1"


def test_a_log_with_too_few_numbers_is_refused():
    assert Recorded([1.0, 2.0]).first(1) == [1.0]
    with pytest.raises(BadInput, match="a step has 3 numbers with these settings, but the log has 2 of each"):
        Recorded([1.0, 2.0]).first(3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MeZO(sides="three"), "MeZO: sides is 'three'; give one of two, one."),  # pyright: ignore
        (lambda: MeZO(scale="spread"), "MeZO: scale is 'spread'; give one of epsilon, deviation."),  # pyright: ignore
        (lambda: MeZO(probes_at_once=0), "MeZO: probes_at_once is 0; it must be at least 1."),
        (lambda: HELENE(h="matrix"), "HELENE: h is 'matrix'; give one of scalar, layer, tensor."),  # pyright: ignore
        (lambda: HELENE(gnb="rows"), "HELENE: gnb is 'rows'; give one of examples, batch."),  # pyright: ignore
        (lambda: HELENE(direction="cone"), "direction is 'cone'; give one of rademacher, gaussian."),  # pyright: ignore
        (lambda: HELENE(floors="none"), "floors is 'none'; give one of const, theory, quantile."),  # pyright: ignore
    ],
)
def test_words_that_are_none_are_refused(make, sentence):
    with pytest.raises(BadInput) as refused:
        make()
    assert sentence in str(refused.value)
