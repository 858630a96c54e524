"""Saving and resuming: small checkpoints, and what becomes of a module that a checkpoint is loaded into."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import LambdaLR

from lit_sparse.anatomy import is_quantized
from lit_sparse.checkpoints import alike, get_rng, set_rng
from lit_sparse.errors import BadInput
from lit_sparse.modules.building import BuiltModel
from lit_sparse.modules.checkpoint_io import WholeCheckpoints
from lit_sparse.modules.finite import LossGuard
from lit_sparse.modules.owed import owed, run_though_done, settle
from lit_sparse.modules.precision import Masters


class Resumable(BuiltModel):
    """The part of the host that saves and resumes.

    Attributes:
        full_checkpoints: Whether checkpoints hold all weights instead of what was trained.
        resume_from: The checkpoint that the model is built from in place of a fresh start.
        unrecorded: Whether the run took its last step and has no record of it: a kill came between the two.
        guard: Skips and counts steps whose loss is not finite.
        owed: The evaluation that was due when the checkpoint was saved; None if none was, or once it has run.
    """

    def __init__(self, *args: Any, full_checkpoints: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.full_checkpoints = full_checkpoints
        self.resume_from: str | Path | None = None
        self.owed: dict[str, int] | None = None
        self.strict_loading = False  # checkpoints hold what was trained; check_complete sees that all of it is there
        self.tokens_seen = torch.zeros((), dtype=torch.int64)  # scored tokens of all steps
        self.unrecorded = False
        self.guard = LossGuard(most=10)
        self._moved = False  # whether what trains has other values than it began with
        self._rng: Any = None
        self._base_lrs: list[Any] = []  # of the optimizer's groups, once they are made

    @property
    def classes(self) -> Any:
        """The classes that the task tells apart, as a checkpoint keeps them; None where there are none."""
        return None

    # ---- saving

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin that the user gave stays
            strategy.checkpoint_io = WholeCheckpoints()
        super().configure_model()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.full_checkpoints:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name in self.trained}
        checkpoint["lit_sparse"] = {
            "base": self.base_fingerprint,
            "base_sums": self.base_sums,
            "init_seed": self.init_seed,
            "precision": str(self.frozen_dtype).removeprefix("torch."),
            "updates": self.updates.state_dict(),
            "tokens_seen": int(self.tokens_seen),
            "skipped": self.guard.total,
            "rng": self._rng or get_rng(self.device, 1 if self._trainer is None else self.trainer.world_size),
            "owed": None if self._trainer is None else owed(self.trainer),
        }

    # ---- resuming

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "lit_sparse" not in checkpoint:
            raise BadInput("this is not a checkpoint of a lit_sparse run.")
        if self.resume_from is None and not self._fits(checkpoint["lit_sparse"], checkpoint["state_dict"].keys()):
            if self._attached or self._moved:  # given to the Trainer alone: what was prepared or trained is taken back
                self._start_over()
            self.restore(checkpoint)
        self.check_complete(checkpoint)
        self._moved, self._rng = True, checkpoint["lit_sparse"]["rng"]
        self.tokens_seen = torch.tensor(checkpoint["lit_sparse"].get("tokens_seen", 0))  # older checkpoints lack it
        self.guard.total = checkpoint["lit_sparse"].get("skipped", 0)
        self.owed = checkpoint["lit_sparse"].get("owed")
        if self.owed is not None and self.trainer.state.fn == "fit":
            run_though_done(self.trainer, self)

    def _fits(self, saved: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether loading a checkpoint's values over the present ones leaves nothing of another training."""
        if not self._attached or self._sharded or not self.trained <= set(names):
            return False
        here = {"base": self.base_fingerprint, "updates": self.updates.state_dict(), "classes": self.classes}
        return all(alike(value, saved.get(key)) for key, value in here.items())

    def _start_over(self) -> None:
        """Undo a fresh start exactly; undo a training by loading the base again."""
        changed = any(update.base in ("rewritten", "moved", "replaced") for update in self.updates)
        rewritten = is_quantized(self.build()) or changed
        if not (rewritten or self._moved or self._sharded):
            self.take_off()
            self.masters.restore()
            self.trained = set()
            return
        if self._given:
            raise BadInput(
                "the checkpoint was given to the trainer alone, after the model given as base had been changed in a "
                "way that cannot be undone exactly; make a new module of the model loaded anew, and set its "
                "resume_from to the checkpoint too."
            )
        self.model, self._attached, self._moved, self._sharded, self.masters = None, False, False, (), Masters()
        self._hollow = None
        self.trained = set()
        self.updates = self.updates.fresh()
        self.build()

    def check_complete(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that lacks a value of what this module trains; call it after `restore`.

        Raises:
            BadInput: naming the first that is missing.
        """
        if missing := sorted(self.trained - set(checkpoint["state_dict"])):
            raise BadInput(
                f"the checkpoint lacks {len(missing)} trained parameters of this configuration, the first is "
                f"{missing[0]}; give the configuration of the run that wrote it, or an undamaged checkpoint."
            )
        self._check_fits(checkpoint["state_dict"])
        if not self.full_checkpoints:
            self.trained |= set(checkpoint["state_dict"])

    def _check_fits(self, values: Mapping[str, Any]) -> None:
        """Refuse values that the model has no place for: loading would drop or cast them without a word."""
        own = self.state_dict()
        for name, value in values.items():
            shape = tuple(own[name].shape) if name in own else None
            if shape != tuple(value.shape):
                raise BadInput(
                    f"the checkpoint has {name} of shape {tuple(value.shape)}, and this model "
                    + (f"one of {shape}" if shape is not None else "has no such parameter")
                    + "; give the configuration of the run that wrote it, or an undamaged checkpoint."
                )
            if value.is_floating_point() != own[name].is_floating_point():
                raise BadInput(
                    f"the checkpoint has {name} in {value.dtype}, and this model in {own[name].dtype}; give the "
                    "configuration of the run that wrote it, or an undamaged checkpoint."
                )

    def on_train_start(self) -> None:
        """Resume exactly: the loader at its position, learning rates at what this run's schedule says, scores complete.

        Lightning builds the loader before the position arrives if the schedule has to know how many batches there are,
        and the optimizer comes back with the rate of the schedule that it was saved with.
        """
        loop = self.trainer.fit_loop
        loop._load_combined_loader_states()
        if loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
            # Saved after an epoch's last batch. Lightning has counted that epoch as finished, but takes the next one
            # for the rest of it, and never counts it: a second resume would train an epoch too many.
            loop.reset_restart_stage()
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, LambdaLR):
                scheduler.base_lrs = list(self._base_lrs)
                rates = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
                for group, base, course in rates:
                    group["initial_lr"], group["lr"] = base, base * course(scheduler.last_epoch)
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        if self.owed is not None:
            settle(self.trainer, self.owed)
            self.owed = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._rng is not None:  # only now: making the loaders' iterators draws random numbers too
            self._resume_rng(self._rng)
            self._rng = None

    def _resume_rng(self, states: Any) -> None:
        before, now = set_rng(states, self.device, self.global_rank, self.trainer.world_size), self.trainer.world_size
        if before != now:
            rank_zero_info(
                f"The checkpoint has random states of {before} processes, this run has {now}: each draws anew, from a "
                "seed of the old state and its rank."
            )
