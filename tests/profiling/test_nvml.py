"""NVML: attribution of memory, power and energy of windows, and drivers that report less."""

import inspect
import os
import subprocess
import sys
from threading import Event
from types import SimpleNamespace

import pynvml
import pytest
import torch

from lit_sparse_profiling import nvml as sampler
from lit_sparse_profiling.nvml import NVML, NVMLMissing, device_uuid
from lit_sparse_profiling.nvml_device import COMPUTE
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.speed_sections import Throughput
from tests.profiling.fake_nvml import HANDLE, MIB, MIG_UUID, UUID, FakeNVML

OURS = os.getpid()
HOST, FOREIGN, THIRD = 4_000_001, 4_000_002, 4_000_003
"""Pids above Linux's maximum, so that none is this process's."""

POWER, ENERGY, CLOCK = (
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetTotalEnergyConsumption",
    "nvmlDeviceGetClockInfo",
)
NO_DRIVER_SAYS = "NVML was to watch the device"


@pytest.fixture
def fake() -> FakeNVML:
    return FakeNVML()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of windows, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(sampler, "perf_counter", lambda: clock.now)
    return clock


def sample(nvml: NVML, fake: FakeNVML, **held: dict[int, int | None]) -> None:
    """Take one sample while the lists show these sizes, in MiB."""
    for name, sizes in held.items():
        setattr(fake, name, {pid: size and size * MIB for pid, size in sizes.items()})
    nvml.sample()


# ---- memory


def test_the_second_version_leaves_out_what_the_driver_reserves(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 300})
    sample(nvml, fake, compute={OURS: 200})
    found = nvml.result()
    assert (found.memory, found.used, found.samples) == ("v2", 300 * MIB, 2)
    assert (found.device, found.uuid, found.driver, found.mig) == ("NVIDIA H100 80GB HBM3", UUID, "580.159.04", False)
    assert found.lost is None


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_UNKNOWN,
    ],
)
def test_an_older_driver_tells_the_first_version(fake: FakeNVML, error: int) -> None:
    fake.fails["v2"] = error
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 300})
    assert (nvml.result().memory, nvml.result().used) == ("v1", 300 * MIB + fake.reserved)
    assert fake.calls["v2"] == 1


def test_other_errors_are_no_reason_for_the_first_version(fake: FakeNVML) -> None:
    fake.fails["v2"] = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(NVMLMissing, match="GPU is lost"):
        NVML(UUID, api=fake)


# ---- whose memory


def test_the_own_pid_has_its_peak_and_a_planted_process_is_found(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500})
    sample(nvml, fake, compute={OURS: 900, FOREIGN: 70})
    sample(nvml, fake, compute={OURS: 400, FOREIGN: 80}, graphics={THIRD: 20})
    sample(nvml, fake, compute={OURS: 450})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("own pid", 900 * MIB, 100 * MIB)
    assert found.used == 970 * MIB


def test_a_process_in_two_lists_counts_once(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500, FOREIGN: 70}, graphics={FOREIGN: 70, OURS: None})
    assert (nvml.result().process, nvml.result().foreign) == (500 * MIB, 70 * MIB)


def test_a_client_of_mps_is_found(fake: FakeNVML) -> None:
    fake.compute = {FOREIGN: 30 * MIB}
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, mps={OURS: 500})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("own pid", 500 * MIB, 30 * MIB)


def test_with_the_own_pid_what_others_held_before_us_is_foreign(fake: FakeNVML) -> None:
    fake.compute = {FOREIGN: 700 * MIB}
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500})
    assert (nvml.result().attribution, nvml.result().foreign) == ("own pid", 700 * MIB)


def test_foreign_is_the_difference_where_a_size_is_not_told(fake: FakeNVML) -> None:
    fake.unlisted = 90 * MIB
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500, FOREIGN: None})
    assert (nvml.result().process, nvml.result().foreign) == (500 * MIB, 90 * MIB)


def test_in_a_container_the_only_process_is_ours(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={HOST: 500})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("only process", 500 * MIB, 0)


def test_once_known_the_only_process_is_told_from_those_that_come(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={HOST: 500})
    sample(nvml, fake, compute={HOST: 800, FOREIGN: 120})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("only process", 800 * MIB, 120 * MIB)


def test_the_own_pid_wins_over_a_process_that_was_alone_before(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={FOREIGN: 600})
    sample(nvml, fake, compute={FOREIGN: 600, OURS: 50})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("own pid", 50 * MIB, 600 * MIB)


