"""Kernels on CPU tensors: interpreted in a process that has TRITON_INTERPRET=1, which test_interpreter.py starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.numpys import mend_interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAUNCHED: set[str] = set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test in the process that is for it: kernels are either interpreted or compiled in one."""
    here = Path(__file__).parent
    foreign = [
        item
        for item in items
        if here in item.path.parents and (item.get_closest_marker("interpreted") is not None) != INTERPRETED
    ]
    config.hook.pytest_deselected(items=foreign)
    items[:] = [item for item in items if item not in foreign]


def pytest_configure() -> None:
    if INTERPRETED:
        mend_interpreter()
        _note_launches()


def pytest_sessionfinish() -> None:
    if INTERPRETED and (file := os.environ.get("LAUNCHED")):
        Path(file).write_text("\n".join(sorted(LAUNCHED)))


def _note_launches() -> None:
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def noted(self: GridExecutor, *arguments: object, **named: object) -> None:
        LAUNCHED.add(self.fn.__name__)
        launch(self, *arguments, **named)

    GridExecutor.__call__ = noted  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)  # which fills it (torch.utils.deterministic.fill_uninitialized_memory)
    yield
    torch.use_deterministic_algorithms(False)
