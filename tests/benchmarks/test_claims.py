"""The ledger of claims: each rule gives each verdict on planted records, and the page says what the records say."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims, readme, rewinding, trials
from benchmarks.claims import OPEN, REFUTED, REPRODUCED
from benchmarks.provenance import ROOT
from benchmarks.ranking import Results
from benchmarks.trials import read_table

STACK = {"device": "cpu"}
ABOUT = {"commit": "abc", "date": "2026-12-01", "device": "a CPU", "versions": {}, "stack": STACK, "kind": "fit"}
TABLE = """
title: Mine.
workload: workload.yaml
seeds: [0, 1, 2, 3]
arms:
  new: {updates: [], lr: [1.0e-3, 3.0e-3, 9.0e-3]}
  old: {updates: [MeZO], lr: [1.0e-4, 3.0e-4, 9.0e-4]}
"""
NEAR, FAR, WIDE = (0.0, 0.0001, -0.0001, 0.0), (0.0, 0.001, -0.001, 0.0), (0.0, 0.1, -0.1, 0.0)
"""What seeds add to the differences of two arms: hardly anything, little, and much."""


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of records beside a table `mine`."""
    (tmp_path / "mine.yaml").write_text(TABLE)
    (tmp_path / "workload.yaml").write_text("data: {class_path: Any}\ntrainer: {max_steps: 100}\n")
    monkeypatch.setattr(trials, "TABLES", tmp_path)
    return tmp_path


def train(records: Path, arm: str, losses: Sequence[float], best: int = 1, **more: Any) -> None:
    """Plant the trainings of an arm whose best learning rate is the middle one, or another."""
    made, results = read_table("mine"), Results(records / "quality.jsonl", STACK)
    chosen = next(one for one in made.arms if one.name == arm)
    for rate in chosen.rates:
        for seed, loss in zip(made.seeds, losses, strict=False):
            trial = made.trial(chosen, rate, seed)
            at = loss + (0 if rate == chosen.rates[best] else 1.0)
            hashes = {"identity": trial.identity(STACK), "untrained": trial.untrained(STACK)}
            outcome = {"before": {"heldout_loss": 3.0}, "after": {"heldout_loss": at, "density": at}}
            costs = {"trainable": 10, "trainable_share": 0.1, "seconds": 1.0, "steps": 100, "passes": 2.0}
            curve = {"curve": [[50, (3 + at) / 2], [100, at]]}
            results.append({**ABOUT, **hashes, **outcome, **costs, **curve, "seed": seed, "lr": rate, **more})


def verdict(records: Path, **rule: Any) -> claims.Verdict:
    return claims.decide(claims.Claim("It is so.", "there", "2405.15525", rule), records)


def of_gap(records: Path, gap: float, spread: Sequence[float], **rule: Any) -> claims.Verdict:
    train(records, "old", [1.0] * 4)
    train(records, "new", [1.0 + gap + one for one in spread])
    return verdict(records, table="mine", arm="new", than="old", **rule)


@pytest.mark.parametrize(
    ("kind", "gap", "spread", "expected"),
    [
        ("lower", -0.01, FAR, REPRODUCED),
        ("lower", 0.01, FAR, REFUTED),
        ("lower", 0.0, NEAR, REFUTED),  # it is not lower by as much as matters
        ("lower", -0.01, WIDE, OPEN),
        ("tie", 0.0, FAR, REPRODUCED),
        ("tie", 0.01, FAR, REFUTED),
        ("tie", 0.005, FAR, OPEN),
        ("tie", 0.0, WIDE, OPEN),
        ("tie not_worse", -0.01, FAR, REPRODUCED),
        ("tie not_worse", 0.01, FAR, REFUTED),
        ("tie not_better", 0.01, FAR, REPRODUCED),
        ("tie not_better", -0.01, FAR, REFUTED),
    ],
)
def test_differences_decide(records: Path, kind: str, gap: float, spread: Sequence[float], expected: str) -> None:
    kind, _, side = kind.partition(" ")
    found = of_gap(records, gap, spread, kind=kind, **({"side": side} if side else {}))
    assert found.verdict == expected
    assert found.found.startswith("new - old: ")
    assert float(found.found.split()[3]) == pytest.approx(gap, abs=1e-4)
    assert "; detectable 0." in found.found
    assert found.scale == "demo, 100 steps, 4 seeds"


