"""The run record: what is written is read back, and nothing else is taken for a record."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from lit_sparse_profiling import devices
from lit_sparse_profiling.record import SCHEMA, RunRecord
from lit_sparse_profiling.sections import Device, Ledger, Memory, ModelSize, Phase
from lit_sparse_profiling.speed_sections import Throughput

FULL = RunRecord(
    name="smt-1",
    created="2026-11-21T10:00:00+00:00",
    versions={"torch": "2.13.0"},
    device=Device("cpu", "a processor", cores=2, memory=2**33),
    model=ModelSize("a/model", parameters=1000, trainable=50),
    updates=[{"class": "SMT", "fields": {"trainable_fraction": 0.05}}],
    settings={"batch_size": 4, "precision": "bf16", "packed": None},
    phases=[Phase("forward", 1.5, 3, peak_rss=10), Phase("backward", 2.0, 3, 10, 20, 30)],
    ledger=Ledger(trainable=1, frozen=2, buffers=3, gradients=4, optimizer=5, strategy=6),
    memory=Memory(peak_resident=2**30, method="VmHWM", saved_for_backward=2**20),
    throughput=Throughput(tokens=90, padded_tokens=120, seconds=3.0, steps=2),
    outcome={"before": {"loss": 2.0}, "after": {"loss": 1.0}},
    samples=["a text", {"question": "a", "answer": "b"}],
)


def document(path: Path, **changes: object) -> Path:
    """A valid document with `changes`, in the file `path`."""
    FULL.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


KERNEL = {"name": "a", "op": "b", "calls": 1, "seconds": 1}
KERNELS = {
    **{"steps": 1, "seconds": 1, "gaps": 0, "dtype": "float32", "flops_ceiling": 1, "bytes_ceiling": 1, "count": 1},
    "top": [KERNEL],
}


@pytest.mark.parametrize("record", [FULL, RunRecord(name="x", status="oom", reason="out of memory")])
def test_what_is_written_is_read_back(tmp_path: Path, record: RunRecord) -> None:
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_derived_figures() -> None:
    assert FULL.model is not None
    assert FULL.model.trainable_share == 0.05
    assert FULL.throughput is not None
    assert FULL.throughput.tokens_per_second == 30
    assert FULL.throughput.padded_tokens_per_second == 40
    assert FULL.ledger is not None
    assert FULL.ledger.total == 21


def test_a_diverged_loss_survives_in_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    outcome = {"after": {"loss": math.nan, "worst": math.inf, "best": -math.inf}}
    RunRecord(name="x", outcome=outcome).write(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    after = RunRecord.read(path).outcome["after"]
    assert math.isnan(after["loss"])
    assert (after["worst"], after["best"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (RunRecord(name="x", settings={"folder": Path("a")}), TypeError),
        (RunRecord(name="x", phases=[Phase("forward", "1", 1)]), ValueError),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_failed_write_leaves_the_old_record(tmp_path: Path, bad: RunRecord, error: type[Exception]) -> None:
    path = tmp_path / "record.json"
    FULL.write(path)
    with pytest.raises(error):
        bad.write(path)
    assert RunRecord.read(path) == FULL
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_record_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    FULL.write(path)
    old = path.read_text()
    with path.open() as reader:
        RunRecord(name="new").write(path)
        assert reader.read() == old
    assert RunRecord.read(path).name == "new"


def test_a_write_that_is_cut_off_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "record.json"
    FULL.write(path)
    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        RunRecord(name="new").write(path)
    assert RunRecord.read(path) == FULL
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [0, 1, 100, -3])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "record.json"
    FULL.write(path)
    path.write_text(path.read_text()[:length])
    with pytest.raises(ValueError, match=r"record\.json is not a complete JSON document .*; repeat the run"):
        RunRecord.read(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"record\.json is not a complete JSON document"):
        RunRecord.read(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["[]", "3", '{"name": "x"}'])
def test_json_without_a_schema_is_not_a_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json is JSON but not a run record .*give a run's record\.json"):
        RunRecord.read(tmp_path / "metrics.json")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = document(tmp_path / "record.json", schema=SCHEMA + 1, news=1)
    with pytest.raises(ValueError, match=rf"schema {SCHEMA + 1}, and this version reads schema {SCHEMA}; read it with"):
        RunRecord.read(path)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"color": "red"}, "record has unknown fields: color"),
        ({"ledger": {"frozen": 1, "activations": 2}}, r"record\.ledger has unknown fields: activations"),
        ({"phases": [{"name": "forward", "seconds": 1.0}]}, r"record\.phases\[0\] lacks: calls"),
        ({"phases": [{"name": "f", "seconds": "1", "calls": 1}]}, r"record\.phases\[0\]\.seconds is '1' where float"),
        ({"phases": {}}, r"record\.phases is {} where list is due"),
        ({"name": None}, r"record\.name is None where str is due"),
        ({"status": "fine"}, r"record\.status is 'fine'"),
        ({"status": "failed"}, r"status 'failed' and reason None"),
        ({"reason": "because"}, r"status 'ok' and reason 'because'"),
        ({"device": "cpu"}, r"record\.device is 'cpu' where an object is due"),
        ({"model": {"base": "a", "parameters": True, "trainable": 0}}, r"model\.parameters is True where int"),
        ({"outcome": {"after": {"loss": None}}}, r"outcome\.after\.loss is None where float"),
        ({"throughput": {"tokens": 1, "padded_tokens": 1, "seconds": 0.0, "steps": 1}}, "needs timed steps"),
        ({"throughput": {"tokens": 1, "padded_tokens": 1, "seconds": 1.0, "steps": 0}}, "`steps` is 0; time at least"),
        (
            {"throughput": {"tokens": 10**400, "padded_tokens": 1, "seconds": 1.0, "steps": 1}},
            "tokens is a number above",
        ),
        ({"seconds": 10**400}, r"record\.seconds is a number above 1e\+30 in size, which no measurement gives"),
        ({"ledger": {"frozen": -(10**31)}}, r"record\.ledger\.frozen is a number above"),
        ({"outcome": {"after": {"loss": 10**400}}}, r"outcome\.after\.loss is a number above"),
        (
            {"kernels": {**KERNELS, "flops_ceiling": 0}},
            "`flops_ceiling` of kernels is 0.0; it must be finite and above 0",
        ),
        ({"kernels": {**KERNELS, "seconds": "NaN"}}, "`seconds` of kernels is nan"),
        (
            {"kernels": {**KERNELS, "top": [{**KERNEL, "bytes": -1}]}},
            r"`bytes` of a kernel is -1\.0; it must be finite",
        ),
        ({"kernels": {**KERNELS, "top": [{**KERNEL, "flops": "Infinity"}]}}, "`flops` of a kernel is inf"),
        ({"throughput": {"tokens": 2, "padded_tokens": 1, "seconds": 1.0, "steps": 1}}, "`padded_tokens` is 1"),
    ],
)
def test_a_malformed_record_is_refused_and_the_place_named(
    tmp_path: Path, changes: dict[str, object], finding: str
) -> None:
    path = document(tmp_path / "record.json", **changes)
    with pytest.raises(ValueError, match=rf"record\.json is not a valid run record: .*{finding}.*repeat the run"):
        RunRecord.read(path)


def test_a_pipe_in_place_of_a_record_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(ValueError, match=r"record\.json is a folder, a device or a pipe; give a run's record\.json"):
        RunRecord.read(tmp_path / "record.json")


def test_a_record_without_a_later_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"schema": SCHEMA, "name": "x"}))
    assert RunRecord.read(tmp_path / "record.json").phases == []


def test_a_processor_is_told_by_its_model_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", given)
    given.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9B14\n")
    found = devices.describe_device(torch.device("cpu"))
    assert found.name == f"AMD EPYC 9B14, {len(os.sched_getaffinity(0))} cores"
    assert found.cores == torch.get_num_threads()
    given.unlink()
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    assert devices.processor_name().startswith(devices.platform.machine())


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_the_host_ends_at_a_limit_of_a_cgroup(tmp_path, monkeypatch, version):
    limit, use, cached = devices.CGROUP_FILES["" if version == 2 else "memory"]
    job = tmp_path / ("memory" if version == 1 else "") / "job"
    (job / "step").mkdir(parents=True)
    for folder, most in (job, 900), (job / "step", "max" if version == 2 else 2**63 - 4096):
        (folder / limit).write_text(f"{most}\n")
        (folder / use).write_text("700\n")
        (folder / "memory.stat").write_text(f"anon 600\n{cached} 50\n")
    (tmp_path / "self").write_text("7:cpu:/job/step\n" + ("0::/job/step\n" if version == 2 else "4:memory:/job/step\n"))
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    monkeypatch.setattr(devices, "OWN_CGROUP", tmp_path / "self")
    assert devices.free_of_host() == 900 - 700 + 50
    (tmp_path / "self").write_text("0::/\n")  # of a container, that is a cgroup elsewhere
    assert devices.free_of_host() > 2**20
