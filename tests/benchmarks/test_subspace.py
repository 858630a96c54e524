"""Steps beside AdamW's: all methods take the same rounds, and marks are judged by medians."""

from benchmarks.subspace import methods, rounds_of, verdicts
from lit_sparse.testing import tiny_llm


def test_all_methods_take_steps_in_turn():
    times = rounds_of(tiny_llm(), (2, 6), 3)
    assert times.keys() == methods().keys()
    assert all(len(one) == 3 and min(one) > 0 for one in times.values())
    assert len(verdicts(times)) == len(times) - 1


def test_marks_are_judged():
    times = {"adamw": [1.0, 1.0, 2.0], "galore": [1.05, 1.05, 2.1], "galore with a refresh": [2.05, 2.05, 4.1]}
    said = dict(verdicts(times))
    assert list(said.values()) == [True, True]
    assert next(iter(said)).startswith("galore: 1.050 [1.050, 1.050] times AdamW's step")
    assert not any(dict(verdicts({**times, "galore": [1.2, 1.2, 2.4], "galore with a refresh": [22.0] * 3})).values())
