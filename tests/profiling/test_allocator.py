"""Measured allocations of a block of code, to the byte; a recording disturbs no other profiler."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from lit_sparse_profiling import allocator
from lit_sparse_profiling.allocator import CPU, CUDA, Allocations, CPUEvents, measure_allocations

F32 = 4
ON_CPU = torch.device("cpu")
ON_CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    assert not _profiler_enabled()


# ---- a CPU


def test_the_peak_and_the_bytes_left_are_measured() -> None:
    with measure_allocations(ON_CPU) as found:
        kept = torch.ones(1000)
        torch.ones(500)
        other = torch.ones(300)
        del other
    assert found == Allocations(requested=1500 * F32, left=1000 * F32, method=CPU)
    assert kept.numel() == 1000


def test_a_block_without_allocations_measures_zero() -> None:
    with measure_allocations(ON_CPU) as found:
        pass
    assert (found.requested, found.left) == (0, 0)


def test_freeing_an_earlier_block_is_not_counted() -> None:
    before = [torch.ones(1000)]
    with measure_allocations(ON_CPU) as found:
        before.clear()
        torch.ones(10)
    assert (found.requested, found.left) == (10 * F32, 0)


def test_sizes_from_an_earlier_recording_are_not_counted() -> None:
    """Torch reports a freed block with the size that an earlier recording saw at its address."""
    with measure_allocations(ON_CPU):
        earlier = [torch.ones(1000) for _ in range(20)]
        addresses = {block.data_ptr() for block in earlier}
    earlier.clear()
    before = [torch.ones(1000) for _ in range(20)]
    if not addresses & {block.data_ptr() for block in before}:
        pytest.skip("this allocator gives no address out again")
    with measure_allocations(ON_CPU) as found:
        before.clear()
        torch.ones(10)
    assert (found.requested, found.left) == (10 * F32, 0)


def test_freeing_a_block_known_before_the_mark_is_counted() -> None:
    events = CPUEvents()
    events.start()
    known = [torch.ones(1000)]
    events.mark()
    known.clear()
    kept = torch.ones(10)
    events.stop()
    assert (events.peak, events.left) == (0, (10 - 1000) * F32)
    assert kept.numel() == 10


def test_allocations_after_the_recording_are_not_counted() -> None:
    events = CPUEvents()
    events.start()
    events.mark()
    kept = torch.ones(10)
    events.stop()
    torch.ones(1000)
    assert (events.peak, events.left) == (kept.nbytes, kept.nbytes)


def test_live_blocks_not_named_at_the_mark_are_unnamed() -> None:
    events = CPUEvents()
    events.start()
    named, kept, freed = torch.ones(100), [torch.ones(20)], [torch.ones(3000)]
    freed.clear()
    events.mark([named.data_ptr(), 0])
    kept.clear()
    torch.ones(30)
    events.stop()
    assert (events.unnamed, events.peak, events.left) == (20 * F32, 10 * F32, -20 * F32)


def test_memory_of_other_devices_is_not_the_cpus() -> None:
    def allocation(when: int, size: int, device: str) -> SimpleNamespace:
        fields = SimpleNamespace(alloc_size=size, ptr=when, device=torch.device(device))
        return SimpleNamespace(tag=_EventType.Allocation, name="", start_time_ns=when, extra_fields=fields)

    events = [allocation(3, -8, "cpu"), allocation(1, 8, "cpu"), allocation(2, 4096, "cuda:0")]
    other = SimpleNamespace(tag=_EventType.TorchOp, name="aten::mm", start_time_ns=2, extra_fields=None)
    assert [change[:2] for change in allocator.size_changes([*events, other])] == [(1, 8), (3, -8)]


def test_a_block_that_fails_leaves_no_profiler_running() -> None:
    with pytest.raises(KeyError), measure_allocations(ON_CPU):
        raise KeyError("in the block")


def test_a_recording_can_be_dropped_at_any_time() -> None:
    for marked in (False, True):
        events = CPUEvents()
        events.start()
        if marked:
            events.mark()
        events.close()
        assert (events.peak, events.left) == (0, 0)


def test_a_recording_without_a_mark_is_refused() -> None:
    events = CPUEvents()
    events.start()
    with pytest.raises(RuntimeError, match="without a mark; call mark between start and stop"):
        events.stop()


def test_another_running_profiler_is_not_stopped() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        with pytest.raises(RuntimeError, match=r"another torch\.profiler runs; stop that one first"):
            CPUEvents().start()
        torch.ones(3).sigmoid()
    assert "aten::sigmoid" in {event.key for event in theirs.key_averages()}


# ---- a GPU


class Stats:
    """Stand-in for `torch.cuda.memory_stats` that returns scripted answers in turn."""

    def __init__(self, *answers: dict[str, int]) -> None:
        self.answers = list(answers)
        self.resets = 0

    def __call__(self, device: torch.device) -> dict[str, int]:
        assert device == ON_CUDA
        return self.answers.pop(0)

    def reset(self, device: torch.device) -> None:
        assert device == ON_CUDA
        assert len(self.answers) == 1, "set back after the level was read, and before the block"
        self.resets += 1


def levels(current: int, peak: int) -> dict[str, int]:
    return {"requested_bytes.all.current": current, "requested_bytes.all.peak": peak}


@pytest.mark.parametrize("before", [levels(100, 5000), {}], ids=["in use", "CUDA has not begun"])
def test_cuda_peaks_are_those_of_the_block(monkeypatch: pytest.MonkeyPatch, before: dict[str, int]) -> None:
    stats = Stats(before, levels(130, 900))
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", stats.reset)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with measure_allocations(ON_CUDA) as found:
        assert stats.resets == 1
    held = before.get("requested_bytes.all.current", 0)
    assert found == Allocations(requested=900 - held, left=130 - held, method=CUDA)


def test_without_a_device_it_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats(levels(0, 0), levels(8, 16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", stats.reset)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with measure_allocations() as found:
        pass
    assert found.method == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with measure_allocations() as found:
        pass
    assert found.method == CPU


@pytest.mark.gpu
def test_a_real_gpu_to_the_byte() -> None:
    before = [torch.ones(1000, device=ON_CUDA)]
    with measure_allocations() as found:
        kept = torch.ones(1001, device=ON_CUDA)
        before.clear()
        torch.ones(400, device=ON_CUDA)
    assert found == Allocations(requested=kept.nbytes, left=F32, method=CUDA)


def test_a_free_of_a_block_from_before_the_recording_is_seen_if_it_is_told() -> None:
    kept, gone = torch.ones(1000), torch.ones(2000)
    events = CPUEvents({tensor.data_ptr(): tensor.nbytes for tensor in (kept, gone)})
    events.start()
    events.mark([tensor.data_ptr() for tensor in (kept, gone)])
    new = torch.ones(500)
    events.tell_freed(gone.data_ptr())
    del gone
    assert new.sum() == 500
    events.stop()
    assert (events.peak, events.left) == (2000, 2000 - 8000)
