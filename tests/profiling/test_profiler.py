"""A bare loop under the profiler: what each step is for, what is timed, and that nothing is left behind."""

import gc
import itertools
import json
import os
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_sparse_profiling import nvml, paired, phases, profiler, stopwatch
from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.counted import UNNAMED_PHASE
from lit_sparse_profiling.examined_steps import EAGER
from lit_sparse_profiling.nvml import NVML, open_nvml
from lit_sparse_profiling.profiler import Profiler
from lit_sparse_profiling.reconcile import findings, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.stages import MAX_ATTEMPTS
from lit_sparse_profiling.step_plan import Plan, plan_on
from lit_sparse_profiling.stopwatch import Stopwatch, Tokens, count_tokens
from tests.profiling.fake_nvml import MIB, UUID, FakeNVML
from tests.profiling.pages import touch

ROWS, LENGTH, WIDTH = 4, 16, 64
TOKENS = ROWS * LENGTH
ACTIVATION = TOKENS * WIDTH * 4
CARD = torch.device("cuda", 0)
PLAN = Plan(warmup=1, profiled=2)
STAGES = ["warm-up", "lead-in", "examined", "kernels", "kernels", "timed", "timed"]


class Model(nn.Module):
    """Tokens to a loss; `hidden` is the last forward's activation, in its graph."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, 1)
        self.hidden = torch.empty(0)

    def forward(self, input_ids: Tensor, **masks: Tensor) -> SimpleNamespace:
        self.hidden = self.up(self.embedding(input_ids)).relu()
        return SimpleNamespace(loss=self.down(self.hidden).square().mean())


def batches(count: int | None = None) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in itertools.count() if count is None else range(count):
        yield {"input_ids": torch.randint(0, 50, (ROWS, LENGTH), generator=generator)}


class Loop:
    """A training loop. It calls `inside` in each forward, and reports `tokens` instead of counting them."""

    def __init__(self, plan: Plan = PLAN, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.profiler = Profiler(self.model, self.optimizer, plan, **options)
        self._batches = batches()

    def step(self, inside: Callable[[], Any] = lambda: None, tokens: tuple[Tensor | int, int] | None = None) -> None:
        batch = next(self._batches)
        with self.profiler.step(batch, tokens):
            with self.profiler.phase("forward"):
                loss = self.model(**batch).loss
                inside()
            with self.profiler.phase("backward"):
                loss.backward()
            with self.profiler.phase("optimizer step"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            del loss  # 4 bytes that would be left behind

    def steps(self, count: int, inside: Callable[[], Any] = lambda: None) -> None:
        for _ in range(count):
            self.step(inside)

    def record(self) -> RunRecord:
        self.profiler.close()
        return self.profiler.record("loop")

    def is_clean(self) -> bool:
        """True if no instrument is left in the process."""
        hooks: list[Any] = [p._post_accumulate_grad_hooks for p in self.model.parameters()]  # pyright: ignore
        modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
        saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return not (modes or _profiler_enabled() or saving or any(hooks))


class Clock:
    """A clock that moves only on request."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], None]:
        """Return work that takes so many seconds."""

        def work() -> None:
            self.now += seconds

        return work


@pytest.fixture(scope="module", autouse=True)
def a_small_heap() -> Iterator[None]:
    """Freeze the objects of the imports, so that the garbage collection in each examination is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the measurement of ceilings, which is slow; return a list with an entry per call."""
    asked: list[str] = []

    def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
        asked.append(f"{device} {dtype}")
        return Ceilings(flops=1e12, bytes=1e11)

    monkeypatch.setattr(profiler, "ceilings", ceilings)
    return asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    return clock


def tools() -> tuple[bool, int]:
    """Return whether a torch.profiler is running, and the number of active dispatch modes."""
    return _profiler_enabled(), len(_get_current_dispatch_mode_stack())


# ---- the course of a loop


def test_the_docstrings_example_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(str(Profiler.__doc__).partition("::\n")[2].partition("Args:")[0])
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    exec(example, {"Profiler": Profiler, "model": model, "batches": batches(8), "optimizer": optimizer})
    record = RunRecord.read("record.json")
    assert (record.name, record.status) == ("mine", "ok")
    assert record.throughput.tokens == 2 * TOKENS  # 2 of 8 steps come after 2 + 2 + 2
    assert findings(record) == []


def test_only_untimed_stages_have_instruments() -> None:
    loop, seen = Loop(), []
    for _ in STAGES:
        loop.step(lambda: seen.append(tools()))
    expected = {"lead-in": (True, 0), "examined": (True, 2), "kernels": (True, 0)}
    assert seen == [expected.get(stage, (False, 0)) for stage in STAGES]
    assert loop.is_clean()


@pytest.mark.parametrize(
    ("plan", "timed"), [(Plan(0, False, 0), 4), (Plan(3, False, 0), 1), (Plan(0, True, 0), 2), (Plan(0, False, 1), 3)]
)
def test_what_the_plan_leaves_out_does_not_happen(plan: Plan, timed: int) -> None:
    loop = Loop(plan)
    loop.steps(4)
    record = loop.record()
    assert record.throughput.steps == loop.profiler.timed == timed
    assert (record.memory.held is not None) == plan.examine
    assert (record.kernels is not None) == bool(plan.profiled)