def test_a_process_from_before_the_opening_is_not_ours(fake: FakeNVML) -> None:
    fake.compute = {FOREIGN: 600 * MIB}
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={FOREIGN: 600})
    sample(nvml, fake, compute={FOREIGN: 600, HOST: 200})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("device delta", 200 * MIB, 600 * MIB)


def test_the_process_alone_at_the_marked_context_is_ours(fake: FakeNVML) -> None:
    fake.compute = {HOST: 400 * MIB}
    nvml = NVML(UUID, api=fake)
    nvml.mark_context()
    sample(nvml, fake, compute={HOST: 700})
    found = nvml.result()
    assert (found.attribution, found.process, found.context) == ("only process", 700 * MIB, 400 * MIB)


def test_the_process_alone_while_we_hold_memory_is_ours(fake: FakeNVML) -> None:
    fake.compute = {HOST: 400 * MIB}
    nvml = NVML(UUID, api=fake, held=300 * MIB)
    nvml.sample()
    assert (nvml.result().attribution, nvml.result().process) == ("only process", 400 * MIB)


def test_two_processes_alone_in_turn_give_a_device_delta(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={FOREIGN: 600})
    sample(nvml, fake, compute={HOST: 200})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("device delta", 600 * MIB, 0)


def test_two_processes_that_appear_together_give_a_device_delta(fake: FakeNVML) -> None:
    fake.unlisted = 30 * MIB
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={HOST: 500, FOREIGN: 100})
    sample(nvml, fake, compute={HOST: 400, FOREIGN: 100})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("device delta", 600 * MIB, 30 * MIB)


@pytest.mark.parametrize("size", [None, 0, pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value])
@pytest.mark.parametrize("pid", [OURS, HOST], ids=["own pid", "a host's pid"])
def test_without_a_size_there_is_only_the_device_delta(fake: FakeNVML, pid: int, size: int | None) -> None:
    fake.unlisted = 40 * MIB
    nvml = NVML(UUID, api=fake)
    fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=size)]
    fake.unlisted = 540 * MIB
    nvml.sample()
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("device delta", 500 * MIB, 40 * MIB)


def test_memory_held_before_the_opening_is_not_foreign(fake: FakeNVML) -> None:
    fake.compute = {HOST: 500 * MIB, FOREIGN: 100 * MIB}
    nvml = NVML(UUID, api=fake, held=450 * MIB)
    sample(nvml, fake, compute={HOST: 800, FOREIGN: 100})
    found = nvml.result()
    assert (found.attribution, found.process, found.foreign) == ("device delta", 750 * MIB, 150 * MIB)


@pytest.mark.parametrize(
    "error", [pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVMLLibraryMismatchError("versions do not match")]
)
def test_where_processes_may_not_be_listed_there_is_the_device_delta(fake: FakeNVML, error: int | Exception) -> None:
    fake.fails[COMPUTE] = error
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500}, graphics={THIRD: 20})
    found = nvml.result()
    assert (found.attribution, found.process, found.lost) == ("device delta", 520 * MIB, None)
    assert fake.calls[COMPUTE] == 1


# ---- the context


@pytest.mark.parametrize(("pid", "kind"), [(OURS, "own pid"), (HOST, "only process")], ids=["own pid", "a host's pid"])
def test_the_context_is_what_this_process_held_when_it_was_marked(fake: FakeNVML, pid: int, kind: str) -> None:
    nvml = NVML(UUID, api=fake)
    fake.compute = {pid: 450 * MIB}
    nvml.mark_context()
    sample(nvml, fake, compute={pid: 900})
    assert (nvml.result().attribution, nvml.result().context) == (kind, 450 * MIB)


def test_the_context_of_a_device_delta_is_what_use_rose_by(fake: FakeNVML) -> None:
    fake.unlisted = 30 * MIB
    nvml = NVML(UUID, api=fake)
    fake.unlisted = 480 * MIB
    nvml.mark_context()
    assert (nvml.result().attribution, nvml.result().context) == ("device delta", 450 * MIB)


def test_what_torch_held_before_is_no_context(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake, held=300 * MIB)
    fake.compute = {OURS: 750 * MIB}
    nvml.mark_context()
    assert nvml.result().context == 450 * MIB


def test_a_context_that_was_not_marked_is_none(fake: FakeNVML) -> None:
    unmarked, early = NVML(UUID, api=fake), NVML(UUID, api=fake)
    early.mark_context()
    for nvml in (unmarked, early):
        sample(nvml, fake, compute={OURS: 500})
    assert (unmarked.result().context, early.result().context) == (None, None)


