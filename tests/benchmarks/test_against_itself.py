"""A against A: pairs of real processes, and what is judged of them."""

import json
from pathlib import Path

import pytest

from benchmarks import against_itself
from lit_sparse_profiling.speed_sections import Pair


def test_pairs_of_real_processes_leave_a_line_for_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    status = against_itself.main(["--pairs=1", "--rounds=4", f"--results={results}"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["untimed_ms"], line["pairs"], line["rounds"]) for line in lines] == [(0.0, 1, 4), (50.0, 1, 4)]
    assert status == (0 if all(line["covered"] for line in lines) else 1)
    assert all(line["median_lowest"] > 0.2 for line in lines)
    assert capsys.readouterr().out.count("the interval holds 1 in") == 2


@pytest.mark.parametrize(("good", "met"), [(93, True), (92, False)])
def test_a_biased_comparison_is_found(good: int, met: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervals seen where a side was timed while the other worked, beside good ones; sides take turns."""
    asked: list[tuple[float, float]] = []

    def pair(rounds: int, untimed: tuple[float, float]) -> Pair:
        asked.append(untimed)
        low, high = (0.9, 1.1) if len(asked) <= good else (0.716, 0.866)
        return Pair("itself", (low + high) / 2, low, high, high, rounds)

    monkeypatch.setattr(against_itself, "pair", pair)
    assert against_itself.judge(0.05, 100, 12, tmp_path / "results.jsonl") is met
    assert asked[:2] == [(0.0, 0.05), (0.05, 0.0)]
