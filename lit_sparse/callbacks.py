"""Bridges from Lightning to the profiler: any LightningModule's fit leaves a record of what it took."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.profilers import Profiler as LightningProfiler

from lit_sparse.errors import BadInput
from lit_sparse_profiling.nvml import NVML
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.profiler import Plan, Profiler, Tokens, count_tokens, opened
from lit_sparse_profiling.record import RunRecord, Status

PACKAGES = ("torch", "lightning", "transformers", "peft")
CPU_OOM = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""What torch says when the host's memory is used up; it has no exception of its own for that."""


class PhaseProfiler(LightningProfiler):
    """Tells a `Profile` where in a step Lightning is: forward, backward, optimizer step; and when it saves."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile_ = profile
        self._stepping = self._after_backward = False

    def start(self, action_name: str) -> None:
        profiler, hook = self.profile_.profiler, action_name.rpartition(".")[2]
        if action_name == "save_checkpoint":
            self.profile_.leave_training("saving")
        elif profiler is None:
            return
        elif hook in STRATEGY_PHASES and action_name.startswith("[Strategy]"):
            profiler.begin_phase(STRATEGY_PHASES[hook])
        elif hook == "optimizer_step":
            self._stepping = True

    def stop(self, action_name: str) -> None:
        profiler, hook = self.profile_.profiler, action_name.rpartition(".")[2]
        if action_name == "save_checkpoint":
            self.profile_.return_to_training("saving")
        elif profiler is None:
            return
        elif hook in STRATEGY_PHASES and action_name.startswith("[Strategy]"):
            profiler.end_phase(STRATEGY_PHASES[hook])
            if hook == "backward" and self._stepping:  # the optimizer's own part of what Lightning calls its step
                profiler.begin_phase("optimizer step")
                self._after_backward = True
        elif hook == "optimizer_step":
            if self._after_backward:
                profiler.end_phase("optimizer step")
            self._stepping = self._after_backward = False


STRATEGY_PHASES = {"training_step": "forward", "backward": "backward"}


class Profile(Callback):
    """Measures a fit and leaves `folder/record.json`: `Trainer(callbacks=[Profile("runs/mine")])`, for any module.

    A step is an optimizer step, with all the batches that it accumulates. A fit that fails or runs out of memory leaves
    a record too, with what was known until then.

    Args:
        folder: Where the record goes; the folder's name is the run's.
        plan: Which steps are for what.
        settings: What else defines the run, for the record.
    """

    def __init__(self, folder: str | Path, plan: Plan | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.folder, self.plan, self.settings = Path(folder), plan or Plan(), dict(settings or {})
        self.profiler: Profiler | None = None
        self.phases: Phases | None = None
        self._tokens = Tokens()
        self._step = 0
        self._nvml: NVML | None = None
        self._notes: list[str] = []

    # ---- the course of a fit

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        own = trainer.profiler  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it in a function
        if stage == "fit" and isinstance(own, PassThroughProfiler):  # one of the user's stays
            trainer.profiler = PhaseProfiler(self)  # pyright: ignore[reportAttributeAccessIssue]
        device = trainer.strategy.root_device
        if stage == "fit" and device.type == "cuda":
            torch.cuda.synchronize(device)  # CUDA begins: what the process holds now is its context
            self._nvml = opened(device, self._notes)
            if self._nvml is not None:
                self._nvml.mark_context()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases = getattr(pl_module, "phases", None) or Phases(pl_module.device)
        self.profiler = Profiler(
            pl_module,
            trainer.optimizers[0] if trainer.optimizers else None,
            self.plan_of(pl_module),
            device=pl_module.device,
            phases=self.phases,
            nvml=self._nvml,
            **self.about(pl_module),
        )
        self.profiler.notes += [note for note in self._notes if note not in self.profiler.notes]
        if len(trainer.optimizers) > 1:
            self.profiler.notes.append(f"The ledger has the first of {len(trainer.optimizers)} optimizers only.")
        self._step = trainer.global_step

    def plan_of(self, module: L.LightningModule) -> Plan:
        """The plan, its trace in the run's folder."""
        trace = self.plan.trace
        return dataclasses.replace(self.plan, trace=None if trace is None else str(self.folder / trace))

    def about(self, module: L.LightningModule) -> dict[str, Any]:
        """What else the profiler is to know of the module."""
        return {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.profiler is not None
        if not self.profiler.in_step:
            self.profiler.begin_step(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.profiler is not None
        self._tokens.add(count_tokens(batch))
        if trainer.global_step == self._step:  # more batches are accumulated
            return
        self.profiler.end_step(self._tokens.counts)
        self._tokens, self._step = Tokens(), trainer.global_step
        if self.profiler.done:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.leave_training("evaluation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.return_to_training("evaluation")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.profiler is not None
        self.profiler.close()
        self.finish(trainer, pl_module)

    def finish(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the record of the fit that has just ended."""
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.record(trainer, module).write(self.folder / "record.json")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.profiler is not None:
            self.profiler.abort()
            self.profiler.close()
        if isinstance(exception, BadInput) or not trainer.is_global_zero or not self.folder.is_dir():
            return
        reason = f"{type(exception).__name__}: {exception}".strip().splitlines()[0]
        status: Status = "oom" if is_oom(exception) else "failed"
        self.record(trainer, pl_module, status=status, reason=reason).write(self.folder / "record.json")

    # ---- phases

    def leave_training(self, name: str) -> None:
        """What follows is not training, but the phase `name`."""
        if self.profiler is not None:
            self.profiler.pause()
        if self.phases is not None:
            self.phases.begin(name)

    def return_to_training(self, name: str) -> None:
        """The phase `name` is over."""
        if self.phases is not None:
            self.phases.end(name)

    # ---- the record

    def record(self, trainer: L.Trainer, module: L.LightningModule, **fields: Any) -> RunRecord:
        """The record of the fit, as far as it has come; `fields` win over what was measured."""
        versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
        failed = fields.get("status", "ok") != "ok"
        measured = self.profiler.results(failed) if self.profiler is not None else {}
        if not measured and self.phases is not None:
            measured = {"phases": self.phases.to_list()}
        return RunRecord(
            name=self.folder.name, **{"versions": versions, "settings": self.settings, **measured, **fields}
        )


def is_oom(exception: BaseException) -> bool:
    """Whether memory was used up, of the device or of the host."""
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exception, RuntimeError) and any(text in str(exception) for text in CPU_OOM)
