"""Bounds that an H100 cannot undercut: each op's FLOPs and bytes at the shapes of Llama models, by arithmetic.

`python -m benchmarks.roofline` writes benchmarks/results/roofline.jsonl. Nothing is run: the time is that of the
card's data sheet, the larger of FLOPs over the dense bf16 rate and bytes over the memory's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels import MODELS, OPS, Work
from benchmarks.provenance import ROOT, of_device
from lit_sparse_kernels import block_grad

RESULTS = ROOT / "benchmarks" / "results" / "roofline.jsonl"
FLOPS, BYTES, PROCESSORS, SHARED = 989.4e12, 3.35e12, 132, 227 * 1024
"""Of an H100 SXM: dense bf16 FLOP/s, bytes/s, multiprocessors (NVIDIA's data sheet), shared memory of a block."""
META, TOKENS = torch.device("meta"), 8192


def balance(work: Work, size: int) -> float:
    """Return the mean load of the multiprocessors over that of the busiest, with block_grad's plan and split."""
    with mock.patch.object(block_grad, "shared_bytes", return_value=SHARED):
        plan = block_grad.plan_for(torch.empty(0, 0, dtype=torch.bfloat16, device=META), (size, size))
    tiles, steps = work.blocks * -(-size // plan.m) * -(-size // plan.n), -(-TOKENS // plan.k)
    splits = block_grad.splits_for(tiles, steps, PROCESSORS)
    return tiles * steps / PROCESSORS / (-(-tiles * splits // PROCESSORS) * -(-steps // splits))


def rows(model: str) -> Iterator[dict[str, Any]]:
    """Yield the floor of every op at the shapes of a model."""
    for op, works in OPS.items():
        for work in works(model, TOKENS, META, torch.bfloat16):
            by_flops, by_bytes = work.flops / FLOPS, work.bytes / BYTES
            yield {
                "op": op,
                "shape": work.shape,
                "flops": work.flops,
                "bytes": work.bytes,
                "seconds": max(by_flops, by_bytes),
                "bound": "FLOPs" if by_flops > by_bytes else "bytes",
                "balance": balance(work, MODELS[model][3]) if op == "block_grad" else None,
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["Llama-3.2-1B", "Llama-3-8B"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to write anew")
    asked = parser.parse_args(arguments)
    about = of_device("roofline", torch.device("cpu")) | {"device": "an H100 SXM (data sheet)"}
    lines = [about | row for model in asked.models for row in rows(model)]
    for line in lines:
        microseconds = float(line["seconds"]) * 1e6
        print(f"{line['op']}, {line['shape']}: at least {microseconds:.1f} us ({line['bound']})")
    asked.results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
