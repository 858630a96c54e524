"""The report: reading runs, the table that compares them, and a gate that fails for regressions only."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from lit_sparse_profiling.gate import check, parse_share, save_baseline
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.report import details, markdown, report, table, tables
from lit_sparse_profiling.run_folders import read_runs
from lit_sparse_profiling.sections import (
    Allocator,
    Device,
    Driver,
    Held,
    Large,
    Ledger,
    Memory,
    ModelSize,
    Phase,
    StateBytes,
)
from lit_sparse_profiling.speed_sections import Kernels, Pair, Rank, Throughput

GIB = 2**30
CPU = RunRecord(
    name="smt-1",
    device=Device("cpu", "a processor", cores=2),
    model=ModelSize("a/model", parameters=1_000_000, trainable=8_400),
    settings={"batch_size": 4, "data": {"seed": 0}, "seed_everything": 0},
    phases=[Phase("selection", 32.45, 1, peak_rss=2 * GIB), Phase("training", 50.0, 1, peak_rss=3 * GIB)],
    memory=Memory(3 * GIB, "VmHWM"),
    throughput=Throughput(tokens=10_000, padded_tokens=12_000, seconds=50.0, steps=100, median_step=0.4),
    outcome={"before": {"heldout_loss": 2.0}, "after": {"heldout_accuracy": 0.5, "heldout_loss": 1.25}},
)
HELD = Held(Ledger(frozen=6 * GIB), batch=0, saved=2 * GIB, temporaries=0, phase="backward")
GPU = replace(
    CPU,
    device=Device("cuda", "a GPU"),
    phases=[Phase("selection", 1.5, 1, 3 * GIB, peak_reserved=11 * GIB), Phase("training", 50.0, 1)],
    memory=Memory(3 * GIB, "VmHWM", 2 * GIB, HELD, Allocator("an allocator", 10 * GIB, 0, 10 * GIB, 12 * GIB, 0)),
    throughput=replace(CPU.throughput, flops=8 * 10**12),
    driver=Driver(
        device="a GPU",
        uuid="GPU-1",
        driver="570",
        mig=False,
        memory="v2",
        attribution="own pid",
        used=13 * GIB,
        process=12 * GIB + GIB // 2,
        context=GIB // 2,
        foreign=0,
        samples=9,
        joules=30_000.0,
    ),
    kernels=Kernels(2, 0.4, 0.1, "bfloat16", flops_ceiling=10**14, bytes_ceiling=10**12, count=0, top=[]),
)
OOM = RunRecord(name="galore-1", status="oom", reason="out of memory [tried 2 GiB]")

Runs = list[tuple[Path, RunRecord | str]]


def runs(*records: RunRecord) -> Runs:
    return [(Path("runs", record.name, "record.json"), record) for record in records]


def faster(record: RunRecord, factor: float, **fields: Any) -> RunRecord:
    new = replace(record.throughput, tokens=round(10_000 * factor), padded_tokens=round(12_000 * factor))
    return replace(record, throughput=new, **fields)


def larger(record: RunRecord, factor: float, **fields: Any) -> RunRecord:
    return replace(record, memory=replace(record.memory, peak_resident=round(3 * GIB * factor)), phases=[], **fields)


def written(root: Path, *records: RunRecord) -> Path:
    for record in records:
        (root / record.name).mkdir(parents=True)
        record.write(root / record.name / "record.json")
    return root


def shown(out: Table, width: int = 160) -> str:
    console = Console(width=width, file=StringIO())
    with console.capture() as captured:
        console.print(out)
    return captured.get()


def rows(of: Sequence[tuple[Path, RunRecord | str]]) -> list[dict[str, str]]:
    """The table's rows: header to cell."""
    lines = [line for line in markdown(of).splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in body]


# ---- reading


def test_a_run_is_found_by_its_folder_its_file_and_the_folders_above(tmp_path: Path) -> None:
    root = written(tmp_path / "all" / "runs", CPU)
    file = root / "smt-1" / "record.json"
    for path in (root / "smt-1", file, root, root.parent):
        assert read_runs([path]) == [(file, CPU)]


