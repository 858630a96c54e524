"""What a penalty on activations costs: steps of LoRA with it and without, in turn (DEFT, arXiv 2402.01911).

`python -m benchmarks.deft` runs `lit-sparse bench` on benchmarks/deft/lora_deft.yaml against lora.yaml beside it: on a
CPU with the demo model and 4 x 256 random tokens (wants a quiet machine), on a GPU at the shapes of Llama-3.2-1B. It
judges what is promised, and appends step times and the bytes saved for backward to benchmarks/results/deft.jsonl.
Run again it makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT
from benchmarks.turns import append, lines_of, measure

HERE = ROOT / "benchmarks" / "deft"
RESULTS = ROOT / "benchmarks" / "results" / "deft.jsonl"
WITHOUT, WITH = str(HERE / "lora.yaml"), str(HERE / "lora_deft.yaml")
WORKLOADS = {
    kind: ROOT / "benchmarks" / folder / "workload.yaml" for kind, folder in (("cpu", "peers"), ("cuda", "gpu"))
}
MOST = {"cpu": 1.10, "cuda": 1.03}
"""Times the step without the penalty that one with it is promised to take at most, by kind of device."""


def commands(into: Path, rounds: int, kind: str) -> list[list[str]]:
    """The benches that make up the comparison."""
    common = [f"--config={WORKLOADS[kind]}", f"--steps={rounds}"]
    return [
        [WITHOUT, f"--into={into / 'alone'}", *common],
        [WITH, f"--against={WITHOUT}", f"--into={into / 'turns'}", *common],
    ]


def lines(into: Path) -> list[Line]:
    """What the newest runs measured."""
    return [line for folder in ("alone", "turns") for line in lines_of("deft", into / folder)]


def verdict(found: Sequence[Line], kind: str) -> str:
    """Whether the promised step time was met."""
    ratio = next(line["ratio_median"] for line in found if "pair" in line)
    met = "met   " if ratio <= MOST[kind] else "missed"
    return f"{met} with the penalty: step time {ratio:.3f} of LoRA's alone, at most {MOST[kind]:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, judge, and append all to the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of the pair (default 30)")
    parser.add_argument("--into", type=Path, default=Path("runs/deft"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    os.chdir(ROOT)  # the GPU's workload names the model's shapes from here
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for words in commands(asked.into, asked.rounds, kind):
        measure(words)
    found = lines(asked.into)
    append(asked.results, found)
    print(verdict(found, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