@pytest.mark.parametrize(
    ("rule", "gap", "spread", "expected"),
    [
        ({"of": "density", "most": 0.6}, -0.5, FAR, REPRODUCED),
        ({"of": "density", "most": 0.6}, -0.1, FAR, REFUTED),
        ({"of": "density", "most": 0.6}, -0.4, WIDE, OPEN),
        ({"of": "steps", "most": 0.9}, -0.5, FAR, REPRODUCED),  # to 1.0 from 3.0: 80 of 100 steps
        ({"of": "passes", "least": 0.9}, -0.5, FAR, REFUTED),
        ({"of": "steps", "most": 0.9}, 0.5, FAR, REFUTED),  # it never gets there
        ({"of": "steps", "most": 1.0}, 0.5, FAR, OPEN),  # but the other took as many
        ({"of": "step_seconds", "most": 0.9}, -0.5, FAR, OPEN),  # which is not recorded
    ],
)
def test_ratios_decide(records: Path, rule: Any, gap: float, spread: Sequence[float], expected: str) -> None:
    assert of_gap(records, gap, spread, kind="ratio", **rule).verdict == expected


@pytest.mark.parametrize(("between", "expected"), [([2, 50], REPRODUCED), ([40, 50], REFUTED), ([8, 15], OPEN)])
def test_learning_rates_decide_to_half_a_step_of_the_sweep(records: Path, between: list[int], expected: str) -> None:
    found = of_gap(records, 0.0, FAR, kind="rate", between=between)
    assert found.verdict == expected
    assert found.found == "0.003 / 0.0003 = 10.0 [3.3, 30.0]"


@pytest.mark.parametrize(
    ("heldout", "text", "seeds", "expected"),
    [
        (-0.02, -0.03, 3, REPRODUCED),
        (-0.02, 0.03, 3, REFUTED),  # better on the task alone
        (0.02, -0.03, 3, REFUTED),
        (-0.02, -0.003, 3, OPEN),
        (-0.02, -0.03, 2, OPEN),  # a seed is missing
    ],
)
def test_a_scaled_run_must_be_better_on_both(
    records: Path, heldout: float, text: float, seeds: int, expected: str
) -> None:
    made, results = read_table(str(rewinding.STUDY)), Results(records / "rewinding.jsonl", STACK)
    for trial in rewinding.trials_of(made):
        if trial.arm.name == "lora":
            off = (0.0, 0.004, -0.004)[trial.seed]
            about = {**ABOUT, "identity": trial.identity(STACK), "seed": trial.seed, "seconds": 1.0, "before": {}}
            end = {"heldout_loss": 1.0, "text_loss": 4.0}
            results.append({**about, "untrained": trial.untrained(STACK), "after": end})
            if trial.seed < seeds:
                scaled = {"heldout_loss": 1.0 + heldout + off, "text_loss": 4.0 + text + off}
                results.append({**about, "kind": "test", "test": {"scale": 0.5}, "after": scaled})
    found = verdict(records, kind="rewound", arm="lora", scale=0.5)
    assert found.verdict == expected
    assert verdict(records, kind="rewound", arm="full", scale=0.5).verdict == OPEN