def test_runs_come_in_natural_order_and_each_once(tmp_path: Path) -> None:
    root = written(tmp_path, *(replace(CPU, name=name) for name in ("smt-10", "smt-2", "lisa-1")))
    read = read_runs([root / "smt-10", root, root / "smt-2" / "record.json"])
    assert [record.name for _, record in read] == ["smt-10", "lisa-1", "smt-2"]
    assert [record.name for _, record in read_runs([root])] == ["lisa-1", "smt-2", "smt-10"]


def test_a_record_that_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = written(tmp_path, CPU, replace(CPU, name="smt-2"), replace(CPU, name="smt-3"))
    broken, other = root / "smt-2" / "record.json", root / "smt-3" / "record.json"
    broken.write_text(broken.read_text()[:100])
    other.write_text('{"schema": 99}')
    first, second, third = (record for _, record in read_runs([root]))
    assert first == CPU
    assert "smt-2/record.json is not a complete JSON document" in second
    assert "is a record of schema 99" in third
    assert [(row["run"], row["status"]) for row in rows(read_runs([root]))] == [
        ("smt-1", "ok"),
        ("smt-2", "unreadable"),
        ("smt-3", "unreadable"),
    ]


def test_a_killed_run_is_told_with_the_command_that_goes_on(tmp_path: Path, capsys: Any) -> None:
    root = written(tmp_path, CPU)
    (root / "smt-1" / "config.yaml").write_text("seed_everything: 0\n")
    killed = root / "lisa-1"
    killed.mkdir()
    (killed / "config.yaml").write_text("seed_everything: 0\n")
    assert report([str(root)]) == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "killed" in line)
    assert told.startswith(f"{killed} has no record.json")
    assert "it was killed, and has no checkpoint to go on from; or it still runs" in told
    (killed / "checkpoints").mkdir()
    (killed / "checkpoints" / "last.ckpt").touch()
    report([str(root)])
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "killed" in line)
    last = killed / "checkpoints" / "last.ckpt"  # not `last`, which is that of the newest run of this name
    assert f"goes on with lit-sparse fit --config {killed / 'config.yaml'} --ckpt_path {last};" in told
    report([str(root)], markdown=True)
    assert "killed" not in capsys.readouterr().out


def test_runs_none_of_which_can_be_read_are_refused(tmp_path: Path) -> None:
    root = written(tmp_path, CPU, replace(CPU, name="smt-2"))
    cut, foreign = (root / name / "record.json" for name in ("smt-1", "smt-2"))
    cut.write_text(cut.read_text()[:100])
    foreign.write_text('{"loss": 1.0}')
    for page in (None, str(tmp_path / "page.html")):
        with pytest.raises(
            ValueError, match=r"^A report of 2 records was .* none can be read: .*smt-1/record\.json is"
        ):
            report([str(root)], output=page)
        with pytest.raises(ValueError, match=r"of 1 records was .*: .*smt-2/record\.json is JSON but not a run record"):
            report([str(foreign.parent)], output=page)


def test_a_path_without_records_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"was given, but there is no record\.json in it or two folders deep"):
            read_runs([path])
    with pytest.raises(ValueError, match="no runs was asked for"):
        read_runs([])


# ---- the table


def test_a_cpu_run() -> None:
    assert rows(runs(CPU)) == [
        {
            "run": "smt-1",
            "status": "ok",
            "trainable": "8,400 0.84%",
            "tokens/s": "200.0",
            "with padding": "240.0",
            "median step ms": "400.0",
            "peak GiB resident": "3.00",
            "select. s": "32.5",
            "select. peak GiB": "2.00",
            "heldout loss before": "2.000",
            "heldout loss after": "1.250",
        }
    ]


