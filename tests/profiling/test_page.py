"""The page of `lit-sparse report -o`: what is in it, what is left out, and what it does with texts from anywhere."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_sparse_profiling import measures
from lit_sparse_profiling.documents import printable
from lit_sparse_profiling.drawing import safe
from lit_sparse_profiling.figures import ACROSS, phases, read_metrics, sides, thinned, tradeoff
from lit_sparse_profiling.figures_of_one import OF_ONE, chosen_share, drawn_layers, states
from lit_sparse_profiling.measures import ENERGY, FORGETTING, LOSS, PEAK, SPEED, phase_seconds
from lit_sparse_profiling.memory import PER_PHASE
from lit_sparse_profiling.memory_figures import OTHER_PHASES, Cards, memory, parts_of, predictions
from lit_sparse_profiling.page import digest, render, script_of, write_page
from lit_sparse_profiling.reconcile import RESIDUE, reconcile
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.report import report
from lit_sparse_profiling.run_folders import Row, grouped, read_runs
from lit_sparse_profiling.sections import Device
from tests.profiling.page_records import GIB, HOSTILE, METHODS, gpu_record, hostile_record, oom_record, write_runs

CARDS = {24: 23028, 80: 81251}


def page_of(root: Path, *records: RunRecord, **options: Any) -> str:
    return render(read_runs([write_runs(root, *records)]), CARDS, **options)


def blocks(page: str) -> list[Any]:
    """The JSON in the page's data blocks: the table, the figures of each model, each run's details."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)]


def rows_of(*records: RunRecord) -> list[Row]:
    return grouped([(Path("runs", record.name, "record.json"), record) for record in records])


def titles(figures: Sequence[dict[str, Any]]) -> list[str]:
    return [figure["title"] for figure in figures]


# ---- what is in it


def test_every_figure_is_there_where_the_records_have_its_data(tmp_path: Path) -> None:
    page = page_of(tmp_path, *map(gpu_record, METHODS), oom_record())
    _, across, *runs = blocks(page)
    assert set(titles(across["figures"])) == {title for title, *_ in ACROSS}
    assert across["missing"] == []
    assert {title for run in runs for title in titles(run["figures"])} == {title for title, *_ in OF_ONE}


def test_axes_of_every_figure_have_a_title_and_bars_a_unit(tmp_path: Path) -> None:
    _, across, *runs = blocks(page_of(tmp_path, *map(gpu_record, METHODS)))
    for figure in [*across["figures"], *(figure for run in runs for figure in run["figures"])]:
        bars = figure["data"][0].get("orientation") == "h"
        assert figure["layout"]["xaxis"]["title"]["text"], figure["title"]
        assert bars or figure["layout"]["yaxis"]["title"]["text"], figure["title"]
        assert len(figure["caption"]) > 60


def test_a_record_without_anything_gives_a_page_and_says_what_each_figure_needs(tmp_path: Path) -> None:
    (tmp_path / "bare-1").mkdir()
    RunRecord(name="bare-1").write(tmp_path / "bare-1" / "record.json")
    _, across, run = blocks(render(read_runs([tmp_path]), CARDS))
    assert across["figures"] == run["figures"] == []
    assert [title for title, _ in across["missing"]] == [title for title, *_ in ACROSS]
    assert all(gives for _, gives in [*across["missing"], *run["missing"]])


def test_the_page_says_the_command_and_versions_of_each_run_and_its_own(tmp_path: Path) -> None:
    page = page_of(tmp_path, gpu_record("smt"), command="lit-sparse report runs -o x.html")
    assert "<code>lit-sparse report runs -o x.html</code>" in page
    (run,) = blocks(page)[0]["runs"]
    assert run["command"] == "lit-sparse fit --config smt.yaml --model.base a/model-8b"
    assert "torch 2.13.0" in run["versions"]


def test_the_bars_of_memory_add_up_to_the_driver_s_figure_and_have_the_residue() -> None:
    record = gpu_record("smt")
    (row,) = rows_of(record)
    parts, lines = parts_of(row), {line.name: line.bytes for line in reconcile(record)}
    assert sum(parts.values()) == record.driver.process == lines["process"]
    assert parts[RESIDUE] == lines[RESIDUE] > 0
    figure = memory(rows_of(*map(gpu_record, METHODS)), Cards(CARDS))
    assert RESIDUE in [trace["name"] for trace in figure.data]
    assert next(trace for trace in figure.data if trace["name"] == RESIDUE)["marker"]["pattern"]["shape"]


