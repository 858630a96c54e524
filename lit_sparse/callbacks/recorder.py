"""Record a fit with update strategies: its costs, and what it changed, in scores and in answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from peft import PeftConfig

from lit_sparse.callbacks.checkpointing import CHECKPOINT_STEPS, LastCheckpoint
from lit_sparse.callbacks.forgetting import Forgetting
from lit_sparse.callbacks.profile import Profile
from lit_sparse.callbacks.samples import Samples
from lit_sparse.callbacks.summary import print_summary
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse
from lit_sparse.optim import trainable
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.profiler import Plan
from lit_sparse_profiling.record import ModelSize, RunRecord, StateBytes


class Recorder(Profile):
    """Writes the record of a fit, keeps its last checkpoint, and prints a summary.

    Args:
        folder: The run's folder.
        plan: The steps of warm-up, examination, timing and profiling.
        settings: The run's configuration, for the record.
        samples: Number of held-out questions that are answered before and after training.
        checkpoint_steps: Optimizer steps from one last checkpoint to the next; 0 keeps none.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan | None = None,
        settings: Mapping[str, Any] | None = None,
        samples: int = 2,
        checkpoint_steps: int = CHECKPOINT_STEPS,
    ) -> None:
        super().__init__(folder, plan, settings)
        self.samples = Samples(samples)
        self.checkpoint = LastCheckpoint(folder / "checkpoints", checkpoint_steps)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.states: list[StateBytes] = []
        self._next_state = 1

    # ---- the course of a fit

    def setup(self, trainer: L.Trainer, pl_module: LitSparse, stage: str) -> None:  # pyright: ignore
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if any(callbacks.index(forgetting) > callbacks.index(self) for forgetting in forgettings(trainer)):
            raise BadInput(
                "Forgetting comes after the Recorder, which would write the record before it has scored; list it first."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        self.samples.ask(trainer, pl_module, "before")
        super().on_train_start(trainer, pl_module)
        if trainer.global_step:
            self._note_state(trainer, pl_module)  # as restored from the checkpoint

    def plan_of(self, module: LitSparse) -> Plan:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = super().plan_of(module)
        # Past one change of the trainable set: its first step allocates new optimizer state.
        return dataclasses.replace(plan, warmup=plan.warmup + max(periods_of(module), default=0))

    def about(self, module: LitSparse) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {
            "dtype": module.frozen_dtype,
            "state": lambda: [update.held() for update in module.updates],
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        self.checkpoint.at_end(trainer)
        super().on_train_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        super().on_validation_end(trainer, pl_module)
        metrics = trainer.callback_metrics
        scores = {name: float(value) for name, value in metrics.items() if name not in pl_module.of_training}
        if trainer.sanity_checking:
            self.before = scores
        else:
            self.after = scores

    def on_train_batch_end(  # pyright: ignore
        self, trainer: L.Trainer, pl_module: LitSparse, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._note_state(trainer, pl_module)
        self.checkpoint.after_batch(trainer)

    def finish(self, trainer: L.Trainer, module: LitSparse) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.samples.ask(trainer, module, "after")
        super().finish(trainer, module)
        if trainer.is_global_zero:
            print_summary(RunRecord.read(self.folder / "record.json"), self.folder)

    # ---- results

    def _note_state(self, trainer: L.Trainer, module: LitSparse) -> None:
        """Note the bytes of state once after each change of the trainable set, when the new state exists."""
        step, periods = trainer.global_step, periods_of(module)
        if not periods or step < self._next_state:
            return
        held = ledger(module, trainer.optimizers[0], [update.held() for update in module.updates])
        self.states.append(StateBytes(step, held.optimizer, held.strategy))
        self._next_state = min(step - (step - 1) % period + period for period in periods)

    def record(self, trainer: L.Trainer, module: LitSparse, **fields: Any) -> RunRecord:  # pyright: ignore
        """Return the record of the fit so far."""
        ours: dict[str, Any] = {
            "updates": [
                {"class": type(u).__name__, "fields": fields_of(u), "chosen": u.describe()} for u in module.updates
            ],
            "outcome": self._outcome(trainer),
            "samples": self.samples.answers,
            "states": self.states,
        }
        if module.model is not None:
            trained = sum(parameter.numel() for _, parameter in trainable(module.model))
            ours["model"] = ModelSize(base=module.base, parameters=module.base_parameters, trainable=trained)
        return super().record(trainer, module, **{**ours, **fields})

    def _outcome(self, trainer: L.Trainer) -> dict[str, dict[str, float]]:
        """Return the scores of validation and of `Forgetting`, before and after training."""
        found = {"before": dict(self.before), "after": dict(self.after)}
        for forgetting in forgettings(trainer):
            found["before"] |= forgetting.before
            found["after"] |= forgetting.after
        return {moment: scores for moment, scores in found.items() if scores}


def forgettings(trainer: L.Trainer) -> list[Forgetting]:
    """Return the trainer's `Forgetting` callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Forgetting)]  # pyright: ignore


def periods_of(module: LitSparse) -> list[int]:
    """Return the optimizer steps between changes of the trainable set, for each strategy that changes it."""
    return [update.period for update in module.updates if update.period is not None]


def fields_of(update: UpdateStrategy) -> dict[str, Any]:
    """Return the fields of a strategy as plain values, for a record."""
    if not dataclasses.is_dataclass(update):
        return {}
    values = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    return {name: plain(value.to_dict() if isinstance(value, PeftConfig) else value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Replace sets by sorted lists: PEFT turns lists of modules into sets, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
