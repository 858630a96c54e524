"""All ledgers of full fine-tuning, LoRA, DoRA, SMT and LISA on a GPU, and SMT's step beside others.

`python -m benchmarks.gpu` runs `lit-sparse bench` at the shapes of Llama-3.2-1B (random weights, no download): each
method alone, then SMT step by step in turn with the frozen floor, with full fine-tuning by torch's fused AdamW, and
with LoRA of equal size; and LISA and LoRA at Llama-3-8B's shapes. It judges what is promised, and appends a line a
method and a pair to benchmarks/results/gpu.jsonl. Run again it makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT, provenance
from benchmarks.turns import append, measure, newest, pair_line
from lit_sparse_profiling.reconcile import residue
from lit_sparse_profiling.record import RunRecord

RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
LISA = ("benchmarks/lisa/embeddings.yaml", "benchmarks/lisa/frozen.yaml")
METHODS = ("full.yaml", "lora.yaml", "dora.yaml", "smt.yaml", *LISA)
LARGE = ("lora.yaml", *LISA)
"""What is measured at Llama-3-8B's shapes."""
OTHERS = {
    "floor": "benchmarks/peers/floor.yaml",
    "full_fused": "benchmarks/gpu/full_fused.yaml",
    "lora_equal": "benchmarks/gpu/lora_equal.yaml",
}
"""What SMT's step is timed against."""
MOST = {"floor": 1.03, "full_fused": 0.72, "lora_equal": 1.0}
"""Times another's step that SMT's is promised to take at most."""
SAVED = 0.67
"""Share of full fine-tuning's peak that SMT's steps are promised to save."""
CARD = 24e9
"""Bytes that LISA with frozen embeddings is promised to reserve at most, at Llama-3-8B's shapes."""


def commands(into: Path, passed: Sequence[str]) -> list[list[str]]:
    """The benches that make up the comparison."""
    common = ["--config=benchmarks/gpu/workload.yaml", "--steps=20", *passed]
    alone = [*METHODS, f"--into={into / 'alone'}", *common]
    large = [*LARGE, f"--into={into / 'large'}", "--config=benchmarks/gpu/large.yaml", "--steps=20", *passed]
    return [alone, *(["smt.yaml", f"--against={y}", f"--into={into / o}", *common] for o, y in OTHERS.items()), large]


def line(name: str, record: RunRecord) -> Line:
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


def lines(into: Path) -> list[Line]:
    """What the newest run of each method and pair measured.

    Raises:
        RuntimeError: if one has no result.
    """
    out: list[Line] = []
    for folder in ("alone", *OTHERS, "large"):
        for method, record in newest(into / folder).items():
            if record.pair is None:
                out.append(line(method, record))
            else:
                out.append(provenance("gpu", record) | pair_line(method, record.pair))
    return out


def verdicts(found: Sequence[Line]) -> Iterator[tuple[str, bool]]:
    """What is promised, with the number, and whether it holds."""
    for pair in (one for one in found if "pair" in one):
        method, other = pair["pair"]
        median, most = pair["ratio_median"], MOST[other]
        yield f"{method}: step time / {other} {median:.3f}, at most {most:.2f}", median <= most
    peaks = {one["method"]: one["requested"] for one in found if "method" in one and "8b" not in one["model"]}
    saved = 1 - peaks["smt"] / peaks["full"]
    yield f"smt: peak of the steps {saved:.1%} below full fine-tuning's, at least {SAVED:.0%}", saved >= SAVED
    for one in found:
        if one.get("method") == "frozen" and "8b" in one["model"]:
            held = one["reserved"]
            yield f"LISA, frozen embeddings, 8B: {held / 1e9:.1f} GB reserved, at most {CARD / 1e9:.0f}", held <= CARD


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, judge, and append all to the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path("runs/gpu"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked, passed = parser.parse_known_args(arguments)
    if passed and asked.results == RESULTS:
        parser.error(f"{passed[0]} makes another measurement than the README's; give --results another file.")
    os.chdir(ROOT)  # workload.yaml names the model's shapes from here
    for words in commands(asked.into, passed):
        measure(words)
    found = lines(asked.into)
    append(asked.results, found)
    for text, met in verdicts(found):
        print("met   " if met else "missed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
