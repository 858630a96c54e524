"""Phases: what adds up, what nests, and that CUDA is read at the boundaries only."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_sparse_profiling import memory, phases
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.sections import Phase
from tests.profiling.pages import touch

MIB = 2**20


class Clock:
    """A clock that moves only on request."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(phases, "perf_counter", clock)
    return clock


@pytest.fixture
def by_name() -> Callable[[Phases], dict[str, Phase]]:
    return lambda measured: {phase.name: phase for phase in measured.to_list()}


def test_seconds_and_calls_add_up(clock: Clock) -> None:
    measured = Phases()
    for seconds in (1.0, 2.0):
        with measured("forward"):
            clock.now += seconds
        clock.now += 10
    (phase,) = measured.to_list()
    assert (phase.name, phase.seconds, phase.calls) == ("forward", 3.0, 2)
    assert (phase.peak_allocated, phase.peak_reserved) == (None, None)


def test_inner_time_counts_in_both(clock: Clock) -> None:
    measured = Phases()
    with measured("selection"):
        clock.now += 1
        with measured("forward"):
            clock.now += 2
        clock.now += 4
    assert [(p.name, p.seconds) for p in measured.to_list()] == [("selection", 7.0), ("forward", 2.0)]


def test_phases_may_overlap(clock: Clock) -> None:
    measured = Phases()
    measured.begin("a")
    clock.now += 1
    measured.begin("b")
    clock.now += 2
    measured.end("a")
    clock.now += 4
    measured.end("b")
    assert [(p.name, p.seconds) for p in measured.to_list()] == [("a", 3.0), ("b", 6.0)]


def test_own_seconds_add_up(clock: Clock) -> None:
    """Each moment belongs to the open phase that began last, however phases nest or overlap."""
    measured = Phases()
    clock.now += 1000  # in no phase
    measured.begin("a")
    clock.now += 1
    measured.begin("b")
    clock.now += 2
    measured.begin("c")
    clock.now += 4
    measured.end("b")
    clock.now += 8
    assert (measured.own("c"), measured.own("a", "b"), measured.own("none")) == (12.0, 3.0, 0.0)
    measured.end("c")
    clock.now += 16
    measured.end("a")
    assert {p.name: p.own for p in measured.to_list()} == {"a": 17.0, "b": 2.0, "c": 12.0}
    assert measured.elapsed == 1031.0


def test_a_processs_phases_begin_with_it() -> None:
    measured = Phases.of_process()
    (imports,) = measured.to_list()
    assert imports.name == "imports"
    assert imports.own == imports.seconds <= measured.elapsed
    script = (
        "import time; begun = time.time(); time.sleep(0.3); from lit_sparse_profiling.phases import process_age; "
        "print(process_age() >= time.time() - begun)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" or not phases.STAT.exists()


def test_a_system_that_does_not_tell_a_processs_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(phases, "STAT", tmp_path / "none")
    assert 0 < phases.process_age() == pytest.approx(time.process_time(), abs=1.0)


def test_a_phase_that_fails_is_counted(clock: Clock) -> None:
    measured = Phases()

    def forward() -> None:
        with measured("forward"):
            clock.now += 1
            raise MemoryError

    with pytest.raises(MemoryError):
        forward()
    with measured("forward"):
        clock.now += 1
    assert [(p.seconds, p.calls) for p in measured.to_list()] == [(2.0, 2)]


def test_a_phase_within_itself_and_an_end_without_begin_are_refused() -> None:
    measured = Phases()
    with measured("forward"), pytest.raises(ValueError, match="'forward' is to begin, but it is open already"):
        measured.begin("forward")
    with pytest.raises(ValueError, match="'forward' is to end, but it is not open"):
        measured.end("forward")


def test_a_phase_still_open_is_not_listed() -> None:
    measured = Phases()
    measured.begin("fit")
    assert measured.to_list() == []


def test_resident_peaks_belong_to_their_phase(by_name: Callable[[Phases], dict[str, Phase]]) -> None:
    measured = Phases()
    if measured.memory.method != memory.PER_PHASE:
        pytest.skip(f"this system cannot set the peak back: {measured.memory.method}")
    with measured("large"):
        touch(128 * MIB)
    with measured("outer"):
        with measured("inner"):
            touch(64 * MIB)
        with measured("after"):
            touch(1)
    with measured("large"):
        touch(1)
    peaks = {name: (phase.peak_rss or 0) / MIB for name, phase in by_name(measured).items()}
    assert peaks["large"] - peaks["after"] == pytest.approx(128, abs=8)
    assert peaks["inner"] - peaks["after"] == pytest.approx(64, abs=8)
    assert peaks["outer"] == peaks["inner"]


class Allocator:
    """Stand-in for CUDA's allocator, whose peaks fall to the current level on reset."""

    def __init__(self) -> None:
        self.held = self.peak = self.synchronised = 0

    def use(self, size: int, keep: bool = False) -> None:
        self.peak = max(self.peak, self.held + size)
        self.held += size if keep else 0

    def reset(self, _: torch.device) -> None:
        self.peak = self.held

    def stats(self, _: torch.device) -> dict[str, int]:
        peaks = {"requested": self.peak - 1, "allocated": self.peak, "reserved": self.peak + 1}
        return {f"{name}_bytes.all.peak": peak for name, peak in peaks.items()}

    def synchronize(self, _: torch.device) -> None:
        self.synchronised += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "synchronize", allocator.synchronize)
    monkeypatch.setattr(torch.cuda, "memory_stats", allocator.stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
    return allocator


def test_allocator_peaks_belong_to_their_phase(allocator: Allocator) -> None:
    allocator.use(1000)  # before any phase: in none
    measured = Phases(torch.device("cuda"))
    with measured("outer"):
        allocator.use(10, keep=True)
        with measured("inner"):
            allocator.use(100)
        allocator.use(1)
    with measured("inner"):
        allocator.use(50)
    found = {p.name: (p.peak_requested, p.peak_allocated, p.peak_reserved) for p in measured.to_list()}
    assert found == {"outer": (109, 110, 111), "inner": (109, 110, 111)}


def test_cuda_waits_at_the_boundaries_and_nowhere_else(allocator: Allocator) -> None:
    measured = Phases(torch.device("cuda"))
    with measured("forward"):
        assert allocator.synchronised == 1
    assert allocator.synchronised == 2
    measured.to_list()
    assert allocator.synchronised == 2


@pytest.mark.gpu
def test_peaks_of_a_real_device() -> None:
    device = torch.device("cuda")
    torch.ones(64 * MIB, device=device)
    measured, before = Phases(device), torch.cuda.memory_allocated()
    with measured("small"):
        kept = torch.ones(MIB, device=device)
    with measured("large"):
        torch.ones(16 * MIB, device=device)
    small, large = measured.to_list()
    assert small.peak_allocated is not None
    assert large.peak_allocated is not None
    assert small.peak_allocated - before < 64 * MIB
    assert large.peak_allocated - small.peak_allocated == 64 * MIB
    assert (large.peak_reserved or 0) >= large.peak_allocated
    assert kept.numel() == MIB
