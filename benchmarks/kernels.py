"""Each op beside what torch has for the same work, and beside what the device can do: time, bytes, share of ceilings.

`python -m benchmarks.kernels` times the ops of lit_sparse_kernels and the loss, on a GPU at the shapes of Llama models,
on a CPU at those of SmolLM2, and appends a line for each shape to benchmarks/results/kernels.jsonl. All contenders of a
shape take turns, so that a device that drifts slows them alike; ceilings are measured in the same run. An op whose
tests fail on the device is not timed. Liger (for the loss) and quack (for block_grad) take part where they are
installed and the device is a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import tests_of
from benchmarks.provenance import ROOT, of_device
from lit_sparse.loss import next_token_loss
from lit_sparse.mlp_density import GLUDensity
from lit_sparse.optim import AdamW
from lit_sparse_kernels import block_delta, block_grad, pack_columns
from lit_sparse_kernels.glu_density import activation, proxied
from lit_sparse_profiling.allocator import measure_allocations
from lit_sparse_profiling.ceilings import Ceilings, ceilings
from lit_sparse_profiling.paired import compare_rounds

RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
OURS, DIAGONAL, COMPILED = "ours", "as many diagonal blocks", "torch.compile"
ENOUGH_BLOCKS, MATMUL_SHARE, MOST_DIAGONAL, COPY_SHARE = 27, 0.70, 1.05, 0.85
"""Targets on an H100: a share of the matmul rate, from so many blocks on; a share of the copy rate."""
CACHE_BYTES = 256 * 2**20
"""Written between timings on a GPU, so that none finds its inputs in the cache."""
PAUSE_CYCLES = 10**7
"""Before a timing on a GPU, some milliseconds: else it would hold the host's time to launch what is timed."""
MODELS = {  # width, key and value width, MLP width, block size
    "SmolLM2-135M": (576, 192, 1536, 64),
    "Llama-3.2-1B": (2048, 512, 8192, 256),
    "Llama-3-8B": (4096, 1024, 14336, 256),
}
VOCABULARIES = {"SmolLM2-135M": 49152, "Llama-3.2-1B": 128256, "Llama-3-8B": 128256}


@dataclass
class Work:
    """One op at one shape, and who else can do it.

    Attributes:
        shape: In words.
        contenders: Ways to do it by name; `ours` among them. Each returns or changes what the op is about.
        flops: Floating-point operations of the work itself.
        bytes: Bytes that it cannot do without reading or writing.
        blocks: How many there are, where there are blocks.
    """

    op: str
    shape: str
    contenders: dict[str, Callable[[], object]]
    flops: int = 0
    bytes: int = 0
    blocks: int = 0


# ---- the ops


