"""Time by kernel: sums over scripted events, and a profile of a real loop."""

import gzip
import json
import re
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import lit_sparse_kernels
from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.events import OURS, Event, busy_nanoseconds, read, summarize
from lit_sparse_profiling.kernel_times import WINDOW, KernelProfile, shorten_name, table
from lit_sparse_profiling.opcounts import OpCount, OpCounts
from lit_sparse_profiling.speed_sections import Kernel, Kernels

CPU = torch.device("cpu")
BEST = Ceilings(flops=1e12, bytes=1e11)
START = Event("window", "steps", 1, 1000, 2000)


def counted(**ops: OpCount) -> OpCounts:
    """Counts of `aten` ops."""
    counts = OpCounts()
    counts.ops = {f"aten::{name}": op for name, op in ops.items()}
    return counts


def sums(
    events: list[Event], counts: OpCounts | None = None, steps: int = 1, cuda: bool = True, **rest: Any
) -> Kernels:
    return summarize(events, steps, counts, BEST, torch.float32, cuda=cuda, **rest)


def by_name(kernels: Kernels) -> dict[tuple[str, str], Kernel]:
    return {(kernel.name, kernel.op): kernel for kernel in kernels.top}


def test_every_kernel_of_this_project_is_known_as_ours() -> None:
    sources = Path(lit_sparse_kernels.__file__).parent.glob("*.py")
    kernels = [name for file in sources for name in re.findall(r"@jit.*\ndef (\w+_kernel)\(", file.read_text())]
    assert len(kernels) >= 8
    assert [name for name in kernels if not name.startswith(OURS)] == []


# ---- scripted: a GPU

# Two threads: forward in 1, backward in 2. The copy's kernel hangs on aten::copy_, which aten::clone called.
GPU = [
    START,
    Event("node", "aten_linear_of_a_function", 1, 1010, 1100, id=1),
    Event("op", "aten::mm", 1, 1020, 1040, id=2),
    Event("op", "aten::clone", 1, 1050, 1090, id=3),
    Event("op", "aten::copy_", 1, 1060, 1080, id=4),
    Event("node", "autograd::engine::evaluate_function: MmBackward0", 2, 1200, 1300, id=5),
    Event("op", "aten::mm", 2, 1210, 1220, id=6),
    Event("op", "aten::copy_", 2, 1240, 1250, id=7),
    Event("node", "MyBackward", 2, 1260, 1270, id=8),
    Event("device", "gemm", 7, 1100, 1200, link=2),
    Event("device", "splitk", 7, 1200, 1300, link=2),
    Event("device", "elementwise", 7, 1300, 1350, link=4),
    Event("device", "gemm", 7, 1400, 1600, link=6),
    Event("device", "elementwise", 9, 1500, 1700, link=7),
    Event("device", "triton", 7, 1700, 1710, link=8),
    Event("device", "Memset (Device)", 7, 1800, 1810),
]


def test_kernels_belong_to_the_op_that_was_counted() -> None:
    counts = counted(mm=OpCount(2, 800, 400), clone=OpCount(1, None, 30), copy_=OpCount(1, None, 20))
    found = by_name(sums(GPU, counts))
    assert {key: (round(kernel.calls), round(kernel.seconds * 1e9)) for key, kernel in found.items()} == {
        ("gemm", "aten::mm"): (2, 300),
        ("splitk", "aten::mm"): (1, 100),
        ("elementwise", "aten::clone"): (1, 50),
        ("elementwise", "aten::copy_"): (1, 200),
        ("triton", "MyBackward"): (1, 10),
        ("Memset (Device)", ""): (1, 10),
    }
    assert next(iter(found)) == ("gemm", "aten::mm")