COST = {"where": {"pair": "b"}, "value": ["ratio"], "over": {"pair": "d"}, "over_value": "added_at_most"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"where": {"pair": "a"}, "value": ["ratio"], "most": 0.6}, REPRODUCED),
        ({"where": {"pair": "a"}, "value": ["ratio"], "least": 0.6}, REFUTED),
        ({"where": {"pair": "a"}, "value": ["ratio"], "low": ["low"], "high": ["high"], "most": 0.6}, OPEN),
        ({"where": {"pair": "a"}, "value": ["sizes", -1], "over": {"pair": "b"}, "most": 0.16}, REPRODUCED),
        ({"where": {"pair": "c"}, "value": ["ratio"], "most": 1}, OPEN),
        ({**COST, "least": 4}, REPRODUCED),  # 1.0 over what recording adds at most, 0.2
        ({**COST, "least": 6}, OPEN),  # a bound refutes nothing
    ],
)
def test_records_decide(records: Path, rule: Any, expected: str) -> None:
    about = {**ABOUT, "model": "demo"}
    old = {**about, "date": "2026-11-01", "pair": "a", "ratio": 9.0, "sizes": [1, 9], "low": 9.0, "high": 9.0}
    new = {**about, "pair": "a", "ratio": 0.5, "low": 0.4, "high": 0.7, "sizes": [1, 3]}
    other = {**about, "pair": "b", "ratio": 1.0, "sizes": [1, 20]}
    added = {**about, "pair": "d", "seconds_a_sample": 2.0, "ratio_median": 1.0, "ratio_high": 1.1}
    (records / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (new, old, other, added)))
    assert verdict(records, kind="record", file="mine", **rule).verdict == expected


def test_what_is_missing_is_told(records: Path) -> None:
    def found() -> str:
        out = verdict(records, kind="lower", table="mine", arm="new", than="old")
        assert out.verdict == OPEN
        return out.found

    assert found() == "not measured yet: `make quality TABLE=mine`"
    train(records, "old", [1.0] * 4)
    assert found().startswith("not measured yet")
    train(records, "new", [1.0] * 2)
    assert found() == "measured in part: `make quality TABLE=mine` goes on"
    train(records, "new", [1.0] * 4, best=0)  # the newer lines count
    assert found() == "the best learning rate of new is at an end of its sweep"


def test_a_diverged_arm_decides_nothing(records: Path) -> None:
    train(records, "old", [1.0] * 4)
    train(records, "new", [1.0, 1.0, math.nan, 1.0])
    found = verdict(records, kind="lower", table="mine", arm="new", than="old")
    assert found == claims.Verdict(OPEN, "new or old diverged, or has no heldout_loss with two shared seeds")


def test_the_ledger_counts_and_links(records: Path) -> None:
    train(records, "old", [1.0] * 4)
    train(records, "new", [0.99, 0.991, 0.989, 0.99])
    rule = {"kind": "lower", "table": "mine", "arm": "new", "than": "old"}
    made = [claims.Claim("New is better.", "7B", "2405.15525", rule, known=True)]
    made += [claims.Claim("Old is better.", "7B", "a page", {**rule, "arm": "old", "than": "new"})]
    text = claims.ledger(records, made)
    assert text.startswith("2 statements: 1 reproduced, 1 refuted at this scale, 0 not decidable here.")
    assert "| New is better. [2405.15525](https://arxiv.org/abs/2405.15525): 7B | `mine`: heldout loss of new" in text
    assert "*(the record was there before the rule)*" in text
    assert "Old is better. a page: 7B" in text


def test_the_page_says_what_the_records_say() -> None:
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert readme.rewritten(page, "docs/claims.md", ROOT / "benchmarks" / "results") == page
    made = claims.read_claims()
    assert len(made) >= 20
    assert len({claim.says + claim.source for claim in made}) == len(made)
    assert all(f"**{verdict}**" in page for verdict in (REPRODUCED, REFUTED, OPEN))


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("{says: a, there: b, source: c}", "statement 1 must have says, there, source and rule"),
        ("{says: a, there: b, source: c, rule: {kind: guess}}", "rule of kind 'guess'; give one of lower, tie, rate"),
    ],
)
def test_a_bad_ledger_is_refused_in_a_sentence(tmp_path: Path, body: str, finding: str) -> None:
    (tmp_path / "claims.yaml").write_text(f"claims: [{body}]")
    with pytest.raises(ValueError, match=finding):
        claims.read_claims(tmp_path / "claims.yaml")
