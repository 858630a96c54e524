"""The comparison with the peers: what it promises of its own numbers, on the tiny model."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peer, peers, readme
from lit_sparse.strategies import SMT

TINY = peer.WORKLOADS["tiny"]


class Clock:
    """Stands in for a worker: every step of `name` takes what `seconds` says."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def ask(self, command: str) -> float:
        self.log.append(self.name)
        return self.seconds


def mode(name: str, **figures: Any) -> dict[str, Any]:
    peaks = {"peak_rss": 2**30, "peak_rss_returned": 2**30, "selection_peak_rss_returned": 0}
    known = {"trainable": 10, **peaks, "saved_bytes": 7, "saved_formula": None}
    return {"mode": name, **known, **figures}


def pair(first: str, second: str, high: float, highest: float) -> dict[str, Any]:
    return {"pair": [first, second], "ratio_high": high, "ratio_max": highest, "rounds": 5}


def judged(*lines: dict[str, Any]) -> list[bool]:
    return [met for _, met in peers.verdicts({peers.key(line): line for line in lines})]


def test_both_files_name_the_same_modes() -> None:
    assert tuple(peer.MODES) == peers.MODES
    assert {mode for pair in peers.PAIRS for mode in pair} == set(peers.MODES)


@pytest.mark.parametrize("name", [name for name in peers.MODES if name.startswith("SMT")])
def test_saved_bytes_equal_the_formula(name: str) -> None:
    line = peer.Training(name, TINY).measure()
    assert line["saved_bytes"] == line["saved_formula"]
    assert line["trainable"] > 0


def test_the_formula_holds_above_the_first_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = {"model.layers.1.self_attn.k_proj": {"size": [8, 8], "index": [[0, 1], [1, 2]]}}
    (tmp_path / "blocks.json").write_text(json.dumps(choice))
    monkeypatch.setitem(peer.MODES, "SMT 5 %", lambda work, model: [SMT(blocks=str(tmp_path / "blocks.json"))])
    line = peer.Training("SMT 5 %", TINY).measure()
    assert line["lowest_layer"] == 1
    assert line["saved_bytes"] == line["saved_formula"]


def test_equal_counts_are_equal() -> None:
    ours, theirs = (peer.Training(name, TINY) for name in (peers.SMT_LORA, peers.LORA_QKV))
    assert sum(p.numel() for p in ours.trained) == sum(p.numel() for p in theirs.trained) > 0


def test_the_floor_trains_nothing_and_reaches_the_first_layer() -> None:
    training = peer.Training(peers.FLOOR, TINY)
    leaves: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        leaves.append(output)

    training.loss(training.batch)  # the first also finds out how the head works, in passes of its own
    for name in ("q_proj", "k_proj", "v_proj"):
        training.model.get_submodule(f"model.layers.0.self_attn.{name}").register_forward_hook(keep)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.step()
    assert [leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves] == [True, True, True]
    assert training.trained == []
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())


def test_a_step_trains() -> None:
    training = peer.Training(peers.SMT_5, TINY)
    first = training.loss(training.batch)
    for _ in range(5):
        training.step()
    assert training.loss(training.batch) < first


def test_commands_are_answered_in_lines_of_json() -> None:
    class Stub:
        def step(self) -> float:
            return 0.5

        def measure(self) -> dict[str, int]:
            return {"trainable": 3}

    answers = StringIO()
    peer.serve(Stub(), StringIO("step\nmeasure\n"), answers)  # pyright: ignore[reportArgumentType]
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [0.5, {"trainable": 3}]


def test_steps_alternate_and_the_ratio_keeps_its_sense() -> None:
    log: list[str] = []
    slow, fast = Clock("slow", 3.0, log), Clock("fast", 2.0, log)
    ratios = [peers.ratio(slow, fast, 2, swapped) for swapped in (False, True)]  # pyright: ignore[reportArgumentType]
    assert ratios == [1.5, 1.5]
    assert log == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"]


def test_the_interval_holds_the_median_and_narrows() -> None:
    few, many = [1.0, 1.1, 1.2, 1.3], [1.0, 1.1, 1.2, 1.3] * 20
    low, high = peers.interval(few)
    assert 1.0 <= low < 1.15 < high <= 1.3
    assert peers.interval(few) == (low, high)
    narrow = peers.interval(many)
    assert narrow[1] - narrow[0] < high - low