def test_a_gpu_run() -> None:
    (row,) = rows(runs(GPU))
    assert row["peak GiB reserved"] == "12.00"
    assert row["residue %"] == "20.0"
    assert row["select. peak GiB"] == "11.00"
    assert row["J/step"] == "300.0"
    assert row["utiliz. %"] == "20.0"
    assert "peak GiB resident" not in row


def test_columns_that_no_run_has_are_left_out() -> None:
    assert rows(runs(RunRecord(name="x"))) == [{"run": "x", "status": "ok"}]
    both = rows(runs(OOM, replace(CPU, outcome={}, throughput=None)))
    assert list(both[0]) == ["run", "status", "trainable", "peak GiB resident", "select. s", "select. peak GiB"]
    assert both[0]["trainable"] == ""


def test_unknown_tokens_are_not_shown_as_zero() -> None:
    (row,) = rows(runs(replace(CPU, throughput=Throughput(None, None, seconds=1.0, steps=1))))
    assert "tokens/s" not in row


def test_an_interleaved_run_shows_the_ratio() -> None:
    paired = replace(CPU, name="lora-1", pair=Pair("floor", 1.1387, 1.061, 1.192, 1.3, 12))
    first, second = rows(runs(CPU, paired))
    assert (first["step / floor"], second["step / floor"]) == ("", "1.139 [1.061, 1.192]")


def test_repetitions_share_a_row_with_median_and_range() -> None:
    again = {"data": {"seed": 1}, "seed_everything": 7, "batch_size": 4}
    of = runs(
        CPU,
        replace(faster(CPU, 1.5), name="smt-2", settings=again),
        replace(faster(CPU, 1.1), name="smt-10", settings=again),
    )
    (row,) = rows(of)
    assert (row["run"], row["tokens/s"]) == ("smt (3 runs)", "220.0 [200.0, 300.0]")
    assert row["peak GiB resident"] == "3.00"


@pytest.mark.parametrize(
    "other",
    [
        {"name": "lisa-1"},
        {"model": replace(CPU.model, base="another")},
        {"device": replace(CPU.device, name="another")},
        {"settings": {**CPU.settings, "batch_size": 8}},
        {"status": "failed", "reason": "it fell over"},
    ],
)
def test_runs_that_differ_are_not_repetitions(other: dict[str, Any]) -> None:
    found = rows(runs(CPU, replace(CPU, **{"name": "smt-2", **other})))
    assert [row["run"] for row in found] == ["smt-1", other.get("name", "smt-2")]


def test_a_diverged_loss_is_not_hidden_by_the_median() -> None:
    diverged = replace(CPU, name="smt-2", outcome={"after": {"heldout_loss": math.nan}})
    for of in ((diverged, CPU, replace(CPU, name="smt-3")), (CPU, replace(CPU, name="smt-3"), diverged)):
        (row,) = rows(runs(*of))
        assert row["heldout loss after"] == "nan"


def test_model_and_device_are_told_once_or_in_columns() -> None:
    assert markdown(runs(CPU, OOM)).startswith("model a/model, device a processor\n\n|")
    other = rows(runs(CPU, replace(GPU, name="lisa-1")))
    assert [row["device"] for row in other] == ["a processor", "a GPU"]
    assert "model" not in other[0]
    assert [(row["peak GiB resident"], row["peak GiB reserved"]) for row in other] == [("3.00", ""), ("", "12.00")]


def test_runs_of_the_same_name_are_told_apart_by_their_folders() -> None:
    of = [(Path(root, "smt-1", "record.json"), record) for root, record in (("a", CPU), ("b", GPU))]
    assert [row["run"] for row in rows(of)] == ["smt-1 in a/smt-1", "smt-1 in b/smt-1"]


def test_losses_of_different_metrics_have_columns_of_their_own() -> None:
    other = replace(CPU, name="lisa-1", outcome={"after": {"text_loss": 4.0}})
    first, second = rows(runs(CPU, other))
    assert (first["heldout loss after"], first["text loss after"]) == ("1.250", "")
    assert (second["heldout loss after"], second["text loss after"]) == ("", "4.000")


