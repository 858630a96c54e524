"""The last checkpoint of a fit, from which it resumes."""

from __future__ import annotations

from pathlib import Path

import lightning as L

CHECKPOINT_STEPS = 100


class LastCheckpoint:
    """Keeps `last.ckpt` up to date; a fit that is killed while it is written keeps the one before.

    Args:
        folder: Where it lies.
        every: Optimizer steps from one to the next; 0 keeps none.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self._saved = -1

    def after_batch(self, trainer: L.Trainer) -> None:
        """Save if it is time, at the end of an epoch, and after the last step.

        Not left to the end of training: there Lightning has counted an unfinished epoch as finished, and a resumed fit
        would skip the rest of it.
        """
        step = trainer.global_step
        if self.every == 0 or step == self._saved:
            return
        if step % self.every == 0 or step == trainer.max_steps or trainer.is_last_batch:
            self._save(trainer)

    def at_end(self, trainer: L.Trainer) -> None:
        """Save the last step if it was not saved: training ended by a time limit, say."""
        if self.every and self._saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)  # by all ranks, which gather what is sharded
        self._saved = trainer.global_step
