"""The fixture `peak_memory`: what it tells, what it refuses, and that it costs nothing where it is not used."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lit_sparse_profiling import pytest_plugin
from lit_sparse_profiling.pytest_plugin import limit_peak, parse_size

pytest_plugins = ["pytester"]

MIB = 2**20
IMPORTING = "from lit_sparse_profiling.pytest_plugin import peak_memory\n"
"""For a conftest, so that the fixture exists without an installation."""


@dataclass
class Allocations:
    requested: int = 0
    left: int = 0
    method: str = "scripted"


class FakeAllocator(types.ModuleType):
    """Stand-in for `lit_sparse_profiling.allocator` that reports scripted figures after the block."""

    def __init__(self) -> None:
        super().__init__("lit_sparse_profiling.allocator")
        self.says = Allocations()
        self.asked: list[torch.device | None] = []

    @contextmanager
    def measure_allocations(self, device: torch.device | None = None) -> Iterator[Allocations]:
        self.asked.append(device)
        found = Allocations()
        yield found
        found.requested, found.left = self.says.requested, self.says.left


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> FakeAllocator:
    fake = FakeAllocator()
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


def test_the_peak_is_known_after_the_block_below_the_block(allocator: FakeAllocator) -> None:
    allocator.says = Allocations(50 * MIB, -3)
    with limit_peak() as peak:
        pass
    assert (peak.bytes, peak.left, peak.method) == (50 * MIB, -3, "scripted")
    assert allocator.asked == [None]


@pytest.mark.parametrize("name", ["bytes", "left", "method"])
@pytest.mark.usefixtures("allocator")
def test_figures_are_refused_inside_the_block(name: str) -> None:
    with limit_peak() as peak, pytest.raises(RuntimeError, match="before the block ended; ask for it below the block"):
        getattr(peak, name)


def test_the_device_may_be_named(allocator: FakeAllocator) -> None:
    with limit_peak(device="cpu"), limit_peak(device=torch.device("cuda", 1)):
        pass
    assert allocator.asked == [torch.device("cpu"), torch.device("cuda", 1)]


@pytest.mark.parametrize("at_most", [50 * MIB, "50 MiB", "50MiB", "51200 KiB"])
def test_a_limit_is_reached_but_not_passed(allocator: FakeAllocator, at_most: int | str) -> None:
    allocator.says = Allocations(50 * MIB)
    with limit_peak(at_most):
        pass
    allocator.says = Allocations(50 * MIB + 1)
    with (
        pytest.raises(AssertionError, match=r"50\.00 MiB \(52,428,801 bytes\) .* at most 50\.00 MiB \(52,428,800 byt"),
        limit_peak(at_most),
    ):
        pass


def test_a_failure_of_the_block_is_not_hidden(allocator: FakeAllocator) -> None:
    allocator.says = Allocations(50 * MIB)
    with pytest.raises(ZeroDivisionError), limit_peak("1 B"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("spelled", "found"),
    [
        ("50 MiB", 50 * MIB),
        ("1.5GiB", 3 * 2**29),
        (" 2 TiB ", 2**41),
        ("0 B", 0),
        ("0.5 KiB", 512),
        (7, 7),
        (0, 0),
    ],
)
def test_sizes_are_read(spelled: int | str, found: int) -> None:
    assert parse_size(spelled) == found


@pytest.mark.parametrize("spelled", ["50", "50 MB", "50 mib", "MiB", "-1 MiB", "1e3 MiB", "", -1, 1.5])
def test_what_is_no_size_is_refused_before_the_block(spelled: int | str) -> None:
    with pytest.raises(ValueError, match=r"it is not a size; give bytes .* units B, KiB, MiB, GiB, TiB"):
        limit_peak(spelled)


def test_the_fixture_in_a_test_of_a_user(pytester: pytest.Pytester, allocator: FakeAllocator) -> None:
    allocator.says = Allocations(50 * MIB, left=9)
    pytester.makeconftest(IMPORTING)
    pytester.makepyfile("""
        def test_tells(peak_memory):
            with peak_memory() as peak:
                pass
            assert (peak.bytes, peak.left) == (50 * 2**20, 9)

        def test_fails(peak_memory):
            with peak_memory(at_most="40 MiB"):
                pass
    """)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*with peak_memory(at_most=?40 MiB?):*",
            "*AssertionError: The block allocated 50.00 MiB (52,428,800 bytes) at its peak, and at most 40.00 MiB*",
        ]
    )


def test_loading_the_plugin_imports_no_torch() -> None:
    code = "import sys, lit_sparse_profiling.pytest_plugin; sys.exit('torch' in sys.modules)"
    root = str(Path(pytest_plugin.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}).returncode == 0


def test_the_real_allocator() -> None:
    with limit_peak("24 MiB", device="cpu") as peak:
        kept = torch.ones(2 * MIB)  # of 4 bytes each
        torch.ones(3 * MIB)
    assert peak.bytes == pytest.approx(20 * MIB, abs=4096)
    assert peak.left == pytest.approx(8 * MIB, abs=4096)
    assert "CPU" in peak.method
    assert kept.numel() == 2 * MIB
    with pytest.raises(AssertionError, match=r"at most 1\.00 MiB"), limit_peak("1 MiB", device="cpu"):
        torch.ones(MIB)


@pytest.mark.gpu
def test_the_real_allocator_of_a_gpu() -> None:
    with limit_peak("24 MiB") as peak:
        kept = torch.ones(2 * MIB, device="cuda")
        torch.ones(3 * MIB, device="cuda")
    assert (peak.bytes, peak.left) == (20 * MIB, 8 * MIB)
    assert "CUDA" in peak.method
    assert kept.numel() == 2 * MIB
