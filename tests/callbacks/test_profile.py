"""Profile on LightningModules that do not know of it, and the records of fits that end early or fail."""

import csv
import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader

from lit_sparse.callbacks import profile as callbacks
from lit_sparse.callbacks.profile import Profile
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import UpdateStrategy
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling import phases, profiler, stopwatch, utilization, walltime
from lit_sparse_profiling.ceilings import Ceilings
from lit_sparse_profiling.reconcile import findings, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan

PLAN = Plan(warmup=1, profiled=2)
BEFORE = 5
"""Steps of the plan before the first timed one."""
LENGTHS = (7, 3, 8, 1, 8, 8, 2, 5)
"""Tokens of each batch's only row, of WIDTH with padding."""
WIDTH = 8
IN_A_STEP = ("forward", "backward", "optimizer step")


class Clock:
    """A clock that moves only on request."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Slow(torch.optim.AdamW):
    """An optimizer whose step takes 100 s, after the closure."""

    clock: ClassVar[Clock]

    def step(self, closure: Any = None) -> Any:
        def then() -> Any:
            loss = closure()
            self.clock.pass_(100.0)
            return loss

        return super().step(then)


class Net(L.LightningModule):
    """A small regression; on the clock a forward takes 1 s, a backward 10 s, an optimizer's step 100 s."""

    def __init__(self, clock: Clock, work: Callable[[L.LightningModule], Any] = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 1))
        self.clock, self.work = clock, work
        Slow.clock = clock

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.clock.pass_(1.0)
        loss = self.net(batch["input_ids"].float()).square().mean()
        if loss.requires_grad:
            loss.register_hook(lambda _: self.clock.pass_(10.0))
        self.work(self)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.pass_(10_000.0)
        self.net(batch["input_ids"].float())

    def val_dataloader(self) -> Any:
        return rows(1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock.pass_(1_000_000.0)

    def configure_optimizers(self) -> Any:
        return Slow(self.parameters(), lr=1e-3)


class Manual(Net):
    """The same in manual optimization, with an optimizer for each layer and `accumulate` batches in a step."""

    def __init__(self, clock: Clock, work: Callable[[L.LightningModule], Any] = lambda _: None, accumulate: int = 1):
        super().__init__(clock, work)
        self.automatic_optimization, self.accumulate = False, accumulate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizers = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clock.pass_(0.25)
        if (batch_idx + 1) % self.accumulate:
            return
        for optimizer in optimizers:  # pyright: ignore[reportGeneralTypeIssues]
            optimizer.step()
            optimizer.zero_grad()
            self.clock.pass_(0.5)

    def configure_optimizers(self) -> Any:
        return [Slow(self.net[i].parameters(), lr=1e-3) for i in (0, 2)]


def rows(count: int = 64) -> DataLoader[Any]:
    """Batches of one row each, every epoch the same."""
    places = torch.arange(WIDTH)[None]
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    given: Any = [{"input_ids": places + n, "attention_mask": places < n} for n in lengths]
    return DataLoader(given, batch_size=None)


def trainer(steps: int, *extra: Callback, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saving = any(isinstance(callback, ModelCheckpoint) for callback in extra)
    given = {**quiet, "limit_val_batches": 0, "enable_checkpointing": saving, **options}
    return L.Trainer(accelerator="cpu", max_steps=steps, callbacks=list(extra), **given)


def is_clean(module: nn.Module) -> bool:
    """Check that no hook, thread or mode of the profiler is left."""
    hooks: list[Any] = [p._post_accumulate_grad_hooks for p in module.parameters()]  # pyright: ignore
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return not (_get_current_dispatch_mode_stack() or _profiler_enabled() or saving or any(hooks))


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The run's folder, not created yet. The device's ceilings are given, since measuring them takes time."""
    monkeypatch.setattr(profiler, "ceilings", lambda device, dtype: Ceilings(flops=1e12, bytes=1e11))
    return tmp_path / "runs" / "mine"


@pytest.fixture(scope="module", autouse=True)
def a_small_heap() -> Any:
    """Freeze the objects of the imports: each examination runs the garbage collector, which would visit them all."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    monkeypatch.setattr(phases, "perf_counter", clock)
    return clock


def recorded(folder: Path) -> RunRecord:
    return RunRecord.read(folder / "record.json")


def seconds(record: RunRecord) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in record.phases}


def calls(record: RunRecord) -> dict[str, int]:
    return {phase.name: phase.calls for phase in record.phases}


# ---- any LightningModule


def test_two_lines_are_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = L.Trainer(callbacks=[Profile("runs/mine")], max_steps=9, logger=False, accelerator="cpu")
    trainer.fit(Net(Clock()), rows())
    record = RunRecord.read("runs/mine/record.json")
    assert (record.name, record.status, record.notes) == ("mine", "ok", [])
    assert set(calls(record)) >= {"training", "evaluation", "saving", "examination", *IN_A_STEP}
    assert abs(residue(record)) < 0.05
    assert findings(record) == []
    assert record.memory.held.phase in IN_A_STEP
    assert (record.kernels.steps, record.throughput.steps) == (2, 3)
    assert record.ledger.optimizer > 2 * record.ledger.trainable
    assert {"torch", "lightning"} <= set(record.versions)


def test_loggers_get_speed_and_memory_without_evaluation_and_saving(clock: Clock, run: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    saving = ModelCheckpoint(run, every_n_train_steps=3, save_top_k=-1)
    options = {"logger": logger, "log_every_n_steps": 2, "limit_val_batches": 1, "val_check_interval": 3}
    trainer(8, Profile(run, PLAN), saving, **options).fit(Net(clock), rows())
    with (tmp_path / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["tokens_per_second"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5, 7]
    tokens = [sum(LENGTHS[i % len(LENGTHS)] for i in (step - 1, step)) for step in (1, 3, 5, 7)]
    assert [float(row["tokens_per_second"]) for row in logged] == pytest.approx([n / (2 * 111) for n in tokens])
    peaks = [float(row["peak_memory_gib"]) * 2**30 for row in logged]
    assert max(peaks) <= max(phase.peak_rss for phase in recorded(run).phases)  # a sample counts in its phase, too
    assert min(peaks) > 2**20


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_phases_of_a_step_do_not_overlap(manual: bool, accumulate: int, clock: Clock, run: Path) -> None:
    module = Manual(clock, accumulate=accumulate) if manual else Net(clock)
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": accumulate}
    saving = ModelCheckpoint(run, every_n_train_steps=4, save_top_k=-1, save_weights_only=accumulate > 1)
    options |= {"limit_val_batches": 1, "val_check_interval": 6}
    fit = trainer(24 if manual else 12, Profile(run, PLAN), saving, **options)
    fit.fit(module, rows())
    record = recorded(run)
    each = {"forward": 1.0, "backward": 10.0}
    expected = {name: value * accumulate for name, value in each.items()} | {"optimizer step": 100.0}
    if manual:  # two optimizers; all that is neither their steps nor a backward is forward
        expected |= {"forward": accumulate * 1.25 + 2 * 0.5, "optimizer step": 200.0}
    assert {name: value for name, value in seconds(record).items() if name in IN_A_STEP} == expected
    assert calls(record)["backward"] == accumulate
    assert calls(record)["optimizer step"] == (2 if manual else 1)
    assert seconds(record)["evaluation"] == calls(record)["evaluation"] * 10_000.0 > 0
    assert seconds(record)["saving"] == calls(record)["saving"] * 1_000_000.0 > 0
    assert findings(record) == []
    step = sum(expected.values())
    assert record.throughput.seconds == record.throughput.steps * step
    assert (record.throughput.median_step, record.throughput.longest_step) == (step, step)
    assert record.notes == (["The ledger has the first of 2 optimizers only."] if manual else [])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulated_batches_all_count(accumulate: int, run: Path) -> None:
    """The number of tokens does not depend on how many batches make a step."""
    fit = trainer(16 // accumulate, Profile(run, Plan(0, False, 0)), accumulate_grad_batches=accumulate)
    fit.fit(Net(Clock()), rows())
    found = recorded(run).throughput
    assert (found.tokens, found.padded_tokens, found.steps) == (2 * sum(LENGTHS), 16 * WIDTH, 16 // accumulate)


def test_a_longer_batch_within_an_accumulated_step_is_examined(run: Path) -> None:
    given: Any = [{"input_ids": torch.ones(4 if number == 13 else 1, WIDTH)} for number in range(24)]
    fit = trainer(10, Profile(run, Plan(warmup=1, profiled=0)), accumulate_grad_batches=2)
    fit.fit(Net(Clock()), DataLoader(given, batch_size=None))
    record = recorded(run)
    assert (record.memory.examined_step, record.memory.examined_positions) == (7, 4 * WIDTH)
    assert record.throughput.steps == 10 - 1 - 2 - 1
    assert findings(record) == []


def test_batches_that_tell_nothing_have_no_tokens(run: Path) -> None:
    class Pairs(Net):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss({"input_ids": batch[0]})

    given: Any = [(torch.ones(1, WIDTH), torch.ones(1))] * 4
    trainer(3, Profile(run, Plan(0, False, 0))).fit(Pairs(Clock()), DataLoader(given, batch_size=None))
    found = recorded(run).throughput
    assert (found.steps, found.tokens, found.tokens_per_second) == (3, None, None)


def test_profiling_changes_nothing_of_the_training(run: Path) -> None:
    modules = [Net(Clock()), Net(Clock())]
    for module, extra in zip(modules, ([], [Profile(run, PLAN)]), strict=True):
        trainer(8, *extra, accumulate_grad_batches=2).fit(module, rows())
    pairs = list(zip(modules[0].parameters(), modules[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(pairs[0][0], next(Net(Clock()).parameters()))
    assert is_clean(modules[1])


def test_evaluation_in_the_middle_of_a_step(clock: Clock, run: Path) -> None:
    """Evaluate every third batch, with two in a step: every second evaluation interrupts a step."""
    profile = Profile(run, Plan(warmup=1, profiled=1))
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 3}
    trainer(32, profile, **options).fit(Net(clock), rows())
    record = recorded(run)
    assert findings(record) == []
    step = 2 * 11.0 + 100.0
    assert record.throughput.seconds == record.throughput.steps * step
    assert record.throughput.padded_tokens == record.throughput.steps * 2 * WIDTH
    interrupted = 32 - record.throughput.steps - len(profile.plan.stages())
    assert interrupted > 5
    assert any("interrupted them: " in note for note in record.notes)
    assert seconds(record)["training"] + seconds(record)["examination"] == 32 * step


@pytest.mark.parametrize("batches", range(1, 2 * BEFORE + 3))
def test_a_fit_that_ends_in_the_middle_of_a_step(batches: int, run: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = batch_idx + 1 == batches

    module = Net(Clock())
    trainer(100, Profile(run, PLAN), Stop(), accumulate_grad_batches=2).fit(module, rows())
    assert is_clean(module)
    record = recorded(run)
    assert (record.status, record.notes) == ("ok", [])
    assert (record.throughput is not None) == (batches >= 2 * (BEFORE + 1))


def test_a_number_of_timed_steps_ends_the_fit(run: Path) -> None:
    fit = trainer(100, Profile(run, dataclasses.replace(PLAN, timed=3)))
    fit.fit(Net(Clock()), rows())
    assert fit.global_step == BEFORE + 3
    assert recorded(run).throughput.steps == 3


def test_the_first_process_alone_writes_a_trace(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = trainer(3, Profile(run, Plan(0, False, 1, trace="trace.json")))
    monkeypatch.setattr(type(fit), "is_global_zero", False)
    fit.fit(Net(Clock()), rows())
    assert not run.exists()


def test_the_trace_is_in_the_runs_folder(run: Path) -> None:
    trainer(3, Profile(run, Plan(0, False, 1, trace="trace.json"))).fit(Net(Clock()), rows())
    assert recorded(run).kernels.trace == str(run / "trace.json")
    trace = json.loads((run / "trace.json").read_text())
    assert "aten::addmm" in {event.get("name") for event in trace["traceEvents"]}


def test_a_profiler_of_the_users_stays(clock: Clock, run: Path) -> None:
    own = SimpleProfiler()
    saving = ModelCheckpoint(run, every_n_train_steps=4, save_top_k=-1)
    fit = trainer(16, Profile(run, PLAN), saving, profiler=own)
    fit.fit(Net(clock), rows())
    assert fit.profiler is own  # pyright: ignore[reportAttributeAccessIssue]
    assert own.recorded_durations["save_checkpoint"]
    record = recorded(run)
    assert set(IN_A_STEP) <= set(calls(record))
    assert "saving" not in calls(record)
    assert record.throughput.seconds == record.throughput.steps * 111.0, "saving does not count as training"
    (note,) = record.notes
    assert note.startswith("The trainer has a SimpleProfiler of its own, so that saving has no phase")


def test_a_second_fit_has_a_record_of_its_own(clock: Clock, run: Path) -> None:
    profile = Profile(run, Plan(0, False, 0))
    for steps in (3, 5):
        trainer(steps, profile).fit(Net(clock), rows())
        record = recorded(run)
        assert (record.throughput.steps, seconds(record)["training"]) == (steps, steps * 111.0)
    again = trainer(2, profile)
    again.fit(Net(clock), rows())
    again.fit_loop.epoch_loop.max_steps = 6
    again.fit(Net(clock), rows())  # the trainer has this profile's own profiler already
    assert recorded(run).notes == []


def test_something_else_called_phases_is_left_alone(run: Path) -> None:
    module = Net(Clock())
    module.phases = nn.ModuleList([nn.Linear(1, 1)])  # pyright: ignore[reportAttributeAccessIssue]
    trainer(1, Profile(run, Plan(0, False, 0))).fit(module, rows())
    assert "training" in calls(recorded(run))


# ---- where the time goes


class SlowData(L.LightningDataModule):
    """Data that takes 3 s to prepare, 5 s to set up, and 7 s for each loader; 0.5 s to fetch a batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def prepare_data(self) -> None:
        self.clock.pass_(3.0)

    def setup(self, stage: str) -> None:
        self.clock.pass_(5.0)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        self.clock.pass_(0.5)
        return batch

    def train_dataloader(self) -> Any:
        self.clock.pass_(7.0)
        return rows()

    def val_dataloader(self) -> Any:
        self.clock.pass_(7.0)
        return rows(1)


def test_a_fits_time_adds_up(clock: Clock, run: Path) -> None:
    begun = phases.Phases()
    with begun("imports"):
        clock.pass_(9.0)
    clock.pass_(11.0)  # in no phase
    profile = Profile(run, Plan(1, True, 0), phases=begun)
    fit = trainer(8, profile, ModelCheckpoint(run, every_n_train_steps=4), limit_val_batches=1, val_check_interval=4)
    profile.listen(fit)
    fit.fit(Net(clock), datamodule=SlowData(clock))
    record = recorded(run)
    found = walltime.parts(record)
    assert record.seconds == pytest.approx(clock.now)
    assert found == {
        **{"imports": 9.0, "data": 3.0 + 5.0 + 2 * 7.0, "evaluation": 2 * (10_000.0 + 0.5)},
        **{"examination": 2 * (111.0 + 0.5), "training": 6 * 111.0 + 4 * 0.5, "saving": 2_000_000.0},
        "other": 11.0 + 2 * 0.5,  # the batches fetched before the first step and after the first evaluation
    }


def test_a_step_is_without_what_comes_between(clock: Clock, run: Path) -> None:
    """Batches are fetched between the steps; what follows the last one of a window is in none."""
    trainer(9, Profile(run, Plan(2, False, 0))).fit(Net(clock), datamodule=SlowData(clock))
    found = recorded(run).throughput
    assert (found.seconds, found.median_step, found.steps, found.between) == (7 * 111.0, 111.0, 7, 6 * 0.5)
    assert list(utilization.findings(recorded(run))) == []


def test_a_fit_that_waits_for_its_data_is_told(clock: Clock, run: Path) -> None:
    class Slower(SlowData):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            self.clock.pass_(37.0)
            return batch

    trainer(9, Profile(run, Plan(2, False, 0))).fit(Net(clock), datamodule=Slower(clock))
    (told,) = utilization.findings(recorded(run))
    assert told.startswith("22% of the time of the timed steps went by between them")


def test_a_second_fit_has_its_own_time(clock: Clock, run: Path) -> None:
    begun = phases.Phases()
    with begun("imports"):
        clock.pass_(9.0)
    profile = Profile(run, Plan(0, False, 0), phases=begun)
    for imports in (9.0, 0.0):
        trainer(2, profile).fit(Net(clock), rows())
        assert recorded(run).seconds == imports + 222.0
        assert walltime.parts(recorded(run)).get("imports", 0.0) == imports


@pytest.mark.parametrize(
    ("steps", "measured"), [(16, (False, False)), (45, (True, False)), (90, (True, True)), (300, (True, True))]
)
def test_measuring_takes_a_tenth_of_a_fit_by_default(
    steps: int, measured: tuple[bool, bool], clock: Clock, run: Path
) -> None:
    fit = trainer(steps, Profile(run, Plan(2, None, None)))
    fit.fit(Net(clock), rows(steps))
    record = recorded(run)
    assert (record.memory.held is not None, record.kernels is not None) == measured
    assert walltime.parts(record).get("examination", 0.0) <= 0.1 * record.seconds
    assert len(record.notes) == 2 - sum(measured)
    if not measured[0]:
        assert record.notes[0].endswith(
            "takes about 335.0 s, and measuring at most 10% of the fit; --profile.examine=true does it nevertheless."
        )


def test_a_limit_of_time_limits_measuring_too(clock: Clock, run: Path) -> None:
    timer = Timer({"seconds": 30})
    trainer(300, Profile(run, Plan(2, None, None)), timer).fit(Net(clock), rows(300))
    assert (recorded(run).memory.held, recorded(run).kernels) == (None, None)


@pytest.mark.parametrize("plan", [Plan(2, True, 2), Plan(2, None, None, timed=3)], ids=["asked for", "a bench"])
def test_what_is_asked_for_is_measured_whatever_it_takes(plan: Plan, clock: Clock, run: Path) -> None:
    trainer(16, Profile(run, plan)).fit(Net(clock), rows())
    record = recorded(run)
    assert record.memory.held is not None
    assert record.kernels is not None
    assert record.notes == []


# ---- failures


def absurd(_: Any) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def raising(error: BaseException) -> Callable[[Any], None]:
    def work(_: Any) -> None:
        raise error

    return work


def fitted_until(step: int, work: Callable[[Any], None], run: Path, error: type[BaseException]) -> L.LightningModule:
    """A module that calls `work`, which fails with `error`, in one step (counted from 0)."""
    module = Net(Clock(), lambda net: work(net) if net.global_step == step else None)
    with pytest.raises(error):
        trainer(100, Profile(run, PLAN)).fit(module, rows())
    return module


CARD_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation.")


@pytest.mark.parametrize("step", range(BEFORE + 2))
@pytest.mark.parametrize(
    ("work", "error", "reason"),
    [
        (
            raising(CARD_IS_FULL),
            torch.OutOfMemoryError,
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.",
        ),
        (absurd, RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
    ids=["card", "host"],
)
def test_out_of_memory_is_a_result(step: int, work: Any, error: type[BaseException], reason: str, run: Path) -> None:
    module = fitted_until(step, work, run, error)
    assert is_clean(module)
    record = recorded(run)
    assert record.status == "oom"
    assert reason in record.reason
    assert "\n" not in record.reason
    assert record.ledger.trainable == sum(p.nbytes for p in module.parameters())
    assert (record.ledger.optimizer > 0) == (step > 0)
    assert (record.memory.held is not None) == (step > 2)
    assert (record.throughput is not None) == (step > BEFORE)
    assert record.kernels is None, "after a failure nothing more is run on the device"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (MemoryError(), "oom", "MemoryError"),
        (RuntimeError("CUDA error: out of memory\nand more"), "oom", "RuntimeError: CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "oom", "RuntimeError: CUDA error"),
        (ValueError("a wrong shape\nand more"), "failed", "ValueError: a wrong shape"),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), "failed", "ValueError: DefaultCPUAllocator"),
        (RuntimeError(), "failed", "RuntimeError"),
    ],
)
def test_how_a_fit_failed(error: BaseException, status: str, reason: str, run: Path) -> None:
    fitted_until(1, raising(error), run, type(error))
    record = recorded(run)
    assert record.status == status
    assert record.reason.startswith(reason)
    assert not record.reason.endswith(":")


def test_a_failure_before_training_has_a_record_too(run: Path) -> None:
    class Broken(Net):
        def configure_optimizers(self) -> Any:
            raise CARD_IS_FULL

    with pytest.raises(torch.OutOfMemoryError):
        trainer(1, Profile(run)).fit(Broken(Clock()), rows())
    record = recorded(run)
    assert (record.status, record.ledger, record.phases) == ("oom", None, [])


def test_a_failure_of_the_second_fit_is_not_told_with_the_firsts_figures(run: Path) -> None:
    profile = Profile(run, Plan(0, False, 0))
    trainer(2, profile).fit(Net(Clock()), rows())

    class Broken(Net):
        def configure_optimizers(self) -> Any:
            raise ValueError("no optimizer")

    with pytest.raises(ValueError, match="no optimizer"):
        trainer(2, profile).fit(Broken(Clock()), rows())
    assert (recorded(run).status, recorded(run).throughput) == ("failed", None)


def test_what_is_refused_has_no_record(run: Path) -> None:
    fitted_until(1, raising(BadInput("two things do not go together.")), run, BadInput)
    assert not run.exists()


def test_a_failure_after_the_fit_leaves_its_record_alone(run: Path) -> None:
    module = Net(Clock())
    fit = trainer(2, Profile(run, Plan(0, False, 0)), limit_val_batches=1)
    fit.fit(module, rows())
    before = recorded(run)

    def validation_step(batch: Any, batch_idx: int) -> None:
        raise ValueError("in the validation")

    module.validation_step = validation_step
    with pytest.raises(ValueError, match="in the validation"):
        fit.validate(module, rows(1))
    assert recorded(run) == before


# ---- a GPU, by script


def test_the_sampler_of_a_card_begins_before_training_and_ends_with_a_failure(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    said: list[str] = []
    nvml = SimpleNamespace(mark_context=lambda: said.append("context"), stop=lambda: said.append("stop"))
    monkeypatch.setattr(callbacks, "open_nvml", lambda device, notes: said.append(f"opened {device}") or nvml)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(f"synchronised {device}"))
    strategy = SimpleNamespace(root_device=torch.device("cuda", 1))
    fit: Any = SimpleNamespace(profiler=None, strategy=strategy, is_global_zero=True, state=SimpleNamespace(fn="fit"))
    profile = Profile(run)
    profile.setup(fit, Net(Clock()), "validate")
    assert said == []
    profile.setup(fit, Net(Clock()), "fit")
    profile.on_exception(fit, Net(Clock()), ValueError("before training"))
    assert said == ["synchronised cuda:1", "opened cuda:1", "context", "stop"]
    assert recorded(run).status == "failed"


# ---- update strategies


@dataclasses.dataclass
class Switching(UpdateStrategy):
    """Declares a change of the trainable set every `period` steps, and notes the modes that each step ran under."""

    claims: ClassVar = frozenset({"trainable"})
    steps: int = 3

    @property
    def period(self) -> int:
        return self.steps

    def attach(self, model: nn.Module, probe: Any, context: Any) -> None:
        self.seen: list[int] = []

    def before_step(self, step: int, optimizer: Any) -> None:
        self.seen.append(len(_get_current_dispatch_mode_stack()))


def data() -> Synthetic:
    return Synthetic(vocab_size=96, max_length=12, rows=20, heldout=2, batch_size=2)


def test_a_strategy_that_switches_is_examined_after_its_first_switch(run: Path) -> None:
    run.mkdir(parents=True)
    switching = Switching(steps=3)
    fit = trainer(8, Recorder(run, Plan(1, True, 1), checkpoint_steps=0, samples=0), limit_val_batches=1)
    fit.fit(CausalLM(base=tiny_llm("llama"), updates=[switching]), datamodule=data())
    assert switching.seen == [0] * (1 + 3) + [0, 2] + [0, 0]
    record = recorded(run)
    assert (record.throughput.steps, record.kernels.steps) == (1, 1)
    assert findings(record) == []


def test_evaluation_before_training_is_in_the_record(run: Path) -> None:
    run.mkdir(parents=True)
    options = {"limit_val_batches": 1, "num_sanity_val_steps": -1, "val_check_interval": 2}
    fit = trainer(2, Recorder(run, Plan(0, False, 0), samples=0), **options)
    fit.fit(CausalLM(base=tiny_llm("llama")), datamodule=data())
    found = calls(recorded(run))
    assert set(found) >= {"loading", "selection", "evaluation", "training", "saving"}
    assert found["evaluation"] == 2
    assert next(iter(found)) == "loading"


def test_memory_that_is_used_up_in_the_selection_has_its_phases(run: Path) -> None:
    class Hungry(Switching):
        def attach(self, model: nn.Module, probe: Any, context: Any) -> None:
            absurd(model)

    run.mkdir(parents=True)
    fit = trainer(2, Recorder(run, Plan(0, False, 0), samples=0))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        fit.fit(CausalLM(base=tiny_llm("llama"), updates=[Hungry()]), datamodule=data())
    record = recorded(run)
    assert (record.status, list(calls(record))) == ("oom", ["loading", "selection"])
