"""Packed input columns, against the definition."""

import re

import pytest
import torch

from lit_sparse_kernels.jit import Listed
from lit_sparse_kernels.pack_columns import CASES, launch, launch_unpack, pack_columns, reference, unpack_columns


def inputs(tokens, width_in, width, columns, dtype, to):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width_in, generator=generator).to(dtype)
    packed = torch.randn(tokens, len(columns) * width, generator=generator).to(dtype)
    return x, packed, torch.tensor(columns, dtype=torch.int32), width, to


def kernel_packs(x, columns, width, dtype=None):
    return launch(x, Listed([(c,) for c in columns.tolist()]), width, dtype)


def kernel_unpacks(packed, columns, width, width_in):
    return launch_unpack(packed, Listed([(c,) for c in columns.tolist()]), width, width_in)


def assert_packs(pack, x, columns, width, dtype=None):
    got, expected = pack(x, columns, width, dtype), reference(x, columns, width).to(dtype or x.dtype)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def unpacked(packed, columns, width, width_in):
    """The definition: the transpose of a selection of columns."""
    out = packed.new_zeros(len(packed), -(-width_in // width) * width)
    for place, column in enumerate(columns.tolist()):
        out[:, column * width : (column + 1) * width] = packed[:, place * width : (place + 1) * width]
    return out[:, :width_in]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition_bit_for_bit(case, poisoned):
    x, packed, columns, width, to = inputs(*case)
    assert_packs(pack_columns, x, columns, width, to)
    got = unpack_columns(packed, columns, width, case[1])
    assert torch.equal(got, unpacked(packed, columns, width, case[1]))


@pytest.mark.interpreted  # the interpreter cuts off what it should round to bf16; copies of bf16 it gets right
@pytest.mark.parametrize(
    "case", [case for case in CASES if case[5] in (case[4], torch.float32, torch.float16)], ids=str
)
def test_the_kernel_is_the_definition_bit_for_bit(case, poisoned):
    x, packed, columns, width, to = inputs(*case)
    assert_packs(kernel_packs, x, columns, width, to)
    assert torch.equal(kernel_unpacks(packed, columns, width, case[1]), unpacked(packed, columns, width, case[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_makes_the_definition_bit_for_bit(case):
    x, packed, columns, width, to = (a.cuda() if isinstance(a, torch.Tensor) else a for a in inputs(*case))
    assert_packs(pack_columns, x, columns, width, to)
    got = unpack_columns(packed, columns, width, case[1])
    assert torch.equal(got, unpacked(packed, columns, width, case[1]))


def test_columns_may_be_inference_tensors():
    """As where the first pass is a validation's; they count no versions, and each call reads them anew."""
    with torch.inference_mode():
        x, columns = torch.arange(8.0).reshape(1, 8), torch.tensor([1], dtype=torch.int32)
        first = pack_columns(x, columns, 2)
        columns.fill_(3)
        assert (first.tolist(), pack_columns(x, columns, 2).tolist()) == ([[2, 3]], [[6, 7]])


@pytest.mark.interpreted
def test_the_kernel_reads_any_strides(poisoned):
    assert_reads_any_strides(kernel_packs, kernel_unpacks)


def test_reads_any_strides(poisoned):
    assert_reads_any_strides(pack_columns, unpack_columns)


def assert_reads_any_strides(pack, unpack):
    x, packed, columns, width, _ = inputs(*CASES[1])
    for strided in (x.t().contiguous().t(), torch.cat([x, x], dim=1)[:, : x.shape[1]], x[:1].expand(len(x), -1)):
        assert_packs(pack, strided, columns, width)
    strided = torch.stack([packed, packed], dim=2)[:, :, 0]
    assert torch.equal(unpack(strided, columns, width, x.shape[1]), unpacked(packed, columns, width, x.shape[1]))


def test_some_columns_are_a_copy_of_their_own_bytes():
    x = torch.randn(64, 96)
    packed = pack_columns(x, torch.tensor([0, 2]), 32)
    assert packed.untyped_storage().nbytes() == 64 * 64 * 4
    assert packed.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_all_columns_are_the_input_itself_unless_it_is_part_of_more():
    x = torch.randn(64, 96)
    assert pack_columns(x, torch.arange(3), 32).data_ptr() == x.data_ptr()
    part = torch.randn(128, 96)[:64]
    packed = pack_columns(part, torch.arange(3), 32)
    assert packed.untyped_storage().nbytes() == part.nbytes
    assert pack_columns(x, torch.arange(3), 32, torch.float64).dtype == torch.float64


def test_compiled_it_is_always_a_copy():
    x, columns = torch.randn(64, 96), torch.arange(3)
    compiled = torch.compile(lambda x: pack_columns(x, columns, 32), backend="aot_eager", fullgraph=True)
    packed = compiled(x)
    assert torch.equal(packed, x)
    assert packed.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(("tokens", "width_in", "width", "columns", "dtype", "to"), CASES)
def test_unpacking_is_the_transpose_of_packing(tokens, width_in, width, columns, dtype, to):
    x, y, kept, _, _ = inputs(tokens, width_in, width, columns, dtype, to)
    packed, back = pack_columns(x, kept, width), unpack_columns(y, kept, width, width_in)
    torch.testing.assert_close((packed.double() * y.double()).sum(), (x.double() * back.double()).sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compilers_see_the_ops(case):
    x, packed, columns, width, to = inputs(*case)
    torch.library.opcheck(torch.ops.lit_sparse.pack_columns.default, (x, columns, width, to))
    torch.library.opcheck(torch.ops.lit_sparse.unpack_columns.default, (packed, columns, width, case[1]))


COLUMNS = [
    ([0, 3], "columns_C has (3,), which lies outside; expected columns below 3"),
    ([-1, 0], "columns_C has (-1,), which lies outside; expected columns below 3"),
    ([1, 1], "columns_C has (1,) twice; blocks may not overlap"),
    ([2, 0], "columns_C is [2, 0]; expected sorted columns"),
    ([[0, 2]], "columns_C is torch.int64 of shape (1, 2); expected integers of shape (N,)"),
    ([0.0, 2.0], "columns_C is torch.float32 of shape (2,); expected integers of shape (N,)"),
]


@pytest.mark.parametrize(("columns", "expected"), COLUMNS)
def test_refuses_columns_in_a_sentence(columns, expected):
    columns = torch.tensor(columns)
    with pytest.raises(ValueError, match=re.escape(expected)):
        pack_columns(torch.zeros(5, 10), columns, 4)
    with pytest.raises(ValueError, match=re.escape(expected)):
        unpack_columns(torch.zeros(5, 4 * len(columns)), columns, 4, 10)


def test_refuses_all_columns_out_of_order():
    with pytest.raises(ValueError, match=re.escape("columns_C is [1, 0]; expected sorted columns")):
        pack_columns(torch.zeros(5, 8), torch.tensor([1, 0]), 4)


def test_refuses_what_does_not_go_together():
    columns = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=re.escape("x_TK has shape (5,); expected (any, any)")):
        pack_columns(torch.zeros(5), columns, 4)
    with pytest.raises(ValueError, match=re.escape("x_TK is torch.int32; expected torch.float32")):
        pack_columns(torch.zeros(5, 10, dtype=torch.int32), columns, 4)
    with pytest.raises(ValueError, match=re.escape("packed_TP has shape (5, 4); expected (any, 8)")):
        unpack_columns(torch.zeros(5, 4), columns, 4, 10)
    with pytest.raises(ValueError, match=re.escape("columns_C is on meta; expected cpu, where x_TK is")):
        pack_columns(torch.zeros(5, 10), columns.to("meta"), 4)
    with pytest.raises(ValueError, match=re.escape("columns_C is on meta; expected cpu, where packed_TP is")):
        unpack_columns(torch.zeros(5, 8), columns.to("meta"), 4, 10)
