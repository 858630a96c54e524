"""End a run of several ranks, with the reason, when one of them has died or failed: the others would wait for it."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.distributed_c10d import _get_default_store

from lit_sparse.library_errors import origin
from lit_sparse_profiling.documents import printable

BEAT = 2.0
"""Seconds between two signs of life of a rank."""
SILENCE = 20.0
"""Seconds without one after which a rank counts as dead. They come from a thread of their own, also in a long step."""
GRACE = 10.0
"""Seconds that a rank has to end by itself after another one has failed."""
OPERATIONS = "torch.distributed.", "lightning.fabric.utilities.distributed"
"""Modules whose operations all ranks take part in."""


class RankWatch(L.Callback):
    """Watch the other ranks of a fit, through the store at which they met.

    A rank that is killed leaves the others in a collective operation: for as long as its timeout, ten minutes or more,
    under NCCL. Here each rank gives signs of life, and says why it failed. A rank that sees another one silent or
    failed ends too, with status 1; one of them prints the reason.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._rank, self._world = 0, 1
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._thread is None and trainer.world_size > 1 and dist.is_initialized():
            self._rank, self._world = trainer.global_rank, trainer.world_size
            self._store = own_store()
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end("left", "")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._thread is None:
            if trainer.world_size > 1 and lost_partner(exception):  # before `setup`: in the wait for the data
                self._exit("another rank has ended")
            return
        if type(exception) is RuntimeError and (reason := self._other_failed()):  # an operation lost its partner
            self._exit(reason)
        lines = str(exception).strip().splitlines() or [""]
        self._end("failed", f"{type(exception).__name__}: {lines[0]}")

    def _end(self, how: str, reason: str) -> None:
        """Stop watching, and tell the others how this rank ended."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            with suppress(dist.DistError):  # the store is gone with the rank that has it, and nobody is left to read
                self._store.set(f"{how}/{self._rank}", reason)

    def _watch(self) -> None:
        seen = {rank: (b"", time.monotonic()) for rank in range(self._world) if rank != self._rank}
        while not self._stop.wait(BEAT):
            reason = self._look(seen)
            if reason is not None and not self._stop.wait(GRACE):
                self._exit(reason)

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        """Give a sign of life and look for those of the others; return why the run cannot go on, or None."""
        try:
            self._store.set(f"alive/{self._rank}", str(time.time()))
            for rank, (before, when) in list(seen.items()):
                if self._store.check([f"failed/{rank}"]):
                    return f"rank {rank} failed ({self._store.get(f'failed/{rank}').decode()})"
                if self._store.check([f"left/{rank}"]):
                    del seen[rank]
                    continue
                now = self._store.get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else b""
                if now != before:
                    seen[rank] = now, time.monotonic()
                elif time.monotonic() - when > SILENCE:
                    return f"rank {rank} has died: it gave no sign of life for {SILENCE:.0f} s"
        except dist.DistError:
            return "rank 0 has died: the store that it keeps is gone"
        return None

    def _other_failed(self) -> str | None:
        """Return what became of another rank, found out by waiting for it, or None if all are alive."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._stop.clear()
        seen = {rank: (b"", time.monotonic()) for rank in range(self._world) if rank != self._rank}
        until = time.monotonic() + SILENCE + 2 * BEAT
        while time.monotonic() < until:
            if reason := self._look(seen):
                return reason
            time.sleep(BEAT)
        return None

    def _exit(self, reason: str) -> None:
        tell_once(f"{reason}; the other ranks end too. Go on from the last checkpoint with --ckpt_path last.", "failed")
        sys.stderr.flush()
        os._exit(1)  # the main thread may be in an operation that waits for the other rank


def lost_partner(error: BaseException) -> bool:
    """Return whether an operation of several ranks raised `error`, as it does when one of them is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and origin(error)[0].startswith(OPERATIONS)


def own_store() -> Any:
    """Return the store at which the ranks met, through a connection of its own: another one may be waiting.

    Raises:
        torch.distributed.DistError: if the process that has it is gone: after `SILENCE`, where torch tries to connect
            for as long as operations may take, half an hour.
    """
    store: Any = _get_default_store()  # torch's stubs lack two of its methods
    usual = store.timeout
    store.set_timeout(timedelta(seconds=SILENCE))
    try:
        own = store.clone()
    finally:
        store.set_timeout(usual)
    own.set_timeout(usual)
    return own


def rank_of_this() -> int:
    """Return the rank of this process, also before the ranks have met."""
    return getattr(rank_zero_only, "rank", 0)


def tell_once(sentence: str, what: str | None = None) -> None:
    """Print `lit-sparse: <sentence>` to stderr, on one rank of those that have it to say.

    Before the ranks have met, one of each machine prints it.

    Args:
        what: What it is about; the sentence itself if not given.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        key = hashlib.sha256((what or sentence).encode()).hexdigest()
        try:
            told = own_store().add(f"told/{key}", 1) > 1
        except dist.DistError:  # rank 0 has the store, and has ended: it has told, or was killed
            told = rank_of_this() != 1
    else:
        told = int(os.environ.get("LOCAL_RANK", "0")) > 0
    if not told:
        print(f"lit-sparse: {printable(sentence)}", file=sys.stderr)  # it may quote a file