def test_a_bar_of_a_processor_ends_at_the_peak_of_the_whole_run() -> None:
    """Where loading or evaluation holds more than any step: the choice and the other figures have that peak."""
    record = gpu_record("smt")
    allocator = replace(record.memory.allocator, allocated=None, reserved=None)
    memory = replace(
        record.memory,
        method=PER_PHASE,
        peak_resident=33 * GIB,
        outside=GIB,
        plain_peak=30 * GIB,
        allocator=allocator,
    )
    device = Device("cpu", "a processor", memory=64 * GIB)
    plain = [replace(phase, peak_reserved=None) for phase in record.phases]
    parts = parts_of(rows_of(replace(record, device=device, driver=None, phases=plain, memory=memory))[0])
    assert sum(parts.values()) == 33 * GIB
    assert parts[OTHER_PHASES] == 3 * GIB


def test_a_run_whose_memory_is_only_a_peak_has_one_bar_of_it() -> None:
    record = replace(gpu_record("smt"), memory=None, driver=None, ledger=None)
    assert parts_of(rows_of(record)[0]) == {"not broken down": record.phases[1].peak_reserved}


def test_cards_are_drawn_up_to_the_next_above_and_the_own_one_always() -> None:
    rows = rows_of(gpu_record("smt"))
    figure = memory(rows, Cards(CARDS, Cards.of(rows)))
    drawn = {note["text"] for note in figure.layout["annotations"]}
    assert drawn == {"24 GB", "NVIDIA H100 80GB HBM3: 79.6 GiB"}  # the sold 80 GB are this very card
    small = memory(
        rows_of(replace(gpu_record("smt"), memory=None, driver=None)), Cards({200: 200 * 1024}, ("mine", 400 * GIB))
    )
    assert [note["text"] for note in small.layout["annotations"]] == ["mine: 400.0 GiB →"]
    assert "out of memory" in str(memory(rows_of(gpu_record("smt"), oom_record()), Cards(CARDS)).data)


def test_no_point_of_the_frontier_is_beaten_and_every_other_one_is() -> None:
    figure = tradeoff(rows_of(*map(gpu_record, METHODS)), LOSS, "loss", "")
    points = next(trace for trace in figure.data if trace["mode"] == "markers+text")
    best = [
        place
        for place, symbol in zip(zip(points["x"], points["y"], strict=True), points["marker"]["symbol"], strict=True)
        if "open" not in symbol
    ]
    every = list(zip(points["x"], points["y"], strict=True))
    beaten = [a for a in every if any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in every)]
    assert sorted(best) == sorted(set(every) - set(beaten))
    assert len(best) == 2


def test_the_name_of_a_point_is_on_the_side_away_from_the_nearest_other() -> None:
    """Two neighbours that had their names between them overlapped."""
    assert sides([(28.0, 2600.0), (28.5, 2450.0), (76.0, 1450.0)]) == ["top", "bottom", "bottom"]
    assert sides([(1.0, 1.0), (1.0, 1.0)]) == ["top", "bottom"]
    assert sides([(1.0, 1.0)]) == ["top"]


def test_state_is_in_the_unit_of_its_size() -> None:
    large = gpu_record("lisa")
    small = replace(large, states=[replace(state, optimizer=2**20, strategy=0) for state in large.states])
    assert states(large).layout["yaxis"]["title"]["text"] == "state, GiB"
    assert states(large).data[0]["y"][0] == pytest.approx(2.1)
    assert states(small).layout["yaxis"]["title"]["text"] == "state, MiB"
    assert states(small).data[0]["y"] == [1, 1, 1]


def test_losses_of_another_name_are_no_point_of_the_figure() -> None:
    other = replace(gpu_record("lora"), outcome={"after": {"train_loss": 0.1}})
    figure = tradeoff(rows_of(gpu_record("smt"), gpu_record("full"), other), LOSS, "loss", "")
    (points,) = [trace["y"] for trace in figure.data if trace["mode"] == "markers+text"]
    assert sorted(points) == [1.02, 1.06]
    assert "1 runs that have another are left out" in figure.caption
    few = tradeoff(
        rows_of(gpu_record("smt"), gpu_record("full"), *[replace(other, name=f"{n}") for n in "abc"]), LOSS, "", ""
    )
    (points,) = [trace["y"] for trace in few.data if trace["mode"] == "markers+text"]
    assert sorted(points) == [1.02, 1.06]  # of held-out rows, though more runs have a training loss


