"""Record a fit with update strategies: its costs, and what it changed, in scores and in answers.

Nothing in the folder of a run is written before its training has moved: a fit that is refused, or has nothing left to
do, leaves the folder as it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig

from lit_sparse.callbacks.checkpointing import CHECKPOINT_STEPS, LastCheckpoint
from lit_sparse.callbacks.forgetting import Forgetting
from lit_sparse.callbacks.logs import RunCSV, RunTensorBoard
from lit_sparse.callbacks.out_of_memory import describe
from lit_sparse.callbacks.prediction import SECONDS, predict, seconds_for
from lit_sparse.callbacks.profile import Profile
from lit_sparse.callbacks.samples import Samples
from lit_sparse.callbacks.summary import print_summary
from lit_sparse.checkpoints import TOKENIZER
from lit_sparse.data import Text
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import is_oom
from lit_sparse.modules import LitSparse
from lit_sparse.modules.checks import check_monitors
from lit_sparse.modules.owed import run_though_done
from lit_sparse.optim import trainable
from lit_sparse.storage.held import Held
from lit_sparse.storage.shard_folders import remove_orphans
from lit_sparse.storage.whole import remove_drafts, replace_text
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse_profiling.budget import SHARE
from lit_sparse_profiling.continued import continued
from lit_sparse_profiling.documents import parse_as, spell_nonfinite
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import RECORD
from lit_sparse_profiling.sections import PREDICTION, ModelSize, Predicted, StateBytes
from lit_sparse_profiling.step_plan import Plan


class Recorder(Profile):
    """Writes the record of a fit, keeps its last checkpoint, and prints a summary.

    Args:
        folder: The run's folder.
        plan: The steps of warm-up, examination, timing and profiling.
        settings: The run's configuration, for the record.
        samples: Number of held-out questions that are answered before and after training; None answers two if all
            measuring, with them, is expected to take at most a tenth of the fit.
        checkpoint_steps: Optimizer steps from one last checkpoint to the next; 0 keeps none.
        config: Text of the run's config.yaml; None writes none.
        command: The command line, for the record.
        phases: What came before the fit, as `Profile` has it.

    Attributes:
        moved: Whether this fit has taken a step, or run an evaluation that its checkpoint owed.
        earlier: The record of the run up to the checkpoint that it goes on from, if it does.
        predicted: The memory predicted before the first step; None if it was not.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan | None = None,
        settings: Mapping[str, Any] | None = None,
        samples: int | None = 2,
        checkpoint_steps: int = CHECKPOINT_STEPS,
        config: str | None = None,
        command: str | None = None,
        phases: Phases | None = None,
    ) -> None:
        super().__init__(folder, plan, settings, phases)
        self.config, self.command = config, command
        self.moved = self._recorded = False
        self.earlier: RunRecord | None = None
        self.predicted: Predicted | None = None
        self.samples = Samples(samples)
        self.checkpoint = LastCheckpoint(folder / "checkpoints", checkpoint_steps)
        self.held = Held(folder)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.states: list[StateBytes] = []
        self._next_state = 1
        self._goes_on = False

    # ---- the course of a fit

    def setup(self, trainer: L.Trainer, pl_module: LitSparse, stage: str) -> None:  # pyright: ignore
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if any(callbacks.index(forgetting) > callbacks.index(self) for forgetting in forgettings(trainer)):
            raise BadInput(
                "Forgetting comes after the Recorder, which would write the record before it has scored; list it first."
            )
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # a rank that started later, or elsewhere, may have found another free name
            self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
            self.checkpoint.path = self.folder / "checkpoints" / self.checkpoint.path.name
        if stage == "fit" and trainer.is_global_zero and self.folder.is_dir():
            self.held.take()
        self.moved, self.earlier, self.predicted, self._recorded = False, None, None, False
        if stage == "fit" and self.plan.predict is not False and self.settings and trainer.is_global_zero:
            pl_module.before_loading = lambda: self._predict(trainer, pl_module)
        self._goes_on = any((self.folder / name).is_file() for name in ("config.yaml", RECORD))

    def _predict(self, trainer: L.Trainer, module: LitSparse) -> None:
        limited = self.plan.predict is None and self.plan.timed is None
        with module.phases(PREDICTION):
            found = seconds_for(trainer, module, partial(self.budget, trainer)) if limited else SECONDS
            if not isinstance(found, str):
                found = predict(trainer, self.settings, found)
        if isinstance(found, str):
            self._notes.append(found)
        else:
            self.predicted = found

    def on_train_start(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        self._first_step = trainer.global_step
        if self.before:
            check_monitors(trainer, {*self.before, *pl_module.of_training, "step", "epoch"})
        if self.earlier is None:
            self.samples.ask(trainer, pl_module, "before", self.budget(trainer))
        super().on_train_start(trainer, pl_module)
        if trainer.global_step:
            self._note_state(trainer, pl_module)  # as restored from the checkpoint
        self._tell_plan(trainer)
        if pl_module.unrecorded and trainer.fit_loop.skip:  # nothing is left to do but to write the record
            self._move(trainer)
        self.checkpoint.begin(trainer)

    def _tell_plan(self, trainer: L.Trainer) -> None:
        """Say which steps will be slower since they are measured."""
        assert self.profiler is not None
        plan = self.profiler.plan
        count = len(plan.stages()) - plan.warmup
        first, end = trainer.global_step + plan.warmup + 1, trainer.estimated_stepping_batches
        if count and first <= end:
            steps = f"Steps {first} to {min(first + count - 1, end):.0f}"
            if plan.limited:  # what a step takes, and with it what the fit does, is known after the warm-up only
                told = f"{steps} are measured, and slower, if that takes at most {SHARE:.0%} of the fit"
            else:
                told = f"{steps} are measured, and slower"
            rank_zero_info(f"{told}; --profile=false leaves that out.")

    def _move(self, trainer: L.Trainer, evaluated: bool = True) -> None:
        """Begin to write in the folder, whose run goes on from this fit's first step; `evaluated`: as `Rows` has it."""
        self.moved = True
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.held.take()
            remove_drafts(self.folder)
            remove_orphans(self.checkpoint.path.parent)
            self._write_config()
            data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(data, Text) and data.vocabulary is not None:
                data.tokenizer.save_pretrained(self.folder / TOKENIZER)
            for logger in trainer.loggers:
                if isinstance(logger, RunCSV | RunTensorBoard):
                    logger.go_on(self._first_step, evaluated)
                else:
                    logger.log_hyperparams(dict(self.settings))

    def _write_config(self) -> None:
        if self.config is not None:
            replace_text(self.config, self.folder / "config.yaml")

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
        self.checkpoint.signals.ignore()
        if self.moved:
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
            if not trainer.fit_loop._should_accumulate():  # else gradients are pending, which no checkpoint holds
                if trainer.should_stop and self.moved:  # EarlyStopping: at the end, this epoch counts as finished
                    self.checkpoint.at_end(trainer)
                self.checkpoint.save_if_asked(trainer)
                self.checkpoint.leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        self.checkpoint.leave(trainer)
        if pl_module.owed is not None and not self.moved:
            self._move(trainer, evaluated=False)
        super().on_validation_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        if self.moved and self.checkpoint.up_to_date:  # a checkpoint made here would lose the scores until here
            self.checkpoint.save_if_asked(trainer)
            self.checkpoint.leave(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        self.checkpoint.leave(trainer)
        super().on_train_batch_start(trainer, *args, **options)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: LitSparse) -> None:  # pyright: ignore
        self.checkpoint.leave(trainer)

    def on_train_batch_end(  # pyright: ignore
        self, trainer: L.Trainer, pl_module: LitSparse, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._note_state(trainer, pl_module)
        if not self.moved and trainer.global_step > self._first_step:
            self._move(trainer)
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # so that Lightning evaluates once more, also in mid-epoch
        self.checkpoint.after_batch(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: LitSparse, exception: BaseException) -> None:  # pyright: ignore
        self.checkpoint.signals.ignore()
        if trainer.state.fn == "fit" and is_oom(exception):  # before anything is freed
            optimizer = trainer.optimizers[0] if trainer.optimizers else None
            exception.add_note(describe(exception, pl_module, optimizer, trainer.global_step + 1))
        saved = trainer.state.fn == "fit" and self.moved and self.checkpoint.path.is_file()
        if saved and (is_oom(exception) or isinstance(exception, OSError)):
            exception.add_note(f"The last checkpoint stays: go on from it with --ckpt_path {self.checkpoint.path}.")
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit" and trainer.is_global_zero and self.leaves_record(exception):
            self._write_config()
        self.held.release()  # Lightning tears nothing down after an exception

    def teardown(self, trainer: L.Trainer, pl_module: LitSparse, stage: str) -> None:  # pyright: ignore
        super().teardown(trainer, pl_module, stage)
        self.held.release()

    def leaves_record(self, exception: BaseException) -> bool:
        """Return whether a fit that ended by `exception` leaves a record; a run that went on keeps its own."""
        if self._recorded:  # it ended well, and printing its summary failed: the reader of a pipe may leave
            return False
        return self.moved or (super().leaves_record(exception) and not self._goes_on)

    def finish(self, trainer: L.Trainer, module: LitSparse) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.moved:
            return
        self.samples.ask(trainer, module, "after")
        super().finish(trainer, module)
        self._recorded = True
        if trainer.is_global_zero:
            print_summary(RunRecord.read(self.folder / RECORD), self.folder)

    # ---- going on

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: LitSparse, checkpoint: dict[str, Any]) -> None:  # pyright: ignore
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.profiler is not None:
            so_far = self.gathered(self.record(trainer, pl_module, status="failed", reason="The fit was interrupted."))
            so_far = self.joined(so_far)
            checkpoint["lit_sparse_record"] = json.dumps(spell_nonfinite(dataclasses.asdict(so_far)))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: LitSparse, checkpoint: dict[str, Any]) -> None:  # pyright: ignore
        text = checkpoint.get("lit_sparse_record")  # older checkpoints have none
        if trainer.state.fn != "fit" or text is None:
            return
        earlier = parse_as(json.loads(text), RunRecord, "the record in the checkpoint")
        if earlier.name == self.folder.name:  # else it is another run that goes on from its checkpoint
            self.earlier = self._at_its_end(earlier)
            if self.earlier.status == "ok":  # the run ended, with the evaluation after its last step
                pl_module.owed = None
            elif pl_module.owed is None:
                pl_module.unrecorded = True
                run_though_done(trainer, pl_module)
            self.samples.answers = self.earlier.samples

    def _at_its_end(self, saved: RunRecord) -> RunRecord:
        """Return the folder's own record, if it ends at the checkpoint: it has what came after saving too."""
        if not (self.folder / RECORD).is_file():
            return saved
        try:
            kept = RunRecord.read(self.folder / RECORD)
        except ValueError as error:
            raise BadInput(f"{error} Without it, the run goes on with the record in its checkpoint.") from error
        return kept if kept.throughput == saved.throughput else saved

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
            "command": self.command,
            "updates": [
                {"class": type(u).__name__, "fields": fields_of(u), "chosen": u.describe()} for u in module.updates
            ],
            "outcome": self._outcome(trainer),
            "samples": self.samples.answers,
            "predicted": self.predicted,
            "states": self.states,
        }
        if module.model is not None:
            trained = sum(parameter.numel() for _, parameter in trainable(module.model))
            ours["model"] = ModelSize(base=module.base, parameters=module.base_parameters, trainable=trained)
        return super().record(trainer, module, **{**ours, **fields})

    def joined(self, record: RunRecord) -> RunRecord:
        return record if self.earlier is None else continued(self.earlier, record)

    def _outcome(self, trainer: L.Trainer) -> dict[str, dict[str, float]]:
        """Return the scores of validation and of `Forgetting`, before and after training."""
        found = {"before": dict(self.before), "after": dict(self.after)}
        for forgetting in forgettings(trainer):
            found["before"] |= forgetting.before
            found["after"] |= forgetting.after
        if not found["after"] and "train_loss" in trainer.callback_metrics:  # nothing is held out
            found["after"] = {"train_loss": float(trainer.callback_metrics["train_loss"])}
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
    return {field.name: plain(getattr(update, field.name)) for field in dataclasses.fields(update)}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: a list for a set, fields for a dataclass, a name for another object."""
    if isinstance(value, PeftConfig):
        value = value.to_dict()  # with lists of modules turned into sets
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        value = {"class": type(value).__name__, **named}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else type(value).__name__
