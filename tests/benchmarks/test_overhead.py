"""The wall time of whole fits with and without measuring: real commands, and which of a pair comes first."""

import json
from pathlib import Path

import pytest

from benchmarks import overhead
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device, ModelSize


def test_whole_fits_are_timed_from_outside_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def wall_seconds(words: list[str]) -> float:
        ran.append(words)
        options = dict(word.split("=", 1) for word in words if "=" in word)
        names = [one["--run"] for one in (dict(w.split("=", 1) for w in each if "=" in w) for each in ran)]
        folder = Path(options["--trainer.default_root_dir"], f"{options['--run']}-{names.count(options['--run'])}")
        folder.mkdir()
        versions = {"torch": "2", "transformers": "5", "peft": "0"}
        model, device = ModelSize("tiny", 2, 1), Device("cpu", "a CPU", cores=1)
        RunRecord(name=folder.name, versions=versions, device=device, model=model).write(folder / "record.json")
        return 8.0 if "--profile=false" in words else 9.0

    monkeypatch.setattr(overhead, "wall_seconds", wall_seconds)
    results = tmp_path / "results.jsonl"
    assert overhead.main(["--rounds=0", "--fits=3", f"--results={results}", "--model.base=tiny"]) == 0
    line = json.loads(results.read_text())
    assert (line["ratio_median"], line["rounds"], line["fits"], line["model"]) == (1.125, 3, 3, "tiny")
    plain = ["--profile=false" in words for words in ran]
    assert plain == [True, False, False, True, True, False]
    assert all("--model.base=tiny" in words for words in ran)


def test_a_fit_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="there is no verb"):
        overhead.wall_seconds(["fitt"])
    assert 0 < overhead.wall_seconds(["--version"]) < 60
