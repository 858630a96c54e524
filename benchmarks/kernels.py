"""Each op beside what torch has for the same work, and beside what the device can do: time, bytes, share of ceilings.

`python -m benchmarks.kernels` times the ops of lit_sparse_kernels, on a GPU at the shapes of Llama models, on a CPU at
those of SmolLM2, and appends a line for each shape to benchmarks/results/kernels.jsonl. All contenders of a shape take
turns, so that a device that drifts slows them alike; ceilings are measured in the same run. An op whose tests fail on
the device is not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import ROOT, of_device
from lit_sparse_kernels import block_grad, pack_columns
from lit_sparse_profiling.allocator import measured
from lit_sparse_profiling.ceilings import Ceilings, ceilings
from lit_sparse_profiling.paired import pair_of

RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
OURS = "ours"
CACHE_BYTES = 256 * 2**20
"""Written between timings on a GPU, so that none finds its inputs in the cache."""
MODELS = {  # width, key and value width, block size
    "SmolLM2-135M": (576, 192, 64),
    "Llama-3.2-1B": (2048, 512, 256),
    "Llama-3-8B": (4096, 1024, 256),
}


@dataclass
class Work:
    """One op at one shape, and who else can do it.

    Attributes:
        shape: In words.
        contenders: Ways to do it by name; `ours` among them. Each returns or changes what the op is about.
        flops: Floating-point operations of the work itself.
        bytes: Bytes that it cannot do without reading or writing.
    """

    op: str
    shape: str
    contenders: dict[str, Callable[[], object]]
    flops: int = 0
    bytes: int = 0


# ---- the ops


def block_grads(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Gradients of q's, k's and v's blocks, few and many; as many diagonal blocks by einsum have no gaps."""
    width, narrow, size = MODELS[name]
    generator = torch.Generator(device).manual_seed(0)
    outs = (width, narrow, narrow)
    dys = [torch.randn(tokens, out, generator=generator, device=device, dtype=dtype) for out in outs]
    x = torch.randn(tokens, width, generator=generator, device=device, dtype=dtype)
    every = [
        (layer, row, c) for c in range(width // size) for layer, out in enumerate(outs) for row in range(out // size)
    ]
    for count in (1, 9, 27, len(every) // 2, len(every)):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(count))[:count]
        rows = torch.tensor(sorted((every[i] for i in order), key=lambda b: (b[2], b[0], b[1])), dtype=torch.int32)
        columns = rows[:, 2].unique()
        packed = pack_columns.pack_columns(x, columns.to(device), size)
        rows[:, 2] = torch.searchsorted(columns, rows[:, 2].contiguous()).int()
        tiles = [
            (dys[layer], slice(r * size, (r + 1) * size), slice(p * size, (p + 1) * size))
            for layer, r, p in rows.tolist()
        ]
        placed = rows.to(device)
        left, right = (torch.randn(tokens, count, size, device=device, dtype=dtype) for _ in range(2))

        def gathered(dys: list[Tensor] = dys, packed: Tensor = packed, tiles: Any = tiles) -> Tensor:
            left = torch.stack([dy[:, rows] for dy, rows, _ in tiles])
            return left.transpose(1, 2) @ torch.stack([packed[:, columns] for _, _, columns in tiles])

        yield Work(
            "block_grad",
            f"{name}, q, k, v, {count} of {len(every)} blocks of {size}, {tokens:,} tokens",
            {
                OURS: lambda p=packed, b=placed: block_grad.block_grad(dys, p, b, (size, size)),
                "whole dW": lambda: [dy.t() @ x for dy in dys],
                "gathered, torch.compile": torch.compile(gathered, dynamic=False),
                "as many diagonal blocks": lambda a=left, b=right: torch.einsum("tnh,tnw->nhw", a, b),
            },
            flops=2 * tokens * count * size * size,
            bytes=count * size * size * 4
            + packed.nbytes
            + len({(t[0].data_ptr(), t[1].start) for t in tiles}) * tokens * size * x.element_size(),
        )


def packings(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """A third and all but one of the input's columns."""
    width, _, size = MODELS[name]
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    available = width // size
    for kept in (available // 3 or 1, available - 1):
        columns = torch.arange(available, device=device)[torch.randperm(available)[:kept].sort().values]

        def indexed(columns: Tensor = columns) -> Tensor:
            return x.view(tokens, -1, size).index_select(1, columns).view(tokens, -1)

        yield Work(
            "pack_columns",
            f"{name}, {kept} of {available} block columns of {size}, {tokens:,} tokens",
            {
                OURS: lambda c=columns: pack_columns.pack_columns(x, c, size),
                "index_select, torch.compile": torch.compile(indexed, dynamic=False),
            },
            bytes=2 * tokens * kept * size * x.element_size(),
        )


OPS = {"block_grad": block_grads, "pack_columns": packings}


# ---- measuring


def times(work: Work, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one a round, all in turn."""
    flush = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for run in work.contenders.values():  # compilation, and the first call's allocations
        run()
        run()
    found: dict[str, list[float]] = {name: [] for name in work.contenders}
    for _ in range(rounds):
        for name, run in work.contenders.items():
            flush.zero_()
            found[name].append(seconds(run, device))
    return found


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one call takes; on a GPU by events, which do not see what the host does meanwhile."""
    if device.type != "cuda":
        begin = perf_counter()
        run()
        return perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at most, its result among them."""
    with measured(device) as found:
        kept = run()
    del kept
    return found.requested


def line_of(work: Work, device: torch.device, best: Ceilings, rounds: int) -> dict[str, Any]:
    """What one shape gave."""
    taken = times(work, device, rounds)
    ours = median(taken[OURS])
    rivals = [name for name in work.contenders if name != OURS]
    pairs = {name: pair_of(name, list(zip(taken[OURS], taken[name], strict=True))) for name in rivals}
    return {
        "op": work.op,
        "shape": work.shape,
        "seconds": {name: median(values) for name, values in taken.items()},
        "ratio": {name: [pair.median, pair.low, pair.high] for name, pair in pairs.items()},
        "peak_bytes": {name: peak(run, device) for name, run in work.contenders.items()},
        "rounds": rounds,
        "of_matmul": work.flops / ours / best.flops if work.flops else None,
        "of_copy": work.bytes / ours / best.bytes if work.bytes else None,
        "ceilings": {"flops": best.flops, "bytes": best.bytes},
    }


def green(op: str, device: torch.device) -> bool:
    """Whether the op's tests pass where it is to be timed."""
    marker = "gpu" if device.type == "cuda" else "not gpu"
    command = [sys.executable, "-m", "pytest", f"tests/kernels/test_{op}.py", "-q", "-m", marker]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and append it; the exit status is 1 if an op's tests fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"some of {', '.join(OPS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each contender (default 50)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.ops) - set(OPS)):
        print(f"kernels: there is no op {unknown[0]}; name some of {', '.join(OPS)}.", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    models, tokens = (["Llama-3.2-1B", "Llama-3-8B"], 8192) if on_gpu else (["SmolLM2-135M"], 1024)
    code = 0
    for op in asked.ops or OPS:
        if not green(op, device):
            print(f"kernels: the tests of {op} fail here, so it is not timed.", file=sys.stderr)
            code = 1
            continue
        best = ceilings(device, dtype)
        for work in (work for model in models for work in OPS[op](model, tokens, device, dtype)):
            line = of_device("kernels", device) | line_of(work, device, best, asked.rounds)
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{work.op}, {work.shape}: {line['ratio']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