def test_a_device_delta_of_zero_is_no_context(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    nvml.mark_context()
    fake.unlisted = 480 * MIB
    nvml.sample()
    assert (nvml.result().attribution, nvml.result().context) == ("device delta", None)


# ---- energy, power, clocks


def test_energy_is_that_of_the_windows_alone(fake: FakeNVML, clock: SimpleNamespace) -> None:
    nvml = NVML(UUID, api=fake)
    for seconds, joules in [(2, 500), (3, 1_000)]:
        nvml.begin_window()
        clock.now += seconds
        fake.millijoules += 1_000 * joules
        nvml.end_window()
        clock.now += 60
        fake.millijoules += 7_000_000
    nvml.begin_window()
    fake.millijoules += 9_000
    found = nvml.result()
    assert (found.joules, found.watts) == (1_500.0, 300.0)


def test_a_window_in_which_the_counter_steps_back_is_left_out(fake: FakeNVML, clock: SimpleNamespace) -> None:
    nvml = NVML(UUID, api=fake)
    for seconds, joules in [(10, 1_000), (5, -4_993), (10, 3_000)]:
        nvml.begin_window()
        clock.now += seconds
        fake.millijoules += 1_000 * joules
        nvml.end_window()
    found = nvml.result()
    assert (found.joules, found.energy_seconds, found.watts) == (4_000.0, 20.0, 200.0)
    assert nvml.notes == [
        "The device's energy counter stepped back in 1 windows, whose energy is left out.",
        "The energy is that of 20.0 of 25.0 s of timed steps.",
    ]


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_NOT_SUPPORTED])
def test_the_energy_of_a_third_of_a_run_is_not_told_as_that_of_the_whole(
    fake: FakeNVML, clock: SimpleNamespace, error: int
) -> None:
    nvml = NVML(UUID, api=fake)
    for window in range(3):
        if window:
            fake.fails[ENERGY] = error
        nvml.begin_window()
        clock.now += 10
        fake.millijoules += 3_000_000
        nvml.end_window()
    found = nvml.result()
    assert (found.joules, found.energy_seconds) == (3_000.0, 10.0)
    assert nvml.notes[-1] == "The energy is that of 10.0 of 30.0 s of timed steps."
    record = RunRecord(name="mine-1", driver=found, throughput=Throughput(1, 1, seconds=30.0, steps=60))
    assert record.joules_per_step == 150.0  # 300 W for half a second


@pytest.mark.parametrize(("seconds", "share"), [(0.4, "25%"), (2.0, "5%"), (5.0, None)])
def test_short_windows_say_how_uncertain_their_energy_is(
    fake: FakeNVML, clock: SimpleNamespace, seconds: float, share: str | None
) -> None:
    nvml = NVML(UUID, api=fake)
    for _ in range(3):
        nvml.begin_window()
        clock.now += seconds
        nvml.end_window()
    assert [note.partition(":")[0] for note in nvml.notes] == (
        [] if share is None else [f"The energy is uncertain by up to {share}"]
    )


class Broken(Exception):
    """An exception that is none of NVML's."""


OTHERS = [Broken("the bindings do not fit"), TypeError("an argument"), OSError("no library"), AttributeError("no name")]


@pytest.mark.parametrize("query", [POWER, ENERGY, CLOCK, COMPUTE])
@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_an_exception_of_any_class_drops_the_query(fake: FakeNVML, query: str, error: Exception) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    nvml.start()
    fake.fails[query] = error
    nvml.begin_window()
    sample(nvml, fake, compute={OURS: 500})
    nvml.end_window()
    nvml.stop()
    assert (nvml.result().lost, nvml.result().used) == (None, 500 * MIB)
    assert [query in note and str(error) in note for note in nvml.dropped] == [True]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_an_exception_of_any_class_ends_the_sampling_but_not_the_run(fake: FakeNVML, error: Exception) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    nvml.start()
    fake.fails = dict.fromkeys(("nvmlDeviceGetMemoryInfo", "nvmlShutdown"), error)
    nvml.begin_window()
    nvml.sample()
    nvml.end_window()
    nvml.stop()
    assert f"({type(error).__name__}: {error})" in str(nvml.result().lost)


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo"])
def test_bindings_that_do_not_fit_are_no_nvml(fake: FakeNVML, call: str) -> None:
    fake.fails[call] = OTHERS[0]
    with pytest.raises(NVMLMissing, match="but says: Broken: the bindings do not fit; see with"):
        NVML(UUID, api=fake)


