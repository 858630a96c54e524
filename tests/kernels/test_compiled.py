"""Every kernel compiled ahead of time for an A100 and an H100, at the shapes of real models; no GPU is needed.

What a GPU test would not show: spilled registers, too much shared memory for the chip, products without tensor cores.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_sparse_kernels import block_adamw, block_delta, block_grad, glu_density, master_adamw, pack_columns
from lit_sparse_kernels.jit import Listed
from lit_sparse_kernels.master_adamw import Item, Rule
from tests.kernels.test_interpreter import kernels

pytest.importorskip("triton")
from tests.kernels.ahead import SHARED_BYTES, compiled, launches

META = torch.device("meta")
TOKENS = 8192
MODELS = {  # width, key and value width, MLP width, block size
    "SmolLM2-135M": (576, 192, 1536, 64),
    "Llama-3.2-1B": (2048, 512, 8192, 256),
    "Llama-3-8B": (4096, 1024, 14336, 256),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
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


def block_part(weight: torch.Tensor, size: int) -> block_adamw.Part:
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


LAUNCHES = {
    "block_grad": block_grads,
    "block_adamw": block_adamws,
    "pack_columns": packings,
    "block_delta": block_deltas,
    "glu_density": glu_densities,
    "master_adamw": master_adamws,
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("op", LAUNCHES)
def test_compiles_within_what_the_chip_has(
    op: str, model: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_grad, "shared_bytes", lambda device: SHARED_BYTES[capability])
    made = [launch for call in LAUNCHES[op](*MODELS[model]) for launch in launches(call)]
    assert made, "nothing was launched"
    for kernel, arguments, named in made:
        result = compiled(kernel, arguments, named, capability, tmp_path)
        assert result.local == 0, f"{result.name} spills {result.local} bytes"
        assert result.shared <= SHARED_BYTES[capability]
        if arguments[0].dtype == torch.bfloat16:  # fp32 products are exact ones, which tensor cores have not
            assert result.tensor_cores == result.has_dot, f"{result.name} multiplies without tensor cores"


@pytest.mark.parametrize("capability", [80, 90])
def test_adamw_moves_16_bytes_and_meets_no_barrier(capability: int, tmp_path: Path) -> None:
    """Where all is aligned: a barrier says that tensors of two dtypes went through shared memory."""
    model = MODELS["Llama-3.2-1B"]
    made = [launch for op in (master_adamws, block_adamws) for call in op(*model) for launch in launches(call)]
    aligned = [one for one in made if one[2]["ALIGNED"] and one[2].get("ORDER", "row") == "row"]
    assert len(aligned) >= 6
    for kernel, arguments, named in aligned:
        result = compiled(kernel, arguments, named, capability, tmp_path)
        assert result.barriers == 0
        assert 128 in result.widths
        assert 16 not in result.widths


@pytest.mark.parametrize("sides", [(208, 208), (48, 208), (208, 2048)], ids=str)
def test_rounded_sides_keep_wide_loads(sides: tuple[int, int], tmp_path: Path) -> None:
    """Blocks of `diagonal` and `slab` at Llama-3.2-1B: a side of 205 loads 16 bits at a time and spills."""
    width = sides[1]
    dys, packed = [empty(TOKENS, 2048)], empty(TOKENS, 2 * width if width < 2048 else width)
    blocks = Listed([(0, 1, 0)])
    item = Item(empty(2048, 2048), *(empty(1, *sides, dtype=torch.float32) for _ in range(4)), 1)
    for call in (
        lambda: block_grad.launch(dys, packed, blocks, sides),
        lambda: pack_columns.launch(empty(TOKENS, 2048), Listed([(0,)]), width),
        lambda: block_adamw.launch([block_adamw.Part(item, Listed([(0, 0)]))], Rule(lr=1e-4)),
    ):
        for kernel, arguments, named in launches(call):
            result = compiled(kernel, arguments, named, 90, tmp_path)
            assert result.local == 0, f"{result.name} spills {result.local} bytes"
            assert 128 in result.widths
            assert 16 not in result.widths


def test_every_kernel_is_compiled() -> None:
    made = {
        kernel.__name__
        for op in LAUNCHES.values()
        for call in op(*MODELS["Llama-3.2-1B"])
        for kernel, _, _ in launches(call)
    }
    assert made == kernels()
