"""Compare step time and memory of SMT with the frozen floor, full fine-tuning and PEFT's adapters.

`python -m benchmarks.peers` runs `lit-sparse bench` on the YAMLs in benchmarks/peers, each step by step in turn with
the floor, and SMT besides in turn with LoRA on all linear layers; it judges what is promised and appends what it found
to benchmarks/results/peers.jsonl. The demo model is trained on batches of 4 x 256 random tokens, in fp32 on the CPU.
Run again it makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT
from benchmarks.turns import FLOOR, append, lines_of, measure

HERE = ROOT / "benchmarks" / "peers"
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"

LORA_ALL, SMT_1, SMT_5, SMT_LORA, LORA_QKV = "lora_all", "smt_0.84", "smt_5", "smt_as_lora", "lora_qkv"
SHIPPED = "smt_v_up_down"
PEERS = (FLOOR, SHIPPED, SMT_1, SMT_5, SMT_LORA, LORA_QKV, LORA_ALL, "dora_all", "shira_qkv", "full")


def commands(into: Path, rounds: int, passed: Sequence[str]) -> list[list[str]]:
    """Return the command lines of `lit-sparse bench` that make up the comparison."""
    common = [f"--config={HERE / 'workload.yaml'}", f"--steps={rounds}", *passed]
    return [
        [yaml(FLOOR), f"--into={into / 'alone'}", *common],
        [*map(yaml, PEERS[1:]), f"--against={yaml(FLOOR)}", f"--into={into / 'floor'}", *common],
        [yaml(SMT_1), yaml(SMT_5), f"--against={yaml(LORA_ALL)}", f"--into={into / 'lora_all'}", *common],
    ]


def yaml(name: str) -> str:
    """Return the YAML of a peer; that of full fine-tuning is the shipped one."""
    return f"{name}.yaml" if name == "full" else str(HERE / f"{name}.yaml")


def lines(into: Path) -> list[Line]:
    """Return a line for the newest run of each peer and each pair.

    Raises:
        RuntimeError: if one has no result.
    """
    modes = {"alone": True, "floor": True, "lora_all": False}
    return [line for folder, told in modes.items() for line in lines_of("peers", into / folder, told)]


def verdicts(found: Sequence[Line]) -> Iterator[tuple[str, bool]]:
    """Yield, for each target that was measured, a sentence with the number, and true if it is met."""
    modes = {line["mode"]: line for line in found if "mode" in line}
    pairs = {tuple(line["pair"]): line for line in found if "pair" in line}
    for mode, most in ((SHIPPED, 1.05), (SMT_1, 1.05), (SMT_5, 1.10)):
        if line := pairs.get((mode, FLOOR)):
            high = line["ratio_high"]
            yield f"{mode}: upper end of step time / floor {high:.3f}, at most {most:.2f}", high <= most
        if line := pairs.get((mode, LORA_ALL)):
            worst = line["ratio_max"]
            yield f"{mode}: slowest of {line['rounds']} rounds {worst:.3f} of {LORA_ALL}, below 1", worst < 1
    if (ours := modes.get(SMT_LORA)) and (theirs := modes.get(LORA_QKV)):
        yield memory_verdict(ours, theirs)


def memory_verdict(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, bool]:
    """Compare the memory of SMT's steps with that of LoRA with as many trained weights."""
    mine, other = ours["peak_rss"] / 2**20, theirs["peak_rss"] / 2**20
    counts = f"{ours['trainable']:,} and {theirs['trainable']:,} trained weights"
    text = f"{SMT_LORA}: peak of the steps {mine:,.0f} MiB, below {other:,.0f} MiB of {LORA_QKV} ({counts})"
    return text, mine < other and ours["trainable"] == theirs["trainable"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the missing runs, compare with the targets, and append the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each pair (default 12)")
    parser.add_argument("--into", type=Path, default=Path("runs/peers"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked, passed = parser.parse_known_args(arguments)
    if passed and asked.results == RESULTS:
        parser.error(f"{passed[0]} makes another measurement than that of docs/studies; give --results another file.")
    os.chdir(ROOT)  # the floor's YAML names a class in benchmarks/, which is imported from here
    for words in commands(asked.into, asked.rounds, passed):
        measure(words)
    found = lines(asked.into)
    append(asked.results, found)
    for text, met in verdicts(found):
        print("met   " if met else "missed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
