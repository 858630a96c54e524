"""Kernels compiled without a GPU: a launch is taken as it is made, and compiled for the chip instead of run.

`python -m benchmarks.ahead` compiles every launch at the shapes of real models for an H100, and writes what each kernel
takes of a multiprocessor into benchmarks/results/ahead.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.provenance import ROOT, of_device
from lit_sparse_kernels import (
    add_noise,
    block_adamw,
    block_delta,
    block_grad,
    glu_density,
    master_adamw,
    momentum_noise,
    pack_columns,
    philox,
    subspace_adam,
)
from lit_sparse_kernels.jit import Listed
from lit_sparse_kernels.master_adamw import Item, Rule

RESULTS = ROOT / "benchmarks" / "results" / "ahead.jsonl"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""A thread block's shared memory at most, by compute capability (CUDA C++ programming guide)."""
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Compiled:
    """A kernel's machine code.

    Attributes:
        shared: Bytes of shared memory.
        registers: Registers a thread, of 255 that there are.
        local: Bytes of local memory a thread: what registers were spilled to, and arrays that are no registers.
        tensor_cores: Whether it uses them.
        has_dot: Whether its source multiplies matrices.
        barriers: Barriers within a program.
        widths: Bits that its loads and stores of global memory move for a thread, each width once.
    """

    name: str
    shared: int
    registers: int
    local: int
    tensor_cores: bool
    has_dot: bool
    barriers: int
    widths: frozenset[int]