def test_numbers_are_right_aligned_and_whole_at_120_columns() -> None:
    large = replace(GPU, model=ModelSize("a/model", parameters=3_212_749_824, trainable=16_063_749))
    of = runs(
        large,
        replace(faster(large, 30.0), name="smt-2"),
        replace(faster(large, 40.0), name="smt-3"),
        replace(large, name="galore-1", status="oom", reason="x"),
    )
    text = shown(table(of), 120)
    assert all(len(line) <= 120 for line in text.splitlines())
    for whole in ("16,063,749", "(3 runs)", "galore-1", "6,000", "[200.0,", "8,000]", "12.00", "tokens/s"):
        assert whole in text, text
    ends = [line.find(cell) + len(cell) for cell in ("tokens/s", "6,000", "8,000]") for line in text.splitlines()]
    assert len({end for end in ends if end > 10}) == 1, text


def test_at_80_columns_the_table_is_in_parts_and_no_word_is_broken() -> None:
    large = replace(GPU, model=ModelSize("a/model", parameters=3_212_749_824, trainable=16_063_749))
    of = runs(large, replace(large, name="galore-1", status="oom", reason="x"))
    parts = list(tables(of, 80))
    text = "\n".join(shown(part, 80) for part in parts)
    assert len(parts) > 1
    assert all(len(line) <= 80 for line in text.splitlines())
    words = {word for head in rows(of)[0] for word in head.split()} | {"16,063,749", "tokens/s", "galore-1"}
    assert words <= set(text.split()), words - set(text.split())
    assert text.count("galore-1") == len(parts), "each part names the runs"
    assert len(list(tables(of, 500))) == 1


def test_names_are_not_markup_and_bars_are_escaped() -> None:
    odd = replace(CPU, name="[red]a|b")
    assert "[red]a|b" in shown(table(runs(odd)))
    assert "| [red]a\\|b |" in markdown(runs(odd))


# ---- one run


@pytest.mark.parametrize(("later", "course"), [(0, "1.00 MiB each time."), (2**20, "1.00 MiB to 2.00 MiB.")])
def test_state_is_reported_when_the_trainable_set_changes(tmp_path: Path, capsys: Any, later: int, course: str) -> None:
    folder = written(tmp_path, replace(CPU, states=[StateBytes(1, 2**20, 0), StateBytes(3, 2**20, later)]))
    assert report([str(folder)]) == 0
    assert f"measured 2 times, after each change of the trainable set: {course}" in capsys.readouterr().out


def test_details_have_every_line_and_the_findings_below() -> None:
    text = shown(details(replace(GPU, notes=["The clock was not read."])), 100)
    order = ["frozen weights", "6,442,450,944", "counted", "residue: counted by neither", "allocator requested"]
    order += ["allocator reserved", "CUDA context", "residue of the driver", "process", "foreign"]
    order += ["The allocator's peak is 2.00 GiB (20.0%) above the count", "The clock was not read."]
    assert [text.find(part) for part in order] == sorted(text.find(part) for part in order)
    assert text.find(order[0]) > 0
    assert "ledgers add up" not in text


def test_details_say_when_all_is_well_or_the_allocator_was_not_read() -> None:
    held = replace(HELD, saved=4 * GIB)
    assert "the ledgers add up" in shown(details(replace(GPU, memory=replace(GPU.memory, held=held))))
    assert "The allocator was not read in a step" in shown(details(replace(CPU, ledger=Ledger(frozen=1))))


# ---- the gate


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    save_baseline(runs(CPU, replace(CPU, name="lisa-3")), tmp_path / "baseline.json")
    return tmp_path / "baseline.json"


def verdicts(baseline: Path, *records: RunRecord, tolerance: float = 0.05) -> dict[str, str]:
    return {verdict.run: verdict.result for verdict in check(runs(*records), baseline, tolerance)}


LISA = replace(CPU, name="lisa-1")


