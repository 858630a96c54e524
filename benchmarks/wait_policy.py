"""Cost of waiting: training steps with OpenMP's wait policies, on a quiet machine and beside a busy process.

`python -m benchmarks.wait_policy` runs each policy in a process of its own, with all cores, in turns; a second process
spins meanwhile in every other round. Prints the seconds of a step, and appends them to
benchmarks/results/wait_policy.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from benchmarks.provenance import ROOT, of_device

RESULTS = ROOT / "benchmarks" / "results" / "wait_policy.jsonl"
POLICIES = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "one thread": {"OMP_NUM_THREADS": "1"}}
STEPS, TOKENS = 8, (4, 192)


def train() -> None:
    """Train a quarter of the demo model's layers, and print the seconds of a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig.from_dict(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 2048, **heads}
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 2048, TOKENS)
    taken = []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - begin)
    print(sum(taken[1:]) / STEPS)  # the first one allocates


@contextmanager
def spinning(busy: bool) -> Iterator[None]:
    """Keep one core busy meanwhile, if asked to."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(policy: str) -> float:
    """Return the seconds of a step in a fresh process with that policy."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-m", "benchmarks.wait_policy", "--train"]
    done = subprocess.run(command, env=clean | POLICIES[policy], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    parser.add_argument("--train", action="store_true", help="the steps alone, in this process")
    asked = parser.parse_args(arguments)
    if asked.train:
        train()
        return 0
    found = {load: {policy: [] for policy in POLICIES} for load in ("quiet", "busy")}
    for number in range(asked.rounds):
        for load in found:
            with spinning(load == "busy"):
                for policy in list(POLICIES)[:: 1 if number % 2 else -1]:
                    found[load][policy].append(seconds(policy))
    line = of_device("wait_policy", torch.device("cpu")) | {"threads": os.cpu_count(), "seconds": found}
    with asked.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    for load, taken in found.items():
        parts = (f"{policy} {median(each):.2f} s (slowest {max(each):.2f})" for policy, each in taken.items())
        print(f"{load}: {', '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
