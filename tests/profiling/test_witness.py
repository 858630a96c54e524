"""Memory that the examined step alone does not show: planted in loops, found, and named."""

import gc
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_sparse_profiling import profiler, witness
from lit_sparse_profiling.budget import MEMORY, Budget
from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.memory import PER_PHASE, heap_in_use
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.profiler import Profiler
from lit_sparse_profiling.reconcile import OUTSIDE, PROCESS_RESIDUE, findings, format_bytes, reconcile, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from lit_sparse_profiling.stopwatch import Tokens, count_positions, count_tokens
from lit_sparse_profiling.witness import Growth, holder
from tests.profiling.pages import touch

MIB = 2**20
WIDTH = 256
PLAN = Plan(warmup=2, profiled=0)


@pytest.fixture(autouse=True)
def given_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "ceilings", lambda *_: Ceilings(1e12, 1e11))


@pytest.fixture(scope="module", autouse=True)
def a_small_heap() -> Iterator[None]:
    """Freeze the objects of the imports, so that the garbage collection in each examination is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4))
        self.checkpointed = checkpointed

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x.square().mean()


def loop(
    steps: int,
    inside: Callable[[int], Any] = lambda _: None,
    between: Callable[[int], Any] = lambda _: None,
    evaluations: Mapping[int, Callable[[], Any]] = MappingProxyType({}),
    lengths: Iterator[int] | None = None,
    model: nn.Module | None = None,
    plan: Plan = PLAN,
    **options: Any,
) -> RunRecord:
    """Train `steps` steps, of which two warm up, one leads in and one is examined; evaluate in the given ones."""
    model = model or Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Profiler(model, optimizer, plan, **options) as profiled:
        for number in range(steps):
            between(number)
            if number in evaluations:
                profiled.pause()
                evaluations[number]()
            batch = {"input_ids": torch.zeros(4, next(lengths or itertools.repeat(64)), dtype=torch.long)}
            with profiled.step(batch):
                with profiled.phase("forward"):
                    loss = model(**batch)
                inside(number)
                with profiled.phase("backward"):
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            del loss
    return profiled.record("loop")


def said(record: RunRecord) -> str:
    return " ".join(findings(record))


def test_a_plain_loop_has_no_findings() -> None:
    record = loop(20)  # from 18 steps on growth is told from noise
    assert findings(record) == []
    assert abs(residue(record)) < 0.01
    assert record.memory.growth == 0.0
    assert record.memory.most_positions == record.memory.examined_positions == 4 * 64


# ---- there before


class Cache:
    def __init__(self) -> None:
        self.kept: Tensor | None = torch.ones(19 * MIB)


def test_what_was_there_before_has_a_line_and_a_holder() -> None:
    cache = Cache()
    record = loop(5)
    assert record.memory.held.before == 76 * MIB
    assert record.memory.held.total == pytest.approx(record.memory.allocator.requested, rel=0.01)
    assert (
        "76.00 MiB of tensors were there before the step and are in no category: 76.00 MiB held by Cache.kept"
        in said(record)
    )
    largest = record.memory.largest[0]
    assert (largest.bytes, largest.category, largest.shape, largest.dtype) == (
        76 * MIB,
        "before",
        [19 * MIB],
        "float32",
    )
    cache.kept = None
    assert loop(5).memory.held.before == 0


def test_many_small_tensors_that_were_there_before_have_a_line_too() -> None:
    store = Keeper()
    store.kept = [torch.ones(MIB // 16) for _ in range(304)]
    record = loop(5)
    assert record.memory.held.before == pytest.approx(76 * MIB, rel=0.01)
    assert abs(residue(record)) < 0.01
    assert re.search(r": 76\.\d+ MiB in 30\d small tensors, some held by Keeper\.kept\.", said(record))


def test_holders_are_named() -> None:
    cache, nested = Cache(), {"a": [(torch.ones(8),)]}
    assert holder(cache.kept) == "Cache.kept"  # pyright: ignore[reportArgumentType]
    module = ModuleType("mine")
    module.kept = [torch.ones(8)]  # pyright: ignore[reportAttributeAccessIssue]
    assert holder(module.kept[0]) == "mine.kept"
    model = nn.Linear(2, 2)
    model.nested = nested
    assert holder(nested["a"][0][0]) == "Linear.nested"


# ---- other steps, and other libraries


def grown(record: RunRecord) -> bool:
    return re.search(r"Memory in use grows by 10?..+ [KM]iB with each step", said(record)) is not None


@pytest.mark.parametrize("make", [lambda: np.ones(MIB // 8), lambda: torch.ones(MIB // 4)], ids=["numpy", "torch"])
@pytest.mark.parametrize("where", ["inside", "between"])
def test_a_leak_is_found_wherever_it_is(make: Callable[[], Any], where: str) -> None:
    kept: list[Any] = []
    record = loop(24, **{where: lambda _: kept.append(make())})
    assert record.memory.growth == pytest.approx(MIB, rel=0.05)
    assert grown(record)


def course(size: Callable[[int], float], samples: int) -> Growth:
    """Samples of a heap that holds `size(step)` bytes at the end of each step."""
    now, growth = [0], Growth(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witness, "heap_in_use", lambda: now[0])
        for step in range(samples):
            now[0] = int(MIB * size(step))
            growth.sample()
        if growth.unsettled:
            growth.settle()
    return growth


NOISE = [0.3, 0.9, 0.1, 0.5, 0.7, 0.2, 0.6, 0.8, 0.4]


@pytest.mark.parametrize(
    ("size", "samples", "per_step"),
    [
        (lambda step: step, 5, None),
        (lambda step: step, 12, None),
        (lambda step: step, 18, MIB),
        (lambda step: step + NOISE[step % 9], 40, MIB),
        (lambda step: 9 * (step // 9), 90, MIB),
        (lambda step: NOISE[step % 9], 12, 0.0),
        (lambda step: -step, 12, 0.0),
        (lambda step: 100 * (1 - 0.9**step), 40, 0.0),
        (lambda step: min(step, 20), 40, 0.0),
        (lambda step: step % 10, 40, 0.0),
        (lambda step: 2 * (step > 11) + step / 999, 30, 0.0),
        (lambda step: 2 * (step > 19) + step / 999, 30, 0.0),
    ],
    ids=[
        *("too few steps", "few steps", "just enough", "beside noise", "in every ninth step"),
        *("noise", "shrinking", "a cache that fills", "a cache that is full", "collected now and then"),
        *("made once", "made once, late"),
    ],
)
def test_growth_is_told_if_it_lasts(size: Callable[[int], float], samples: int, per_step: float | None) -> None:
    found = course(size, samples).per_step()
    assert found == (pytest.approx(per_step, rel=0.1) if per_step else per_step)


def test_a_leak_of_a_short_run_is_not_told_from_caches_that_fill() -> None:
    kept: list[Any] = []
    record = loop(16, between=lambda _: kept.append(np.ones(MIB // 8)))
    assert (record.memory.growth, said(record)) == (None, "")


def tie(number: int) -> None:
    """Make a reference cycle with an array, which stays until Python collects it."""
    cycle: list[Any] = [np.ones(MIB // 8)]
    cycle.append(cycle)


def test_garbage_is_no_leak() -> None:
    kept: list[Any] = []
    gc.disable()
    try:
        clean = loop(28, tie)
        both = loop(28, tie, between=lambda _: kept.append(np.ones(MIB // 8)))
        gc.collect()
    finally:
        gc.enable()
    assert (clean.memory.growth, findings(clean)) == (0.0, [])
    assert both.memory.growth == pytest.approx(MIB, rel=0.1)


class Store:
    """A callback that keeps something of each step, in one way or another."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.by_step: dict[int, Any] = {}
        self.last: deque[Any] = deque()
        self.losses: list[Tensor] = []