def test_a_baseline_is_kept_whole(baseline: Path) -> None:
    kept = {
        "status": "ok",
        "device": "a processor",
        "model": "a/model",
        "peak": 3 * GIB,
        "tokens_per_second": 200.0,
        "cores": 2,
        "parameters": 1_000_000,
        "trainable": 8_400,
        "settings": {"batch_size": 4, "data": {}},
        "ranks": 1,
    }
    assert json.loads(baseline.read_text()) == {"schema": 1, "runs": {"smt": kept, "lisa": kept}}
    assert [file.name for file in baseline.parent.iterdir()] == [baseline.name]


def test_the_same_again_passes(baseline: Path) -> None:
    found = check(runs(replace(CPU, name="smt-7"), LISA), baseline, 0.0)
    assert [(verdict.result, verdict.failed) for verdict in found] == [("within tolerance", False)] * 2
    assert found[0].sentence == (
        "memory within tolerance: 3.00 GiB, was 3.00 GiB (+0.0%); tokens/s within tolerance: 200.0, was 200.0 (+0.0%)"
    )


@pytest.mark.parametrize(
    ("record", "result", "words"),
    [
        (larger(CPU, 1.04), "within tolerance", "memory within tolerance: 3.12 GiB, was 3.00 GiB (+4.0%)"),
        (larger(CPU, 1.06), "worse", "memory worse: 3.18 GiB, was 3.00 GiB (+6.0%); tokens/s within tolerance"),
        (larger(CPU, 0.9), "better", "memory better: 2.70 GiB, was 3.00 GiB (-10.0%)"),
        (faster(CPU, 0.96), "within tolerance", "tokens/s within tolerance: 192.0, was 200.0 (-4.0%)"),
        (faster(CPU, 0.94), "worse", "tokens/s worse: 188.0, was 200.0 (-6.0%)"),
        (faster(CPU, 1.5), "better", "tokens/s better: 300.0, was 200.0 (+50.0%)"),
        (faster(larger(CPU, 0.5), 0.5), "worse", "memory better: 1.50 GiB"),
        (replace(CPU, throughput=None), "not comparable", "tokens/s not comparable: it was measured only then"),
        (replace(CPU, device=None), "not comparable", "device None where the baseline has a processor"),
        (replace(CPU, device=Device("cpu", "another")), "not comparable", "device another where the baseline has a p"),
        (
            replace(CPU, device=Device("cpu", "a processor", cores=1)),
            "not comparable",
            "cores 1 where the baseline has 2",
        ),
        (
            replace(CPU, model=ModelSize("a/model", 1_000_001, 8_400)),
            "not comparable",
            "parameters 1000001 where the baseline has 1000000",
        ),
        (
            replace(CPU, settings={"batch_size": 2, "data": {"seed": 9}, "new": True}),
            "not comparable",
            "not comparable: batch_size 2 where the baseline has 4, new True where the baseline has nothing",
        ),
        (
            replace(CPU, settings={**CPU.settings, "seed_everything": 5, "default_root_dir": "x"}),
            "within tolerance",
            "",
        ),
        (
            replace(CPU, outcome={"after": {"heldout_loss": math.nan}}),
            "worse",
            "worse: smt-1 diverged, since its heldout_loss after training is nan",
        ),
        (faster(CPU, 2.0, outcome={"after": {"train_loss": math.inf}}), "worse", "train_loss after training is inf"),
        (replace(CPU, ranks=[Rank(0), Rank(1)]), "not comparable", "ranks 2 where the baseline has 1"),
        (replace(CPU, model=ModelSize("b", 1, 1)), "not comparable", "model b where the baseline has a/model"),
        (replace(OOM, name="smt-1"), "worse", "oom where the baseline is ok: out of memory [tried 2 GiB]"),
        (replace(CPU, status="failed", reason="why"), "worse", "failed where the baseline is ok: why"),
    ],
)
def test_each_run_gets_its_verdict(baseline: Path, record: RunRecord, result: str, words: str) -> None:
    found, other = check(runs(record, LISA), baseline, 0.05)
    assert (found.run, found.result, found.failed) == ("smt-1", result, result in ("worse", "not comparable"))
    assert words in found.sentence
    assert not other.failed


