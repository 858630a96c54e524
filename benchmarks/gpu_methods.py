"""Methods on a GPU: SMT's step beside others', and the ledgers of each method alone.

`python -m benchmarks.gpu_methods pairs` fits with SMT, with the frozen floor, with full fine-tuning by torch's fused
AdamW and with LoRA of equal size at the shapes of Llama-3.2-1B (random weights, no download). All are started at once,
since imports and loading take most of the time, and then do their timed steps in turn. `alone` examines and profiles
each method by itself, `large` does so at Llama-3-8B's shapes, and `lengths` compares MEFT with activation checkpointing
on rows of growing length. Lines go to benchmarks/results/gpu.jsonl; what is promised is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT, provenance
from benchmarks.turns import append, measure, newest, pair_line
from lit_sparse.commands.bench import TIMED_ONLY, job, parser
from lit_sparse_profiling.paired import PairedRun, compare_rounds, dependence, rounds_of
from lit_sparse_profiling.reconcile import residue
from lit_sparse_profiling.record import Pair, RunRecord
from lit_sparse_profiling.run_folders import peak_memory
from lit_sparse_profiling.runner import parent_death_hook

RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
LISA = ("benchmarks/lisa/embeddings.yaml", "benchmarks/lisa/frozen.yaml")
METHODS = ("full.yaml", "lora.yaml", "dora.yaml", "smt.yaml", *LISA)
LARGE = ("lora.yaml", *LISA)
"""YAMLs that are measured at Llama-3-8B's shapes."""
LONG = tuple(f"benchmarks/meft/{name}.yaml" for name in ("adapters_every_1", "lora", "lora_checkpointed"))
"""YAMLs that are measured beside MEFT at each length."""
LENGTHS = (1024, 2048, 4096, 8192, 16384)
WORKLOAD = "--config=benchmarks/gpu/workload.yaml"
SMT = "smt"
OTHERS = {
    "floor": "benchmarks/peers/floor.yaml",
    "full_fused": "benchmarks/gpu/full_fused.yaml",
    "lora_equal": "benchmarks/gpu/lora_equal.yaml",
}
"""The runs that SMT's step is timed against."""
MOST = {"floor": 1.03, "full_fused": 0.72, "lora_equal": 1.0}
"""Times another's step that SMT's is promised to take at most."""
SAVED = 0.67
"""Share of full fine-tuning's peak that SMT's steps are promised to save."""
CARD = 24e9
"""Bytes that LISA with frozen embeddings is promised to reserve at most, at Llama-3-8B's shapes."""


def pairs(into: Path, results: Path, rounds: int, seconds: float, passed: Sequence[str]) -> int:
    """Time SMT and the others in turn, append a line for each, and print what is promised; 1 if SMT gave no times."""
    files = {SMT: "smt.yaml", **OTHERS}
    begin = monotonic()
    players: dict[str, PairedRun] = {}
    for name, file in files.items():
        asked = parser().parse_args([file, f"--steps={rounds}", f"--into={into / name}", WORKLOAD])
        command = job(file, asked, [*TIMED_ONLY, *passed]).command
        (into / name).mkdir(parents=True, exist_ok=True)
        players[name] = PairedRun(command, into / name / "log.txt", cwd=ROOT, preexec_fn=parent_death_hook())
    late, end = begin + 0.75 * seconds, begin + seconds
    ready = {name: player for name, player in players.items() if player.ready(late, _nothing)}
    print(f"ready after {monotonic() - begin:.0f} s: {', '.join(ready)}", flush=True)
    taken = rounds_of(list(ready.values()), end, _nothing) if SMT in ready else []
    with (into / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"methods": list(ready), "seconds": taken}) + "\n")
    columns = dict(zip(ready, zip(*taken, strict=True), strict=True)) if taken else {}
    compared = {
        name: compare_rounds(name, list(zip(columns[SMT], column, strict=True)))
        for name, column in columns.items()
        if name != SMT
    }
    for name, pair in compared.items():
        print(f"smt / {name}: {pair.median:.3f} [{pair.low:.3f}, {pair.high:.3f}]", dependence(pair) or "", flush=True)
    for player in players.values():
        player.end(end, _nothing)
    print(f"ended after {monotonic() - begin:.0f} s", flush=True)
    for name in files.keys() - columns.keys():
        print(f"{name} gave no times; its log ends:", *_tail(into / name / "log.txt"), sep="\n", flush=True)
    found = list(_lines(into, compared))
    append(results, found)
    _judge(found)
    return int(SMT not in columns)


def _nothing() -> None:
    """Do nothing while a process is waited for."""


def _tail(log: Path) -> list[str]:
    return [text[:300] for text in log.read_text("utf-8", "replace").splitlines()[-8:]]