WAYS: dict[str, Callable[[Store, int], Any]] = {
    "Store.rows (28 items)": lambda store, _: store.rows.append(np.ones(MIB // 8)),
    "Store.by_step (28 items)": lambda store, step: store.by_step.update({step: np.ones(MIB // 8)}),
    "Store.last (28 items)": lambda store, _: store.last.append({"logits": (torch.ones(MIB // 4), "text")}),
    "Store.losses (28 losses with their graphs: keep loss.detach() instead)": lambda store, _: store.losses.append(
        (torch.ones(MIB // 4, requires_grad=True) ** 2).sum()
    ),
}


@pytest.mark.parametrize("told", WAYS)
def test_what_memory_grew_by_is_named(told: str) -> None:
    store = Store()
    record = loop(28, lambda step: WAYS[told](store, step))
    assert record.memory.keeper == told
    assert f"with each step, all along the timed ones: a leak, or state that keeps growing: {told}." in said(record)


def test_a_variable_of_the_loop_is_named_and_what_nobody_has_is_not() -> None:
    batches: list[Any] = []
    assert loop(28, lambda _: batches.append(np.ones(MIB // 8))).memory.keeper == (
        "batches in test_a_variable_of_the_loop_is_named_and_what_nobody_has_is_not (28 items)"
    )
    batches.clear()
    chain: list[Any] = [None]

    def link(_: int) -> None:
        chain[0] = (chain[0], np.ones(MIB // 8))

    record = loop(28, link)
    assert record.memory.keeper == ""
    assert "or a leak: no list, dict or set of Python holds as much." in said(record)


def test_what_goes_up_and_down_is_no_leak() -> None:
    kept: list[Any] = []

    def swing(number: int) -> None:
        kept.append(np.ones(MIB // 8))
        if number % 5 == 0:
            kept.clear()

    assert not loop(30, between=swing).memory.growth


def test_a_temporary_of_every_fifth_step_is_in_the_processs_residue() -> None:
    record = loop(12, lambda number: touch(128 * MIB) if number % 5 == 4 else None)
    if record.memory.method != PER_PHASE:
        pytest.skip(f"this system cannot set the peak back: {record.memory.method}")
    lines = {line.name: line.bytes for line in reconcile(record)}
    assert lines[PROCESS_RESIDUE] == pytest.approx(128 * MIB, rel=0.1)
    assert lines[OUTSIDE] > 50 * MIB
    assert "more than torch's allocator and what was there before" in said(record)


def leave_freed_memory() -> bytes:
    """Take and free 192 MiB in pieces; return a piece behind them, for which the C allocator keeps their pages."""
    pieces = [b"x" * 60_000 for _ in range(192 * MIB // 60_000)]
    return b"y" * (60_000 if pieces else 0)


def test_what_an_earlier_fit_of_the_process_left_is_not_this_ones() -> None:
    behind = leave_freed_memory()
    assert findings(loop(8)) == []
    assert behind


def test_what_an_evaluation_left_is_not_the_steps_and_has_a_line() -> None:
    behind: list[bytes] = []
    record = loop(10, evaluations={6: lambda: behind.append(leave_freed_memory())})
    if record.memory.method != PER_PHASE:
        pytest.skip(f"this system cannot set the peak back: {record.memory.method}")
    assert findings(record) == []
    lines = {line.name: line.bytes for line in reconcile(record)}
    assert lines[PROCESS_RESIDUE] < 16 * MIB
    hidden = loop(
        10, lambda n: touch(96 * MIB) if n == 5 else None, evaluations={6: lambda: behind.append(leave_freed_memory())}
    )
    found = {line.name: line.bytes for line in reconcile(hidden)}
    assert found[PROCESS_RESIDUE] == pytest.approx(96 * MIB, rel=0.15), "of the steps before the evaluation"


# ---- the longest batch


def note_of_counted(record: RunRecord) -> str:
    return next(line.note for line in reconcile(record) if line.name == "counted")


def test_a_longer_batch_is_examined_when_it_comes() -> None:
    record = loop(9, lengths=iter([64] * 6 + [256, 64, 260]))
    found, alone = record.memory, loop(4, lengths=itertools.repeat(256)).memory
    assert (found.examined_step, found.examined_positions) == (7, 4 * 256)
    assert (found.most_positions, found.plain_positions) == (4 * 260, 4 * 260), "4 more are not worth an examination"
    assert found.saved_for_backward == alone.saved_for_backward
    assert found.held.total == pytest.approx(alone.held.total, rel=0.01)
    assert found.allocator.requested == pytest.approx(alone.allocator.requested, rel=0.01)
    assert found.allocator.uncounted is None
    assert found.allocator.left_behind < 64  # the loss
    assert record.throughput.steps == 9 - 2 - 2 - 1
    assert findings(record) == []
    assert note_of_counted(record).endswith(": step 7, of 1,024 token positions (the longest had 1,040)")


def test_each_longer_batch_is_examined_and_a_shorter_one_is_not() -> None:
    record = loop(9, lengths=iter([64, 64, 64, 64, 128, 96, 192, 128, 100]))
    assert (record.memory.examined_step, record.memory.examined_positions) == (7, 4 * 192)
    assert {phase.name: phase.calls for phase in record.phases}["examined step"] == 3


def test_what_only_the_longest_batch_does_is_found() -> None:
    kept: list[Tensor] = []
    record = loop(8, lambda n: kept.append(torch.ones(MIB)) if n == 6 else None, lengths=iter([64] * 6 + [256, 64]))
    assert record.memory.allocator.left_behind == pytest.approx(4 * MIB, abs=64)
    assert re.search(r"Each step leaves 4,19\d,\d+ bytes allocated that are in no category: a leak", said(record))


def test_the_flops_stay_those_of_the_step_whose_kernels_were_timed() -> None:
    short, both = loop(8), loop(8, lengths=iter([64] * 6 + [256, 64]))
    assert both.throughput.flops == short.throughput.flops


def test_the_resident_peak_has_the_longest_batch_too() -> None:
    model = Net()
    record = loop(8, lengths=iter([64] * 6 + [4000, 64]), model=model)
    found = record.memory
    assert found.allocator.requested > 100 * MIB
    assert found.peak_resident == (found.outside or 0) + found.allocator.requested
    assert PROCESS_RESIDUE not in {line.name for line in reconcile(record)}, "nothing witnessed that step"


@pytest.mark.parametrize("budget", [None, 0.0])
def test_a_longest_batch_that_was_not_examined_is_told(budget: float | None) -> None:
    """It came in the warm-up, or measuring takes too much of the run."""
    if budget is None:
        record = loop(8, lengths=iter([256] + [64] * 7))
    else:
        refusing = Budget(Phases(), steps=8)
        plan = Plan(warmup=2, examine=None, profiled=0)
        allowed = iter([True])
        refusing.allows = lambda cost: next(allowed, False)  # pyright: ignore[reportAttributeAccessIssue]
        record = loop(8, lengths=iter([64] * 6 + [256, 64]), plan=plan, budget=refusing)
    assert (record.memory.examined_step, record.memory.examined_positions) == (4, 4 * 64)
    assert record.memory.most_positions == 4 * 256
    assert "The examined step had 256 token positions, the longest 1,024" in said(record)
    assert note_of_counted(record).endswith(": step 4, of 256 token positions (the longest had 1,024)")


def test_examine_true_has_no_limit() -> None:
    refusing = Budget(Phases(), steps=0)
    record = loop(8, lengths=iter([64] * 6 + [256, 64]), budget=refusing)
    assert not refusing.allows(MEMORY)
    assert record.memory.examined_step == 7


def test_a_longer_batch_that_evaluation_interrupts_leaves_what_was_found_before() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Profiler(model, optimizer, PLAN) as profiled:
        for number, length in enumerate([64] * 6 + [256, 64, 128]):
            with profiled.step({"input_ids": torch.zeros(4, length, dtype=torch.long)}):
                loss = model(torch.zeros(4, length, dtype=torch.long))
                if number == 6:
                    profiled.pause()
                    profiled.resume()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del loss
            if number == 7:
                assert profiled.memory().examined_step == 4
    record = profiled.record("loop")
    assert (record.memory.examined_step, record.memory.examined_positions) == (9, 4 * 128)
    assert record.notes == ["Steps not measured, since evaluation or saving interrupted them: 1."]


def test_the_longest_of_accumulated_batches_decides() -> None:
    """The list of a step's batches, and batches that come one by one: the rest of that step is examined."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    batches = [[64, 64]] * 6 + [[64, 256, 64]] + [[100, 64]] * 2
    with Profiler(model, optimizer, PLAN) as profiled:
        for lengths in batches:
            tokens = Tokens()
            for number, length in enumerate(lengths):
                batch = {"input_ids": torch.zeros(4, length, dtype=torch.long)}
                (profiled.add_batch if number else profiled.begin_step)(batch)
                tokens.add(count_tokens(batch))
                model(**batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            profiled.end_step(tokens.counts)
    record = profiled.record("loop")
    assert (record.memory.examined_step, record.memory.examined_positions) == (7, 4 * 256)
    assert record.throughput.steps == 9 - 2 - 2 - 1
    assert record.memory.allocator.left_behind < 64
    assert abs(residue(record)) < 0.01
    assert record.memory.held.saved == pytest.approx(loop(4, lengths=itertools.repeat(256)).memory.held.saved, rel=0.01)
    assert count_positions([{"input_ids": torch.zeros(4, n)} for n in (64, 256, 64)]) == 4 * 256


def test_samples_of_a_long_run_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    size, asked = [0], []
    monkeypatch.setattr(witness, "heap_in_use", lambda: asked.append(size[0]) or size[0])
    growth = Growth(torch.device("cpu"))
    for _ in range(10_000):
        size[0] += 1000
        growth.sample()
    assert growth.per_step() == 1000
    assert len(asked) < 1000


def test_the_heap_has_numpys_arrays() -> None:
    before = heap_in_use()
    if before is None:
        pytest.skip("this C library does not tell")
    kept = np.ones(4 * MIB)
    assert (heap_in_use() or 0) - before == pytest.approx(kept.nbytes, rel=0.01)


class Keeper:
    """A callback that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


def test_the_cause_of_a_leak_is_found_with_its_line_and_holder() -> None:
    keeper = Keeper()
    record = loop(5, lambda _: keeper.kept.append(torch.ones(2 * MIB)))
    left = record.memory.left[0]
    assert (left.bytes, left.shape) == (8 * MIB, [2 * MIB])
    assert re.search(
        r"a leak: 8\.00 MiB of the loop at test_witness\.py:\d+ in <lambda>, held by Keeper\.kept[.;]", said(record)
    )


def test_a_loss_that_is_kept_keeps_its_graph() -> None:
    keeper = Keeper()

    class Kept(Net):
        def forward(self, input_ids: Tensor) -> Tensor:
            kept = super().forward(input_ids)
            keeper.kept.append(kept)
            return super().forward(input_ids)

    record = loop(5, model=Kept())
    assert record.memory.left[0].category == "saved"
    assert re.search(
        r"a leak: .* in forward, held by a graph of autograd.* keep loss\.detach\(\) instead", said(record)
    )


# ---- the observer


def test_the_step_before_is_the_one_that_nothing_counted() -> None:
    record = loop(5)
    allocator = record.memory.allocator
    assert allocator.uncounted == pytest.approx(allocator.requested, rel=0.01)


def test_the_shift_by_counting_is_measured_and_told() -> None:
    """A model that takes more memory where it is watched."""

    class Shy(Net):
        def forward(self, input_ids: Tensor) -> Tensor:
            loss = super().forward(input_ids)
            if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
                loss = loss + 0 * torch.ones(2 * MIB).mean()
            return loss

    record = loop(5, model=Shy())
    allocator = record.memory.allocator
    assert 6 * MIB < allocator.requested - allocator.uncounted <= 8 * MIB  # the peak was elsewhere in the step before
    assert "Counting shifts the peak by 7." in said(record)
    told = f"; {format_bytes(allocator.uncounted)} in the step before, which nothing counted"
    assert [line.note for line in reconcile(record) if line.name == "allocator requested"] == [allocator.method + told]


def test_steps_of_other_lengths_are_not_compared() -> None:
    record = loop(5, lengths=iter([64, 64, 128, 64, 64]))
    assert record.memory.allocator.uncounted is None


def test_under_checkpointing_the_shift_is_known() -> None:
    allocator = loop(5, model=Net(checkpointed=True)).memory.allocator
    assert allocator.uncounted == pytest.approx(allocator.requested, rel=0.05)


# ---- where the bytes come from


def test_the_largest_tensors_have_their_module_and_line() -> None:
    record = loop(5, lengths=itertools.repeat(256))
    largest = record.memory.largest
    assert [one.bytes for one in largest] == sorted((one.bytes for one in largest), reverse=True)
    saved = {(one.module, tuple(one.shape), one.dtype) for one in largest if one.category == "saved"}
    assert saved >= {(f"layers.{i}.0", (4 * 256, WIDTH), "float32") for i in (1, 2)}
    assert saved >= {(f"layers.{i}.1", (4, 256, WIDTH), "float32") for i in (1, 2)}
    lines = {one.line for one in largest if one.category == "saved"}
    assert all(re.fullmatch(r"test_witness\.py:\d+ in forward", line) for line in lines)
    assert sum(one.bytes for one in largest) <= record.memory.held.total


def test_weights_have_their_names() -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4000, WIDTH)

    largest = loop(5, model=Wide()).memory.largest
    assert ("trainable", "embedding.weight", [4000, WIDTH]) in [
        (one.category, one.module, one.shape) for one in largest
    ]


def test_the_keeper_of_growing_memory_is_searched_again_after_as_many_steps_and_at_the_end(monkeypatch):
    growth, searched = witness.Growth(torch.device("cpu")), []
    monkeypatch.setattr(growth, "per_step", lambda: 10.0)
    monkeypatch.setattr(witness, "keeper", lambda grown, steps: searched.append(steps) or f"kept since {steps}")
    found = []
    for step in range(1, 101):
        growth.sample()
        if step % 10 == 0:  # as each save does
            found.append(growth.keeper())
    assert searched == [10, 20, 40, 80]
    assert (found[0], found[2], found[-1]) == ("kept since 10", "kept since 20", "kept since 80")
    growth.end()
    assert growth.keeper() == "kept since 100"
    monkeypatch.setattr(growth, "per_step", lambda: 0.0)
    assert growth.keeper() == ""