def test_a_new_run_passes_and_a_missing_one_fails(baseline: Path) -> None:
    found = check(runs(CPU, replace(CPU, name="galore-1")), baseline, 0.05)
    assert [(v.run, v.result, v.failed) for v in found] == [
        ("smt-1", "within tolerance", False),
        ("galore-1", "new", False),
        ("lisa", "not comparable", True),
    ]
    assert found[2].sentence == "not comparable: the baseline has it, but no run of that name was given"


def test_repetitions_are_judged_by_their_median(baseline: Path) -> None:
    slow = faster(CPU, 0.5, name="smt-2")
    assert verdicts(baseline, CPU, slow, replace(CPU, name="smt-3"), LISA) == {
        "smt (3 runs)": "within tolerance",
        "lisa-1": "within tolerance",
    }
    assert verdicts(baseline, CPU, slow, replace(slow, name="smt-3"), LISA)["smt (3 runs)"] == "worse"
    other = replace(CPU, name="smt-2", settings={"batch_size": 8, "data": {}})
    assert verdicts(baseline, CPU, other, LISA)["smt (2 runs)"] == "not comparable"
    failed = replace(CPU, name="smt-2", status="failed", reason="why")
    assert verdicts(baseline, CPU, failed, LISA)["smt (2 runs)"] == "worse"


def test_a_failure_never_passes(tmp_path: Path) -> None:
    path, failed = tmp_path / "baseline.json", replace(CPU, status="failed", reason="why")
    save_baseline(runs(failed), path)
    (verdict,) = check(runs(failed), path, 0.05)
    assert (verdict.result, verdict.failed) == ("worse", True)
    assert verdict.sentence == "worse: failed as the baseline is failed: why"
    assert verdicts(path, CPU) == {"smt-1": "better"}
    save_baseline([], path)
    assert verdicts(path, failed) == {"smt-1": "worse"}


def test_a_baseline_of_before_settings_were_kept_is_read(baseline: Path) -> None:
    document = json.loads(baseline.read_text())
    for entry in document["runs"].values():
        for key in ("cores", "parameters", "trainable", "settings", "ranks"):
            del entry[key]
    baseline.write_text(json.dumps(document))
    assert set(verdicts(baseline, replace(CPU, settings={}), LISA).values()) == {"within tolerance"}


def test_a_record_that_cannot_be_read_fails(baseline: Path) -> None:
    of = [(Path("runs/smt-1/record.json"), "it is cut off."), *runs(LISA)]
    found, _ = check(of, baseline, 0.05)
    assert (found.run, found.failed, found.sentence) == ("smt-1", True, "not comparable: it is cut off.")