def test_an_ops_counts_are_spread_over_its_kernels_by_their_time() -> None:
    found = by_name(sums(GPU, counted(mm=OpCount(2, 800, 400), clone=OpCount(1, None, 30))))
    assert (found["gemm", "aten::mm"].flops, found["gemm", "aten::mm"].bytes) == (600, 300)
    assert (found["splitk", "aten::mm"].flops, found["splitk", "aten::mm"].bytes) == (200, 100)
    assert (found["elementwise", "aten::clone"].flops, found["elementwise", "aten::clone"].bytes) == (None, 30)
    assert (found["triton", "MyBackward"].flops, found["triton", "MyBackward"].bytes) == (None, None)


def test_without_counts_kernels_belong_to_the_innermost_op() -> None:
    found = by_name(sums(GPU))
    assert ("elementwise", "aten::clone") not in found
    assert found["elementwise", "aten::copy_"].calls == 2
    assert found["elementwise", "aten::copy_"].bytes is None


def test_gaps_are_where_no_stream_runs_anything() -> None:
    result = sums(GPU)
    assert result.gaps == pytest.approx(1 - (250 + 300 + 10 + 10) / 1000)
    assert result.seconds == pytest.approx(1e-6)
    assert result.count == 5


def test_figures_are_of_one_step() -> None:
    one, two = sums(GPU), sums(GPU, steps=2)
    assert two.seconds == one.seconds / 2
    assert [kernel.seconds for kernel in two.top] == [kernel.seconds / 2 for kernel in one.top]
    assert [kernel.calls for kernel in two.top] == [kernel.calls / 2 for kernel in one.top]
    assert two.gaps == one.gaps
    counts = counted(mm=OpCount(2, 800, 400))
    assert by_name(sums(GPU, counts, steps=2))["gemm", "aten::mm"].flops == 600


def test_only_the_top_is_kept_and_all_are_counted() -> None:
    result = sums(GPU, top=2, trace="trace.json")
    assert [kernel.name for kernel in result.top] == ["gemm", "elementwise"]
    assert (result.count, result.trace) == (5, "trace.json")


def test_ours_are_known_by_name_of_kernel_or_op() -> None:
    launch = Event("op", "lit_sparse::block_grad", 1, 1400, 1500, id=20)
    gemm = Event("device", "gemm", 7, 1900, 1901, link=20)
    triton = Event("device", "lit_sparse_pack", 7, 1902, 1903)
    found = sums([*GPU, launch, gemm, triton]).top
    assert {(k.name, k.op) for k in found if k.ours} == {("gemm", "lit_sparse::block_grad"), ("lit_sparse_pack", "")}
    assert {k.op for k in sums(GPU, ours=["aten::mm", "My"]).top if k.ours} == {"aten::mm", "MyBackward"}


def test_events_outside_the_window_are_not_counted() -> None:
    before, after = Event("device", "gemm", 7, 100, 1000, link=2), Event("device", "gemm", 7, 2000, 2900, link=2)
    assert sums([before, *GPU, after]) == sums(GPU)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(1000, 2000)], 1000),
        ([(1100, 1200), (1200, 1300)], 200),
        ([(1100, 1400), (1200, 1300)], 300),  # one in another
        ([(1100, 1300), (1200, 1400)], 300),  # overlapping
        ([(1500, 1600), (1100, 1200), (1150, 1550)], 500),  # out of order
        ([(500, 1100), (1900, 2500)], 200),  # beyond the window
        ([(500, 900), (2100, 2500), (500, 2500)], 1000),
    ],
)
def test_overlapping_streams_count_once(spans: list[tuple[int, int]], expected: int) -> None:
    events = [Event("device", "k", lane, *span) for lane, span in enumerate(spans)]
    assert busy_nanoseconds(events, START) == expected


def test_a_gpu_without_kernels_and_a_trace_without_steps_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.profiler saw none; another profiler may have the GPU"):
        sums([event for event in GPU if event.kind != "device"])
    with pytest.raises(RuntimeError, match=r"no mark of them; start and stop the profile in the same thread"):
        sums(GPU[1:])


# ---- scripted: a CPU

