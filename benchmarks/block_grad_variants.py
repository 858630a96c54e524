"""Every plan of block_grad beside the whole product and gathered ones, to choose the plan from: needs a GPU.

`python -m benchmarks.block_grad_variants` takes q, k and v of Llama-3.2-1B at 4,096 and 8,192 tokens, with 9, 27, 48
and 96 of their 96 blocks of 256. A result that is not the reference's is reported and not timed. `--dry` does the same
with tiny shapes in Triton's interpreter, to try this script.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import ROOT, of_device
from lit_sparse_kernels import block_grad
from lit_sparse_kernels.block_grad import PLANS, Plan
from lit_sparse_kernels.jit import Listed
from lit_sparse_profiling.ceilings import ceilings

COUNTS, TOKENS = (9, 27, 48, 96), (8192, 4096)
CACHE_BYTES, PAUSE_CYCLES = 128 * 2**20, 10**6
"""Written before each timing, so that no input lies in the cache; and a pause in which the host gets ahead."""
SPLITS = ("none", "even", "stream")


class Case:
    """Inputs of one size, and what each contender makes of them."""

    def __init__(self, tokens: int, count: int, outs: Sequence[int], size: int, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
        every = [
            (layer, r, c) for c in range(outs[0] // size) for layer, o in enumerate(outs) for r in range(o // size)
        ]
        drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(count))[:count]
        chosen = sorted(every[i] for i in drawn)
        columns = sorted({column for _, _, column in chosen})
        self.rows = [(layer, row, columns.index(column)) for layer, row, column in chosen]
        self.rows.sort(key=lambda one: (one[0], one[2], one[1]))  # as SMT has them: by layer, then column
        self.size, self.count, self.tokens = size, count, tokens
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda n: torch.randn(tokens, n, generator=generator, device=device, dtype=dtype)  # noqa: E731
        self.dys, self.x, self.packed = [draw(out) for out in outs], draw(outs[0]), draw(len(columns) * size)
        self.blocks = Listed(self.rows)
        self.ends = torch.arange(1, count + 1, device=device, dtype=torch.int32) * tokens
        table = torch.tensor(self.rows)
        self.wanted = block_grad.reference(self.dys, self.packed, table, (size, size))

    def gathered(self) -> tuple[Tensor, Tensor]:
        """The blocks' columns of dY, and those of X, one below the other: (blocks x tokens, size)."""
        size = self.size
        left = torch.cat([self.dys[n][:, r * size : (r + 1) * size] for n, r, _ in self.rows])
        return left, torch.cat([self.packed[:, p * size : (p + 1) * size] for *_, p in self.rows])

    def bmm(self) -> Tensor:
        left, right = (one.view(self.count, self.tokens, self.size) for one in self.gathered())
        return left.transpose(1, 2) @ right

    def grouped(self) -> Tensor:
        left, right = self.gathered()
        return F.grouped_mm(left.t(), right, offs=self.ends)

    def ours(self, plan: Plan) -> Tensor:
        return block_grad.launch(self.dys, self.packed, self.blocks, (self.size, self.size), plan=plan)

    def contenders(self, plans: dict[str, Plan]) -> Iterator[tuple[str, Callable[[], Any], bool]]:
        """Name, call, and whether its result are the blocks."""
        yield "whole dW", lambda: [dy.t() @ self.x for dy in self.dys], False
        yield "gather + bmm", self.bmm, True
        yield "gather + grouped_mm", self.grouped, True
        yield "whole product, then blocks", lambda: self.ours(next(iter(plans.values()))._replace(dense_from=0)), True
        for name, plan in plans.items():
            for split in SPLITS:
                kept = plan._replace(split=split, dense_from=2)
                yield f"{name}, {split}", lambda plan=kept: self.ours(plan), True


def is_right(got: Tensor, wanted: Tensor) -> bool:
    """Whether sums over the tokens agree to the rounding of what they are kept in."""
    near = 2e-2 if got.dtype != torch.float32 else 1e-3
    return bool(((got.float() - wanted).abs() <= near * (wanted.abs() + wanted.square().mean().sqrt())).all())


def seconds(run: Callable[[], Any], device: torch.device, flush: Tensor) -> float:
    """How long one call takes."""
    flush.zero_()
    if device.type != "cuda":
        begin = perf_counter()
        run()
        return perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measured(case: Case, plans: dict[str, Plan], rounds: int, device: torch.device) -> dict[str, float | str]:
    """Median seconds of each contender, all in turn; in place of them what it failed with."""
    found: dict[str, list[float] | str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, run, checked in case.contenders(plans):
        try:
            got = run()
            wrong = checked and not is_right(got, case.wanted)
        except Exception as error:  # whatever a variant fails with is its result
            found[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            print(f"  {name}: {found[name]}", flush=True)
            continue
        if wrong:
            found[name] = "wrong"
        else:
            found[name], runs[name] = [], run
    flush = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run, device, flush))  # pyright: ignore[reportAttributeAccessIssue]
    return {name: value if isinstance(value, str) else median(value) for name, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each case, and append its JSON line at once; 1 if a plan of ours is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "gpu" / "block_grad_variants.jsonl")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args(arguments)
    device = torch.device("cpu" if asked.dry else "cuda")
    outs, size = ((128, 64, 64), 32) if asked.dry else ((2048, 512, 512), 256)
    plans = {n: p._replace(m=p.m // 8, n=p.n // 8, k=16) for n, p in list(PLANS.items())[2::5]} if asked.dry else PLANS
    best = ceilings(device, torch.float32 if asked.dry else torch.bfloat16)
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    code, begin = 0, perf_counter()
    for tokens in (64,) if asked.dry else TOKENS:
        for count in (3,) if asked.dry else COUNTS:
            case = Case(tokens, count, outs, size, device)
            found = measured(case, plans, asked.rounds, device)
            flops = 2 * tokens * count * size * size
            line = of_device("block_grad_variants", device) | {
                "tokens": tokens, "blocks": count, "flops": flops, "seconds": found, "ceiling": best.flops,
            }  # fmt: skip
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"\n{count} blocks of {size}, {tokens:,} tokens; after {perf_counter() - begin:.1f} s")
            for name, value in sorted(found.items(), key=lambda one: (isinstance(one[1], str), one[1])):
                if isinstance(value, str):
                    code = 1 if name.rpartition(",")[0] in plans else code
                    print(f"  {value:>8} | {name}", flush=True)
                else:
                    print(f"  {value * 1e6:8.1f} us {flops / value / best.flops:6.1%} | {name}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