def test_a_failure_in_the_baseline_may_stay_or_improve(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(runs(OOM), path)
    assert verdicts(path, OOM) == {"galore-1": "within tolerance"}
    assert verdicts(path, replace(CPU, name="galore-1")) == {"galore-1": "better"}
    assert verdicts(path, replace(OOM, status="failed")) == {"galore-1": "not comparable"}


def test_a_run_without_measurements_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(runs(RunRecord(name="x")), path)
    (verdict,) = check(runs(RunRecord(name="x")), path, 0.05)
    assert (verdict.failed, verdict.sentence) == (True, "not comparable: neither memory nor speed was measured")


def test_a_baseline_of_repetitions_is_their_median(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    repetitions = [CPU, faster(larger(CPU, 2.0), 1.1, name="smt-2"), faster(larger(CPU, 1.5), 3.0, name="smt-3")]
    save_baseline(runs(*repetitions, replace(OOM, name="smt-4")), path)
    kept = json.loads(path.read_text())["runs"]["smt"]
    assert (kept["status"], kept["peak"], kept["tokens_per_second"]) == ("ok", round(4.5 * GIB), 220.0)


def test_a_gpu_is_judged_by_what_its_allocator_reserved(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(runs(GPU), path)
    assert json.loads(path.read_text())["runs"]["smt"]["peak"] == 12 * GIB


def test_a_baseline_of_different_runs_under_one_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"but smt-1, smt-2 differ in model, device or settings; give those"):
        save_baseline(runs(CPU, replace(CPU, name="smt-2", settings={})), tmp_path / "baseline.json")
    with pytest.raises(ValueError, match="one cannot be read: it is cut off"):
        save_baseline([(Path("x"), "it is cut off.")], tmp_path / "baseline.json")
    with pytest.raises(ValueError, match=r"there is no folder .*absent; make it first"):
        save_baseline(runs(CPU), tmp_path / "absent" / "baseline.json")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_cut_off_leaves_the_old_baseline(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_disk(*_: object) -> None:
        raise OSError("no space left on device")

    before = baseline.read_text()
    monkeypatch.setattr(os, "replace", no_disk)
    with pytest.raises(OSError, match="no space"):
        save_baseline(runs(OOM), baseline)
    assert baseline.read_text() == before
    assert list(baseline.parent.iterdir()) == [baseline]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as a baseline"),
        ("[]", "is a baseline of schema None, and this version reads 1; save it again"),
        ('{"schema": 2, "runs": {}}', "is a baseline of schema 2, and this version reads 1"),
        ('{"schema": 1}', "is not a valid baseline: baseline lacks: runs"),
        (
            '{"schema": 1, "runs": {"smt": {"status": "ok", "peak": "3"}}}',
            r"runs\.smt\.peak is '3' where int",
        ),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "baseline.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        check(runs(CPU), tmp_path / "baseline.json", 0.05)


def test_a_missing_baseline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baseline\.json cannot be read as a baseline .*; save one"):
        check(runs(CPU), tmp_path / "baseline.json", 0.05)


def test_a_nan_in_the_baseline_lets_nothing_pass(baseline: Path) -> None:
    baseline.write_text(baseline.read_text().replace("200.0", '"NaN"'))
    assert verdicts(baseline, CPU, LISA) == {"smt-1": "worse", "lisa-1": "worse"}


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("0.05", 0.05), (" 2.5 % ", 0.025), ("0", 0.0), (".5", 0.5), ("150%", 1.5)]
)
def test_shares_are_read(text: str, value: float) -> None:
    assert parse_share(text) == value


@pytest.mark.parametrize("text", ["5", "1", "-5%", "", "%", "nan", "inf", "1e-2", "five", "5%%"])
def test_an_invalid_tolerance_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"A tolerance of .* but it must be a fraction; write it as 5% or as 0"):
        parse_share(text)


# ---- the verb


def test_one_run_is_reported_with_its_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(written(tmp_path, GPU))]) == 0
    out = capsys.readouterr().out
    assert "where the memory went" in out
    assert "above the count" in out


