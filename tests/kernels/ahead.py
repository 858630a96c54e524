"""Compilation of kernels without a GPU: a launch is taken as it is made, and compiled for the chip instead of run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
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
        local: Bytes of local memory a thread: what registers were spilled to, and arrays that are no registers.
        tensor_cores: Whether it uses them.
        has_dot: Whether its source multiplies matrices.
        barriers: Barriers within a program.
        widths: Bits that its loads and stores of global memory move for a thread, each width once.
    """

    name: str
    shared: int
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
    return Compiled(
        kernel.__name__,
        made.metadata.shared,
        local_bytes(binary),
        TENSOR_CORES[capability] in made.asm["ptx"],
        "tt.dot" in made.asm["ttir"],
        made.asm["ptx"].count("bar.sync"),
        widths(made.asm["ptx"]),
    )


def widths(ptx: str) -> frozenset[int]:
    """Bits that each load and store of global memory moves for a thread."""
    found = re.findall(r"(?:ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    copied = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?, (?:0x)?(\d+)", ptx)
    return frozenset(int(times or 1) * int(bits) for times, bits in found) | frozenset(8 * int(n) for n in copied)


def type_of(value: Any) -> str:
    """Triton's name of the type that it would give the argument."""
    if isinstance(value, Tensor):
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def local_bytes(binary: Path) -> int:
    """Bytes of local memory and stack a thread, as the toolkit reads them from the binary."""
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", said)
    assert found, f"no figure in what cuobjdump said: {said}"
    return sum(map(int, found))
