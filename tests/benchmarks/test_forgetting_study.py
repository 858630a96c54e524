"""The study of forgetting: its phases and arms, what is run and what is reused, its costs, tables and figure."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import forgetting_study, plots, recording, tradeoff
from benchmarks.curves import STUDY, Study, left, read_study
from benchmarks.provenance import ROOT
from benchmarks.ranking import Results
from benchmarks.trials import Trial
from lit_sparse.callbacks.forgetting import Forgetting, rows_of
from lit_sparse.checkpoints import run_checkpoint
from lit_sparse.data import sources
from lit_sparse.errors import BadInput
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device, Ledger, ModelSize
from lit_sparse_profiling.speed_sections import Pair, Throughput
from tests.modules.words import word_tokenizer

STACK = {"device": "cpu", "torch": "2.13.0"}
PASSAGES = [{"text": f"w{n % 19} red w{n % 5} green w{n % 7}" + " blue" * (n % 4)} for n in range(40)]
QUESTIONS = [{"question": f"w{n} red", "choices": ["red", f"green w{n}"], "label": n % 2} for n in range(6)]
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
GO_ON = {"class_path": "PEFT", "init_args": {"start_from": "${general}", "config": LORA}}
Write = Callable[..., Path]


def phase(update: dict[str, Any], peft: dict[str, Any], rate: float, steps: int, batch: int) -> dict[str, Any]:
    data = {"train": "${text}", "heldout": 0, "max_length": 32, "batch_size": batch}
    return {
        "model": {"base": "tiny", "precision": "float32", "lr": rate, "updates": [peft, update]},
        "data": {"class_path": "lit_sparse.data.Instructions", "init_args": data},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "limit_val_batches": 0},
    }


def held(importance: str) -> dict[str, Any]:
    return {"class_path": "AdaptiveRegularization", "init_args": {"importance": importance, "phi": "${strength}"}}


DOCUMENT = {
    "title": "Small.",
    "workload": "workload.yaml",
    "text_rows": 12,
    "phases": {
        "general": phase(
            {"class_path": "RecordImportance"}, {"class_path": "PEFT", "init_args": {"config": LORA}}, 1e-2, 3, 4
        ),
        "fisher": phase({"class_path": "RecordFisher", "init_args": {"samples": 3}}, GO_ON, 0.0, 1, 1),
    },
    "methods": {
        "none": {"updates": [GO_ON], "lr": [1e-3, 1e-2]},
        "adaptive": {
            "updates": [GO_ON, held("${general}")],
            "strengths": [10.0, 0.1],
            "swept": 0.1,
            "lr": [1e-3, 1e-2],
        },
        "ewc": {"updates": [GO_ON, held("${fisher}")], "strengths": [1.0], "swept": 1.0, "lr": [1e-2]},
    },
}
SCORED = {"rows": 8, "text": "text.jsonl", "questions": ["ask.jsonl"], "max_length": 32}
WORKLOAD = {
    "model": {"base": "tiny", "precision": "float32"},
    "data": {"class_path": "lit_sparse.data.Instructions", "init_args": {"train": "domain.jsonl", "heldout": 4}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "callbacks": [{"class_path": "lit_sparse.callbacks.Forgetting", "init_args": SCORED}],
    },
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text, questions and a domain, from which subprocesses import the code under test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling")))
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    domain = [{"prompt": f"w{n}", "completion": f"w{n} blue green"} for n in range(16)]
    for name, rows in (("text", PASSAGES), ("ask", QUESTIONS), ("domain", domain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def write(home: Path) -> Write:
    """`write(**changes)`: a study's file, with its workload beside it."""

    def write(workload: dict[str, Any] = WORKLOAD, **changes: Any) -> Path:
        (home / "workload.yaml").write_text(yaml.safe_dump(workload))
        kept = {key: value for key, value in {**DOCUMENT, **changes}.items() if value is not None}
        (home / "study.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
        return home / "study.yaml"

    return write


def read(path: Path, **options: Any) -> Study:
    return read_study(path, text="text.jsonl", **options)


ARMS = ("none_0.001 0.001", "none_0.01 0.01", "adaptive_0.1 0.01", "adaptive_10 0.01", "ewc_1 0.01")


class Fake(forgetting_study.StudyRunner):
    """A runner with instant trainings, in which strong penalties and low rates learn less and forget less.

    Penalties like some seeds more than `none` does.
    """

    def __init__(self, study: Study, path: Path) -> None:
        super().__init__(study, Results(path, STACK), Path("runs"))
        self.did: list[str] = []
        self.say = lambda text: None

    def made_phase(self, phase: Any) -> Path:
        return Path("runs") / phase.name

    def _fit(self, trial: Trial) -> Path:
        self.did.append(f"{trial.arm.name} {trial.rate:g} {trial.seed}")
        folder = self.root / f"{self._name(trial)}-1"
        folder.mkdir(parents=True, exist_ok=True)
        update = self.configured(trial)["model"]["updates"][-1]["init_args"]
        learnt = 50 * trial.rate / (1 + update.get("phi", 0.0))
        before = {"general_loss": 3.0, "ask_zero_shot": 0.5} | ({} if self.begun(trial) else {"heldout_loss": 2.0})
        noise = 0.01 * trial.seed + ((0.0, 0.002, -0.002)[trial.seed] if "phi" in update else 0.0)
        after = {"heldout_loss": 2.0 - learnt + noise, "general_loss": 3.0 + learnt + noise, "ask_zero_shot": 0.25}
        RunRecord(
            name=folder.name,
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            device=Device("cpu", "x86_64", cores=2),
            model=ModelSize("tiny", 1000, 10),
            outcome={"before": before, "after": after},
        ).write(folder / "record.json")
        return folder


def run(path: Path, minutes: float | None = None, results: str = "f.jsonl") -> Fake:
    runner = Fake(read(path), Path(results))
    runner.run(minutes)
    return runner


# ---- reading


def test_the_shipped_study_is_whole() -> None:
    study = read_study()
    strengths = {curve.name: list(curve.arms) for curve in study.curves}
    assert strengths["none"] == [6e-4, 2e-3, 6e-3, 2e-2]
    assert set(strengths["unweighted"]) | set(strengths["ewc"]) < set(strengths["adaptive"])
    assert [phase.name for phase in study.phases] == ["general", "fisher"]
    assert len(study.table.seeds) == 3
    for curve in study.curves:
        for arm in curve.arms.values():
            assert arm.model["updates"][0]["init_args"]["start_from"] == study.phases[0].stands
            assert set(arm.rates) <= set(strengths["none"])
    assert "${strength}" not in json.dumps([arm.model for arm in study.table.arms])
    ewc = next(curve for curve in study.curves if curve.name == "ewc").swept
    assert ewc.model["updates"][1]["init_args"]["importance"] == study.phases[1].stands


def test_another_first_phase_is_another_trial(write: Write) -> None:
    def identities(study: Study) -> list[str]:
        trials = [study.table.trial(next(iter(curve.arms.values())), 1e-3, 0) for curve in study.curves]
        return [trial.identity(STACK) for trial in trials]

    none, adaptive, ewc = identities(read(write()))
    assert identities(read(write())) == [none, adaptive, ewc]
    more = json.loads(json.dumps(DOCUMENT["phases"]))
    more["fisher"]["model"]["updates"][1]["init_args"]["samples"] = 4
    changed = identities(read(write(phases=more)))
    assert changed[:2] == [none, adaptive]
    assert changed[2] != ewc
    assert not {none, adaptive, ewc} & set(identities(read(write(text_rows=13))))
    data = {**WORKLOAD["data"], "init_args": {**WORKLOAD["data"]["init_args"], "heldout": 9}}
    other = read(write(workload={**WORKLOAD, "data": data}))
    assert other.phases[0].stands != read(write()).phases[0].stands  # of whose text other rows are scored


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"methods": None}, "must have the keys methods, phases"),
        ({"texts": 1}, "correct texts"),
        ({"phases": {"fisher": DOCUMENT["phases"]["fisher"]}}, "the phases are ['fisher']; give general, then fisher"),
        ({"text_rows": 33}, "text.jsonl has 32 rows that are not scored, and the first phase is to see 33"),
        ({"methods": {"a": {"updates": [GO_ON], "strengths": [1], "swept": 2, "lr": [1]}}}, "a is swept at 2"),
        (
            {"workload": {**WORKLOAD, "trainer": {"max_steps": 2}}},
            r"no lit_sparse.callbacks.Forgetting among",
        ),
        (
            {"workload": {**WORKLOAD, "data": {"class_path": "lit_sparse.data.Instructions"}}},
            "no data.init_args.heldout",
        ),
    ],
)
def test_a_bad_study_is_refused_in_a_sentence(
    write: Write, changes: dict[str, Any], finding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--study", str(written(write, changes)), "--text", "text.jsonl", "--results", "f.jsonl"]
    assert forgetting_study.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("forgetting: ")
    assert finding in said
    assert "\n" not in said
    assert not Path("f.jsonl").exists()


def written(write: Write, changes: dict[str, Any]) -> Path:
    workload = changes.get("workload")
    return write(workload=workload) if workload else write(**changes)


def test_what_is_recorded_on_is_not_scored(write: Write) -> None:
    study = read(write())
    seen = {sources.row_digest(row) for row in rows_of(str(forgetting_study.write_text(study, Path("runs"))), "text")}
    callback = Forgetting(**SCORED)
    scored: set[str] = forgetting_study.scored_rows(study.table.workload)
    assert len(seen) == 12
    assert len(scored) == callback.rows
    assert scored == set(sorted(sources.row_digest(row) for row in rows_of("text.jsonl", "text"))[:8])
    assert not seen & scored


# ---- order, and going on


def test_rates_are_swept_at_one_strength_and_taken_to_all(write: Write) -> None:
    runner = run(write())
    assert runner.did == [
        *("adaptive_0.1 0.001 0", "adaptive_0.1 0.01 0", "ewc_1 0.01 0"),
        *("none_0.001 0.001 0", "none_0.01 0.01 0", "adaptive_10 0.01 0"),
        *(f"{arm} {seed}" for seed in (1, 2) for arm in ARMS),
    ]
    assert left(runner.study, runner.results) == 0
    assert run(write()).did == []


def test_a_killed_study_goes_on_where_it_was(write: Write) -> None:
    class Killed(Fake):
        def _fit(self, trial: Trial) -> Path:
            if len(self.did) == 7:
                raise KeyboardInterrupt
            return super()._fit(trial)

    killed = Killed(read(write()), Path("f.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert left(killed.study, killed.results) == 9
    assert killed.did + run(write()).did == run(write(), results="straight.jsonl").did
    lines = [json.loads(line) for line in Path("f.jsonl").read_text().splitlines()]
    assert len({line["identity"] for line in lines}) == len(lines) == 16
    assert {line["bench"] for line in lines} == {"forgetting"}
    assert sum("heldout_loss" in line["before"] for line in lines) == 3  # once a seed


def test_a_method_whose_sweep_failed_has_no_points(write: Write) -> None:
    class Failing(Fake):
        def _fit(self, trial: Trial) -> Path:
            if trial.arm.name == "adaptive_0.1" and trial.rate == 1e-3:
                raise RuntimeError("refused: no such thing.")
            return super()._fit(trial)

    runner = Failing(read(write()), Path("f.jsonl"))
    runner.run()
    assert list(runner.failed) == ["adaptive_0.1, lr 0.001, seed 0"]
    assert {point.curve.name for point in tradeoff.points(runner.study, runner.results)} == {"none", "ewc"}
    assert runner.left() == (6, 0)  # a rate of the sweep, and five points that wait for it


def test_no_time_is_no_phase(write: Write) -> None:
    runner = run(write(), minutes=0)
    assert runner.did == []
    assert not Path("runs").exists()
    assert runner.left() == (16, 0)


# ---- costs


def batches(model: Any, count: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(0, 90, (1, 7), generator=generator)
        yield model(input_ids=ids, labels=ids).loss


def test_the_published_recipe_is_the_mean_square_of_each_gradient() -> None:
    model = tiny_llm("gpt2", dropout=0.2)
    found = recording.published_fisher(model, batches(model, 3))
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for loss in batches(model, 3):
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] += gradient**2 / 3
    assert found.keys() == parameters.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-12)


def test_time_of_a_sample_is_that_of_all_that_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(recording.time, "perf_counter", lambda: clock[0])
    seconds: list[float] = []

    def losses() -> Any:
        for _ in range(2):
            clock[0] += 1  # the forward
            yield torch.zeros(())

    for _ in recording.timed(losses(), seconds):
        clock[0] += 2  # the backward
    assert seconds == [3.0, 3.0]


@pytest.fixture
def tiny(home: Path) -> Path:
    tiny_llm("llama").save_pretrained(home / "tiny")
    word_tokenizer().save_pretrained(home / "tiny")
    return home / "tiny"


def test_both_fishers_take_the_same_samples(write: Write, tiny: Path) -> None:
    study = read(write())
    config = forgetting_study.filled(study.phases[1].config, {forgetting_study.TEXT: "text.jsonl"})
    lean, published = recording.lean_cost(config, 4), recording.published_cost(config, 4)
    weights = dict(tiny_llm("llama").named_parameters())
    adapted = [weight for name, weight in weights.items() if "q_proj.weight" in name or "v_proj.weight" in name]
    assert lean["bytes"] == 4 * sum(weight.numel() for weight in adapted)
    assert published["bytes"] == 4 * sum(weight.numel() for weight in weights.values())
    assert lean["samples"] == published["samples"] == 4
    assert all(one["fastest"] <= one["seconds_a_sample"] <= one["slowest"] for one in (lean, published))


def test_no_cost_is_measured_twice(write: Write, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    asked: list[None] = []

    def names() -> dict[str, str]:
        asked.append(None)
        return {forgetting_study.TEXT: "text.jsonl"}

    def bench(words: list[str]) -> int:
        begun.append(words[0])
        name = Path(words[0]).stem
        folder = Path(f"runs/cost/{name}-1")
        folder.mkdir(parents=True)
        RunRecord(
            name=folder.name,
            versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            device=Device("cpu", "x86_64", cores=2),
            model=ModelSize("tiny", 1000, 10),
            ledger=Ledger(strategy=77),
            throughput=Throughput(1, 1, 8.0, 4, median_step=2.0),
            pair=Pair("plain", 1.1, 1.05, 1.2, 1.3, 4),
            updates=[{"class": "PEFT", "chosen": {}}, {"class": "RecordImportance", "chosen": {"bytes": 55}}],
        ).write(folder / "record.json")
        return 0

    monkeypatch.setattr(recording, "bench", bench)
    study, results = read(write()), Results(Path("f.jsonl"), STACK)
    for _ in range(2):
        recording.measure_costs(study, results, names, Path("runs"), {"rounds": 4, "samples": 2})
    assert len(asked) == 4  # for what was missing alone
    assert begun == ["runs/cost/recorder.yaml", "runs/cost/adaptive.yaml"]
    lines = [json.loads(line) for line in Path("f.jsonl").read_text().splitlines()]
    assert [line["cost"] for line in lines] == ["recorder", "lean", "published", "penalty: adaptive"]
    assert (lines[3]["pair"], lines[3]["ratio_median"], lines[3]["held_bytes"]) == (["adaptive", "plain"], 1.1, 77)
    assert (lines[0]["seconds_a_sample"], lines[0]["bytes"], lines[0]["held_bytes"]) == (0.5, 55, 77)  # 4 rows a step
    files = [yaml.safe_load(Path(f"runs/cost/{name}.yaml").read_text()) for name in ("recorder", "recorder_plain")]
    assert [len(file["model"]["updates"]) for file in files] == [2, 1]
    assert files[0]["data"] == files[1]["data"]
    assert files[0]["data"]["init_args"]["train"] == "text.jsonl"
    held, free = (yaml.safe_load(Path(f"runs/cost/{name}.yaml").read_text()) for name in ("adaptive", "adaptive_plain"))
    assert [len(file["model"]["updates"]) for file in (held, free)] == [2, 1]
    assert held["model"]["updates"][1]["class_path"] == "AdaptiveRegularization"
    assert "callbacks" not in held["trainer"]


@pytest.mark.parametrize("phase", ["general", "fisher"])
def test_costs_in_two_types_are_not_compared(phase: str, write: Write, tiny: Path) -> None:
    """The Fishers have no trainer, whose device would decide `auto`."""
    study, results = read(write()), Results(Path("f.jsonl"), STACK)
    next(one for one in study.phases if one.name == phase).config["model"]["precision"] = "auto"
    with pytest.raises(BadInput, match=f"the phase {phase} has model.precision auto, but the Fishers"):
        recording.measure_costs(study, results, dict, Path("runs"), {"rounds": 4, "samples": 2})


# ---- tables and figure

ABOUT = {"stack": STACK, "commit": "abc", "date": "2026-11-22", "device": "a CPU", "versions": {"torch": "2.13.0"}}
RATIO = {"ratio_median": 1.1, "ratio_low": 1.05, "ratio_high": 1.2, "rounds": 12}
COSTS = [
    {"cost": "recorder", "seconds_a_sample": 0.5, "bytes": 2**20, "held_bytes": 2**21, **RATIO},
    {"cost": "lean", "seconds_a_sample": 1.0, "bytes": 2**20},
    {"cost": "published", "seconds_a_sample": 9.0, "bytes": 2**23},
    {"cost": "penalty: adaptive", "held_bytes": 2**20, **RATIO, "ratio_median": 1.07},
]


def test_the_tables_say_what_was_found(write: Write) -> None:
    runner = run(write())
    for cost in COSTS:
        runner.results.append({**ABOUT, "kind": "cost", "identity": cost["cost"], "seconds": 1.0, **cost})
    text = tradeoff.shown(runner.study, runner.results)
    first = "| first phase |  | - | 2.0000 ± 0.0000 | 3.0000 ± 0.0000 | ask 50.0% ± 0.0% | - |  |"
    assert first in text
    assert "| none | - | 0.01 | 1.5100 ± 0.0100 | 3.5100 ± 0.0100 | ask 25.0% ± 0.0% | 3 |  |" in text
    remark = "general: lower (-0.4500 [-0.4500, -0.4500]); domain: higher (+0.4500 [+0.4500, +0.4500])"
    assert f"| none | - | 0.001 | 1.9600 ± 0.0100 | 3.0600 ± 0.0100 | ask 25.0% ± 0.0% | 3 | {remark} |" in text
    assert "| base |" not in text
    about = {**ABOUT, "kind": "phase", "identity": runner.study.phases[0].stands, "seconds": 1.0}
    runner.results.append({**about, "before": {"general_loss": 4.0}, "after": {"general_loss": 3.0}})
    assert "| base |  | - | - | 4.0000 | - | - |  |" in tradeoff.shown(runner.study, runner.results)
    told = "general: lower (-0.4545 [-0.4595, -0.4496]); domain: higher (+0.4545 [+0.4496, +0.4595])"
    remark = f"{told}; highest rate tried"
    assert f"| adaptive | 10 | 0.01 | 1.9645 ± 0.0092 | 3.0555 ± 0.0092 | ask 25.0% ± 0.0% | 3 | {remark} |" in text
    assert f"Measured by `python -m benchmarks.forgetting_study --only cost` on {ABOUT['device']}, " in text
    assert "| a Fisher of all weights (EWC-LoRA's recipe) | 9.000 | 50.0 | 18.00 | 8.0 | 100.0% |" in text
    assert "(RecordImportance) | 0.500 | 2.8 | 1.00 | 1.0 | 12.5% |" in text
    assert "| of that, what recording adds to the run | 0.045 | 0.3 | 0.09 | 1.0 | 12.5% |" in text
    assert (
        "with the recorder 1.100 [1.050, 1.200] (2.0 MiB kept, 12 rounds), with adaptive 1.070 [1.050, 1.200] (1.0"
        in text
    )
    for line in runner.results.fits.values():
        for when in ("before", "after"):
            line[when] = {name: value for name, value in line[when].items() if "zero_shot" not in name}
    shorter = tradeoff.shown(runner.study, runner.results)
    assert "zero-shot" in text
    assert "zero-shot" not in shorter
    assert "| none | - | 0.01 | 1.5100 ± 0.0100 | 3.5100 ± 0.0100 | 3 |  |" in shorter


def test_gaps_within_the_spread_are_ties_and_missing_seeds_are_named(write: Write) -> None:
    methods: Any = json.loads(json.dumps(DOCUMENT["methods"]))
    methods["adaptive"] |= {"strengths": [0.001, 10.0], "swept": 0.001}
    runner = run(write(methods=methods))
    rows = {(row[0], row[1]): row for row in tradeoff.cells(runner.study, runner.results)}
    assert rows["adaptive", "0.001"][-1].startswith("general: tie (-0.0005 [-0.0055, +0.0045]); domain: tie (+0.0005 [")
    part = read(write(methods=methods), seeds=[0, 1, 2, 3])
    rows = {(row[0], row[1]): row for row in tradeoff.cells(part, runner.results)}
    assert rows["none", "-"][-1] == "incomplete: 3 of 4 seeds"


def test_the_readme_has_the_newest_and_says_where_there_is_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tradeoff.published(Path("f.jsonl")).startswith("Not measured yet: `python -m benchmarks.forgetting_study`")
    path = write()
    monkeypatch.setattr(tradeoff, "read_study", lambda: read(path))
    run(path)
    text = tradeoff.published(Path("f.jsonl"))
    assert text.startswith("Measured by `python -m benchmarks.forgetting_study` on ")
    assert "| ewc | 1 | 0.01 |" in text


def test_the_figure_has_a_curve_for_each_method(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(tradeoff, "read_study", lambda: read(path))
    assert tradeoff.changes(Path("f.jsonl")) == {}
    run(path)
    curves = tradeoff.changes(Path("f.jsonl"))
    assert {name: len(curve) for name, curve in curves.items()} == {"none": 2, "adaptive": 2, "ewc": 1}
    (axes,) = plots.forgetting(curves).axes
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["none", "adaptive", "ewc"]
    weak, strong = (list(values) for values in handles[1].lines[0].get_data())
    assert weak == pytest.approx([0.5 / 1.1 + 0.01, 0.5 / 11 + 0.01])  # forgotten, weakest penalty first
    assert strong == pytest.approx([0.5 / 1.1 - 0.01, 0.5 / 11 - 0.01])  # gained


# ---- the whole


def test_a_study_from_end_to_end(write: Write, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {name: body | {"lr": [1e-2]} for name, body in DOCUMENT["methods"].items() if name == "ewc"}
    words = ["--only", "trials", "--study", str(write(methods=methods)), "--seeds", "0", "--text", "text.jsonl"]
    words += ["--results", "f.jsonl", "--into", "runs"]
    assert forgetting_study.main(words) == 0, [path.read_text() for path in Path("runs").rglob("*.txt")]
    general, fisher, ewc = (json.loads(line) for line in Path("f.jsonl").read_text().splitlines())
    assert (general["phase"], fisher["phase"]) == ("general", "fisher")
    assert ewc["before"].keys() >= {"heldout_loss", "general_loss", "ask.jsonl_zero_shot"}
    assert ewc["before"]["general_loss"] != ewc["after"]["general_loss"]
    assert "| ewc | 1 | 0.01 |" in capsys.readouterr().out
    ends = [run_checkpoint(folder)["state_dict"] for folder in sorted(Path("runs").glob("[fg]*_*-1"))]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())  # the Fisher's run goes nowhere
    assert forgetting_study.main(words) == 0
    assert len(Path("f.jsonl").read_text().splitlines()) == 3
    assert STUDY.is_file()
