"""Runs that are scored with their changes scaled: the end is the run, nothing is the base, and lines are kept."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import readme, rewinding
from benchmarks.provenance import ROOT
from benchmarks.ranking import Results
from benchmarks.rewinding import SCALES, Rewinder, Rewound, losses
from benchmarks.trials import read_table
from lit_sparse.export.folder import export
from tests.benchmarks.test_quality import write_tiny

SMT = [{"class_path": "SMT", "init_args": {"blocks": "random", "num_blocks": 4, "block_size": 8}}]
LORA = [
    {
        "class_path": "PEFT",
        "init_args": {
            "config": {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": "all-linear"}}
        },
    }
]
WORDS = ["--study", "study.yaml", "--results", "r.jsonl", "--into", "runs"]


@pytest.fixture(autouse=True)
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of two arms on a tiny model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling")))
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rewinding, "STUDY", tmp_path / "study.yaml")
    write_tiny(tmp_path / "tiny")
    rows = [{"prompt": f"{a} and {a % 7}", "completion": str(a % 11)} for a in range(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": "rows.jsonl", "heldout": 8, "max_length": 32, "batch_size": 2}
    workload = {
        "model": {"base": "tiny", "precision": "float32"},
        "data": {"class_path": "lit_sparse.data.Instructions", "init_args": data},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "limit_val_batches": 3},
    }
    Path("workload.yaml").write_text(yaml.safe_dump(workload))
    arms = {"smt": {"updates": SMT, "lr": [1.0]}, "lora": {"updates": LORA, "lr": [0.1]}}
    table = {"title": "Small.", "workload": "workload.yaml", "test": {}, "seeds": [0, 1], "arms": arms}
    Path("study.yaml").write_text(yaml.safe_dump(table))
    return tmp_path


def losses_of(line: dict[str, Any]) -> float:
    return line["after"]["heldout_loss"]


@pytest.mark.parametrize("arm", ["smt", "lora"])
def test_a_run_is_scored_between_its_base_and_its_end(arm: str, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained by the command line, scored at all scales, and what is scored is what `export --scale` writes."""
    made = read_table("study.yaml")
    made = replace(made, arms=tuple(one for one in made.arms if one.name == arm), seeds=(0,))
    runner = Rewinder(made, Results(Path("r.jsonl"), rewinding.stack_of(made.workload)), Path("runs"))
    assert runner.left() == (1, 1)
    (trial,) = rewinding.trials_of(made)
    runner.train(trial)
    fit, folder = runner.results.fit(trial), runner._checkpointed(trial)
    assert fit is not None
    assert folder is not None
    assert runner.left() == (0, 1)
    run = Rewound(folder)
    before, after = (losses(run.scores(scale))["heldout_loss"] for scale in (0.0, 1.0))
    assert before == pytest.approx(fit["before"]["heldout_loss"], abs=2e-4)
    assert after == pytest.approx(losses_of(fit), abs=2e-4)
    assert abs(after - before) > 0.002
    run.scores(0.5)  # after 1: nothing is left of the scale before
    exported = export(folder, output=study / "out", scale=0.5)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    ours = run.module.build().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name

    runner.run()
    assert runner.left() == (0, 0)
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [line.get("test") for line in lines] == [None, *({"scale": scale} for scale in SCALES)]
    assert len({line["rows"]["heldout"]["of"] for line in lines}) == 1  # the trainer's loop had the same rows
    assert len({losses_of(line) for line in lines}) == len(SCALES) + 1
    assert not list(Path("runs").rglob("*.ckpt"))


def planted(arms: Sequence[str], seeds: Sequence[int]) -> Path:
    """Write scores that fall with the scale, of some arms and seeds."""
    made, path = read_table("study.yaml"), Path("planted.jsonl")
    results = Results(path, {"device": "cpu"})
    rows = {"of": "a", "tokens": [3, 4], "nll": [1.0, 2.0]}
    about = {"commit": "abc", "date": "2026-12-01", "device": "a CPU", "versions": {}, "stack": results.stack}
    for trial in rewinding.trials_of(made):
        for scale in (*SCALES, rewinding.END) if trial.arm.name in arms and trial.seed in seeds else ():
            shared = {**about, "identity": trial.identity(results.stack), "seed": trial.seed, "seconds": 1.0}
            base = {"heldout_loss": 2 + trial.seed / 100, "text_loss": 4.0}
            after = {"heldout_loss": 2 - scale + trial.seed / 100, "text_loss": 4 + scale}
            kind = (
                {"kind": "test", "test": {"scale": scale}} if scale < rewinding.END else {"kind": "fit", "before": base}
            )
            kept = {"rows": {"heldout": rows, "text": rows}}
            results.append({**shared, **kind, "untrained": trial.untrained(results.stack), "after": after, **kept})
    return path


def test_the_table_waits_for_two_seeds_of_all_arms() -> None:
    assert rewinding.published(Path("none.jsonl")).startswith("Not measured yet: `python -m benchmarks.rewinding`")
    assert rewinding.published(planted(["smt"], [0, 1])).startswith("Under way: 8 of 16 scores are made; ")
    assert rewinding.curves(Path("planted.jsonl")) == {}
    Path("planted.jsonl").unlink()
    shown = rewinding.published(planted(["smt", "lora"], [0, 1]))
    assert "scored on 2 rows of heldout (7 tokens) and 2 rows of text (7 tokens)" in shown
    lines = [line for line in shown.splitlines() if line.startswith("| lora")]
    assert lines[0].startswith("| lora | 0.5 | 1.5050 ± 0.0071 | 4.5000 ± 0.0000 | ")
    points = rewinding.curves(Path("planted.jsonl"))["lora"]
    assert points == [(scale, pytest.approx(2.005 - scale), 4 + scale) for scale in (0.0, *SCALES, rewinding.END)]
    assert lines[-1] == "| lora | 1 | 1.0050 ± 0.0071 | 5.0000 ± 0.0000 | - | - | 2 |"


def test_several_rates_are_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = yaml.safe_load(Path("study.yaml").read_text())
    table["arms"]["lora"]["lr"] = [0.1, 0.2]
    Path("study.yaml").write_text(yaml.safe_dump(table))
    assert rewinding.main(WORDS) == 2
    assert capsys.readouterr().err.strip().startswith("rewinding: study: lora has several learning rates")


def test_the_study_that_comes_with_it_is_read() -> None:
    made = read_table(str(ROOT / "benchmarks" / "rewinding" / "study.yaml"))
    assert len(rewinding.trials_of(made)) == 12
    assert "rewinding" in readme.BLOCKS