def test_repetitions_are_one_row_with_their_median_and_range(tmp_path: Path) -> None:
    records = [
        replace(gpu_record("lora", n, scale), settings={"seed_everything": n})
        for n, scale in enumerate((1, 1.1, 1.4), 1)
    ]
    table = blocks(page_of(tmp_path, *records))[0]
    (row,) = table["rows"]
    assert row["label"] == "lora (3 runs)"
    assert row["runs"] == [0, 1, 2]
    assert row["values"]["loss_after"] == pytest.approx([1.11 * 1.1, 1.11, 1.11 * 1.4])
    assert len(table["runs"]) == 3


def test_measures_are_the_records_figures() -> None:
    record = gpu_record("full")
    assert SPEED.value(record) == pytest.approx(1450)
    assert PEAK.value(record) == pytest.approx(76.11, abs=0.01)  # 71.8 GiB requested, 6 % more reserved
    assert FORGETTING.value(record) == pytest.approx(0.21)
    # 500 J in each second, 1450 tokens a second: 500 / 1450 J a token.
    assert ENERGY.value(record) == pytest.approx(500 / 1450 * 1e3)


def test_seconds_of_phases_add_up_without_those_that_are_part_of_another() -> None:
    record = gpu_record("full")
    whole = {phase.name: phase.seconds for phase in record.phases if phase.name != "forward"}
    assert phase_seconds(record) == whole
    assert {"imports", "polishing", "examination"} <= whole.keys()
    owned = [replace(phase, own=phase.seconds / 2) for phase in record.phases]
    parts = phase_seconds(replace(record, phases=owned, seconds=100.0))
    assert sum(parts.values()) == 100
    assert parts["examination"] == whole["examination"] / 2 + 1  # of which forward is a part
    assert parts["polishing"] == 1
    figure = phases(rows_of(replace(record, phases=owned, seconds=100.0)), Cards({}))
    assert {trace["name"]: trace["x"] for trace in figure.data}["other"] == [parts["other"]]


def test_a_prediction_in_the_record_is_compared_with_the_allocator(tmp_path: Path) -> None:
    gpu_record("smt").write(tmp_path / "record.json")
    record = RunRecord.read(tmp_path / "record.json")  # as a report reads it
    assert measures.prediction_error(record) == pytest.approx(1)
    figure = predictions(rows_of(record), Cards({}))
    allocated, reserved = figure.data[1:]
    assert allocated["y"][0] == pytest.approx(1.01 * allocated["x"][0])
    assert reserved["y"][0] == pytest.approx(0.995 * reserved["x"][0])
    assert figure.caption.endswith("The furthest off is smt-1, by +1.0%.")
    assert measures.prediction_error(replace(record, predicted=None)) is None
    assert measures.prediction_error(replace(record, predicted=replace(record.predicted, peak_bytes=0))) is None


def test_a_prediction_of_a_longer_batch_than_was_measured_is_not_compared() -> None:
    record = gpu_record("smt")
    short = replace(record, memory=replace(record.memory, examined_positions=2048, most_positions=2048))
    assert measures.prediction_error(short) is None
    full = replace(short, memory=replace(short.memory, most_positions=4096))  # the card tells the peak of every step
    assert measures.prediction_error(full) == pytest.approx(1)
    plain = [replace(phase, peak_requested=None) for phase in full.phases]
    assert measures.prediction_error(replace(full, phases=plain)) is None


def test_metrics_are_read_as_they_are_and_long_ones_are_thinned(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,epoch,train_loss,note\n0,0,2.0,x\n1,0,nan,\n,0,3,\n2,0,1.5,")
    assert read_metrics(tmp_path / "record.json") == {"train_loss": [(0, 2.0), (2, 1.5)]}
    assert read_metrics(tmp_path / "elsewhere" / "record.json") == {}
    long = thinned([(step, float(step)) for step in range(1000)])
    assert len(long) == 200
    assert long[0] == (4, 2.0)  # the mean of the first five steps, at the last of them


# ---- texts from anywhere


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile_record(), gpu_record("smt"), command=HOSTILE)
    assert "window.hacked = 1</script>" not in page
    assert "<img" not in page
    # The table, a model, two runs, the page's script and Plotly's.
    assert page.count("</script>") == page.count("<script") == 1 + 1 + 2 + 2
    ours = page.replace(re.findall(r"<script>(.*?)</script>", page, re.S)[0], "")  # Plotly's own has control characters
    assert ours == printable(ours)
    assert any(run["run"] == printable(HOSTILE) for run in blocks(page)[0]["runs"])


