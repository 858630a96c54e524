"""A fit that goes on from a seed log: the log's steps are taken again on the base, before the first batch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.data.loader import Loader
from lit_sparse.errors import BadInput
from lit_sparse.export.seedlog import SeedLog
from lit_sparse.modules import LitSparse
from lit_sparse.strategies.forward_only import recipe, take_again


def go_on_from(log: SeedLog, module: LitSparse) -> None:
    """Take the steps of a log, and let the trainer stand where it would after them: steps, epoch, rates, and data.

    Dropout masks of the steps to come are drawn anew. Call it once the optimizer exists.

    Raises:
        BadInput: if the log is of another base, dtype, or strategies.
    """
    log.check(module.base_fingerprint, {p.dtype for p in module.build().parameters()})
    check_alike(log, module)
    trainer, steps = module.trainer, len(log.log)
    optimizer: Any = trainer.optimizers[0]
    rank_zero_info(f"Taking the {steps} steps of the seed log again.")
    take_again(module.updates, optimizer, log.log, lambda: module.follow_trainable_set(optimizer))
    if steps:
        stand_after(trainer, steps)


def check_alike(log: SeedLog, module: LitSparse) -> None:
    """Refuse a run with other strategies or settings than the log's: its steps would be others.

    Raises:
        BadInput: naming what differs.
    """
    theirs, ours = ({"the methods": updates.names, **recipe(updates)} for updates in (log.strategies(), module.updates))
    if theirs != ours:
        other = next(key for key in [*theirs, *ours] if theirs.get(key) != ours.get(key))
        raise BadInput(
            f"the seed log was written with {other} being {theirs.get(other, 'absent')}, and this run has "
            f"{ours.get(other, 'none')}; give the configuration of the run that wrote it."
        )


def stand_after(trainer: L.Trainer, steps: int) -> None:
    """Put the trainer where a checkpoint of the end of step `steps` would: a step is a batch of one micro-batch."""
    fit = trainer.fit_loop
    fit.setup_data()  # which counts the batches of an epoch
    epoch, batch = divmod(steps - 1, int(min(fit.max_batches, steps)))
    total = {"ready": steps, "started": steps, "processed": steps, "completed": steps - 1}
    current = {"ready": batch + 1, "started": batch + 1, "processed": batch + 1, "completed": batch}
    epochs = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    taken = {"ready": steps, "completed": steps}
    for one in fit._combined_loader.flattened if fit._combined_loader is not None else []:
        if isinstance(one, Loader):
            one.position = steps
    state = fit.state_dict()  # with the loaders' places
    state["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": steps - 1}
    last = batch + 1 == fit.max_batches
    state["epoch_loop.batch_progress"] = {"total": total, "current": current, "is_last_batch": last}
    state["epoch_loop.scheduler_progress"] = {"total": dict(taken), "current": dict(taken)}
    progress = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    progress["step"] = {"total": dict(taken), "current": dict(taken)}
    fit.load_state_dict(state)
    for config in trainer.lr_scheduler_configs:
        config.scheduler.last_epoch = steps  # pyright: ignore[reportAttributeAccessIssue]