def test_a_record_is_complete(measured: list[str], tmp_path: Path) -> None:
    loop = Loop()
    loop.steps(len(STAGES))
    record = loop.record()
    assert (record.status, record.notes, record.device.kind) == ("ok", [], "cpu")
    assert {"python", "torch"} <= set(record.versions)
    assert abs(residue(record)) < 0.05
    assert findings(record) == []
    weights = sum(p.nbytes for p in loop.model.parameters())
    assert record.memory.held.ledger.trainable == record.ledger.trainable == weights
    assert record.memory.held.batch == TOKENS * 8
    assert record.memory.held.phase in ("backward", "optimizer step")
    assert record.memory.allocator.left_behind == 0
    assert (record.memory.saved_for_backward or 0) > ACTIVATION
    assert (record.throughput.steps, record.kernels.steps) == (2, 2)
    assert (record.throughput.flops or 0) >= 6 * TOKENS * WIDTH * WIDTH
    assert record.kernels.top[0].seconds > 0
    assert any(kernel.flops for kernel in record.kernels.top)
    assert measured == ["cpu torch.float32"] * 2  # before the timed steps and after them
    names = [phase.name for phase in record.phases]
    assert names == ["examination", "training", "examined step", "forward", "backward", "optimizer step", "ceilings"]
    assert {phase.name: phase.calls for phase in record.phases}["forward"] == 1
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record


def test_the_peak_has_the_phase_that_it_was_in() -> None:
    loop, blocks = Loop(Plan(1, True, 0)), []

    def spike() -> None:
        blocks.append(torch.ones(MIB).sum())

    loop.steps(3, spike)
    assert loop.record().memory.held.phase == "forward"
    assert loop.record().memory.held.temporaries >= 4 * MIB


def test_between_the_phases_a_step_is_in_its_course() -> None:
    model = Model()
    with Profiler(model, plan=Plan(0, True, 0)) as found:
        for batch in batches(2):
            with found.step(batch):
                with found.phase("forward"):
                    model(**batch)
                torch.ones(MIB)
    assert found.record("course").memory.held.phase == UNNAMED_PHASE


def test_the_trace_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.json"
    loop = Loop(Plan(0, False, 1, trace=str(path)))
    loop.step()
    assert loop.record().kernels.trace == str(path)
    assert "aten::addmm" in {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}


@pytest.mark.parametrize(("timed", "steps"), [(0, 5), (1, 6), (2, 7)])
def test_a_loop_is_done_when_all_that_was_planned_is(timed: int, steps: int) -> None:
    loop = Loop(Plan(warmup=1, profiled=2, timed=timed))
    done: list[bool] = []
    for _ in range(steps):
        assert not loop.profiler.done
        loop.step(lambda: done.append(loop.profiler.done))
    assert loop.profiler.done
    assert done == [False] * steps, "in the middle of a step"


def test_a_loop_without_a_number_of_steps_is_never_done() -> None:
    loop = Loop(Plan(0, False, 0))
    loop.steps(3)
    assert not loop.profiler.done


@pytest.mark.parametrize("field", ["warmup", "profiled", "timed"])
def test_a_negative_plan_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"profile\.{field} is -1; it must be 0 or more"):
        Plan(**{field: -1})


# ---- leaks


def test_a_planted_leak_is_found_and_named() -> None:
    loop, kept = Loop(), []
    loop.steps(len(STAGES), lambda: kept.append(loop.model.hidden.detach()))
    record = loop.record()
    assert record.memory.allocator.left_behind == ACTIVATION
    residue, leak = findings(record)
    assert residue.startswith("The allocator's peak is 16.")  # what the lead-in left behind, and is still there
    assert f"Each step leaves {ACTIVATION:,} bytes allocated that are in no category: a leak" in leak


def test_a_kept_number_is_no_leak() -> None:
    loop, kept = Loop(), []
    loop.steps(len(STAGES), lambda: kept.append(loop.model.hidden.mean().item()))
    assert len(kept) == len(STAGES)
    assert findings(loop.record()) == []


def test_what_the_ledger_grew_by_is_no_leak() -> None:
    loop = Loop()
    loop.steps(len(STAGES), lambda: loop.model.register_buffer("index", torch.ones(5000 * (1 + tools()[1]))))
    record = loop.record()
    assert record.memory.allocator.left_behind == 0
    assert findings(record) == []


def test_reference_cycles_are_no_leak() -> None:
    """They are freed by the garbage collector, which may run at any time."""
    loop = Loop()

    def tie() -> None:
        cycle: list[Any] = [torch.ones(ACTIVATION)]
        cycle.append(cycle)

    gc.disable()
    try:
        loop.steps(len(STAGES), tie)
    finally:
        gc.enable()
    assert findings(loop.record()) == []


