"""The model of CUDA's caching allocator, beside what its source says of single requests."""

import pytest

from lit_sparse_profiling.caching import CachingAllocator, replay

MIB = 2**20


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # the rest of less than 1 MiB stays with the block
    ],
)
def test_a_request_takes_a_segment_of_its_pool(size: int, allocated: int, reserved: int) -> None:
    found = replay([1], [size])
    assert (found.allocated, found.reserved) == (allocated, reserved)


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert replay(range(1, 5), [512 * 1024] * 4).reserved == 2 * MIB
    assert replay(range(1, 6), [512 * 1024] * 5).reserved == 4 * MIB


def test_freed_neighbours_are_merged_and_taken_again() -> None:
    # Three of 6 MiB fill most of 20 MiB; the first two, freed, make room for one of 12 without a new segment.
    assert replay([1, 2, 3, -1, -2, 4], [6 * MIB, 6 * MIB, 6 * MIB, 12 * MIB]).reserved == 20 * MIB
    # Freed apart from each other they do not.
    assert replay([1, 2, 3, -1, -3, 4], [6 * MIB, 6 * MIB, 6 * MIB, 12 * MIB]).reserved == 32 * MIB


def test_the_best_fit_is_taken() -> None:
    allocator = CachingAllocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(16 * MIB)
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(15 * MIB).address == small.address
    assert allocator.allocated == 16 * MIB  # not split: the rest of 1 MiB is not more than 1 MiB


def test_what_is_freed_leaves_nothing_allocated_and_stays_reserved() -> None:
    allocator = CachingAllocator()
    for piece in [allocator.allocate(size) for size in (100, 3 * MIB, 30 * MIB, MIB, 700)]:
        allocator.release(piece)
    assert allocator.allocated == 0
    assert allocator.reserved == (2 + 20 + 30) * MIB
