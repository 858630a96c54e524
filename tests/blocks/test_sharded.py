"""Blocks of a sharded matrix: read, written and scored a part a rank, as of the whole; ranks are played one by one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.selection import block_scores
from lit_sparse.blocks.sharded import part_of

SHAPES = [(43, 50), (64, 48), (3, 17)]  # no size divides the first; the last has fewer rows than there are ranks
SIZES = [(8, 16), (10, 7), (64, 5)]


@contextmanager
def one_of(world: int, rank: int) -> Iterator[None]:
    """Be one rank of a group without communication."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_each(world: int, act: Callable[[Callable[[Tensor], DTensor]], Tensor], replicas: int = 1) -> list[Tensor]:
    """Return what `act` returns on each rank; it is given a function that shards a matrix."""
    out = []
    for rank in range(world * replicas):
        with one_of(world * replicas, rank):
            mesh = init_device_mesh("cpu", (replicas, world), mesh_dim_names=("replicate", "shard"))
            out.append(
                act(lambda t, mesh=mesh: distribute_tensor(t, mesh, [Replicate(), Shard(0)], src_data_rank=None))
            )
    return out


def chosen(shape: tuple[int, int], size: tuple[int, int]) -> Blocks:
    """Every second block, those at the ragged ends too."""
    rows, columns = -(-shape[0] // size[0]), -(-shape[1] // size[1])
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return Blocks.of(size, torch.tensor(places[::-2]))


def weight(shape: tuple[int, int], transposed: bool) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.t().contiguous() if transposed else values


def matrix(given: Tensor, transposed: bool) -> Tensor:
    return given.t() if transposed else given


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_have_one_value_of_each_block_entry(shape, size, world, transposed):
    whole, blocks = weight(shape, transposed), chosen(shape, size)
    parts = on_each(world, lambda shard: Blocks.of(size, blocks.index).read(matrix(shard(whole), transposed)))
    assert torch.equal(torch.stack(parts).sum(0), blocks.read(matrix(whole, transposed)))
    assert (torch.stack([part != 0 for part in parts]).sum(0) <= 1).all(), "an entry was read on two ranks"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_rank_writes_its_own_rows(shape, size, world, transposed):
    whole, blocks = weight(shape, transposed).bfloat16(), chosen(shape, size)
    values = torch.randn(len(blocks.index), *size, generator=torch.Generator().manual_seed(1))

    def write(shard: Callable[[Tensor], DTensor]) -> Tensor:
        sharded = shard(whole)
        Blocks.of(size, blocks.index).write(matrix(sharded, transposed), values)
        return sharded.to_local()

    written, wanted = torch.cat(on_each(world, write)), whole.clone()
    blocks.write(matrix(wanted, transposed), values)
    assert torch.equal(written, wanted)


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs", "l2"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_parts_add_up(shape, size, transposed, score):
    whole = weight(shape, transposed)
    parts = on_each(3, lambda shard: block_scores(matrix(shard(whole), transposed), size, score))
    wanted = block_scores(matrix(whole, transposed), size, score)
    torch.testing.assert_close(torch.stack(parts).sum(0), wanted, rtol=1e-5, atol=1e-6)


def test_ranks_with_copies_of_a_shard_write_the_same():
    whole, blocks = weight((43, 50), False), chosen((43, 50), (8, 16))

    def write(shard: Callable[[Tensor], DTensor]) -> Tensor:
        sharded = shard(whole)
        Blocks.of(blocks.size, blocks.index).write(sharded, torch.ones(len(blocks.index), *blocks.size))
        return sharded.to_local()

    first, second, third, fourth = on_each(2, write, replicas=2)
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    wanted = whole.clone()
    blocks.write(wanted, torch.ones(len(blocks.index), *blocks.size))
    assert torch.equal(torch.cat([first, second]), wanted)


def test_the_part_of_a_tensor_that_is_not_sharded_is_all_of_it():
    whole = weight((6, 4), False)
    assert part_of(whole).start == (0, 0)
    assert part_of(whole).values.data_ptr() == whole.data_ptr()