def test_a_profiler_that_is_gone_keeps_no_model() -> None:
    loop = Loop()
    loop.steps(len(STAGES))
    assert findings(loop.record()) == []
    model = weakref.ref(loop.model)
    del loop
    gc.collect()
    assert model() is None


# ---- evaluation and saving


@pytest.mark.parametrize("before", range(len(STAGES) + 1))
def test_evaluation_between_two_steps_of_any_stage(before: int) -> None:
    loop = Loop()
    loop.steps(before)
    loop.profiler.pause()
    assert loop.is_clean()
    kept = [torch.ones(10 * MIB)]  # what evaluation takes and gives back is not the step's
    loop.step()
    kept.clear()
    loop.steps(9)
    record = loop.record()
    assert (findings(record), record.notes) == ([], [])
    assert record.memory.allocator.requested < MIB
    assert record.kernels.steps == (1 if before == STAGES.index("kernels") + 1 else 2)
    redone = 1 if before == STAGES.index("examined") else 0  # the lead-in
    skipped = 1 if before == STAGES.index("kernels") + 1 else 0
    assert record.throughput.steps == before + 10 - 5 - redone + skipped


@pytest.mark.parametrize("amid", range(len(STAGES)))
def test_evaluation_in_the_middle_of_a_step_of_any_stage(amid: int) -> None:
    loop = Loop()
    loop.steps(amid)

    def evaluation() -> None:
        loop.profiler.pause()
        assert loop.is_clean()
        torch.ones(10 * MIB)
        loop.profiler.resume()

    loop.step(evaluation)
    loop.steps(9)
    record = loop.record()
    assert findings(record) == []
    assert record.notes == ["Steps not measured, since evaluation or saving interrupted them: 1."]
    assert record.memory.allocator.requested < MIB
    assert record.kernels.steps == 2
    lost = {"warm-up": 0, "lead-in": 1, "examined": 2, "kernels": 1, "timed": 1}[STAGES[amid]]
    lost += amid == len(STAGES) - 3  # the second kernel step: both are profiled anew
    assert record.throughput.steps == amid + 10 - 5 - lost
    assert record.throughput.tokens == record.throughput.steps * TOKENS


def test_steps_that_are_always_interrupted_are_given_up_with_a_note() -> None:
    loop = Loop(Plan(warmup=0, profiled=0, timed=2))
    for _ in range(MAX_ATTEMPTS + 2):
        assert not loop.profiler.done
        loop.step()
        loop.profiler.pause()
    assert loop.profiler.done
    record = loop.record()
    assert record.memory.held is None
    (note,) = record.notes
    assert note.startswith(f"Memory was not counted: evaluation or saving interrupted all of {MAX_ATTEMPTS} attempts")


def test_kernels_that_are_always_interrupted_are_given_up_too() -> None:
    loop = Loop(Plan(0, False, 1))
    loop.steps(MAX_ATTEMPTS, loop.profiler.pause)
    loop.step()
    record = loop.record()
    assert (record.kernels, record.throughput.steps) == (None, 1)
    assert record.notes[0].startswith("Kernels were not timed: evaluation or saving interrupted all of 5 attempts")


def test_the_rest_of_an_interrupted_step_is_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(phases, "perf_counter", clock)
    loop = Loop(Plan(0, False, 0))

    def saving() -> None:
        clock.now += 1
        loop.profiler.pause()
        clock.now += 10
        loop.profiler.resume()
        clock.now += 2

    loop.step(saving)
    (training,) = loop.record().phases
    assert (training.name, training.seconds) == ("training", 3.0)


def test_a_loop_that_ends_within_a_step_leaves_nothing_behind() -> None:
    for begun in range(len(STAGES)):
        loop = Loop()
        loop.steps(begun)
        loop.profiler.begin_step(next(batches()))
        loop.profiler.begin_phase("forward")
        loop.profiler.close()
        assert loop.is_clean()
        assert not loop.profiler.in_step
        loop.profiler.end_phase("forward")
        assert loop.record().status == "ok"


# ---- failures


class Failure(Exception):
    """The exception of a failing step."""


def fail() -> None:
    raise Failure


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_a_step_that_fails_in_any_stage_leaves_nothing_behind_and_training_goes_on(stage: int) -> None:
    loop = Loop()
    loop.steps(stage)
    with pytest.raises(Failure):
        loop.step(fail)
    assert loop.is_clean()
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.steps(3)
    assert not any(map(torch.equal, before, loop.model.parameters()))
    record = loop.record()
    assert record.throughput.steps == max(stage - 5, 0) + 3
    assert (record.memory.held is not None) == (record.throughput.flops is not None) == (stage > 2)
    assert (record.kernels is not None) == (stage > 4)


def test_a_failure_in_the_backward_is_its_own_too() -> None:
    loop = Loop(Plan(0, True, 0))
    loop.step()
    with pytest.raises(Failure):
        loop.step(lambda: loop.model.hidden.register_hook(lambda _: fail()))
    assert loop.is_clean()


def test_the_examined_step_has_its_phase_also_if_it_fails() -> None:
    loop = Loop(Plan(0, True, 0))
    loop.step()
    with pytest.raises(Failure):
        loop.step(fail)
    assert [phase.name for phase in loop.record().phases] == ["examination", "examined step", "forward"]