def _lines(into: Path, compared: dict[str, Pair]) -> Iterator[Line]:
    """Yield a line for each method that has ended, and for each pair."""
    for name in (SMT, *OTHERS):
        try:
            record = newest(into / name).popitem()[1]
        except (RuntimeError, KeyError) as error:  # it failed, or was stopped
            print(f"{name} has no record: {error}", flush=True)
            continue
        if name != "floor":
            yield line(name, record)
        if name == SMT:
            yield from (
                provenance("gpu", record, shape_of(record)) | pair_line(SMT, pair) | {"seconds": pair.seconds}
                for pair in compared.values()
            )


def commands(into: Path, passed: Sequence[str], lengths: Sequence[int] = LENGTHS) -> dict[str, list[list[str]]]:
    """Return the benches of single methods, by name; each makes its runs in the folder `--into`."""
    alone = [*METHODS, f"--into={into / 'alone'}", WORKLOAD, "--steps=20", *passed]
    large = [*LARGE, f"--into={into / 'large'}", "--config=benchmarks/gpu/large.yaml", "--steps=20", *passed]
    longer = ["meft.yaml", *LONG, WORKLOAD, "--steps=10", "--data.batch_size=1", *passed]
    by_length = [[*longer, f"--into={into / 'lengths' / str(n)}", f"--data.max_length={n}"] for n in lengths]
    return {"alone": [alone], "large": [large], "lengths": by_length}


def shape_of(record: RunRecord) -> str:
    """Return the name of the model, whose weights are random, with rows and tokens of a batch."""
    assert record.model is not None
    data = record.settings["data"]["init_args"]
    name = Path(record.model.base).stem if record.model.base.endswith(".json") else Path(record.model.base).name
    return f"{name} (random weights), {data['batch_size']} x {data['max_length']:,} tokens"


def line(name: str, record: RunRecord) -> Line:
    """Return the measurements of one method."""
    assert record.model is not None
    assert record.throughput is not None
    memory, driver, throughput = record.memory, record.driver, record.throughput
    training = next((phase for phase in record.phases if phase.name == "training"), None)
    plain = None if training is None else training.peak_requested  # of steps that nothing looked into
    return {
        **provenance("gpu", record, shape_of(record)),
        "method": name,
        "trainable": record.model.trainable,
        "trainable_share": record.model.trainable_share,
        "tokens_per_second": throughput.tokens_per_second,
        "step_seconds_median": throughput.median_step,
        "utilization": record.utilization,
        "counted": memory.held.total if memory is not None and memory.held is not None else None,
        "requested": memory.allocator.requested if memory is not None and memory.allocator is not None else plain,
        "reserved": peak_memory(record, "cuda"),
        "residue": None if memory is None else residue(record),
        "nvml_process": driver.process if driver is not None else None,
        "joules_per_step": record.joules_per_step,
    }


def verdicts(found: Sequence[Line]) -> Iterator[tuple[str, bool]]:
    """Yield each target, with the measured number, and whether it is met."""
    for pair in (one for one in found if "pair" in one):
        method, other = pair["pair"]
        median, most = pair["ratio_median"], MOST[other]
        yield f"{method}: step time / {other} {median:.3f}, at most {most:.2f}", median <= most
    peaks = {one["method"]: one["requested"] for one in found if "method" in one and "8b" not in one["model"]}
    full = peaks.get("full", peaks.get("full_fused"))
    if peaks.get("smt") and full:
        saved = 1 - peaks["smt"] / full
        yield f"smt: peak of the steps {saved:.1%} below full fine-tuning's, at least {SAVED:.0%}", saved >= SAVED
    for one in found:
        if one.get("method") == "frozen" and "8b" in one["model"]:
            held = one["reserved"]
            yield f"LISA, frozen embeddings, 8B: {held / 1e9:.1f} GB reserved, at most {CARD / 1e9:.0f}", held <= CARD


def _judge(found: Sequence[Line]) -> None:
    for text, met in verdicts(found):
        print("met   " if met else "missed", text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, append and judge it; the exit status."""
    own = argparse.ArgumentParser(description=__doc__)
    own.add_argument("what", choices=("pairs", "alone", "large", "lengths"))
    own.add_argument("--into", type=Path, default=ROOT / "runs" / "gpu", help="folder of the runs")
    own.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    own.add_argument("--rounds", type=int, default=20, help="timed steps of each of the pairs (default 20)")
    own.add_argument("--seconds", type=float, default=300.0, help="limit of the pairs (default 300)")
    own.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row (default: 1k to 16k)")
    asked, passed = own.parse_known_args(arguments)
    os.chdir(ROOT)  # workload.yaml names the model's shapes from here
    into = asked.into.resolve()
    if asked.what == "pairs":
        return pairs(into, asked.results.resolve(), asked.rounds, asked.seconds, passed)
    for words in commands(into, passed, asked.lengths)[asked.what]:
        measure(words)
        (folder,) = (word.partition("=")[2] for word in words if word.startswith("--into="))
        found = [line(method, record) for method, record in newest(Path(folder)).items()]
        append(asked.results, found)
        _judge(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