def block_grads(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Gradients of q's, k's and v's blocks, few and many; as many diagonal blocks by einsum have no gaps."""
    width, narrow, _, size = MODELS[name]
    torch.manual_seed(0)
    outs = (width, narrow, narrow)
    dys = [torch.randn(tokens, out, device=device, dtype=dtype) for out in outs]
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    every = [
        (layer, row, c) for c in range(width // size) for layer, out in enumerate(outs) for row in range(out // size)
    ]
    for count in (1, 9, 27, len(every) // 2, len(every)):
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(count))[:count]
        rows = torch.tensor(sorted((every[i] for i in order), key=lambda b: (b[2], b[0], b[1])), dtype=torch.int32)
        columns = rows[:, 2].unique()
        packed = x.view(tokens, -1, size).index_select(1, columns.to(device)).view(tokens, -1)
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

        def by_quack(dys: list[Tensor] = dys, packed: Tensor = packed, tiles: Any = tiles) -> Tensor:
            from quack.gemm_interface import gemm  # pyright: ignore[reportMissingImports]

            left = torch.stack([dy[:, rows] for dy, rows, _ in tiles]).transpose(1, 2)
            return gemm(left, torch.stack([packed[:, columns] for _, _, columns in tiles]), out_dtype=torch.float32)

        rivals = {"gathered, quack": by_quack} if available("quack", device) else {}
        yield Work(
            "block_grad",
            f"{name}, q, k, v, {count} of {len(every)} blocks of {size}, {tokens:,} tokens",
            {
                OURS: lambda p=packed, b=placed: block_grad.block_grad(dys, p, b, (size, size)),
                "whole dW": lambda: [dy.t() @ x for dy in dys],
                "gathered, torch.compile": torch.compile(gathered, dynamic=False),
                DIAGONAL: lambda a=left, b=right: torch.einsum("tnh,tnw->nhw", a, b),
                **rivals,
            },
            blocks=count,
            flops=2 * tokens * count * size * size,
            bytes=count * size * size * 4
            + packed.nbytes
            + len(rows[:, :2].unique(dim=0)) * tokens * size * x.element_size(),
        )


def packings(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """A third and all but one of the input's columns."""
    width, _, _, size = MODELS[name]
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    available = width // size
    for kept in (available // 3 or 1, available - 1):
        columns = torch.randperm(available)[:kept].sort().values.to(device)

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


def deltas(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Yield the product with blocks of one matrix of the MLP, 5 % of it."""
    width, _, wide, size = MODELS[name]
    rows, columns = wide // size, width // size
    every = [(row, column) for column in range(columns) for row in range(rows)]
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: max(1, len(every) // 20)]
    blocks = torch.tensor([every[i] for i in sorted(chosen.tolist())], dtype=torch.int32)
    torch.manual_seed(0)
    base, x = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (wide, width))
    delta = torch.randn(len(blocks), size, size, device=device, dtype=dtype)
    places, listed = blocks.to(device), blocks.tolist()

    def by_blocks() -> Tensor:
        out = base.clone()
        for number, (row, column) in enumerate(listed):
            part = x[:, column * size : (column + 1) * size] @ delta[number].t()
            out[:, row * size : (row + 1) * size] += part
        return out

    yield Work(
        "block_delta",
        f"{name}, up, {len(blocks)} of {len(every)} blocks of {size}, {tokens:,} tokens",
        {
            OURS: lambda: block_delta.block_delta(base, x, delta, places),
            "block by block, torch.compile": torch.compile(by_blocks, dynamic=False),
        },
        flops=2 * tokens * delta.numel(),
        bytes=2 * base.nbytes + delta.nbytes + len({column for _, column in listed}) * tokens * size * x.element_size(),
    )


def whole_adamws(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """All tensors of a decoder layer in fp32; and in bf16 with an fp32 master, of which torch has none."""
    width, narrow, wide, _ = MODELS[name]
    shapes = [(width, width)] * 2 + [(narrow, width)] * 2 + [(wide, width)] * 2 + [(width, wide), (width,), (width,)]
    for kept in (torch.float32, torch.bfloat16):
        ours, theirs, compiled = (parameters(shapes, device, kept) for _ in range(3))
        yield Work(
            "master_adamw",
            f"{name}, a layer of {sum(p.numel() for p in ours):,} weights in {str(kept).removeprefix('torch.')}",
            {
                OURS: AdamW(ours, lr=1e-5).step,
                "torch's fused AdamW": with_masters(
                    theirs, lambda masters: torch.optim.AdamW(masters, 1e-5, fused=True)
                ),
                "torch.compile": with_masters(compiled, compiled_adamw),
            },
            bytes=28 * sum(p.numel() for p in ours),
        )


def parameters(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters with gradients."""
    made = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def with_masters(weights: list[nn.Parameter], make: Callable[[list[nn.Parameter]], Any]) -> Callable[[], object]:
    """A step of an optimizer for fp32, which trains copies of the weights where these are in fewer bits."""
    if weights[0].dtype == torch.float32:
        return make(weights).step
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    step = make(masters).step

    def run() -> None:
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        step()
        torch._foreach_copy_([weight.detach() for weight in weights], [master.detach() for master in masters])  # pyright: ignore[reportPrivateImportUsage]

    return run


def compiled_adamw(masters: list[nn.Parameter]) -> Any:
    """torch's AdamW as its compiler makes it."""
    optimizer = torch.optim.AdamW(masters, lr=torch.tensor(1e-5), capturable=masters[0].is_cuda)
    optimizer.step = torch.compile(optimizer.step, dynamic=False)
    return optimizer


def block_adamws(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """A third of the blocks of q, k and v of eight layers; torch writes them into the weights one by one."""
    width, narrow, _, size = MODELS[name]
    weights = [torch.randn(out, width, device=device).to(dtype) for out in [width, narrow, narrow] * 8]
    indices = [torch.tensor(list(product(range(len(w) // size), range(width // size)))[::3]) for w in weights]
    shapes = [(len(index), size, size) for index in indices]
    ours, theirs, compiled = (parameters(shapes, device, torch.float32) for _ in range(3))
    optimizer = AdamW(ours, lr=1e-5)
    for parameter, weight, index in zip(ours, weights, indices, strict=True):
        optimizer.scatter(parameter, weight, index.to(device))

    def write(masters: list[nn.Parameter]) -> None:
        for weight, index, master in zip(weights, indices, masters, strict=True):
            for (row, column), block in zip(index.tolist(), master.detach(), strict=True):
                weight[row * size : (row + 1) * size, column * size : (column + 1) * size] = block

    def then_write(masters: list[nn.Parameter], made: Any) -> Callable[[], object]:
        return lambda: (made.step(), write(masters))

    count = sum(parameter.numel() for parameter in ours)
    yield Work(
        "block_adamw",
        f"{name}, {sum(map(len, indices))} blocks of {size} of {len(weights)} matrices",
        {
            OURS: optimizer.step,
            "torch's fused AdamW, then copies": then_write(theirs, torch.optim.AdamW(theirs, 1e-5, fused=True)),
            "torch.compile, then copies": then_write(compiled, compiled_adamw(compiled)),
        },
        bytes=(28 + weights[0].element_size()) * count,
    )


def densities(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """A gated activation with its penalty, forward and backward; torch's autograd keeps what ours computes again."""
    wide = MODELS[name][2]
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(tokens, wide, device=device, dtype=dtype) for _ in range(3))
    drows = torch.full((tokens,), 1 / (tokens * wide), device=device)
    leaves = [gate.requires_grad_(), up.requires_grad_()]

    def and_back(forward: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, (dh, drows))

    for where, proxy, sharpness in (("gate_act", "rational", 1e-3), ("product", "tanh", 10.0)):
        sharp = torch.tensor(sharpness, device=device)

        def plain(where: str = where, proxy: str = proxy, sharp: Tensor = sharp) -> tuple[Tensor, Tensor]:
            o = activation(gate, "silu")
            h = o * up
            return h, proxied((h if where == "product" else o).float(), sharp, proxy).sum(-1)

        def ours(where: str = where, proxy: str = proxy, sharp: Tensor = sharp) -> Any:
            return GLUDensity.apply(gate, up, sharp, "silu", proxy, where)

        yield Work(
            "glu_density",
            f"{name}, {proxy} of {where}, {tokens:,} tokens, forward and backward",
            {
                OURS: and_back(ours),
                "torch's operations": and_back(plain),
                "torch.compile": and_back(torch.compile(plain, dynamic=False)),
            },
            bytes=8 * gate.nbytes,  # gate, up and h; then dh, gate, up and both gradients
        )


def losses(name: str, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Work]:
    """Cross-entropy from the last hidden states, with its gradients: of these alone, and of the head, too."""
    width, vocabulary = MODELS[name][0], VOCABULARIES[name]
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens), device=device)
    for trained in (False, True):
        head = (torch.randn(vocabulary, width, device=device, dtype=dtype) / width**0.5).requires_grad_(trained)
        leaves = [hidden, head] if trained else [hidden]

        def and_back(loss: Callable[[Tensor], Tensor], leaves: list[Tensor] = leaves) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(hidden), leaves)

        def plain(hidden: Tensor, head: Tensor = head) -> Tensor:
            return F.cross_entropy((hidden[0, :-1] @ head.t()).float(), labels[0, 1:])

        def liger(hidden: Tensor, head: Tensor = head) -> Tensor:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore

            return LigerFusedLinearCrossEntropyLoss()(head, hidden[0, :-1], labels[0, 1:])

        yield Work(
            "loss",
            f"{name}, {'trained' if trained else 'frozen'} head of {vocabulary:,} tokens, {tokens:,} tokens",
            {
                OURS: and_back(lambda x, head=head: next_token_loss(x, head, None, labels)),
                "all logits at once": and_back(plain),
                "all logits, torch.compile": and_back(torch.compile(plain, dynamic=False)),
                **({"Liger": and_back(liger)} if available("liger_kernel", device) else {}),
            },
            flops=2 * (3 if trained else 2) * tokens * vocabulary * width,
        )


def available(package: str, device: torch.device) -> bool:
    """Return whether a rival for GPUs alone can be called."""
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


OPS = {
    "block_grad": block_grads,
    "block_adamw": block_adamws,
    "pack_columns": packings,
    "block_delta": deltas,
    "master_adamw": whole_adamws,
    "glu_density": densities,
    "loss": losses,
}


# ---- measuring


def warm(work: Work) -> None:
    """Call each contender twice, which compiles it; drop a rival that fails, and say so."""
    for name, run in list(work.contenders.items()):
        try:
            run()
            run()
        except Exception as error:  # of torch.compile, for which a host may lack a compiler
            if name == OURS:
                raise
            del work.contenders[name]
            print(f"dropped {work.op}, {work.shape}, {name}: {type(error).__name__}: {error!s:.300}", flush=True)


def times(work: Work, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one a round, all in turn."""
    flush = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    warm(work)
    found: dict[str, list[float]] = {name: [] for name in work.contenders}
    for _ in range(rounds):
        for name, run in work.contenders.items():
            flush.zero_()
            found[name].append(seconds(run, device))
    return found


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one call takes; on a GPU by events, behind a pause in which the host gets ahead of the device."""
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


def peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at most, its result among them."""
    with measure_allocations(device) as found:
        kept = run()
    del kept
    return found.requested


def line_of(work: Work, device: torch.device, best: Ceilings, rounds: int) -> dict[str, Any]:
    """Return the measurements at one shape."""
    taken = times(work, device, rounds)
    ours = median(taken[OURS])
    rivals = [name for name in work.contenders if name != OURS]
    pairs = {name: compare_rounds(name, list(zip(taken[OURS], taken[name], strict=True))) for name in rivals}
    return {
        "op": work.op,
        "shape": work.shape,
        "seconds": {name: median(values) for name, values in taken.items()},
        "ratio": {name: [pair.median, pair.low, pair.high] for name, pair in pairs.items()},
        "peak_bytes": {name: peak(run, device) for name, run in work.contenders.items()},
        "rounds": rounds,
        "blocks": work.blocks,
        "of_matmul": work.flops / ours / best.flops if work.flops else None,
        "of_copy": work.bytes / ours / best.bytes if work.bytes else None,
        "ceilings": {"flops": best.flops, "bytes": best.bytes},
    }


def verdicts(line: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield each target on an H100 at one shape, with the measured number, and whether it is met."""
    name = f"{line['op']}, {line['shape']}"
    if line["op"] == "block_grad" and line["blocks"] >= ENOUGH_BLOCKS:
        rate, (times, *_) = line["of_matmul"], line["ratio"][DIAGONAL]
        yield f"{name}: {rate:.0%} of the matmul rate, at least {MATMUL_SHARE:.0%}", rate >= MATMUL_SHARE
        yield f"{name}: {times:.3f} of as many diagonal blocks, at most {MOST_DIAGONAL}", times <= MOST_DIAGONAL
    if line["op"].endswith("adamw"):
        rate = line["of_copy"]
        yield f"{name}: {rate:.0%} of the copy rate, at least {COPY_SHARE:.0%}", rate >= COPY_SHARE


def green(op: str, device: torch.device) -> bool:
    """Return whether the op's tests pass on the device that it is to be timed on."""
    marker = "gpu" if device.type == "cuda" else "not gpu"
    command = [sys.executable, "-m", "pytest", tests_of(op), "-q", "-m", marker]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and append it; the exit status is 1 if an op's tests fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"some of {', '.join(OPS)}; all if none is named")
    parser.add_argument("--model", choices=MODELS, help="whose shapes (default: Llama-3.2-1B on a GPU, else SmolLM2)")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each contender (default 50)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    parser.add_argument("--tested", action="store_true", help="do not run the ops' tests first")
    parser.add_argument("--compiled", nargs="*", metavar="OP", help="compare only these with torch.compile")
    parser.add_argument("--warm", action="store_true", help="only call each contender, which fills compilers' caches")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.ops) - set(OPS)):
        print(f"kernels: there is no op {unknown[0]}; name some of {', '.join(OPS)}.", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    model, tokens = ("Llama-3.2-1B", 8192) if on_gpu else ("SmolLM2-135M", 1024)
    code = 0
    for op in asked.ops or OPS:
        if not asked.tested and not green(op, device):
            print(f"kernels: the tests of {op} fail here, so it is not timed.", file=sys.stderr)
            code = 1
            continue
        best = None if asked.warm else ceilings(device, dtype)
        for work in OPS[op](asked.model or model, tokens, device, dtype):
            if asked.compiled is not None and op not in asked.compiled:
                work.contenders = {name: run for name, run in work.contenders.items() if COMPILED not in name}
            if best is None:
                warm(work)
                continue
            line = of_device("kernels", device) | line_of(work, device, best, asked.rounds)
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{work.op}, {work.shape}: {line['ratio']}", flush=True)
            for text, met in verdicts(line) if on_gpu else ():
                print("met   " if met else "missed", text, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