def test_after_a_failure_nothing_more_is_run_on_the_device(measured: list[str]) -> None:
    loop = Loop()
    loop.steps(len(STAGES))
    measured.clear()
    found = loop.profiler.results(failed=True)
    assert found["kernels"] is None
    assert found["ledger"].trainable > 0
    assert measured == []


NOT_COUNTED = "Memory was not counted: another torch.profiler was running, and only one can; profile without it."
NOT_TIMED = "Kernels were not timed: another torch.profiler was running, and only one can; profile without it."


@pytest.mark.parametrize(
    ("plan", "notes"),
    [
        (Plan(0, True, 0), [NOT_COUNTED]),
        (Plan(0, False, 1), [NOT_TIMED]),
        (Plan(1, True, 2), [NOT_COUNTED, NOT_TIMED]),
    ],
)
def test_in_a_profiler_of_the_users_steps_are_only_timed_and_a_note_says_so(plan: Plan, notes: list[str]) -> None:
    loop = Loop(plan)
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        loop.steps(4)
        loop.profiler.close()
        torch.ones(3).sigmoid()
    assert "aten::sigmoid" in {event.key for event in theirs.key_averages()}
    record = loop.record()
    assert (record.throughput.steps, record.memory.held, record.kernels) == (4 - plan.warmup, None, None)
    assert record.notes == notes
    assert loop.is_clean()


def test_a_profiler_of_the_users_that_waits_for_its_steps_is_not_disturbed() -> None:
    """Its schedule begins in the middle of our instruments, or between them."""
    for wait in (1, 3):
        loop = Loop(Plan(1, True, 2))
        steps = schedule(wait=wait, warmup=1, active=1, repeat=1)
        with profile(activities=[ProfilerActivity.CPU], schedule=steps) as theirs:
            for _ in range(8):
                loop.step()
                theirs.step()
        assert "aten::addmm" in {event.key for event in theirs.key_averages()}
        record = loop.record()
        assert (record.throughput.steps, record.notes) == (7, [NOT_COUNTED, NOT_TIMED])
        assert loop.is_clean()
    loop = Loop(Plan(1, True, 2))
    loop.steps(6)
    assert (loop.record().memory.held is not None, loop.record().notes) == (True, [])


def test_a_profiler_of_the_users_that_has_ended_is_no_hindrance() -> None:
    loop = Loop(Plan(1, True, 1))
    with profile(activities=[ProfilerActivity.CPU]):
        loop.step()
    loop.steps(4)
    record = loop.record()
    assert record.memory.held is not None
    assert (record.kernels is not None, record.notes) == (True, [])


@pytest.mark.parametrize("wrapped", [True, False])
def test_of_a_compiled_model_the_record_says_what_ran_eagerly(wrapped: bool) -> None:
    loop = Loop(Plan(1, True, 1))
    plain = Loop(Plan(1, True, 1))
    plain.steps(6)
    expected = plain.record()
    assert EAGER not in expected.notes
    if wrapped:
        loop.profiler.model = loop.model = torch.compile(loop.model, backend="aot_eager")  # pyright: ignore
    else:
        loop.model.compile(backend="aot_eager")
    loop.steps(6)
    record = loop.record()
    assert record.notes == [EAGER]
    assert record.throughput.flops == expected.throughput.flops
    assert "the examined step ran eagerly" in EAGER
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


# ---- throughput


def test_only_timed_steps_take_time_and_what_comes_between_them_is_kept_apart(clock: Clock) -> None:
    loop = Loop(Plan(warmup=1, examine=False, profiled=1))
    for seconds in (100.0, 200.0, 1.0):
        loop.step(clock.takes(seconds))
    clock.now += 0.5  # waiting for the next batch is no step's
    loop.step(clock.takes(2.0))
    loop.profiler.pause()
    clock.now += 1000.0
    loop.step(clock.takes(4.0))
    found = loop.record().throughput
    assert (found.seconds, found.steps, found.median_step, found.longest_step) == (7.0, 3, 2.0, 4.0)
    assert found.between == 0.5
    assert (found.tokens, found.tokens_per_second) == (3 * TOKENS, 3 * TOKENS / 7.0)


def test_a_step_in_turns_is_as_long_as_one_alone(clock: Clock) -> None:
    (to_run, go), (answers, from_run) = os.pipe(), os.pipe()
    os.write(go, paired.GO * 5)
    found = []
    for turns in (None, f"{to_run},{from_run}"):
        loop = Loop(Plan(warmup=1, examine=False, profiled=0, turns=turns))
        for seconds in (1.0, 2.0, 3.0, 4.0):
            loop.step(clock.takes(seconds))
            clock.now += 0.5  # loading, logging
        found.append(loop.record().throughput)
    assert replace(found[0], between=None) == found[1]
    assert (found[0].between, found[0].median_step) == (1.0, 3.0)
    for descriptor in (to_run, go, answers, from_run):
        os.close(descriptor)