def test_promises_are_kept_up_to_their_limit_only() -> None:
    assert judged(pair(peers.SMT_1, peers.FLOOR, high=1.05, highest=2)) == [True]
    assert judged(pair(peers.SMT_1, peers.FLOOR, high=1.051, highest=1)) == [False]
    assert judged(pair(peers.SMT_5, peers.FLOOR, high=1.1, highest=2)) == [True]
    assert judged(pair(peers.SMT_5, peers.LORA_ALL, high=0.5, highest=1.0)) == [False]
    assert judged(mode(peers.SMT_1, saved_formula=8)) == [False]
    assert judged(mode(peers.SMT_1, saved_formula=7)) == [True]


def test_memory_is_compared_at_equal_counts_only() -> None:
    theirs = mode(peers.LORA_QKV)
    assert judged(mode(peers.SMT_LORA, peak_rss=2**30 - 1), theirs) == [True, False]
    assert judged(mode(peers.SMT_LORA, peak_rss_returned=2**30 - 1), theirs) == [False, True]
    assert judged(mode(peers.SMT_LORA, peak_rss=1, peak_rss_returned=1, trainable=9), theirs) == [False, False]


def test_memory_counts_the_selection() -> None:
    ours = mode(peers.SMT_LORA, peak_rss=1, peak_rss_returned=1, selection_peak_rss_returned=2**30)
    assert judged(ours, mode(peers.LORA_QKV)) == [True, False]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers that measure nothing; what was asked of which mode."""
    asked: list[str] = []
    figures = {"selection_seconds": 0.0, "selection_peak_rss": 0, "rss_before": 0, "memory_method": "none"}
    line = mode("", trainable_share=0.1, step_seconds_median=1.0, lowest_layer=None, **figures)
    del line["mode"]

    class Stub(Clock):
        def __init__(self, name: str, options: list[str], variables: Any = None) -> None:
            super().__init__(name, 1.0, asked)

        def ask(self, command: str) -> Any:
            return super().ask(command) if command == "step" else line

        def close(self) -> None:
            asked.append(f"end of {self.name}")

    monkeypatch.setattr(peers, "Worker", Stub)
    return asked


def test_lines_are_what_the_readme_reads(tmp_path: Path, stubbed: list[str]) -> None:
    path = tmp_path / "results" / "peers.jsonl"
    assert peers.main(["--results", str(path), "--rounds", "2", "--modes", peers.FLOOR, peers.SMT_5]) == 0
    assert f"| {peers.SMT_5} | 10 (10.00%) | 1.0" in readme.peers(path.parent)
    assert stubbed.count(f"end of {peers.SMT_5}") == 3  # two for memory, one for times


def test_resume_measures_what_is_missing(tmp_path: Path, stubbed: list[str]) -> None:
    path = tmp_path / "peers.jsonl"
    options = ["--results", str(path), "--rounds", "2", "--resume", "--modes", peers.FLOOR]
    peers.main(options)
    peers.main([*options, peers.SMT_5])
    peers.main([*options, peers.SMT_5])
    names = [peers.key(json.loads(line)) for line in path.read_text().splitlines()]
    assert names == [("mode", peers.FLOOR), ("mode", peers.SMT_5), ("pair", peers.SMT_5, peers.FLOOR)]
    peers.main([*options, "--threads", "77"])
    assert len(path.read_text().splitlines()) == 4


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--rounds", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_two_processes_step_in_turn() -> None:
    line = peers.compared((peers.SMT_5, peers.FLOOR), ["--model", "tiny", "--threads", "1"], rounds=2, steps=1)
    assert line["pair"] == [peers.SMT_5, peers.FLOOR]
    assert 0 < line["ratio_low"] <= line["ratio_median"] <= line["ratio_high"] <= line["ratio_max"]


def test_a_process_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "peer.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    worker = peers.Worker("some mode", [])
    with pytest.raises(RuntimeError, match="'some mode' ended without an answer"):
        worker.ask("step")
    worker.close()
