"""Races to a loss: when arms reach it, at which cost, and which parts of a method pay."""

import math
from pathlib import Path

import pytest

from benchmarks import race
from benchmarks.trials import Race
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device

RACE = Race(50, "mezo", "helene", {"flat": "the curvature", "layer": "one number"})


def lines(*losses: float, passes: float = 2.0) -> list[dict]:
    """A training for each seed, which falls from 3 to a loss in a straight line of two validations."""
    return [
        {
            "steps": 100, "passes": passes, "step_seconds": 6.0, "peak_resident": 2**30,
            "after": {"heldout_loss": loss}, "curve": [[50, (3 + loss) / 2], [100, loss]], "seed": seed,
        }
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def test_a_loss_is_reached_between_validations():
    points = [[50, 2.5], [100, 1.5], [150, 2.0]]
    assert race.reached(3.0, points, 2.75) == 25
    assert race.reached(3.0, points, 2.0) == 75
    assert race.reached(3.0, points, 1.5) == 100
    assert race.reached(3.0, points, 1.0) is None
    assert race.reached(3.0, [[50, math.nan], [100, 2.0]], 2.5) is not None
    assert race.reached(3.0, points, 3.5) == 0


def test_arms_are_timed_to_the_loss_of_one():
    arms = {"mezo": lines(2.0, 2.2), "helene": lines(1.0, 1.0, passes=4), "flat": lines(2.5, 1.0), "layer": []}
    steps = race.steps_of(RACE, arms, 3.0)
    assert steps["mezo"] == 100
    assert steps["helene"] == pytest.approx(45)
    assert steps["flat"] is steps["layer"] is None
    assert race.cells(arms["helene"], steps["helene"]) == ["45", "180", "4.5", "1.00"]
    assert race.cells(arms["flat"], None) == [*["not reached"] * 3, "1.00"]
    assert race.cells([], None) == ["-"] * 4
    assert race.steps_of(RACE, arms, math.nan) == dict.fromkeys(arms)


def test_sentences_say_what_is_faster_and_which_parts_pay():
    arms = {
        "mezo": lines(2.0, 2.2),
        "helene": lines(1.0, 1.1, 1.05),
        "flat": lines(1.5, 1.4, 1.45),
        "layer": lines(1.05, 1.06, 1.08),
    }
    text = " ".join(race.told(RACE, arms, 3.0))
    assert "Steps, forward passes and minutes are those to the final loss of mezo." in text
    assert "Beside mezo: helene in 0.46 of its steps and 0.46 of its passes;" in text
    assert "Parts of helene: the curvature pays (+0.4000 [+0.1516, +0.6484] with flat);" in text
    assert "one number does not pay, a tie" in text
    arms = {"mezo": lines(2.0, 2.2), "helene": lines(2.5, 2.5, 2.5), "flat": lines(1.5, 1.4, 1.45), "layer": []}
    text = " ".join(race.told(RACE, arms, 3.0))
    assert "Not reached by helene." in text
    assert "the curvature does not pay, it costs (-1.0500 [-1.1742, -0.9258] with flat)" in text
    assert "one number not judged (layer)." in text
    assert not list(race.told(RACE, {"mezo": [], "helene": []}, 3.0))


def test_what_a_training_took(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("step,train_loss,heldout_loss\n9,3,\n19,,2.5\n29,2,\n39,,2.25\n")
    config = {"model": {}, "trainer": {"val_check_interval": 40, "accumulate_grad_batches": 2}}
    updates = [{"class": "LISA", "chosen": {}}, {"class": "MeZO", "chosen": {"forwards_per_step": 3}}]
    record = RunRecord(name="one", versions={}, device=Device("cpu", "x86_64"), updates=updates)
    found = race.measured(record, tmp_path, config)
    assert found["curve"] == [(20, 2.5), (40, 2.25)]
    assert found["passes"] == 3
    record = RunRecord(name="one", versions={}, device=Device("cpu", "x86_64"), updates=[])
    assert race.measured(record, tmp_path, config)["passes"] == 3
    config["model"] = {"activation_checkpointing": True}
    assert race.measured(record, tmp_path, config)["passes"] == 4
