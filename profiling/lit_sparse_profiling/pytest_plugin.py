"""A pytest fixture that measures, and limits, the peak memory that a block of code allocates.

pytest loads this file at every start, whether or not a test uses it. Torch is imported only when a test does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import device as Device

    from lit_sparse_profiling.allocator import Allocations

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Peak:
    """Memory that a block of code allocated, above the level at its begin. The figures are known once it has ended.

    Attributes:
        bytes: Peak, in bytes.
        left: Bytes still allocated at the end; negative if the block freed more than it allocated.
        method: Which allocator was read, and how.
    """

    def __init__(self) -> None:
        self._measured: Allocations | None = None

    @property
    def bytes(self) -> int:
        return self._known().requested

    @property
    def left(self) -> int:
        return self._known().left

    @property
    def method(self) -> str:
        return self._known().method

    def _known(self) -> Allocations:
        if self._measured is None:
            raise RuntimeError("The peak of a block was asked for before the block ended; ask for it below the block.")
        return self._measured


def limit_peak(at_most: int | str | None = None, device: Device | str | None = None) -> AbstractContextManager[Peak]:
    """Return a context manager that measures its block: `with limit_peak("50 MiB") as peak: ...`.

    Args:
        at_most: Limit of the peak in bytes, or as a size such as "50 MiB" or "1.5GiB"; None sets no limit.
        device: Device whose allocator is read; by default the GPU if there is one, else the CPU.

    Raises:
        ValueError: if `at_most` is not a size.
        AssertionError: at the end of the block, if its peak exceeded `at_most`.
    """
    return _limit_peak(None if at_most is None else parse_size(at_most), device)


@contextmanager
def _limit_peak(limit: int | None, device: Device | str | None) -> Iterator[Peak]:
    __tracebackhide__ = True  # pytest then shows the line of the test, not this function
    import torch

    from lit_sparse_profiling.allocator import measure_allocations
    from lit_sparse_profiling.reconcile import format_bytes

    peak = Peak()
    with measure_allocations(None if device is None else torch.device(device)) as found:
        yield peak
    peak._measured = found
    if limit is not None and found.requested > limit:
        raise AssertionError(
            f"The block allocated {format_bytes(found.requested)} ({found.requested:,} bytes) at its peak, and at most "
            f"{format_bytes(limit)} ({limit:,} bytes) were allowed; measured by: {found.method}."
        )


@pytest.fixture
def peak_memory() -> Callable[..., AbstractContextManager[Peak]]:
    """Measure what a block allocates: `with peak_memory(at_most="50 MiB") as peak: step()`, then `peak.bytes`."""
    return limit_peak


def parse_size(spelled: int | str) -> int:
    """Return the bytes of a size such as "50 MiB"; a whole number is bytes already.

    Raises:
        ValueError: if it is negative or not a size, or has a unit other than B, KiB, MiB, GiB and TiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*", str(spelled))
    if match:
        return int(float(match[1]) * UNITS[match[2]])
    if isinstance(spelled, int) and spelled >= 0:
        return spelled
    raise ValueError(
        f"At most {spelled!r} was asked for, but it is not a size; give bytes as a whole number, or text such as "
        f'"50 MiB" with one of the units {", ".join(UNITS)}.'
    )
