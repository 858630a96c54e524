"""AdamW on masters of blocks, and the matrices that hold them, against torch.optim.AdamW and the blocks one by one."""

import re

import pytest
import torch

from lit_sparse_kernels.block_adamw import CASES, Part, block_adamw, launch, reference
from lit_sparse_kernels.jit import Listed
from lit_sparse_kernels.master_adamw import Item, Rule
from tests.kernels.test_master_adamw import RULE, by_torch, guarded, largest, rounded

STEPS = 3
SCALE = torch.tensor(3.0)


def parts(shapes, size, blocks, dtype, hold=lambda weight: guarded(weight), offset=16):
    """Matrices with the masters of their blocks, zero past the matrices' edges, and moments of earlier steps."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (shape, rows) in enumerate(zip(shapes, blocks, strict=True)):
        weight = hold(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        dtype_of_master = torch.promote_types(dtype, torch.float32)
        inside = blocks_of(torch.ones(shape, dtype=dtype_of_master), rows, size)
        draw = lambda inside=inside: torch.randn(inside.shape, generator=generator).to(inside.dtype) * inside  # noqa: E731
        master = guarded(blocks_of(weight.to(dtype_of_master), rows, size), offset)
        grad, m, v = guarded(draw(), offset), guarded(draw(), offset), guarded(draw().square(), offset)
        made.append(Part(Item(weight, grad, master, m, v, 3 + number), Listed(rows)))
    return made


def blocks_of(matrix, rows, size):
    (height, width) = size
    out = torch.zeros(len(rows), height, width, dtype=matrix.dtype)
    for block, (row, column) in zip(out, rows, strict=True):
        values = matrix[row * height : (row + 1) * height, column * width : (column + 1) * width]
        block[: values.shape[0], : values.shape[1]] = values
    return out


def index(part):
    return torch.tensor(part.blocks.rows, dtype=torch.int32).reshape(-1, 2)


def public(given, rule, scale):
    columns = [list(column) for column in zip(*(part.item for part in given), strict=True)]
    block_adamw(columns[0], list(map(index, given)), *columns[1:], rule, scale)


def assert_moves_the_blocks(update, given, scale=None):
    """The masters as torch's AdamW has them (as close as in test_master_adamw), written where the blocks are."""
    exact = [by_torch(part.item, RULE, scale, torch.float64, STEPS) for part in given]
    eager = [by_torch(part.item, RULE, scale, torch.float32, STEPS) for part in given]
    starts = [[tensor.clone() for tensor in part.item.moved()] for part in given]
    for step in range(STEPS):
        for part, start in zip(given, starts, strict=True):
            part.item.grad.copy_(start[1])  # torch's CPU operation divides it in place
        update([Part(part.item._replace(step=part.item.step + step), part.blocks) for part in given], RULE, scale)
    for part, wanted, usual, start in zip(given, exact, eager, starts, strict=True):
        for got, right, rough, old in zip(part.item.moved()[2:], wanted, usual, start[2:], strict=True):
            floor = STEPS * 2**-23 * max(largest(right), largest(old))
            assert largest(got - right) <= 2 * largest(rough - right) + floor
        assert_holds_the_blocks(part, start[0], interpreted=update is launch)