def test_hostile_texts_are_not_obeyed_by_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_runs(tmp_path, hostile_record(), gpu_record("smt"))
    report([str(root)])
    report([str(next(root.glob("run-*")))])
    printed = capsys.readouterr().out
    assert "window.hacked" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


@pytest.mark.parametrize(
    "told",
    [
        *(None, [], "x", {"share": 1}, {"share": {}}, {"share": {"0": {}}}, {"share": {"0": {"q": "much"}}}),
        *({"share": {"0": {"q": 10**400}}}, {"share": {"0": {"q": -1}}}, {"share": {"0": {"q": math.nan}}}),
        *({"draws": {"1": [10**12]}}, {"draws": {"1": [-1]}}),
        *({"share": {"0": [1]}}, {"draws": {"1": "all"}}, {"draws": {"1": ["a"]}}, {"draws": {}}, {"draws": {"1": []}}),
    ],
)
def test_a_choice_in_another_form_is_no_figure(tmp_path: Path, told: Any) -> None:
    record = replace(gpu_record("full"), updates=[{"class": "X", "chosen": told}, {}])
    assert chosen_share(record) is None
    assert drawn_layers(record) is None
    assert report([str(write_runs(tmp_path, record))]) == 0


def test_plotly_takes_no_text_for_markup() -> None:
    assert safe("<b>a</b> & %{x}") == "&lt;b&gt;a&lt;/b&gt; &amp; % {x}"


def test_only_the_page_s_own_scripts_may_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, gpu_record("smt"))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page).group(1)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    assert scripts[1] == script_of(page)
    assert policy.startswith("default-src 'none'; script-src " + " ".join(map(digest, scripts)) + ";")
    assert not re.findall(r'(?:src|href)=["\'](?!data:|#)', page.replace(scripts[0], ""))


# ---- what cannot be had


def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    root = write_runs(tmp_path / "runs", gpu_record("smt"))
    read = read_runs([root])
    with pytest.raises(ValueError, match=r"is a folder; name a file"):
        write_page(read, tmp_path, CARDS)
    with pytest.raises(ValueError, match=r"No such file or directory\); name a file in a folder that exists"):
        write_page(read, tmp_path / "nowhere" / "x.html", CARDS)
    with pytest.raises(ValueError, match=r"A page of 1 records was asked for, but none can be read"):
        write_page([(Path("x"), "it is no record")], tmp_path / "x.html", CARDS)
    with pytest.raises(ValueError, match=r"no record\.json in it"):
        report([str(tmp_path / "empty")], output=str(tmp_path / "x.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_file_that_is_no_record_is_told_in_the_page(tmp_path: Path) -> None:
    root = write_runs(tmp_path, gpu_record("smt"), gpu_record("lora"))
    (root / "lora-1" / "record.json").write_text('{"schema": 1, "name": "<b>x</b>", "wrong": "<i>"}')
    deep = root / "deep-1" / "record.json"
    deep.parent.mkdir()
    deep.write_text("[" * 100_000)
    (root / "pipe-1").mkdir()
    os.mkfifo(root / "pipe-1" / "record.json")
    os.mkfifo(root / "pipe.json")
    (root / "smt-1" / "metrics.csv").unlink()
    os.mkfifo(root / "smt-1" / "metrics.csv")
    page = render(read_runs([root]), CARDS)
    assert "3 records could not be read" in page
    assert "pipe-1/record.json is a folder, a device or a pipe" in page
    assert "has unknown fields: wrong" in page
    assert "deep-1/record.json is not a complete JSON document" in page
    assert len(blocks(page)[0]["runs"]) == 1


def test_report_writes_the_page_in_place_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_runs(tmp_path / "runs", gpu_record("smt"))
    out = tmp_path / "page.html"
    out.touch()
    assert report([str(root)], output=str(out), cards=CARDS) == 0
    assert re.fullmatch(r"Page of 1 runs: .*page.html \(\d\.\d MB, opens offline\)\n", capsys.readouterr().out)
    assert out.read_text().startswith("<!DOCTYPE html>")
