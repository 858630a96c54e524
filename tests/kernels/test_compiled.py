"""Every kernel compiled ahead of time for an A100 and an H100, at the shapes of real models; no GPU is needed.

What a GPU test would not show: spilled registers, too much shared memory for the chip, products without tensor cores.
"""

from pathlib import Path

import pytest
import torch

from lit_sparse_kernels import block_adamw, block_grad, pack_columns
from lit_sparse_kernels.jit import Listed
from lit_sparse_kernels.master_adamw import Item, Rule
from tests.kernels.test_interpreter import kernels

pytest.importorskip("triton")
from benchmarks.ahead import (
    LAUNCHES,
    MODELS,
    SHARED_BYTES,
    TOKENS,
    block_adamws,
    compiled,
    empty,
    launches,
    master_adamws,
)


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
