"""Connect Lightning to the profiler: a fit of any LightningModule leaves a record of its memory and time."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.profilers import Profiler as LightningProfiler

from lit_sparse.errors import BadInput
from lit_sparse.library_errors import is_oom, understood
from lit_sparse_profiling.budget import Budget
from lit_sparse_profiling.nvml import NVML, open_nvml
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.profiler import Profiler
from lit_sparse_profiling.ranks import combined, note_of_one
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.run_folders import RECORD
from lit_sparse_profiling.step_plan import Plan
from lit_sparse_profiling.stopwatch import Pace

PACKAGES = ("torch", "lightning", "transformers", "peft")


DATA, DATA_HOOKS = "data", ("prepare_data", "train_dataloader", "val_dataloader")
"""Phase of preparing the data, and the hooks in it, beside a datamodule's `setup`."""


class PhaseProfiler(LightningProfiler):
    """Tells a `Profile` of events that callbacks do not see: data, ends of optimizer steps, saving of checkpoints."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile_ = profile
        self._data: str | None = None  # the action that opened the phase

    def start(self, action_name: str) -> None:
        if action_name == "save_checkpoint":
            self.profile_.leave_training("saving")
        elif self._data is None and is_data(action_name) and self.profile_.phases is not None:
            self._data = action_name
            self.profile_.phases.begin(DATA)

    def stop(self, action_name: str) -> None:
        if action_name == "save_checkpoint":
            self.profile_.return_to_training("saving")
        elif action_name == self._data and self.profile_.phases is not None:
            self._data = None
            self.profile_.phases.end(DATA)
        elif action_name.rpartition(".")[2] == "optimizer_step":
            self.profile_.after_optimizer_step()


def is_data(action: str) -> bool:
    """Return whether an action that Lightning profiles prepares data. Fetching batches does not: it is training."""
    hook = action.rpartition(".")[2]
    return hook in DATA_HOOKS or (hook == "setup" and action.startswith("[LightningDataModule]"))


def check_trace(name: str | None) -> None:
    """Refuse a path for a trace, at which the user may have a file, and the name of the run's record.

    Raises:
        BadInput: naming it.
    """
    if name is not None and (Path(name).name != name or not name.endswith((".json", ".json.gz")) or name == RECORD):
        raise BadInput(
            f"profile.trace is {name!r}, but the trace is written to the run's folder; give a file name without "
            f"folders that ends in .json or .json.gz, such as trace.json ({RECORD} is taken)."
        )


class Profile(Callback):
    """Measures a fit and leaves `folder/record.json`: `Trainer(callbacks=[Profile("runs/mine")])`, for any module.

    A step is an optimizer step, with all the batches that it accumulates. In manual optimization, everything that is
    neither backward nor optimizer step counts as forward. A fit that fails or runs out of memory leaves a record too,
    with the measurements until then; one that is refused leaves none.

    While the fit goes, every logger gets `tokens_per_second` (without padding) and `peak_memory_gib` (reserved on a
    GPU, resident on a CPU), of this rank and since the step that was logged before.

    Args:
        folder: Folder of the record; its name is the name of the run.
        plan: The steps of warm-up, examination, timing and profiling.
        settings: The configuration of the run, for the record.
        phases: What came before the first fit, such as imports, which its wall time then includes; by default, a fit's
            wall time begins with its setup.

    Raises:
        BadInput: if the plan's trace is no name of a file in the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Plan | None = None,
        settings: Mapping[str, Any] | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.folder, self.plan, self.settings = Path(folder), plan or Plan(), dict(settings or {})
        check_trace(self.plan.trace)
        self.profiler: Profiler | None = None
        self.phases = self._given = phases
        self._pace = Pace()
        self._first = self._step = 0
        self._ranks = 1
        self._part: str | None = None
        self._else: str | None = None
        self._nvml: NVML | None = None
        self._notes: list[str] = []

    # ---- the course of a fit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.profiler, self._nvml, self._notes = None, None, []
        device = trainer.strategy.root_device
        self._begin_phases(pl_module, device)
        self.listen(trainer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # starts CUDA: what the process holds now is its context
            self._nvml = open_nvml(device, self._notes)
            if self._nvml is not None:
                self._nvml.mark_context()

    def _begin_phases(self, module: L.LightningModule, device: torch.device) -> None:
        """Begin the phases of a fit, or go on with those given for the first one; share them with a module that can."""
        self.phases, self._given = self._given or Phases(), None
        self.phases.read(device)
        if isinstance(getattr(module, "phases", None), Phases):
            module.phases = self.phases  # pyright: ignore[reportArgumentType]

    def listen(self, trainer: L.Trainer) -> None:
        """Hear of what callbacks are not told. Called before the fit, it hears of the preparation of data, too."""
        own = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it in a function
        if isinstance(own, PassThroughProfiler):
            trainer.profiler = PhaseProfiler(self)  # pyright: ignore[reportAttributeAccessIssue]
        elif getattr(own, "profile_", None) is not self:  # the user's own stays
            self._notes.append(
                f"The trainer has a {type(own).__name__} of its own, so that saving has no phase, nor have data and "
                "the end of the optimizer's step; leave trainer.profiler out for them."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        plan = self.plan_of(pl_module)
        self.profiler = Profiler(
            pl_module,
            trainer.optimizers[0] if trainer.optimizers else None,
            plan,
            device=pl_module.device,
            phases=self.phases,
            nvml=self._nvml,
            budget=self.budget(trainer) if plan.limited else None,
            **self.about(pl_module),
        )
        self.profiler.notes += [note for note in self._notes if note not in self.profiler.notes]
        if len(trainer.optimizers) > 1:
            self.profiler.notes.append(f"The ledger has the first of {len(trainer.optimizers)} optimizers only.")
        self._first = self._step = trainer.global_step
        self._part, self._pace = None, Pace()
        self._ranks = trainer.world_size
        self._else = None if pl_module.automatic_optimization else "forward"

    def budget(self, trainer: L.Trainer, steps: float | None = None) -> Budget:
        """Return the limit of what measuring takes, by the time that the fit still has, and by so many steps.

        The steps are those that the fit still has by default, which all ranks must ask for together.
        """
        assert self.phases is not None
        callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        timers = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
        seconds = min((left for left in timers if left is not None), default=float("inf"))
        if steps is None:
            steps = trainer.estimated_stepping_batches - trainer.global_step
        return Budget(self.phases, steps, seconds)

    def plan_of(self, module: L.LightningModule) -> Plan:
        """Return the plan; its trace goes to the run's folder, and only rank 0 writes one, and takes turns."""
        if not module.trainer.is_global_zero:
            return dataclasses.replace(self.plan, trace=None, turns=None)
        trace = None if self.plan.trace is None else str(self.folder / self.plan.trace)
        return dataclasses.replace(self.plan, trace=trace)

    def about(self, module: L.LightningModule) -> dict[str, Any]:
        """Return further arguments of the profiler, taken from the module."""
        return {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.profiler is not None
        if self.profiler.in_step:
            self.profiler.add_batch(batch)
        else:
            self.profiler.begin_step(batch)
        self._turn_to("forward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.profiler is not None
        self._turn_to(None)
        if trainer.global_step == self._step:  # more batches are accumulated
            return
        self._pace.add(self.profiler.tokens)
        self.profiler.end_step()
        self._step = trainer.global_step
        self._log(trainer, pl_module)
        if self._is_done(trainer):
            trainer.should_stop = True

    def _is_done(self, trainer: L.Trainer) -> bool:
        """Return whether all ranks have taken their timed steps: one that ended alone would leave the others waiting.

        Ranks differ in how long their steps took, and in which of them they examined.
        """
        assert self.profiler is not None
        plan = self.profiler.plan
        if plan.timed is None or trainer.global_step - self._first < plan.timed:  # no rank can be done
            return False
        return trainer.strategy.reduce_boolean_decision(self.profiler.done)

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log this rank's speed and memory since the step that was logged before, instrumented steps included."""
        every = trainer.log_every_n_steps or 1  # pyright: ignore[reportAttributeAccessIssue] - set in a function
        if not trainer.loggers or self.phases is None or trainer.global_step % every:
            return
        speed, peak = self._pace.lap(), self.phases.sample()
        if speed is not None:
            module.log("tokens_per_second", speed)
        if peak is not None:
            module.log("peak_memory_gib", peak / 2**30)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._turn_to("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._turn_to(self._else)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._turn_to("optimizer step")

    def after_optimizer_step(self) -> None:
        """Leave the phase of the optimizer step."""
        self._turn_to(self._else)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.profiler is not None:  # told already by PhaseProfiler, unless the user set a profiler
            self.profiler.pause()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.leave_training("evaluation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.return_to_training("evaluation")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.profiler is not None
        self.profiler.close()
        self.finish(trainer, pl_module)

    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the record of the fit that has just ended, with all ranks' measurements. Every rank must call it."""
        record = self.joined(self.gathered(self.record(trainer, module)))
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            record.write(self.folder / "record.json")

    def gathered(self, record: RunRecord) -> RunRecord:
        """Return a rank's record with the measurements of all. Every rank must call it."""
        if self._ranks == 1:
            return record
        found: list[Any] = [None] * self._ranks
        dist.all_gather_object(found, record)
        return combined(found)

    def joined(self, record: RunRecord) -> RunRecord:
        """Return the record of the whole run, of which this fit may be a part."""
        return record

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.profiler is not None:
            self.profiler.abort()
            self.profiler.close()
        elif self._nvml is not None:
            self._nvml.stop()
        if trainer.state.fn != "fit" or not self.leaves_record(exception) or not trainer.is_global_zero:
            return
        reason = f"{type(exception).__name__}: {exception}".strip(": \n").splitlines()[0]
        status: Status = "oom" if is_oom(exception) else "failed"
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.joined(self.record(trainer, pl_module, status=status, reason=reason))
        record.write(self.folder / "record.json")

    def leaves_record(self, exception: BaseException) -> bool:
        """Return whether a fit that ended by `exception` leaves a record: one that is refused does not."""
        return understood(exception) is None

    # ---- phases

    def leave_training(self, name: str) -> None:
        """Pause the measurement of steps, and begin the phase `name`."""
        self._pace.pause()
        if self.profiler is not None:
            self.profiler.pause()
        if self.phases is not None:
            self.phases.begin(name)

    def return_to_training(self, name: str) -> None:
        """End the phase `name`, and resume the measurement of steps."""
        if self.phases is not None:
            self.phases.end(name)
        if self.profiler is not None:
            self.profiler.resume()
        self._pace.resume()

    def _turn_to(self, part: str | None) -> None:
        """Begin another part of the step, or none."""
        if self.profiler is None or part == self._part:
            return
        if self._part is not None:
            self.profiler.end_phase(self._part)
        if part is not None:
            self.profiler.begin_phase(part)
        self._part = part

    # ---- the record

    def record(self, trainer: L.Trainer, module: L.LightningModule, **fields: Any) -> RunRecord:
        """Return the record of the fit so far; `fields` override measured ones."""
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        failed = fields.get("status", "ok") != "ok"
        measured = self.profiler.results(failed) if self.profiler is not None else {}
        if self.phases is not None:
            measured |= {"phases": self.phases.to_list(), "seconds": self.phases.elapsed}
        if self._ranks > 1:
            measured["notes"] = [*measured.get("notes", []), note_of_one(self._ranks)]
        return RunRecord(
            name=self.folder.name, **{"versions": versions, "settings": self.settings, **measured, **fields}
        )
