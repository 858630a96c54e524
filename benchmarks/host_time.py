"""Host time of block-sparse tuning: the CPU time of a step whose launches are stubbed, ours against plain linears.

`python -m benchmarks.host_time` trains blocks of q, k and v of 16 layers, 64 wide, so that little of a step is
arithmetic. The ops take the path of a GPU and launch nothing; steps of ours and of the frozen plain layers alternate.
Appends one line to benchmarks/results/host_time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.provenance import ROOT, of_device
from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.linear import BlockLinear, SharedInput
from lit_sparse.optim import AdamW
from lit_sparse_kernels import block_adamw, block_grad, jit, master_adamw, pack_columns
from lit_sparse_profiling.paired import compare_rounds

RESULTS = ROOT / "benchmarks" / "results" / "host_time.jsonl"
LAYERS, WIDTH, SIZE, TOKENS = 16, 64, (16, 16), 8


def stub() -> None:
    """Let every op take the path of a GPU, and launch nothing."""
    for module in (block_adamw, block_grad, master_adamw, pack_columns):
        for name, stand_in in (("on_cuda", lambda tensor: True), ("enqueue", lambda *arguments, **constants: None)):
            setattr(module, name, stand_in)
    assert jit.on_cuda is not block_grad.on_cuda


def plain() -> list[list[nn.Module]]:
    """Return the frozen layers: q, k and v of each decoder layer."""
    torch.manual_seed(0)
    made = [[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)] for _ in range(LAYERS)]
    return [[linear.requires_grad_(False) for linear in group] for group in made]


def with_blocks() -> tuple[list[list[nn.Module]], AdamW]:
    """Return the same layers with two trained blocks in each, and their optimizer."""
    optimizer, out = None, []
    for group in plain():
        chosen = [Blocks.of(SIZE, torch.tensor([[0, 0], [2, n + 1]])) for n in range(len(group))]
        shared = SharedInput(chosen, WIDTH)
        made = [BlockLinear(linear, blocks, shared) for linear, blocks in zip(group, chosen, strict=True)]  # pyright: ignore
        out.append(made)
    optimizer = AdamW([linear.blocks for group in out for linear in group], lr=1e-4)
    for group in out:
        for linear in group:
            optimizer.scatter(linear.blocks, linear.weight, linear.chosen.index)
    return out, optimizer


def step_of(groups: Sequence[Sequence[nn.Module]], optimizer: Any) -> Callable[[], None]:
    """Return one training step."""
    x = torch.randn(1, TOKENS, WIDTH)

    def step() -> None:
        y: Tensor = x.clone().requires_grad_()
        for q, k, v in groups:
            y = (q(y) + k(y) + v(y)).tanh()
        y.sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(rounds: int) -> list[tuple[float, float]]:
    """Return the CPU seconds of a step of ours and of the plain one in each round."""
    steps = step_of(*with_blocks()), step_of(plain(), None)
    found: list[tuple[float, float]] = []
    for number in range(rounds + 5):
        taken = {}
        for index in (0, 1) if number % 2 else (1, 0):
            begin = thread_time()
            steps[index]()
            taken[index] = thread_time() - begin
        if number >= 5:  # the first ones make tables
            found.append((taken[0], taken[1]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stub()
    found = measure(asked.rounds)
    pair = compare_rounds("plain", found)
    ours, theirs = (median(column) * 1e3 for column in zip(*found, strict=True))
    line = of_device("host_time", torch.device("cpu")) | {
        "layers": LAYERS,
        "milliseconds": {"blocks": ours, "plain": theirs},
        "ratio": [pair.median, pair.low, pair.high],
        "rounds": len(found),
    }
    with asked.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{LAYERS} layers: blocks {ours:.2f} ms, plain {theirs:.2f} ms, {(ours - theirs) / LAYERS * 1e3:.0f} us a layer"
        f" more; ratio {pair.median:.3f} [{pair.low:.3f}, {pair.high:.3f}]"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
