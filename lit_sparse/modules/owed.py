"""An evaluation that is due when a checkpoint is saved: a fit that goes on from there runs it first.

Checkpoints are saved at the end of a training batch, before the evaluation that follows, which may take as long as many
steps. Lightning takes such an evaluation for done when it resumes.
"""

from __future__ import annotations

from typing import Any

import lightning as L


def owed(trainer: L.Trainer) -> dict[str, int] | None:
    """Return where an evaluation follows the training batch that ends, for its checkpoint; None if none does."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # At the end of a batch, in the hooks that may save:
    at_end = progress.processed == progress.completed + 1  # pyright: ignore[reportAttributeAccessIssue]
    if not at_end or fit._data_fetcher is None or not loop._should_check_val_fx(fit._data_fetcher):
        return None
    return {"epoch": trainer.current_epoch, "logged_steps": loop._batches_that_stepped}


def settle(trainer: L.Trainer, due: dict[str, int]) -> None:
    """Run the evaluation that was due, as Lightning would have run it there, under that epoch and step."""
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs, connector = fit.epoch_progress.current, trainer._logger_connector
    epoch, logged, first = epochs.completed, loop._batches_that_stepped, connector._first_loop_iter
    epochs.completed, loop._batches_that_stepped = due["epoch"], due["logged_steps"]
    trainer.validating, loop.val_loop.restarting = True, False
    loop.val_loop.run()
    trainer.training, connector._first_loop_iter = True, first
    epochs.completed, loop._batches_that_stepped = epoch, logged


def run_though_done(trainer: L.Trainer, module: Any) -> None:
    """Let a fit of which no step is left start and end all the same if `module` owes an evaluation or a record.

    Lightning returns from such a fit before any hook.
    """
    loop = trainer.fit_loop
    steps = loop.run

    def run() -> None:
        loop.setup_data()
        if not loop.skip or (module.owed is None and not module.unrecorded):
            steps()
            return
        loop.on_run_start()  # which settles it
        loop.on_run_end()

    loop.run = run