def assert_holds_the_blocks(part, before, interpreted):
    weight, _, master, m, v, _ = part.item
    size = master.shape[1:]
    inside = blocks_of(torch.ones(weight.shape, dtype=torch.bool), part.blocks.rows, size)
    assert torch.equal(
        blocks_of(weight, part.blocks.rows, size),
        torch.where(inside, rounded(master, weight.dtype, interpreted), torch.zeros((), dtype=weight.dtype)),
    )
    assert not any(tensor[~inside].any() for tensor in (master, m, v)), "the padding moved"
    untouched = torch.ones(weight.shape, dtype=torch.bool)
    for row, column in part.blocks.rows:
        untouched[row * size[0] : (row + 1) * size[0], column * size[1] : (column + 1) * size[1]] = False
    assert torch.equal(weight[untouched], before[untouched])
    for tensor in part.item.moved():  # what stands around each of them in memory is NaN, still
        memory = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert int(memory.isnan().sum()) == len(memory) - tensor.numel()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moves_the_blocks(case):
    assert_moves_the_blocks(public, parts(*case), SCALE)


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_moves_the_blocks(case, poisoned):
    assert_moves_the_blocks(launch, parts(*case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_moves_the_blocks(case):
    def update(given, rule, scale):
        there = [Part(Item(*(t.cuda() for t in part.item.moved()), part.item.step), part.blocks) for part in given]
        public(there, rule, scale.cuda())
        for old, new in zip(given, there, strict=True):
            for mine, its in zip(old.item.moved(), new.item.moved(), strict=True):
                mine.copy_(its)

    assert_moves_the_blocks(update, parts(*case), SCALE)


def as_transpose(weight):
    return guarded(weight.t().contiguous()).t()


def with_gaps(weight):
    memory = torch.full((*weight.shape, 3), torch.nan, dtype=weight.dtype)
    memory[..., 1] = weight
    return memory[..., 1]


@pytest.mark.parametrize("hold", [as_transpose, with_gaps])
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_writes_matrices_of_any_strides(case, hold):
    assert_moves_the_blocks(public, parts(*case, hold))


@pytest.mark.interpreted
@pytest.mark.parametrize("hold", [as_transpose, with_gaps])
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_the_kernel_writes_matrices_of_any_strides(case, hold, poisoned):
    assert_moves_the_blocks(launch, parts(*case, hold), SCALE)


@pytest.mark.interpreted
def test_the_kernel_takes_mixed_matrices_at_any_address(poisoned):
    given = parts(*CASES[0], offset=1) + parts(*CASES[1]) + parts(*CASES[2], as_transpose) + parts(*CASES[4])
    assert_moves_the_blocks(launch, given)


@pytest.mark.interpreted
def test_the_kernel_leaves_the_padding_whatever_its_gradient_is(poisoned):
    (part,) = parts([(20, 20)], (16, 16), [[(1, 1)]], torch.float32)
    before = part.item.weight.clone()
    part.item.grad[:, 4:], part.item.grad[:, :, 4:] = 1.0, 1.0
    launch([part], Rule(lr=0.1))
    assert_holds_the_blocks(part, before, interpreted=True)


@pytest.mark.interpreted
def test_the_kernel_counts_as_a_change(poisoned):
    (part,) = parts(*CASES[0])
    before = part.item.weight._version
    launch([part], RULE)
    assert part.item.weight._version == before + 1


def test_the_reference_moves_the_blocks():
    (part,) = parts([(40, 50)], (16, 24), [[(2, 2), (0, 1)]], torch.float64)
    before = part.item.weight.clone()
    wanted = reference(part.item, index(part), RULE)
    public([part], RULE, None)
    torch.testing.assert_close([part.item.weight, *part.item.moved()[2:]], list(wanted), rtol=1e-12, atol=1e-12)
    assert_holds_the_blocks(part, before, interpreted=False)


ZEROS = torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"weights": [torch.zeros(8)]}, "weights[0] has shape (8,); expected (any, any)"),
        ({"weights": [torch.zeros(8, 8).int()]}, "weights[0] is torch.int32; expected torch.float32 or"),
        ({"weights": [torch.zeros(8, 8, device="meta")]}, "weights[0] is on meta; expected cpu"),
        ({"masters": [torch.zeros(4, 4)]}, "masters[0] has shape (4, 4); expected (blocks, height, width)"),
        ({"masters": [ZEROS.mT[:, :2]]}, "masters[0] has strides (16, 1, 4); expected a contiguous tensor"),
        ({"masters": [ZEROS.half()]}, "masters[0] is torch.float16; expected torch.float32"),
        ({"grads": [torch.zeros(1, 4, 5)]}, "grads[0] has shape (1, 4, 5); expected (1, 4, 4)"),
        ({"grads": [ZEROS.clone().mT]}, "grads[0] has strides (16, 1, 4); expected (16, 4, 1)"),
        ({"indices": [torch.tensor([[2, 0]])]}, "indices[0] has (2, 0), which lies outside"),
        ({"indices": [torch.tensor([[0, -1]])]}, "indices[0] has (0, -1), which lies outside"),
        ({"indices": [torch.tensor([[0, 0], [0, 0]])]}, "indices[0] has (0, 0) twice; blocks may not overlap"),
        ({"indices": [torch.tensor([[0, 0], [0, 1]])]}, "indices[0] has 2 blocks; expected 1, as the master has"),
        ({"indices": [torch.zeros(1, 2)]}, "indices[0] is torch.float32 of shape (1, 2); expected integers"),
        ({"indices": []}, "indices has 0 entries; expected 1, as weights has"),
        ({"steps": [1, 2]}, "steps has 2 entries; expected 1, as weights has"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = {"weights": [torch.zeros(8, 8)], "indices": [torch.tensor([[0, 0]])], "steps": [1], "rule": RULE}
    given |= {name: [ZEROS] for name in ("grads", "masters", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=re.escape(expected)):
        block_adamw(**given | changed)