def launches(call: Callable[[], Any]) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """The launches that `call` makes, none of which runs."""
    found: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def noted(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((self, arguments, named))

    with mock.patch.object(JITFunction, "run", noted):
        call()
    return found


def compiled(
    kernel: JITFunction, arguments: tuple[Any, ...], named: Mapping[str, Any], capability: int, folder: Path
) -> Compiled:
    """The machine code of one launch for a chip of that compute capability."""
    given = dict(zip([p.name for p in kernel.params], arguments, strict=False)) | dict(named)
    options = {key: value for key, value in given.items() if key in ("num_warps", "num_stages")}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    binary = folder / f"{kernel.__name__}_{capability}.cubin"
    binary.write_bytes(made.asm["cubin"])
    used = resources(binary)
    return Compiled(
        kernel.__name__,
        made.metadata.shared,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        TENSOR_CORES[capability] in made.asm["ptx"],
        "tt.dot" in made.asm["ttir"],
        made.asm["ptx"].count("bar.sync"),
        widths(made.asm["ptx"]),
    )


def widths(ptx: str) -> frozenset[int]:
    """Bits that each load and store of global memory moves for a thread."""
    found = re.findall(r"(?:ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    copied = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)
    return frozenset(int(times or 1) * int(bits) for times, bits in found) | frozenset(8 * int(n, 0) for n in copied)


def type_of(value: Any) -> str:
    """Triton's name of the type that it would give the argument."""
    if isinstance(value, Tensor):
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def resources(binary: Path) -> dict[str, int]:
    """Registers, stack and local memory a thread, as the toolkit reads them from the binary."""
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    assert len(found) == 3, f"no figures in what cuobjdump said: {said}"
    return found


# ---- what is compiled


META = torch.device("meta")
TOKENS = 8192
MODELS = {  # width, key and value width, MLP width, block size
    "SmolLM2-135M": (576, 192, 1536, 64),
    "Llama-3.2-1B": (2048, 512, 8192, 256),
    "Llama-3-8B": (4096, 1024, 14336, 256),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def block_grads(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of q, k and v, in bf16 and fp32; with one block, for which the tokens are divided."""
    for dtype in (torch.bfloat16, torch.float32):
        dys = [empty(TOKENS, out, dtype=dtype) for out in (width, narrow, narrow)]
        few, many = [(0, 0, 0)], [(layer, row, place) for layer in (0, 1, 2) for row in range(3) for place in range(3)]
        packed = empty(TOKENS, 3 * size, dtype=dtype)
        for blocks in (few, many * 9):
            yield lambda blocks=blocks, dys=dys, x=packed: block_grad.launch(dys, x, Listed(blocks), (size, size))


def packings(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of bf16, of fp32, of fp32 to bf16; back; of a transposed input, whose columns have a stride."""
    kept = [(0,), (2,)]
    for dtype, to in ((torch.bfloat16, None), (torch.float32, None), (torch.float32, torch.bfloat16)):
        x = empty(TOKENS, width, dtype=dtype)
        yield lambda x=x, to=to: pack_columns.launch(x, Listed(kept), size, to)
    for dtype in (torch.bfloat16, torch.float32):
        packed = empty(TOKENS, 2 * size, dtype=dtype)
        yield lambda packed=packed: pack_columns.launch_unpack(packed, Listed(kept), size, width)
    yield lambda: pack_columns.launch(empty(width, TOKENS).t(), Listed(kept), size)


def block_deltas(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Forward and input gradient of an MLP's first matrix, in bf16 and fp32; blocks that are no squares in bf16."""
    blocks = [(row, place) for place in (0, 2) for row in (0, 1, 3)]
    for dtype, sides in ((torch.bfloat16, (size, size)), (torch.float32, (size, size)), (torch.bfloat16, (224, 64))):
        wide_TO, delta = empty(TOKENS, wide, dtype=dtype), empty(len(blocks), *sides, dtype=dtype)
        packed = empty(TOKENS, 3 * sides[1], dtype=dtype)
        yield lambda base=wide_TO, x=packed, delta=delta: block_delta.launch(base, x, delta, Listed(blocks))
        yield lambda dy=wide_TO, delta=delta: block_delta.launch_input_grad(
            dy, delta, Listed(blocks), 3 * delta.shape[2]
        )


def master_adamws(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of a layer's matrices and norms, in bf16 with either gradient and in fp32; of a tensor with an odd end."""
    for weight, grad in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        items = [adamw_item(shape, weight, grad) for shape in ((narrow, width), (wide, width), (width,), (7,))]
        yield lambda items=items: master_adamw.launch(items, Rule(lr=1e-4), empty(dtype=torch.float32))
    yield lambda items=items: master_adamw.launch(items, Rule(lr=1e-4))


def adamw_item(shape: tuple[int, ...], weight_dtype: torch.dtype, grad_dtype: torch.dtype) -> Item:
    weight, grad = empty(*shape, dtype=weight_dtype), empty(*shape, dtype=grad_dtype)
    master, m, v = (empty(*shape, dtype=torch.float32) for _ in range(3))
    return Item(weight, grad, weight if weight_dtype == torch.float32 else master, m, v, 1)


def block_adamws(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """In bf16 and fp32; of a matrix held as its transpose (GPT-2's Conv1D), and of one with no unit stride."""
    for dtype in (torch.bfloat16, torch.float32):
        square, up = empty(width, width, dtype=dtype), empty(wide, width, dtype=dtype)
        for weights in ([square, up], [up.t()], [empty(narrow, width, 2, dtype=dtype)[..., 0]]):
            parts = [block_part(weight, size) for weight in weights]
            yield lambda parts=parts: block_adamw.launch(parts, Rule(lr=1e-4), empty(dtype=torch.float32))


def block_part(weight: Tensor, size: int) -> block_adamw.Part:
    grad, master, m, v = (empty(3, size, size, dtype=torch.float32) for _ in range(4))
    return block_adamw.Part(Item(weight, grad, master, m, v, 1), Listed([(0, 0), (1, 0), (0, 1)]))


def glu_densities(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Forward and backward of all activations, proxies and places, in bf16; of one in fp32, and of one without up."""
    forms = [(a, p, w) for a in glu_density.ACTS for p in glu_density.PROXIES for w in glu_density.WHERES]
    rows, sharpness = empty(TOKENS, dtype=torch.float32), empty(dtype=torch.float32)
    for dtype, names, gated in [
        *((torch.bfloat16, names, True) for names in forms),
        (torch.float32, forms[0], True),
        (torch.bfloat16, forms[0], False),
    ]:
        gate, up = empty(TOKENS, wide, dtype=dtype), empty(TOKENS, wide, dtype=dtype) if gated else None
        yield lambda gate=gate, up=up, names=names: glu_density.launch(gate, up, sharpness, *names)
        yield lambda gate=gate, up=up, names=names: glu_density.launch_grad(gate, rows, gate, up, sharpness, *names)


NOISES: list[tuple[torch.dtype, philox.Kind]] = [(torch.bfloat16, "rademacher"), (torch.float32, "gaussian")]


def noises(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of the embeddings of a batch's tokens."""
    yield lambda: philox.launch(empty(TOKENS, dtype=torch.int64), width, 2**63 + 1, 7, kind="gaussian")


def added_noises(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of a layer's matrices, its norm and an odd shard, in bf16 and fp32."""
    terms = [add_noise.Term(2**63 + 1, 1e-3), add_noise.Term(2, -1e-3)]
    for dtype, kind in NOISES:
        weights = [empty(*shape, dtype=dtype) for shape in ((wide, width), (narrow, width), (width,), (7,))]
        pieces = [add_noise.Piece(one, one, number, 5 * number) for number, one in enumerate(weights)]
        yield lambda p=pieces, k=kind: add_noise.launch(p, terms, 0.9, k, stochastic=True)


def momentum_noises(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """With a curvature that is refreshed, and without one."""
    rule, terms = momentum_noise.Rule(1e-4, 0.9, 0.99, 1.0, 1e-8, 0.9, (0.1,)), [add_noise.Term(2**63 + 1, 1e-3)]
    for (dtype, kind), curved in zip(NOISES, (True, False), strict=True):
        pieces = []
        for shape in ((wide, width), (width,)):
            weight, m, h = empty(*shape, dtype=dtype), *(empty(*shape, dtype=torch.float32) for _ in range(2))
            pieces.append(momentum_noise.Piece(weight, m, h if curved else None, 1.0, 3))
        yield lambda p=pieces, k=kind: momentum_noise.launch(p, terms, rule, k, stochastic=True)


def subspace_adams(width: int, narrow: int, wide: int, size: int) -> Iterator[Callable[[], Any]]:
    """Of an MLP's matrix and of its transpose, with bf16 and fp32 gradients, at the rank of a quarter of the width."""
    rank, fp32 = width // 4, torch.float32
    projected, m, v, moved = (empty(wide, rank, dtype=fp32) for _ in range(4))
    yield lambda: subspace_adam.launch(projected, m, v, moved, 1, Rule(lr=1e-4))
    basis, factor = empty(width, rank, dtype=fp32), empty(wide, dtype=fp32)
    for dtype, turned in ((torch.bfloat16, False), (fp32, True)):
        weight, grad = (
            empty(width, wide, dtype=d).t() if turned else empty(wide, width, dtype=d) for d in (fp32, dtype)
        )
        yield lambda w=weight, g=grad: subspace_adam.launch_back(w, moved, basis, 1e-4, 1.0, factor, g)


LAUNCHES = {
    "subspace_adam": subspace_adams,
    "row_noise": noises,
    "add_noise": added_noises,
    "momentum_noise": momentum_noises,
    "block_grad": block_grads,
    "block_adamw": block_adamws,
    "pack_columns": packings,
    "block_delta": block_deltas,
    "glu_density": glu_densities,
    "master_adamw": master_adamws,
}


# ---- the table


def rows(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the range of what each kernel takes over its launches at the shapes of a model, on an H100."""
    for op, cases in LAUNCHES.items():
        found: dict[str, list[Compiled]] = {}
        with mock.patch.object(block_grad, "shared_bytes", return_value=SHARED_BYTES[90]):
            taken = [launch for call in cases(*MODELS[model]) for launch in launches(call)]
        for kernel, arguments, named in taken:
            found.setdefault(kernel.__name__, []).append(compiled(kernel, arguments, named, 90, folder))
        for name, each in found.items():
            yield {
                "op": op,
                "kernel": name,
                "model": model,
                "launches": len(each),
                "registers": spread(one.registers for one in each),
                "shared": spread(one.shared for one in each),
                "local": spread(one.local for one in each),
                "barriers": spread(one.barriers for one in each),
                "widths": sorted({width for one in each for width in one.widths}),
            }


def spread(values: Iterable[int]) -> list[int]:
    """Return the least and the largest value."""
    listed = list(values)
    return [min(listed), max(listed)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["Llama-3.2-1B", "Llama-3-8B"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to write anew")
    asked = parser.parse_args(arguments)
    about = of_device("ahead", torch.device("cpu")) | {"device": "an H100 (compiled for sm_90)"}
    with tempfile.TemporaryDirectory() as folder:
        lines = [about | row for model in asked.models for row in rows(model, Path(folder))]
    for line in lines:
        print(f"{line['kernel']}, {line['model']}: registers {line['registers']}, shared {line['shared']}")
    asked.results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