def test_kernels_that_were_interrupted_are_timed_anew_by_default(clock: Clock) -> None:
    loop = Loop(Plan(warmup=0, examine=False, profiled=None))
    loop.profiler.begin_step()
    loop.profiler.pause()
    loop.profiler.end_step()
    for _ in range(3):
        loop.step(clock.takes(1.0))
    assert (loop.record().kernels.steps, loop.profiler.timed) == (2, 1)


def test_no_timed_step_is_no_throughput() -> None:
    loop = Loop()
    loop.steps(5)
    assert loop.record().throughput is None


@pytest.mark.parametrize("at_a_time", [1, 4])
def test_accumulated_batches_all_count(at_a_time: int, clock: Clock) -> None:
    """The number of tokens is the same however many batches a step has."""
    given = [{"token_mask": torch.arange(TOKENS) < length} for length in (60, 1, 33, 64, 17, 5, 48, 2)]
    loop = Loop(Plan(0, False, 0))
    for first in range(0, len(given), at_a_time):
        tokens = Tokens()
        for batch in given[first : first + at_a_time]:
            tokens.add(count_tokens(batch))
        loop.step(clock.takes(float(at_a_time)), tokens.counts)
    found = loop.record().throughput
    assert (found.tokens, found.padded_tokens, found.seconds) == (60 + 1 + 33 + 64 + 17 + 5 + 48 + 2, 8 * TOKENS, 8.0)
    assert found.steps == 8 // at_a_time


@pytest.mark.parametrize(
    ("batch", "counts"),
    [
        ({"input_ids": torch.ones(2, 3)}, (6, 6)),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, (3, 6)),
        ({"attention_mask": torch.ones(2, 3), "token_mask": torch.tensor([True, False])}, (1, 2)),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[True, True, False]] * 2)}, (4, 6)),
        ({"input_ids": torch.ones(2, 3), "attention_mask": None}, (6, 6)),
        ({"input_ids": torch.ones(2, 2, 3), "attention_mask": torch.ones(2, 2, 3)}, (12, 12)),  # choices
        ([{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.ones(1, 4)}], (10, 10)),
        ([{"input_ids": torch.ones(2, 3)}, {"pixels": torch.ones(1, 4)}], None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 2], [1, 2, 3]])}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[0, 0, -1], [0, 0, 0]])}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[0.0, 0.0, -torch.inf]] * 2)}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3)}, None),  # additive, and rules nothing out
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.full((2, 3), torch.nan)}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}, None),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": {"full_attention": torch.ones(2, 1, 3, 3)}}, None),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 4)}, None),
        ({"input_ids": [1, 2]}, None),
        ({"pixels": torch.ones(3)}, None),
        ([torch.ones(3)], None),
        (None, None),
    ],
)
def test_tokens_of_a_batch(batch: Any, counts: tuple[int, int] | None) -> None:
    assert count_tokens(batch) == counts


def test_batches_that_tell_nothing_have_no_tokens() -> None:
    loop = Loop(Plan(0, False, 0))
    loop.step()
    with loop.profiler.step([torch.ones(3)]):
        loop.model(**next(batches()))
    found = loop.record().throughput
    assert (found.steps, found.tokens, found.padded_tokens, found.tokens_per_second) == (2, None, None, None)
    assert loop.record().notes == [stopwatch.NO_TOKENS]


MASKS = {
    "segment numbers": torch.tensor([[1, 1, 2, 3], [1, 2, 2, 0]]),
    "additive": torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]] * 2),
    "lowest": torch.full((2, 4), torch.finfo(torch.float32).min),
    "4-D": torch.ones(2, 1, 4, 4),
    "4-D additive": torch.full((2, 1, 4, 4), -torch.inf).triu(1),
    "not a number": torch.full((2, 4), torch.nan),
    "of 8 bits": torch.full((2, 4), 0.5).to(torch.float8_e4m3fn),
    "learnt": torch.full((2, 4), 0.5, requires_grad=True),
    "complex": torch.ones(2, 4, dtype=torch.complex64),
    "sparse": torch.ones(2, 4).to_sparse(),
    "of a prefix": torch.ones(2, 6),
    "transposed": torch.ones(4, 2),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_mask_costs_the_record(mask: Tensor, tmp_path: Path) -> None:
    loop = Loop(Plan(0, False, 0))
    loop.step()
    with loop.profiler.step({"input_ids": torch.ones(2, 4), "attention_mask": mask}):
        pass
    record = loop.record()
    record.write(tmp_path / "record.json")
    assert (record.throughput.steps, record.throughput.tokens, record.throughput.padded_tokens) == (2, None, None)
    assert record.notes == [stopwatch.NO_TOKENS]


@pytest.mark.parametrize("tokens", [(9, 8), (-1, 8), (float("nan"), 8), (torch.tensor(-torch.inf), 8)])
def test_counts_that_cannot_be_cost_no_record_either(tokens: Any) -> None:
    loop = Loop(Plan(0, False, 0))
    loop.step(tokens=tokens)
    record = loop.record()
    assert (record.throughput.steps, record.throughput.tokens, record.notes) == (1, None, [stopwatch.NO_TOKENS])


