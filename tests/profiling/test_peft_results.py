"""Results of PEFT's method comparison, read as records and written from them."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_sparse_profiling.measures import ENERGY, FORGETTING, LOSS, PEAK, SPEED
from lit_sparse_profiling.peft_export import to_result, write_results
from lit_sparse_profiling.peft_results import is_result, to_record
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.report import report
from lit_sparse_profiling.run_folders import read_runs
from tests.profiling.page_records import gpu_record, oom_record

# The form of method_comparison/MetaMathQA/results/lora--llama-3.2-3B-rank32.json in huggingface/peft, in July 2026.
RESULT: dict[str, Any] = {
    "run_info": {
        "created_at": "2026-07-14T19:28:07+00:00",
        "total_time": 1258.75,
        "experiment_name": "lora/llama-3.2-3B-rank32",
        "peft_branch": "main",
        "train_config": {"model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "batch_size": 4, "max_steps": 500},
        "peft_config": {"peft_type": "LORA", "r": 32, "target_modules": ["q_proj", "v_proj"]},
        "error_msg": "",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 13 * 2**30,
        "accelerator_memory_max": 20 * 2**30,
        "accelerator_memory_reserved_99th": 18 * 2**30,
        "train_time": 942.0,
        "file_size": 36715216,
        "num_trainable_params": 9175040,
        "num_total_params": 3221924864,
        "status": "success",
        "metrics": [
            {"step": 250, "train loss": 0.98, "train time": 30.0, "tokens / sec": 7000.0, "valid accuracy": 0.3},
            {"step": 500, "train loss": 0.61, "train time": 10.0, "tokens / sec": 3000.0, "valid accuracy": 0.4},
            {"step": 500, "test accuracy": 0.478, "train loss": 0.61, "train total tokens": 9, "forgetting": 0.05},
        ],
    },
    "meta_info": {
        "package_info": {"transformers-version": "5.13.1", "peft-version": "0.19.2", "torch-version": "2.13.0+cu130"},
        "system_info": {"system": "Linux", "accelerator": "NVIDIA L40S"},
    },
}


def changed(part: str, **fields: Any) -> dict[str, Any]:
    document = copy.deepcopy(RESULT)
    document[part] |= fields
    return document


def test_a_result_is_a_record_with_the_same_figures() -> None:
    record = to_record(RESULT, "lora--llama-3.2-3B-rank32")
    assert (record.status, record.device.name, record.model.base) == ("ok", "NVIDIA L40S", "meta-llama/Llama-3.2-3B")
    assert record.model.trainable_share == 9175040 / 3221924864
    assert PEAK.value(record) == 20
    assert SPEED.value(record) == (7000 * 30 + 3000 * 10) / 40  # of the steps alone, weighed by their time
    assert LOSS.value(record) == 0.61
    assert FORGETTING.value(record) == 0.05
    assert ENERGY.value(record) is None
    assert record.versions["torch"] == "2.13.0+cu130"
    assert record.throughput.steps == 500


def test_a_result_of_before_2026_is_read_too() -> None:
    old = changed("meta_info", system_info={"gpu": "NVIDIA L40S"})
    for name in ("memory_max", "memory_reserved_avg", "memory_reserved_99th"):
        old["train_info"][f"cuda_{name}"] = old["train_info"].pop(f"accelerator_{name}")
    del old["train_info"]["metrics"][-1]["forgetting"]
    record = to_record(old, "lora--x")
    assert (PEAK.value(record), record.device.name, FORGETTING.value(record)) == (20, "NVIDIA L40S", None)


def test_a_result_that_failed_says_why() -> None:
    record = to_record(
        {**changed("train_info", status="canceled"), "run_info": {**RESULT["run_info"], "error_msg": "OOM"}}, "x"
    )
    assert (record.status, record.reason) == ("failed", "OOM")


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        *(
            ("train_info", {"num_total_params": None}),
            ("run_info", {"train_config": []}),
            ("train_info", {"metrics": [3]}),
        ),
        *(("train_info", {"num_total_params": 10**400}), ("train_info", {"train_time": 10**400})),
        ("train_info", {"accelerator_memory_max": math.inf}),
    ],
)
def test_a_result_that_lacks_a_figure_is_a_sentence(tmp_path: Path, part: str, fields: dict[str, Any]) -> None:
    (tmp_path / "x.json").write_text(json.dumps(changed(part, **fields)))
    ((_, told),) = read_runs([tmp_path])
    assert told.startswith("the result")


def test_results_stand_beside_runs_by_folder_or_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, run = tmp_path / "results", tmp_path / "runs" / "smt-1"
    results.mkdir()
    (results / "lora--x.json").write_text(json.dumps(RESULT))
    (results / "other.json").write_text("{}")
    run.mkdir(parents=True)
    gpu_record("smt").write(run / "record.json")
    assert [record.name for _, record in read_runs([run, results])] == ["smt-1", "lora--x"]
    assert [record.name for _, record in read_runs([results / "lora--x.json"])] == ["lora--x"]
    report([str(run), str(results)])
    assert "NVIDIA L40S" in capsys.readouterr().out


def test_a_record_is_written_with_what_peft_s_application_reads(tmp_path: Path) -> None:
    record = gpu_record("smt")
    (tmp_path / "smt-1").mkdir()
    record.write(tmp_path / "smt-1" / "record.json")
    assert report([str(tmp_path / "smt-1")], peft_results=str(tmp_path / "out" / "results")) == 0
    document = json.loads((tmp_path / "out" / "results" / "smt-1.json").read_text())
    assert is_result(document)
    run, train, meta = (document[part] for part in ("run_info", "train_info", "meta_info"))
    # The keys that method_comparison/processing.py takes, with the types that it converts to.
    assert run["peft_config"]["peft_type"] == "SMT"
    assert run["train_config"]["model_id"] == "a/model-8b"
    assert {"experiment_name", "total_time", "peft_branch", "created_at"} <= run.keys()
    sizes = (
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "file_size",
    )
    assert all(type(train[key]) is int for key in sizes)
    assert train["status"] == "success"
    last = train["metrics"][-1]
    assert last["test accuracy"] == 0.7
    assert last["forgetting"] == pytest.approx(0.03)
    assert {"train loss", "train samples", "train total tokens"} <= last.keys()
    assert {f"{name}-version" for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")} <= meta[
        "package_info"
    ].keys()


def test_what_was_written_is_read_again_with_the_same_figures() -> None:
    record = gpu_record("lora")
    again = to_record(json.loads(json.dumps(to_result(record))), record.name)
    for measure in (PEAK, LOSS, FORGETTING):
        assert measure.value(again) == pytest.approx(measure.value(record))
    assert SPEED.value(again) == pytest.approx(SPEED.value(record), rel=1e-4)
    assert (again.model, again.device.name) == (record.model, record.device.name)


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    ended, place = gpu_record("smt"), Path("smt-1/record.json")
    with pytest.raises(ValueError, match="none of these runs ended"):
        write_results([(place, oom_record()), (place, "unreadable")], tmp_path / "out")
    with pytest.raises(ValueError, match="Two of these runs are called smt-1"):
        write_results([(place, ended), (place, replace(ended, created="later"))], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not be written"):
        write_results([(place, ended)], tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_fine_tuning_has_no_configuration_of_an_adapter() -> None:
    assert to_result(gpu_record("full"))["run_info"]["peft_config"] is None
    assert to_record(changed("run_info", peft_config=None), "x").updates[0]["class"] == "PEFT full fine-tuning"
    assert isinstance(to_record(RESULT, "x"), RunRecord)