HOST = [
    START,
    Event("op", "aten::linear", 1, 1000, 1400, id=1),
    Event("op", "aten::addmm", 1, 1100, 1300, id=2),
    Event("op", "aten::copy_", 1, 1110, 1130, id=3),
    Event("op", "aten::copy_", 1, 1500, 1600, id=4),
    Event("node", "autograd::engine::evaluate_function: X", 2, 1600, 1900, id=5),
    Event("op", "aten::mm", 2, 1650, 1850, id=6),
    Event("op", "aten::mm", 3, 1650, 1850, id=7),  # a worker's: within the time of the op that gave it work
]


def test_a_counted_op_includes_the_ops_that_it_calls() -> None:
    def seconds(counts: OpCounts | None) -> dict[str, tuple[float, int]]:
        return {k.name: (k.calls, round(k.seconds * 1e9)) for k in sums(HOST, counts, cuda=False).top}

    assert seconds(None) == {
        "aten::linear": (1, 200),
        "aten::addmm": (1, 180),
        "aten::copy_": (2, 120),
        "aten::mm": (1, 200),
    }
    assert seconds(counted(addmm=OpCount(1, 1, 1), copy_=OpCount(1, None, 1))) == {
        "aten::linear": (1, 200),
        "aten::addmm": (1, 200),
        "aten::copy_": (1, 100),
        "aten::mm": (1, 200),
    }


@pytest.mark.parametrize("second", [(1200, 1300), (1150, 1250), (1200, 1200)])
def test_ops_that_touch_or_overlap_did_not_call_one_another(second: tuple[int, int]) -> None:
    first, other = Event("op", "aten::a", 1, 1100, 1200, id=1), Event("op", "aten::b", 1, *second, id=2)
    counts = counted(a=OpCount(1, None, 1))
    found = {kernel.name: kernel for kernel in sums([START, first, other], counts, cuda=False).top}
    assert {name: kernel.calls for name, kernel in found.items()} == {"aten::a": 1, "aten::b": 1}
    assert found["aten::a"].seconds == pytest.approx(100e-9)


def test_on_a_cpu_the_gaps_are_where_no_op_runs() -> None:
    result = sums(HOST, cuda=False)
    assert result.gaps == pytest.approx(1 - (400 + 100 + 200) / 1000)
    assert sum(result.share(kernel) for kernel in result.top) + result.gaps == pytest.approx(1)


# ---- reading torch's events


def recorded(name: str, **values: Any) -> SimpleNamespace:
    """Stand-in for an event of torch's profiler: a CPU op unless `values` say otherwise."""
    cpu = {"device_type": DeviceType.CPU, "device_index": 0, "device_resource_id": 7, "is_user_annotation": False}
    times = {"start_ns": 10, "end_ns": 20, "start_thread_id": 1, "end_thread_id": 1}
    ids = {"correlation_id": 5, "linked_correlation_id": 0}
    given = {"name": name, **cpu, **times, **ids, **values}
    return SimpleNamespace(**{key: partial(given.__getitem__, key) for key in given})


GPU_0: dict[str, Any] = {"device_type": DeviceType.CUDA, "linked_correlation_id": 3}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (recorded("aten::mm"), Event("op", "aten::mm", 1, 10, 20, 5)),
        (recorded("lit_sparse::pack"), Event("op", "lit_sparse::pack", 1, 10, 20, 5)),
        (recorded("MmBackward0"), Event("node", "MmBackward0", 1, 10, 20, 5)),
        (recorded("torch::autograd::AccumulateGrad"), Event("node", "torch::autograd::AccumulateGrad", 1, 10, 20, 5)),
        (recorded("gemm", **GPU_0), Event("device", "gemm", 7, 10, 20, 5, 3)),
        (recorded("mine", is_user_annotation=True), Event("window", "mine", 1, 10, 20, 5)),
        (recorded("other", is_user_annotation=True), None),
        (recorded("mine", is_user_annotation=True, **GPU_0), None),  # the annotation's shadow on the device
        (recorded("gemm", **{**GPU_0, "device_index": 1}), None),
        (recorded("cudaLaunchKernel"), None),
        (recorded("cuLaunchKernelEx"), None),
        (recorded("custom_function"), Event("node", "custom_function", 1, 10, 20, 5)),
        (recorded("profiler::_record_function_exit"), None),
        (recorded("[memory]"), None),
        (recorded("aten::mm", end_thread_id=2), None),
    ],
)
def test_only_events_of_the_device_and_its_launches_are_read(event: SimpleNamespace, expected: Event | None) -> None:
    assert read([event], torch.device("cuda", 0), "mine") == ([] if expected is None else [expected])