def test_a_mask_on_a_device_is_judged_there_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake device: values of a mask that is not on the CPU are not read in the step."""
    for mask, known in ((torch.tensor([[1, 1, 0]]), True), (torch.tensor([[1, 2, 2]]), False)):
        tokens = Tokens()
        real = stopwatch.judged(mask)
        tokens.add((real, 3))
        tokens.add((2, 3))
        assert isinstance(real, Tensor)
        assert tokens.read() == ((4, 6) if known else None)


@pytest.mark.parametrize("known", [True, False])
def test_batches_that_are_added_to_a_step_count(known: bool, clock: Clock) -> None:
    """A bare loop that accumulates gradients, whose batches come one by one."""
    loop = Loop(Plan(0, False, 0))
    first, *others = batches(3)
    for number in range(2):
        with loop.profiler.step(first):
            for batch in others:
                loop.profiler.add_batch(batch if known else {"pixels": torch.ones(3)})
            clock.now += 1.0
        assert loop.profiler.timed == number + 1
    found = loop.record().throughput
    assert (found.steps, found.tokens) == (2, 2 * 3 * TOKENS if known else None)


def test_a_list_of_micro_batches_is_one_step(clock: Clock) -> None:
    loop = Loop(Plan(0, False, 0))
    with loop.profiler.step(list(batches(3))):
        clock.now += 1.0
    found = loop.record().throughput
    assert (found.steps, found.tokens, found.padded_tokens) == (1, 3 * TOKENS, 3 * TOKENS)


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 11])
def test_more_steps_than_are_held_are_folded(steps: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "MAX_STAMPS", 4)
    loop = Loop(Plan(0, False, 0))
    for number in range(steps):
        loop.step(clock.takes(2.0**number))
        clock.now += 0.5  # before the next
    found = loop.record().throughput
    assert (found.steps, found.seconds, found.between) == (steps, 2.0**steps - 1, 0.5 * (steps - 1))
    assert found.longest_step == 2.0 ** (steps - 1)


# ---- what resides


def test_the_examinations_own_memory_is_not_the_runs() -> None:
    loop = Loop(Plan(1, True, 0))
    loop.steps(3, lambda: touch(256 * MIB) if tools()[1] else None)
    loop.step()
    record = loop.record()
    peaks = {phase.name: phase.peak_rss for phase in record.phases}
    if "set back at each phase" not in record.memory.method:
        pytest.skip(f"this system cannot set the peak back: {record.memory.method}")
    assert peaks["examined step"] - record.memory.peak_resident > 200 * MIB
    assert record.memory.peak_resident == peaks["training"]


def test_weights_of_few_bits_do_not_choose_the_ceilings_type() -> None:
    model = nn.Module()
    model.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    model.register_parameter("scale", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    assert Profiler(model).dtype == torch.bfloat16
    assert Profiler(model, dtype=torch.float16).dtype == torch.float16


# ---- a GPU, by script


class Card:
    """Stand-in for `torch.cuda`, whose time moves with `Loop`'s steps, and memory on request.

    Attributes:
        waits: How often someone waited for an event; `synchronised` is how often for the whole device.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.held = self.peak = 0
        self.split, self.retries = 0, 0
        self.waits = self.synchronised = 0

    def use(self, size: int, keep: int = 0) -> None:
        self.peak = max(self.peak, self.held + size)
        self.held += keep

    def synchronize(self, device: torch.device) -> None:
        assert device == CARD
        self.synchronised += 1

    def current_stream(self, device: torch.device) -> str:
        return f"stream of {device}"

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.held

    def memory_stats(self, device: torch.device) -> dict[str, int]:
        assert device == CARD
        sizes = {"requested": self.peak, "allocated": 2 * self.peak, "reserved": 3 * self.peak}
        return {
            **{f"{name}_bytes.all.peak": size for name, size in sizes.items()},
            "requested_bytes.all.current": self.held,
            "inactive_split_bytes.all.current": self.split,
            "num_alloc_retries": self.retries,
        }

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name="a card", total_memory=80 * 2**30, uuid=UUID.removeprefix("GPU-"))

    def Event(self, enable_timing: bool) -> "CardEvent":
        assert enable_timing
        return CardEvent(self)


