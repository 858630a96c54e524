"""Resident memory: it follows allocations, and says so if the system does not report it."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sparse_profiling import memory
from lit_sparse_profiling.memory import ResidentMemory, trim_heap
from tests.profiling.pages import new_pages

MIB = 2**20
BLOCK = 64 * MIB
SLACK = 8 * MIB


def allocate() -> mmap.mmap:
    """Return BLOCK bytes of pages that are new to the process."""
    return new_pages(BLOCK)


@pytest.fixture
def resident() -> ResidentMemory:
    found = ResidentMemory()
    if found.method != memory.PER_PHASE:
        pytest.skip(f"this system cannot set the peak back: {found.method}")
    return found


def test_current_follows_what_is_allocated(resident: ResidentMemory) -> None:
    before, block, after = resident.current(), allocate(), resident.current()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(BLOCK, abs=SLACK)
    assert len(block) == BLOCK


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_current_is_in_bytes() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert ResidentMemory().current() == pytest.approx(pages * mmap.PAGESIZE, abs=2 * MIB)


def test_a_lap_has_its_own_peak_and_the_process_keeps_its_highest(resident: ResidentMemory) -> None:
    resident.lap()
    before = resident.current()
    allocate()
    with_block, without = resident.lap(), resident.lap()
    assert before is not None
    assert with_block is not None
    assert without is not None
    assert with_block - before == pytest.approx(BLOCK, abs=SLACK)
    assert without - before == pytest.approx(0, abs=SLACK)
    assert (resident.peak() or 0) >= with_block


def test_the_peak_before_the_first_lap_is_not_lost(resident: ResidentMemory) -> None:
    allocate()
    top = memory._status("VmHWM")
    assert ResidentMemory().peak() == top


def no_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")


def test_the_method_says_when_the_peak_cannot_be_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_reset(tmp_path, monkeypatch)
    resident = ResidentMemory()
    assert "peak so far, not the phase's" in resident.method
    allocate()
    first, second = resident.lap(), resident.lap()
    assert first is not None
    assert second is not None
    assert second >= first


def test_without_proc_the_system_call_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    resident = ResidentMemory()
    assert "ru_maxrss" in resident.method
    assert "peak so far" in resident.method
    assert resident.current() is None
    assert (resident.lap() or 0) > 32 * MIB


def test_an_unknown_peak_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(memory, "_maxrss", lambda: None)
    resident = ResidentMemory()
    assert resident.method.startswith("not measured")
    assert (resident.current(), resident.lap(), resident.peak()) == (None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's ru_maxrss is what it is about")
def test_a_process_does_not_inherit_the_peak_of_the_one_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = allocate()
    code = "from lit_sparse_profiling import memory; print(memory._peak())"
    root = Path(memory.__file__).parents[1]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(child.stdout) < BLOCK
    assert len(block) == BLOCK


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_is_returned() -> None:
    kept = [bytearray(2000) for _ in range(100_000)][::1000]  # here and there, so that glibc keeps what is between them
    before = ResidentMemory().current()
    trim_heap()
    after = ResidentMemory().current()
    assert before is not None
    assert after is not None
    assert before - after > 50 * 2**20
    assert len(kept) == 100