# ---- a real loop on a CPU

STEPS = 3


class Loop:
    """A small model, and its training step."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, foreach=False)
        self.x = torch.randn(512, 256)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def profile(self, trace: Path | None = None) -> KernelProfile:
        profiled = KernelProfile(CPU, trace)
        profiled.start()
        for _ in range(STEPS):
            self.step()
        profiled.stop(STEPS)
        return profiled


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@pytest.fixture(scope="module")
def measured(loop: Loop) -> Kernels:
    with OpCounts() as counts:
        loop.step()
    return loop.profile().kernels(counts, BEST, torch.float32, top=1000)


def test_products_take_longest_and_are_all_there(measured: Kernels) -> None:
    found = {kernel.name: kernel for kernel in measured.top}
    assert {kernel.name for kernel in measured.top[:2]} == {"aten::mm", "aten::addmm"}
    assert found["aten::addmm"].calls == 2
    assert found["aten::mm"].calls == 3  # no gradient of the input
    assert found["aten::relu"].calls == found["aten::mean"].calls == 1
    assert found["aten::mm"].flops == pytest.approx(2 * 512 * 256 * 512 * 3)
    assert measured.steps == STEPS
    assert measured.dtype == "float32"


def test_shares_and_gaps_make_up_the_step(measured: Kernels) -> None:
    assert all(kernel.seconds >= 0 for kernel in measured.top)
    assert all(kernel.name == kernel.op and "::" in kernel.name for kernel in measured.top)
    assert 0 < measured.gaps < 1
    assert sum(measured.share(kernel) for kernel in measured.top) + measured.gaps == pytest.approx(1, abs=1e-3)
    assert measured.count == len(measured.top)
    assert (measured.flops_ceiling, measured.bytes_ceiling) == (BEST.flops, BEST.bytes)


def test_python_between_ops_is_a_gap() -> None:
    x = torch.ones(2)
    profiled = KernelProfile(CPU)
    profiled.start()
    _ = x + x, sum(range(3_000_000))
    profiled.stop(1)
    assert profiled.kernels(None, BEST, torch.float32).gaps > 0.9


def test_the_profilers_own_ops_are_left_out(loop: Loop) -> None:
    found = loop.profile().kernels(None, BEST, torch.float32, top=1000)
    names = {kernel.name for kernel in found.top}
    assert "aten::mm" in names
    assert not [name for name in names if name.startswith(("profiler::", "Optimizer", "autograd::")) or name == WINDOW]
    assert "aten::zeros" not in names  # of the warm-up


@pytest.mark.parametrize("name", ["trace.json", "traces/trace.json.gz"])
def test_a_trace_is_written(loop: Loop, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    profiled = loop.profile(path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    names = {event.get("name") for event in json.loads(content)["traceEvents"]}
    assert {"aten::mm", WINDOW} <= names
    assert profiled.kernels(None, BEST, torch.float32).trace == str(path)


def test_start_and_stop_in_the_wrong_order_are_refused() -> None:
    profiled = KernelProfile(CPU)
    with pytest.raises(RuntimeError, match="no step was profiled; start, step and stop first"):
        profiled.kernels(None, BEST, torch.float32)
    with pytest.raises(RuntimeError, match="it is not running; start it first"):
        profiled.stop(1)
    profiled.start()
    with pytest.raises(RuntimeError, match="it is running; stop it first"):
        profiled.start()
    with pytest.raises(ValueError, match="needs at least one step, but 0 were given"):
        profiled.stop(0)
    with pytest.raises(ValueError, match="Kernels of meta"):
        KernelProfile(torch.device("meta"))


def test_a_profile_of_steps_that_failed_ends(loop: Loop) -> None:
    profiled = KernelProfile(CPU)
    profiled.close()
    profiled.start()
    profiled.close()
    profiled.close()
    assert loop.profile().kernels(None, BEST, torch.float32).count


def test_another_profiler_is_not_disturbed() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as other:
        with pytest.raises(RuntimeError, match=r"another torch\.profiler runs; stop that one first"):
            KernelProfile(CPU).start()
        torch.ones(2)
    assert "aten::ones" in {event.name for event in other.events() or ()}


# ---- the table


def rendered(kernels: Kernels, rows: int = 10) -> str:
    console = Console(width=120, file=StringIO())
    with console.capture() as capture:
        console.print(table(kernels, rows))
    return capture.get()


def test_the_table_tells_rates_beside_their_ceilings() -> None:
    mm = Kernel("aten::mm", "aten::mm", 3, 0.004, flops=2e9, bytes=1e6)
    add = Kernel("lit_sparse::add[x]", "lit_sparse::add[x]", 1.5, 0.001, bytes=2e7, ours=True)
    bare = Kernel("aten::sort", "aten::sort", 1, 0.0005)
    text = rendered(Kernels(2, 0.01, 0.25, "float32", 1e12, 1e11, 7, [mm, add, bare]), rows=2)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "mm 3 4.000 40.0% 500.00 GFLOP/s 50%" in lines
    assert "* lit_sparse::add[x] 1.5 1.000 10.0% 20.00 GB/s 20%" in lines
    assert "aten::sort" not in text
    assert "2 of 7; in 25.0% of a step of 10.00 ms no op ran" in text
    assert "ceilings: 1.00 TFLOP/s in float32, 100.00 GB/s; * ours" in text


def test_the_table_of_a_gpu_names_ops() -> None:
    long = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul> >"
    )
    kernel = Kernel(long, "aten::add_", 300, 0.002)
    text = rendered(Kernels(1, 0.01, 0.1, "bfloat16", 1e15, 3e12, 1, [kernel, replace(kernel, op="")]))
    assert "vectorized_elementwise_kernel<4, CUDAFuncto… " in text
    assert re.search(r" aten::add_ +300 +2\.000 +20\.0%", text)
    assert "no kernel ran" in text
    assert "1,000.00 TFLOP/s in bfloat16, 3.00 TB/s" in text
    assert "ours" not in text


def test_names_are_shortened() -> None:
    assert shorten_name("aten::mm") == "aten::mm"
    assert shorten_name("void (anonymous namespace)::f<at::Half>(int)") == "f<Half>(int)"
    assert shorten_name("x" * 50, 10) == "x" * 9 + "…"


# ---- the real thing


@pytest.mark.gpu
def test_a_gpus_kernels_are_linked_to_their_ops() -> None:
    device = torch.device("cuda")
    model = nn.Sequential(nn.Linear(2048, 4096), nn.GELU(), nn.Linear(4096, 2048)).to(device, torch.bfloat16)
    x = torch.randn(4096, 2048, device=device, dtype=torch.bfloat16)

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    step()
    with OpCounts() as counts:
        step()
    profiled = KernelProfile(device)
    profiled.start()
    for _ in range(STEPS):
        step()
    profiled.stop(STEPS)
    result = profiled.kernels(counts, BEST, torch.bfloat16, top=1000)
    assert all(kernel.op.startswith("aten::") for kernel in result.top)
    assert result.top[0].op in ("aten::mm", "aten::addmm")
    assert sum(kernel.flops or 0 for kernel in result.top) == pytest.approx(counts.flops)
    assert sum(kernel.calls for kernel in result.top if kernel.op == "aten::mm") >= 3
    assert sum(result.share(kernel) for kernel in result.top) + result.gaps == pytest.approx(1, abs=0.02)
