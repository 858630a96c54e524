"""Quality tables: further outcomes, and comparisons with one arm."""

import math
from pathlib import Path

import pytest

from benchmarks import ranking
from benchmarks.ranking import Results
from benchmarks.trials import Arm, Table
from lit_sparse.errors import BadInput

STACK = {"device": "cpu"}
ABOUT = {"commit": "abc", "date": "2026-11-22", "device": "a CPU", "versions": {}, "stack": STACK, "kind": "fit"}
WORKLOAD = {"model": {"base": "demo"}, "data": {"class_path": "Any"}, "trainer": {"max_steps": 2}}
ARMS = tuple(Arm(name, {"about": name, "updates": []}, (1e-3,)) for name in ("lora", "sparse", "sparser"))
PLAIN = (1.00, 1.01, 1.02)
"""Held-out losses of the arm without a penalty: 1.01 on average, their standard deviation 0.01."""


def results(made: Table, path: Path, **losses: tuple[float, ...]) -> Results:
    """Return results of arms with a loss for each seed, and densities 0.8, 0.6 and 0.4, higher for later seeds."""
    out = Results(path / "q.jsonl", STACK)
    for number, arm in enumerate(made.arms):
        for seed, loss in enumerate(losses.get(arm.name, ())):
            trial = made.trial(arm, 1e-3, seed)
            after = {"heldout_loss": loss, "density": 0.8 - 0.2 * number + 0.02 * seed}
            hashes = {"identity": trial.identity(STACK), "untrained": trial.untrained(STACK)}
            figures = {"before": {"heldout_loss": 2.0, "density": 0.9}, "after": after, "seconds": 36.0}
            out.append({**ABOUT, **hashes, **figures, "trainable": 10, "trainable_share": 0.1, "seed": seed})
    return out


@pytest.fixture
def made() -> Table:
    also = ("density", "density_above_1")
    return Table("mine", "Mine.", WORKLOAD, None, (0, 1, 2), ARMS, also, "lora", ("density",))


def told(made: Table, found: Results) -> str:
    """Return the sentences of the notes that are not in those of every table."""
    return ranking.notes(made, found).partition("a tie: it contains 0.")[2].strip()


def test_further_outcomes_are_columns_after_the_losses(made: Table, tmp_path: Path) -> None:
    assert ranking.head(made)[4:9] == [
        "held-out loss",
        "text loss",
        "density",
        "density above 1",
        "beside the best [95 %]",
    ]
    untrained, lora, sparse, sparser = ranking.cells(made, results(made, tmp_path, lora=PLAIN, sparse=PLAIN))
    assert {len(row) for row in (untrained, lora, sparse, sparser)} == {len(ranking.head(made))}
    assert untrained[4:8] == ["2.0000 ± 0.0000", "-", "0.9000 ± 0.0000", "-"]
    assert lora[4:8] == ["1.0100 ± 0.0100", "-", "0.8200 ± 0.0200", "-"]
    assert sparser[2:] == [*["-"] * 8, "0", "not measured"]


def test_an_outcome_that_no_trial_has_is_named(made: Table, tmp_path: Path) -> None:
    assert "No trial" not in told(made, Results(tmp_path / "none.jsonl", STACK))
    said = "No trial has the outcome density_above_1 that `also` names; they have density, heldout_loss."
    assert told(made, results(made, tmp_path, lora=PLAIN)).startswith(said)


@pytest.mark.parametrize(
    ("worse", "quality"),
    [
        (0.002, "a quality that is not told apart (+0.0020 [-0.0005, +0.0045])"),
        (0.01, "worse quality (+0.0100 [+0.0075, +0.0125])"),
        (-0.01, "better quality (-0.0100 [-0.0125, -0.0075])"),
    ],
)
def test_quality_differs_where_the_interval_leaves_out_zero(
    made: Table, tmp_path: Path, worse: float, quality: str
) -> None:
    losses = tuple(loss + worse + more for loss, more in zip(PLAIN, (-0.001, 0, 0.001), strict=True))
    said = told(made, results(made, tmp_path, lora=PLAIN, sparse=losses))
    unseen = "sparser not judged (3 seeds of both are needed)"
    assert f"Density beside lora: sparse -24.4% at {quality}; {unseen}. In brackets: how much" in said


@pytest.mark.parametrize("plain", [PLAIN[:2], (1.0, 1.01, math.nan)])
def test_what_cannot_be_judged_is_not(made: Table, tmp_path: Path, plain: tuple[float, ...]) -> None:
    said = told(made, results(made, tmp_path, lora=plain, sparse=PLAIN, sparser=PLAIN))
    assert said.count("not judged (3 seeds of both are needed)") == 2


def test_a_table_that_compares_nothing_says_nothing(tmp_path: Path) -> None:
    plain = Table("mine", "Mine.", WORKLOAD, None, (0, 1, 2), ARMS)
    assert ranking.head(plain) == [*ranking.HEAD, *ranking.TAIL]
    assert told(plain, results(plain, tmp_path, lora=PLAIN)) == ""


def test_a_line_that_is_cut_off_is_left_alone(made: Table, tmp_path: Path) -> None:
    path, found = tmp_path / "q.jsonl", results(made, tmp_path, lora=PLAIN)
    whole = path.read_text()
    path.write_text(whole + '{"kind": "fi')  # by another process, or a full disk
    assert len(ranking.read_results(path)) == len(whole.splitlines())
    found.append(next(iter(found.fits.values())))
    with pytest.raises(BadInput, match="is no JSON"):  # it is told, once something stands behind it
        ranking.read_results(path)
    path.write_text(path.read_text().replace('{"kind": "fi\n', ""))
    assert len(ranking.read_results(path)) == len(whole.splitlines()) + 1


def test_unlike_rows_are_told() -> None:
    lines = [{"rows": {"heldout": {"of": "a"}, "text": {"of": of}}} for of in "bc"]
    assert ranking.unlike_rows(lines) == ["text"]
    assert ranking.unlike_rows([*lines[:1], {}]) == []
