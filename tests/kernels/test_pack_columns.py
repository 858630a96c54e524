"""Packed input columns, against the definition."""

import pytest
import torch

from lit_sparse_kernels.pack_columns import CASES, pack_columns, reference, unpack_columns


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition_bit_for_bit(case):
    tokens, width_in, width, columns, dtype = case
    x = torch.randn(tokens, width_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = torch.tensor(columns, dtype=torch.int64)
    assert torch.equal(pack_columns(x, columns, width), reference(x, columns, width))


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


@pytest.mark.parametrize(("tokens", "inputs", "width", "columns", "dtype"), CASES)
def test_unpacking_is_the_transpose_of_packing(tokens, inputs, width, columns, dtype):
    kept = torch.tensor(columns, dtype=torch.int64)
    x, y = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, len(columns) * width).to(dtype)
    packed, unpacked = pack_columns(x, kept, width), unpack_columns(y, kept, width, inputs)
    torch.testing.assert_close((packed.double() * y.double()).sum(), (x.double() * unpacked.double()).sum())