def test_one_run_shows_where_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"share": {"0": {"v": 0.5}, "1": {"q": 0.25, "v": 1.0}}}
    run = replace(GPU, updates=[{"class": "SMT", "fields": {}, "chosen": chosen}])
    assert report([str(written(tmp_path, run))]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layer", "q", "v"] in rows
    assert ["0", "-", "50.0%"] in rows
    assert ["1", "25.0%", "100.0%"] in rows


def test_several_runs_are_compared_with_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, CPU, OOM, replace(GPU, name="lisa-1"))
    (tmp_path / "cut-1").mkdir()
    (tmp_path / "cut-1" / "record.json").write_text("{")
    assert report([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "galore-1: oom: out of memory [tried 2 GiB]\n" in out
    assert "cut-1: unreadable: " in out
    assert f"lisa-1: a memory figure is not as expected: lit-sparse report {tmp_path / 'lisa-1'}\n" in out
    assert "where the memory went" not in out


@pytest.mark.parametrize("value", [str(10**400), "1e999", "NaN", '"Infinity"', "-1", "0"])
def test_a_forged_number_is_told_or_shown_and_the_other_runs_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    written(tmp_path, CPU, replace(GPU, name="odd-1", seconds=-7.5, memory=replace(GPU.memory, growth=-7.5)))
    odd = tmp_path / "odd-1" / "record.json"
    document = json.loads(odd.read_text())
    odd.write_text(json.dumps({**document, "sha256": None}).replace("-7.5", value))
    assert report([str(tmp_path)]) == 0
    assert report([str(tmp_path)], output=str(tmp_path / "page.html")) == 0
    out = capsys.readouterr().out
    assert ("odd-1: unreadable: " in out) == (len(value) > 400)
    assert "smt-1" in out


def test_a_run_without_measurements_has_no_details(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(written(tmp_path, OOM))]) == 0
    assert "where the memory went" not in capsys.readouterr().out


def test_markdown_is_not_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = replace(GPU, name="a-rather-long-name-of-a-run" * 5)
    assert report([str(written(tmp_path, long))], markdown=True) == 0
    out = capsys.readouterr().out
    assert markdown([(tmp_path, long)]) in out
    assert "where the memory went" not in out


def test_the_gate_decides_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = written(tmp_path / "good", CPU), written(tmp_path / "bad", faster(CPU, 0.9))
    baseline = str(tmp_path / "baseline.json")
    assert report([str(good)], save_baseline=baseline) == 0
    assert report([str(good)], check=baseline) == 0
    assert "passed for all 1" in capsys.readouterr().out
    assert report([str(bad)], check=baseline) == 1
    out = capsys.readouterr().out
    assert "FAILED  smt-1: memory within tolerance: 3.00 GiB, was 3.00 GiB (+0.0%); tokens/s worse: 180.0, was" in out
    assert "within 5.0%: failed for 1 of 1" in out
    assert report([str(bad)], check=baseline, tolerance="10%") == 0
    with pytest.raises(ValueError, match="A tolerance of '5'"):
        report([str(bad)], check=baseline, tolerance="5")


def test_a_baseline_is_compared_with_before_it_is_replaced(tmp_path: Path) -> None:
    good, bad = written(tmp_path / "good", CPU), written(tmp_path / "bad", faster(CPU, 0.9))
    baseline = str(tmp_path / "baseline.json")
    report([str(good)], save_baseline=baseline)
    assert report([str(bad)], check=baseline, save_baseline=baseline) == 1
    assert report([str(bad)], check=baseline) == 0


def test_the_largest_tensors_of_one_run_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Large(3 * 2**20, "saved", [4, 256, 768], "float32", "layers.0.mlp", "modeling_llama.py:142 in forward"),
        Large(2**20, "before", [2**18], "float32", "", "held by Cache.kept"),
    ]
    replace(GPU, memory=replace(GPU.memory, largest=found)).write(tmp_path / "record.json")
    report([str(tmp_path)])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "3.00 MiB saved float32 4 x 256 x 768 layers.0.mlp modeling_llama.py:142 in forward" in lines
    assert "1.00 MiB before float32 262144 held by Cache.kept" in lines


def test_utilization_is_told_by_its_conventions_and_energy_by_its_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = replace(GPU, driver=replace(GPU.driver, energy_seconds=25.0))
    record.write(tmp_path / "record.json")
    report([str(tmp_path)])
    assert "20.0% (MFU, without recomputation), causal attention in full" in capsys.readouterr().out
    (row,) = rows(runs(record))
    assert row["J/step"] == "600.0"  # 30 kJ in 25 of 50 s
    above = replace(record, throughput=replace(record.throughput, flops=10**15))
    (row,) = rows(runs(above))
    assert "utiliz. %" not in row
    above.write(tmp_path / "record.json")
    report([str(tmp_path)])
    assert "2500% of the measured matrix-product rate, which cannot be" in capsys.readouterr().out