def test_the_memory_of_children_is_ours(fake: FakeNVML) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        nvml = NVML(UUID, api=fake)
        sample(nvml, fake, compute={child.pid: 50, FOREIGN: 7})
        assert nvml.result().attribution == "own pid"
        sample(nvml, fake, compute={OURS: 300, child.pid: 200, FOREIGN: 7})
        child.communicate(b"\n")
    sample(nvml, fake, compute={OURS: 300, FOREIGN: 7})
    found = nvml.result()
    assert (found.process, found.foreign, found.attribution) == (500 * MIB, 7 * MIB, "own pid")


def test_without_the_counter_power_is_the_mean_of_samples_in_windows(fake: FakeNVML) -> None:
    fake.fails[ENERGY] = pynvml.NVML_ERROR_NOT_SUPPORTED
    nvml = NVML(UUID, api=fake)
    for milliwatts, windowed in [(90_000, False), (200_000, True), (300_000, True), (310_500, False)]:
        fake.milliwatts = milliwatts
        if windowed:
            nvml.begin_window()
        nvml.sample()
        if windowed:
            nvml.end_window()
    found = nvml.result()
    assert (found.joules, found.watts, found.watts_peak) == (None, 250.0, 310.5)
    assert fake.calls[ENERGY] == 1


def test_without_windows_there_is_no_mean_power(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    nvml.sample()
    assert (nvml.result().joules, nvml.result().watts, nvml.result().watts_peak) == (None, None, 70.0)


def test_unsupported_queries_are_made_once(fake: FakeNVML) -> None:
    fake.fails = dict.fromkeys((POWER, CLOCK), pynvml.NVML_ERROR_NOT_SUPPORTED)
    nvml = NVML(UUID, api=fake)
    sample(nvml, fake, compute={OURS: 500})
    sample(nvml, fake, compute={OURS: 600})
    found = nvml.result()
    assert (found.process, found.watts_peak, found.sm_mhz, found.lost) == (600 * MIB, None, [], None)
    assert (fake.calls[POWER], fake.calls[CLOCK]) == (1, 1)


def test_clocks_are_told_by_their_median_and_lowest(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    for fake.mhz in (1_980, 345, 1_900):
        nvml.sample()
    assert nvml.result().sm_mhz == [1_900.0, 345.0]


def test_a_window_begins_once_and_ends_once(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    with pytest.raises(ValueError, match="none is open; begin it first"):
        nvml.end_window()
    nvml.begin_window()
    with pytest.raises(ValueError, match="one is open already; end it first"):
        nvml.begin_window()


def test_a_mig_instance_tells_its_memory_and_is_not_asked_for_the_rest(fake: FakeNVML) -> None:
    nvml = NVML(MIG_UUID, api=fake)
    nvml.begin_window()
    sample(nvml, fake, compute={OURS: 500})
    nvml.end_window()
    found = nvml.result()
    assert (found.mig, found.uuid, found.process) == (True, MIG_UUID, 500 * MIB)
    assert (found.joules, found.watts, found.watts_peak, found.sm_mhz) == (None, None, None, [])
    assert not {POWER, ENERGY, CLOCK} & set(fake.calls)


# ---- the thread, and what goes wrong


def test_the_thread_samples_between_the_first_and_the_last(fake: FakeNVML) -> None:
    third = Event()

    def clock_info(handle: object, type: int) -> int:
        fake.calls[CLOCK] += 1
        if fake.calls[CLOCK] == 4:  # one of them was the opening's
            third.set()
        return 1_000

    fake.nvmlDeviceGetClockInfo = clock_info
    with NVML(UUID, interval=0.001, api=fake) as nvml:
        assert nvml.result().samples >= 1
        fake.compute = {OURS: 500 * MIB}
        assert third.wait(30)
        fake.compute = {OURS: 800 * MIB}
    found = nvml.result()
    assert found.samples >= 4
    assert (found.process, found.lost, fake.open) == (800 * MIB, None, 0)
    assert not nvml._thread.is_alive()


def test_a_short_run_has_the_samples_of_its_begin_and_its_end(fake: FakeNVML) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    for _ in range(2):
        nvml.start()
    assert nvml.result().samples == 1
    for _ in range(2):
        nvml.stop()
    assert (nvml.result().samples, fake.calls["nvmlShutdown"], fake.open) == (2, 1, 0)


def test_a_sampler_never_started_is_shut_down_without_a_sample(fake: FakeNVML) -> None:
    fake.unlisted = 30 * MIB
    nvml = NVML(UUID, api=fake)
    nvml.stop()
    found = nvml.result()
    assert (found.samples, found.used, found.process, fake.open) == (0, 30 * MIB, 0, 0)


@pytest.mark.parametrize("use", ["start", "sample", "mark_context", "begin_window", "end_window"])
def test_a_stopped_sampler_cannot_be_restarted(fake: FakeNVML, use: str) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    nvml.start()
    nvml.stop()
    with pytest.raises(RuntimeError, match="it was stopped; make a new NVML"):
        getattr(nvml, use)()


def test_a_lost_device_ends_the_sampling_but_not_the_run(fake: FakeNVML, clock: SimpleNamespace) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    nvml.start()
    nvml.begin_window()
    clock.now += 2
    fake.millijoules += 500_000
    nvml.end_window()
    sample(nvml, fake, compute={OURS: 500})
    nvml.begin_window()
    fake.fails = dict.fromkeys(("nvmlDeviceGetMemoryInfo", ENERGY), pynvml.NVML_ERROR_GPU_IS_LOST)
    sample(nvml, fake, compute={OURS: 900})
    asked = fake.calls["nvmlDeviceGetMemoryInfo"]
    nvml.end_window()
    nvml.mark_context()
    nvml.stop()
    found = nvml.result()
    assert (found.process, found.samples, found.joules, found.watts) == (500 * MIB, 2, 500.0, 250.0)
    assert found.lost == (
        f"NVML failed after 2 samples of {UUID} (GPU is lost), and the figures are those until then; "
        "look at the device with nvidia-smi."
    )
    assert (fake.calls["nvmlDeviceGetMemoryInfo"], fake.open) == (asked, 0)


NOT_READY, NO_DATA = 27, pynvml.NVML_ERROR_NO_DATA


@pytest.mark.parametrize("query", [POWER, ENERGY, CLOCK, COMPUTE, "nvmlDeviceGetGraphicsRunningProcesses"])
@pytest.mark.parametrize("error", [NOT_READY, NO_DATA, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_TIMEOUT])
def test_a_query_that_fails_is_dropped_with_a_note_and_memory_is_sampled_on(
    fake: FakeNVML, query: str, error: int
) -> None:
    nvml = NVML(UUID, interval=3_600, api=fake)
    nvml.start()
    nvml.begin_window()
    sample(nvml, fake, compute={OURS: 3_000})
    fake.fails[query] = error
    sample(nvml, fake, compute={OURS: 9_000})
    nvml.end_window()
    nvml.stop()
    found = nvml.result()
    assert (found.lost, found.used, found.samples) == (None, 9_000 * MIB, 4)
    assert len(nvml.dropped) == 1
    assert query in nvml.dropped[0]
    if query != COMPUTE:
        assert found.process == 9_000 * MIB


def test_the_thread_ends_when_the_device_is_lost(fake: FakeNVML) -> None:
    nvml = NVML(UUID, interval=0.001, api=fake)
    nvml.start()
    fake.fails["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_GPU_IS_LOST
    nvml._thread.join(30)
    assert not nvml._thread.is_alive()
    nvml.stop()
    assert "(GPU is lost)" in nvml.result().lost


def test_a_driver_that_does_not_answer_is_not_waited_for(fake: FakeNVML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PATIENCE", 0.01)
    nvml = NVML(UUID, interval=0.001, api=fake)
    nvml.start()
    fake.gate = Event()
    assert fake.waiting.wait(30)
    nvml.stop()
    assert "(no answer for 0.01 seconds)" in nvml.result().lost
    assert fake.calls["nvmlShutdown"] == 0
    with pytest.raises(RuntimeError, match="it was stopped"):
        nvml.sample()
    fake.gate.set()
    nvml._thread.join(30)
    assert not nvml._thread.is_alive()


def test_a_failed_shutdown_is_reported(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    fake.fails["nvmlShutdown"] = pynvml.NVML_ERROR_UNINITIALIZED
    nvml.stop()
    assert "(Uninitialized)" in nvml.result().lost


def test_the_first_of_several_failures_is_reported(fake: FakeNVML) -> None:
    nvml = NVML(UUID, api=fake)
    memory = "nvmlDeviceGetMemoryInfo"
    fake.fails = {memory: pynvml.NVML_ERROR_GPU_IS_LOST, "nvmlShutdown": pynvml.NVML_ERROR_UNINITIALIZED}
    nvml.sample()
    nvml.stop()
    assert "(GPU is lost)" in nvml.result().lost


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "NVML Shared Library Not Found"),
        ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"),
        ("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "version mismatch"),
        ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_NOT_SUPPORTED, "Not Supported"),
    ],
)
def test_without_a_working_driver_it_is_missing(fake: FakeNVML, function: str, error: int, says: str) -> None:
    fake.fails[function] = error
    with pytest.raises(NVMLMissing, match=f"{NO_DRIVER_SAYS} {UUID}, but says: .*{says}"):
        NVML(UUID, api=fake)
    assert fake.open == 0


def test_an_unknown_device_is_missing(fake: FakeNVML) -> None:
    with pytest.raises(NVMLMissing, match="GPU-unknown, but says: Not Found; see with `nvidia-smi -L`"):
        NVML("GPU-unknown", api=fake)
    assert fake.open == 0


def test_the_real_library_is_missing_or_does_not_know_a_made_up_device() -> None:
    with pytest.raises(NVMLMissing, match=NO_DRIVER_SAYS):
        NVML(UUID)


def test_an_interval_of_zero_is_refused(fake: FakeNVML) -> None:
    with pytest.raises(ValueError, match="every 0 seconds; give a time above 0"):
        NVML(UUID, interval=0, api=fake)


# ---- devices


@pytest.mark.parametrize(
    ("name", "uuid"), [("NVIDIA H100 80GB HBM3", UUID), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", MIG_UUID)]
)
def test_a_device_is_found_by_its_uuid(fake: FakeNVML, monkeypatch: pytest.MonkeyPatch, name: str, uuid: str) -> None:
    properties = SimpleNamespace(name=name, uuid=uuid.partition("-")[2])
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda:1"): properties}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {torch.device("cuda:1"): 300 * MIB}.__getitem__)
    fake.compute = {HOST: 400 * MIB}
    nvml = NVML.of(torch.device("cuda:1"), api=fake)
    nvml.sample()
    found = nvml.result()
    assert (device_uuid(torch.device("cuda:1")), found.uuid) == (uuid, uuid)
    assert (found.attribution, found.process) == ("only process", 400 * MIB)


def test_only_a_cuda_device_has_a_uuid() -> None:
    with pytest.raises(ValueError, match="device 'cpu' was asked for, but only CUDA devices have one"):
        device_uuid(torch.device("cpu"))


# ---- the real thing

FAKED = [name for name in dir(FakeNVML) if name.lower().startswith("nvml")]


@pytest.mark.parametrize("name", FAKED)
def test_the_fake_has_names_and_arguments_of_the_real_module(fake: FakeNVML, name: str) -> None:
    faked, real = getattr(fake, name), getattr(pynvml, name)
    if not inspect.ismethod(faked):
        assert faked is real
        return

    def arguments(function: object) -> list[tuple[str, object]]:
        return [(each.name, each.default) for each in inspect.signature(function).parameters.values()]

    assert arguments(faked) == arguments(real)


def test_the_fake_lists_processes_with_the_fields_of_the_real_module(fake: FakeNVML) -> None:
    fake.compute = {OURS: 500 * MIB}
    fake.nvmlInit()
    (listed,) = fake.nvmlDeviceGetComputeRunningProcesses(HANDLE)
    assert (listed.pid, listed.usedGpuMemory) == (OURS, 500 * MIB)
    assert set(vars(listed)) == {field[0] for field in pynvml.c_nvmlProcessInfo_t._fields_}


@pytest.mark.gpu
def test_the_driver_sees_at_least_what_torch_has_taken() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    with NVML.of(device, interval=0.02) as nvml:
        torch.cuda.synchronize(device)
        nvml.mark_context()
        nvml.begin_window()
        block = torch.ones(64 * MIB, device=device)
        for _ in range(200):
            block = block * 1.0
        torch.cuda.synchronize(device)
        nvml.end_window()
        reserved = torch.cuda.memory_reserved(device)
    found = nvml.result()
    assert (found.lost, found.uuid) == (None, device_uuid(device))
    assert found.samples >= 3
    assert found.used >= reserved >= block.nbytes
    assert found.process >= (reserved if found.attribution != "device delta" else block.nbytes)
