"""Fixtures of the profiler's tests."""

import pytest

from lit_sparse_profiling.memory import trim_heap


@pytest.fixture(autouse=True)
def trimmed_heap() -> None:
    """Return freed memory to the system, which an allocation would reuse without a rise of resident memory."""
    trim_heap()