class CardEvent:
    """An event of a `Card`, whose time can be read once it, or a later one, was synchronised."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def record(self, stream: str) -> None:
        assert stream == f"stream of {CARD}"
        self.seconds = self.card.clock.now

    def elapsed_time(self, end: "CardEvent") -> float:
        assert self.card.waits
        return (end.seconds - self.seconds) * 1e3

    def synchronize(self) -> None:
        self.card.waits += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Card:
    card = Card(clock)
    memory = ("memory_stats", "reset_peak_memory_stats", "get_device_properties")
    for name in ("synchronize", "current_stream", "Event", *memory):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    return card


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNVML:
    """A scripted NVML that samples only when the profiler or a test asks."""
    fake = FakeNVML()
    fake.compute = {os.getpid(): 300 * MIB}
    monkeypatch.setattr(nvml, "NVML", SimpleNamespace(of=lambda device: NVML(UUID, interval=1000, api=fake)))
    return fake


def test_the_stopwatch_waits_once_a_window(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(CARD)
    for window in (3, 1):
        watch.stamp()
        for _ in range(window):
            card.clock.now += 0.25
            watch.stamp()
        assert watch.running
        watch.close()
        assert not watch.running
        card.clock.now += 50.0
    assert watch.seconds == [0.25] * 4
    assert (card.waits, card.synchronised) == (2, 0)
    watch.close()
    assert card.waits == 2
    monkeypatch.setattr(stopwatch, "MAX_STAMPS", 2)
    for _ in range(6):
        watch.stamp()
    assert card.waits == 2 + 2


def test_a_loop_on_a_card_waits_for_it_at_phases_and_windows_only(card: Card, fake: FakeNVML) -> None:
    loop = Loop(Plan(warmup=2, examine=False, profiled=0), device=CARD)
    loop.steps(2)
    assert (card.waits, card.synchronised) == (0, 1), "training begins"
    for _ in range(2):
        loop.steps(20, card.clock.takes(0.5))
        loop.profiler.pause()
    assert (card.waits, card.synchronised) == (2, 6), "two windows, and two of energy; training ends, begins and ends"
    record = loop.record()
    assert card.waits == 2
    assert (record.throughput.steps, record.throughput.seconds) == (40, 20.0)
    assert record.throughput.tokens == 40 * TOKENS
    assert (record.device.kind, record.device.name, record.device.memory) == ("cuda", "a card", 80 * 2**30)


def test_the_allocators_record_is_what_the_card_says(card: Card, fake: FakeNVML) -> None:
    card.use(9000, keep=1000)
    loop = Loop(Plan(warmup=1, profiled=0), device=CARD)
    loop.steps(2, lambda: card.use(7000, keep=100))
    card.split, card.retries = 33, 4

    def step() -> None:
        assert tools() == (False, 2), "no torch.profiler on a card"
        card.use(500)
        loop.profiler.end_phase("forward")
        card.use(300, keep=64)
        loop.profiler.begin_phase("forward")

    loop.step(step)
    card.use(8000)
    found = loop.record().memory.allocator
    assert found.method.startswith("CUDA caching allocator")
    assert (found.requested, found.allocated, found.reserved) == (1700, 3400, 5100)
    assert (found.inactive_split, found.retries, found.left_behind) == (33, 4, 64)
    assert {phase.name: phase.peak_requested for phase in loop.record().phases}["forward"] == 1700
    assert any("flushed its cache 4 times" in sentence for sentence in findings(loop.record()))


def test_a_step_that_is_examined_again_has_its_own_peaks(card: Card, fake: FakeNVML) -> None:
    loop = Loop(Plan(warmup=0, profiled=0), device=CARD)
    loop.step()
    loop.step(lambda: card.use(9000))  # what only that step takes is not the longer one's
    with loop.profiler.step({"input_ids": torch.zeros(ROWS, 2 * LENGTH, dtype=torch.long)}):
        card.use(5000)
    record = loop.record()
    found = record.memory
    assert (found.examined_step, found.examined_positions) == (3, 2 * TOKENS)
    assert (found.allocator.requested, found.allocator.reserved, found.allocator.uncounted) == (5000, 15_000, None)
    assert {phase.name: phase.peak_requested for phase in record.phases}["examined step"] == 9000


def test_what_the_ledger_grew_by_is_not_left_behind(card: Card, fake: FakeNVML) -> None:
    loop = Loop(Plan(warmup=0, profiled=0), device=CARD)

    def widen() -> None:
        loop.model.register_buffer("index", torch.ones(100))
        card.use(400, keep=400)

    loop.step()
    loop.step(widen)
    assert loop.record().memory.allocator.left_behind == 0


def test_cuda_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch, card: Card, fake: FakeNVML) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    loop = Loop(device=torch.device("cuda"))
    loop.profiler.close()
    assert loop.profiler.device == CARD


def test_energy_is_that_of_the_timed_windows(card: Card, fake: FakeNVML) -> None:
    loop = Loop(Plan(warmup=1, examine=False, profiled=0), device=CARD)

    def draw() -> None:
        card.clock.now += 1.0
        fake.millijoules += 2000

    loop.step(draw)
    loop.steps(2, draw)
    loop.profiler.pause()
    fake.millijoules += 10**6
    loop.steps(3, draw)
    loop.steps(1, lambda: (draw(), loop.profiler.pause()))  # does not count for the time, and its energy is drawn
    loop.profiler.resume()
    fake.millijoules += 10**6
    record = loop.record()
    assert (record.throughput.seconds, record.driver.joules) == (5.0, 12.0)
    assert not fake.open
    assert [thread.name for thread in threading.enumerate() if thread.name == "nvml"] == []


def test_the_energy_of_steps_before_is_not_in_the_window(card: Card, fake: FakeNVML) -> None:
    """Work is queued on a card: what a warm-up step has left there is done before the counter is read."""
    loop, order = Loop(Plan(warmup=1, examine=False, profiled=0), device=CARD), list[str]()
    wait, ask = torch.cuda.synchronize, fake.nvmlDeviceGetTotalEnergyConsumption
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: (order.append("wait"), wait(device)))
        patch.setattr(
            fake, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: (order.append("read"), ask(handle))[1]
        )
        loop.step()
        order.clear()
        loop.step(card.clock.takes(1.0))
    assert order == ["wait", "read"]
    loop.record()


@pytest.mark.parametrize(("seconds", "steps"), [(0.5, 10), (1.0, 5), (3.0, 3)])
def test_a_bench_times_long_enough_for_the_energy_counter(
    card: Card, fake: FakeNVML, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int
) -> None:
    monkeypatch.setattr(nvml, "perf_counter", card.clock)
    loop = Loop(Plan(warmup=0, examine=False, profiled=0, timed=3), device=CARD)
    while not loop.profiler.done:
        loop.step(card.clock.takes(seconds))
    record = loop.record()
    assert (record.throughput.steps, record.driver.energy_seconds) == (steps, steps * seconds)
    assert not any("uncertain" in note for note in record.notes)


def test_a_bench_without_a_counter_ends_after_its_steps(card: Card, fake: FakeNVML) -> None:
    fake.fails["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    loop = Loop(Plan(warmup=0, examine=False, profiled=0, timed=3), device=CARD)
    while not loop.profiler.done:
        loop.step(card.clock.takes(0.5))
    assert loop.record().throughput.steps == 3


def test_steps_in_turns_have_no_energy(card: Card, fake: FakeNVML) -> None:
    (to_run, go), (answers, from_run) = os.pipe(), os.pipe()
    os.write(go, paired.GO * 2)
    loop = Loop(Plan(warmup=0, examine=False, profiled=0, turns=f"{to_run},{from_run}"), device=CARD)
    loop.steps(2, card.clock.takes(0.5))
    record = loop.record()
    assert (record.throughput.steps, record.driver.joules) == (2, None)
    assert any("Energy was not measured: windows of one step" in note for note in record.notes)
    for descriptor in (to_run, go, answers, from_run):
        os.close(descriptor)


def test_a_machine_without_nvml_says_so_and_trains(card: Card, fake: FakeNVML) -> None:
    fake.fails["nvmlInit"] = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    loop = Loop(Plan(warmup=1, examine=False, profiled=0), device=CARD)
    loop.steps(3, card.clock.takes(1.0))
    record = loop.record()
    (note,) = record.notes
    assert note.startswith(f"NVML was to watch the device {UUID}, but says: ")
    assert (record.status, record.driver, record.throughput.steps) == ("ok", None, 2)


def test_a_cpu_has_no_nvml() -> None:
    notes: list[str] = []
    assert open_nvml(torch.device("cpu"), notes) is None
    assert notes == []


def test_a_card_that_is_lost_is_in_the_findings(card: Card, fake: FakeNVML) -> None:
    loop = Loop(Plan(warmup=1, examine=False, profiled=0), device=CARD)
    loop.steps(2, card.clock.takes(1.0))
    fake.fails["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_GPU_IS_LOST
    loop.profiler.nvml.sample()
    loop.steps(2, card.clock.takes(1.0))
    record = loop.record()
    assert (record.status, record.throughput.steps, record.driver.samples) == ("ok", 3, 1)
    (sentence,) = findings(record)
    assert sentence.startswith("The driver's figures end before the run: NVML failed after 1 samples")


@pytest.mark.gpu
def test_a_real_card() -> None:
    torch.manual_seed(0)
    model = Model(16_384).cuda()  # a step holds 4 GiB, beside which cuBLAS's workspaces are small
    optimizer = torch.optim.AdamW(model.parameters())
    with Profiler(model, optimizer, PLAN) as found:
        for batch in batches(len(STAGES)):
            moved = {name: ids.cuda() for name, ids in batch.items()}
            with found.step(moved):
                with found.phase("forward"):
                    loss = model(**moved).loss
                with found.phase("backward"):
                    loss.backward()
                with found.phase("optimizer step"):
                    optimizer.step()
                    optimizer.zero_grad()
    record = found.record("card")
    assert abs(residue(record)) < 0.05
    assert record.memory.allocator.left_behind == 0
    sizes = record.memory.allocator
    assert (sizes.reserved or 0) >= (sizes.allocated or 0) >= sizes.requested
    assert record.throughput.tokens == 2 * TOKENS
    assert record.kernels.top


def test_a_device_without_accounts_is_timed_only() -> None:
    """Lightning trains on Apple's mps where a machine has one."""
    notes: list[str] = []
    plan = plan_on(torch.device("mps"), Plan(warmup=1, profiled=2, timed=3), notes)
    assert (plan.examine, plan.profiled, plan.timed) == (False, 0, 3)
    assert notes == ["Memory by category and kernels were not measured: on mps neither has an account."]
    assert plan_on(torch.device("cuda"), PLAN, notes) is PLAN
