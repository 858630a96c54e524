"""All ledgers of full fine-tuning, LoRA, DoRA and SMT on a GPU, at the shapes of Llama-3.2-1B.

`python -m benchmarks.gpu` runs `lit-sparse bench` with benchmarks/gpu/workload.yaml (random weights, no download) and
appends a line a method to benchmarks/results/gpu.jsonl. Run again it makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, provenance
from lit_sparse.bench import bench
from lit_sparse_profiling.reconcile import residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.runs import method_of, name_of, read_runs

RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
METHODS = ("full.yaml", "lora.yaml", "dora.yaml", "smt.yaml")


def line(name: str, record: RunRecord) -> dict[str, Any]:
    """What one method took."""
    assert record.model is not None
    assert record.throughput is not None
    memory, driver, throughput = record.memory, record.driver, record.throughput
    assert memory is not None
    joules = driver.joules if driver is not None else None
    return {
        **provenance("gpu", record),
        "method": name,
        "trainable": record.model.trainable,
        "trainable_share": record.model.trainable_share,
        "tokens_per_second": throughput.tokens_per_second,
        "step_seconds_median": throughput.median_step,
        "utilization": record.utilization,
        "counted": memory.held.total if memory.held is not None else None,
        "requested": memory.allocator.requested if memory.allocator is not None else None,
        "reserved": max((phase.peak_reserved or 0 for phase in record.phases), default=None),
        "residue": residue(record),
        "nvml_process": driver.process if driver is not None else None,
        "joules_per_step": joules / throughput.steps if joules is not None else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, and append all to the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked, passed = parser.parse_known_args(arguments)
    os.chdir(ROOT)  # workload.yaml names the model's shapes from here
    if bench([*METHODS, "--config=benchmarks/gpu/workload.yaml", f"--into={asked.into}", "--steps=20", *passed]):
        return 1
    newest = {method_of(name_of(path, record)): record for path, record in read_runs([asked.into])}
    measured = [
        (name, record) for name, record in newest.items() if isinstance(record, RunRecord) and record.status == "ok"
    ]
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    with asked.results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line(name, record)) + "\n" for name, record in measured)
    return 0 if len(measured) == len(METHODS) else 1


if __name__ == "__main__":
    sys.exit(main())
