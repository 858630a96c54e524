"""The last checkpoint of a fit, from which it resumes, and the signals that ask a fit to end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from lit_sparse.checkpoints import is_whole
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.storage.whole import keep_previous

CHECKPOINT_STEPS = 100
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals after which a fit saves and ends: Ctrl-C, a closed terminal's, and what schedulers send before they kill."""


class Stopped(Exception):
    """A signal ended a fit, after its checkpoint was saved.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """Notes the first signal that asks this process to end, which then ends after a step; a second one acts at once.

    Attributes:
        received: The signal, None before it came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Note signals from now on. Python allows it in the main thread only; elsewhere this does nothing."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING if not kept_off(number)}

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        self.ignore()

    def ignore(self) -> None:
        """Give signals back to those who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def kept_off(number: int) -> bool:
    """Return whether `nohup` started this process, so that a closed terminal does not end it."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def first_of_all(received: int | None) -> int:
    """Return the first signal that any rank received; every rank must call it, and one must have received one."""
    found = [received]
    if dist.is_available() and dist.is_initialized():
        found: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, received)
    return next(number for number in found if number is not None)


class LastCheckpoint:
    """Keeps `last.ckpt` up to date, and the one before it as `previous.ckpt`; ends a fit that is asked to end.

    Args:
        folder: Where it lies.
        every: Optimizer steps from one to the next; 0 keeps none.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self.signals = StopSignals()
        self._saved = self._done = -1
        self._wrote = False  # the file that is there was read back
        self._stopping: int | None = None

    def begin(self, trainer: L.Trainer) -> None:
        """Listen for signals; call it when training starts."""
        self._done, self._stopping = trainer.global_step, None
        self._saved = trainer.global_step if self.path.is_file() else -1  # a run that goes on has this step
        self.signals.listen()
        if trainer.received_sigterm:  # before training, where Lightning listens, which would end it unsaved
            trainer._signal_connector.received_sigterm = False
            self.signals.received = signal.SIGTERM

    def after_batch(self, trainer: L.Trainer) -> None:
        """Save if it is time, at the end of an epoch, after the last step, and if the fit was asked to end.

        Not left to the end of training: there Lightning has counted an unfinished epoch as finished, and a resumed fit
        would skip the rest of it.
        """
        step = trainer.global_step
        if step == self._done:  # more batches are accumulated, and their gradients are in no checkpoint
            return
        self._done = step
        ends = step == trainer.max_steps or trainer.is_last_batch or trainer.should_stop
        if self.every and (step % self.every == 0 or ends):
            self._save(trainer)
        self.save_if_asked(trainer)

    def save_if_asked(self, trainer: L.Trainer) -> None:
        """Save if a signal, on any rank, asked the fit to end; `leave` ends it."""
        received = self.signals.received
        if trainer.strategy.reduce_boolean_decision(received is not None, all=False):
            self.at_end(trainer)
            self._stopping = first_of_all(received)

    def leave(self, trainer: L.Trainer) -> None:
        """End a fit that was asked to end and is saved. Not at the end of a batch, which is logged only later.

        Raises:
            Stopped: if it was.
        """
        if self._stopping is None:
            return
        told = f"{signal.Signals(self._stopping).name} stopped the fit after step {trainer.global_step}; "
        how = f"go on with --ckpt_path {self.path}, all else alike." if self.every else ""
        raise Stopped(self._stopping, told + (how or "checkpoint_steps is 0, so nothing was saved."))

    @property
    def up_to_date(self) -> bool:
        """True if the last step is saved, or none is to be."""
        return self.every == 0 or self._saved == self._done

    def at_end(self, trainer: L.Trainer) -> None:
        """Save the last step if it was not saved: training ended by a time limit, say. Wait until it is written."""
        if self.every and self._saved != trainer.global_step:
            self._save(trainer)
        if isinstance(trainer.strategy, FSDP2Strategy):
            trainer.strategy.wait_until_saved()

    def _save(self, trainer: L.Trainer) -> None:
        if isinstance(trainer.strategy, FSDP2Strategy):  # what is being written is to be the previous one
            trainer.strategy.wait_until_saved()
        if trainer.is_global_zero and (self._wrote or is_whole(self.path)):
            keep_previous(self.path)
        self._wrote = True
        trainer.save_checkpoint(self.path, weights_only=False)  # by all ranks, which gather what is sharded
        self._saved = trainer.global_step
