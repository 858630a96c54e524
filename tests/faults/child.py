"""Commands in forked processes that are killed, cut off from power, or out of disk on purpose.

A process that has imported everything is forked for each command, which saves seconds of imports. What a command does
to files is counted by Python's audit events; a kill at one of them comes before that event happens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lit_sparse import cli
from lit_sparse.callbacks import recorder
from lit_sparse.library_errors import understood

FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"})
"""Audit events of what changes files, of which `open` counts only for writing."""
LIMIT = 1800
"""Seconds a command may take; a tiny fit takes two on a quiet machine, and minutes where others are served first."""


@dataclass(frozen=True)
class Fault:
    """A fault that befalls a command.

    Args:
        event: Die before this file event in the watched folder, counted from 1; 0: never.
        seconds: Die so long after the start; 0: never.
        power: At the death, lose what was not synced (`lose_unsynced`).
        file_size: Bytes that a file may have, as on a disk that is full; 0: any.
    """

    event: int = 0
    seconds: float = 0.0
    power: bool = False
    file_size: int = 0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative for a signal), what it said, and the file events it had."""

    status: int
    told: str
    events: int


class Watch:
    """Counts file events under a folder, notes what is synced, and kills the process before the one that is due."""

    def __init__(self, folder: Path, fault: Fault, journal: Path) -> None:
        self.folder, self.fault, self.count = str(folder), fault, 0
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.kept = journal.with_suffix(".kept")
        self._busy = False

    def begin(self) -> None:
        """Watch this process from now on, until it ends."""
        sys.addaudithook(self._heard)
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self._note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))

        def replaced(source: Any, target: Any, **options: Any) -> None:
            before = self._keep(Path(target))
            replace(source, target, **options)
            self._note("rename", os.path.abspath(source), os.path.abspath(target), before)

        os.fsync, os.replace = synced, replaced

    def _keep(self, path: Path) -> str:
        """Copy what a rename is about to replace, which a power cut may bring back."""
        if not (self.fault.power and path.is_file() and str(path.resolve()).startswith(self.folder)):
            return ""
        self._busy = True
        self.kept.mkdir(exist_ok=True)
        copy = self.kept / str(self.count)
        shutil.copyfile(path, copy)
        self._busy = False
        return str(copy)

    def _note(self, *words: str) -> None:
        os.write(self.journal, (json.dumps(words) + "\n").encode())

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or self._busy or not isinstance(arguments[0], str | os.PathLike | bytes):
            return
        if event == "open" and not _writes(arguments):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(self.folder):
            return
        self.count += 1
        if event == "open":
            self._note("write", path)
        if self.count == self.fault.event:
            os.kill(os.getpid(), signal.SIGKILL)


def _writes(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def lose_unsynced(journal: Path, draw: Any) -> int:
    """Do to the files what a power cut does after a process's writes: lose what no fsync has asked for.

    A file that was written and not synced has zeros in place of its end, or is empty. A rename whose folder was not
    synced afterwards may be undone. Returns the number of files that lost something.
    """
    unsynced: dict[str, None] = {}
    renames: list[tuple[str, str, str]] = []
    for line in journal.read_text().splitlines():
        what, *paths = json.loads(line)
        if what == "write":
            unsynced[paths[0]] = None
        elif what == "sync":
            unsynced.pop(paths[0], None)
            renames = [one for one in renames if os.path.dirname(one[1]) != paths[0]]
        else:
            if paths[0] in unsynced:
                del unsynced[paths[0]]
                unsynced[paths[1]] = None
            renames.append((paths[0], paths[1], paths[2]))
    lost = 0
    for path in map(Path, unsynced):
        if path.is_file() and draw.random() < 0.7:
            size = path.stat().st_size
            kept = draw.randint(0, size)
            os.truncate(path, kept)
            if draw.random() < 0.5:  # the length reached the disk, the contents did not
                os.truncate(path, size)
            lost += kept < size
    for _, target, before in reversed(renames):
        if before and Path(target).is_file() and draw.random() < 0.5:
            shutil.copyfile(before, target)
            lost += 1
    return lost


def command(
    words: Sequence[str],
    folder: Path,
    fault: Fault | None = None,
    ranks: int = 1,
    temporary: Path | None = None,
    act: Callable[[Sequence[str]], object] = cli.run,
    limit: float = LIMIT,
) -> list[Ended]:
    """Run a command line in forked processes, one for each rank, in `folder`; return how each ended.

    Args:
        words: The command line, without the program's name.
        folder: The working folder, which is watched.
        fault: What befalls the first rank, which writes checkpoints. The others are killed with it, as a scheduler
            does.
        temporary: TMPDIR of the processes.
        act: What runs the command line.
        limit: Seconds after which the processes are killed.
    """
    fault, port = fault or Fault(), _free_port() if ranks > 1 else 0
    place = {"TMPDIR": str(temporary)} if temporary is not None else {}
    if ranks > 1:
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "faults"}
        place |= {"GROUP_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    pids = []
    for rank in range(ranks):
        own = fault if rank == 0 else Fault(power=fault.power)
        names = {**place, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})}
        if (pid := os.fork()) == 0:
            _be_child(words, folder, own, rank, names, act)
        pids.append(pid)
    statuses = _wait(pids, time.monotonic() + (fault.seconds or limit))
    return [_ended(folder, rank, status) for rank, status in enumerate(statuses)]


def journal_of(folder: Path, rank: int = 0) -> Path:
    """Return where a command's file events are noted: beside its working folder."""
    return folder.with_name(f"{folder.name}-journal-{rank}")


def _wait(pids: Sequence[int], deadline: float) -> list[int]:
    """Return the exit statuses of processes, which all end with the first that a signal ends, or at the deadline."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or any(status < 0 for status in statuses.values()):
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def _ended(folder: Path, rank: int, status: int) -> Ended:
    told = folder.with_name(f"{folder.name}-told-{rank}")
    found = json.loads(told.read_text()) if told.is_file() else {"told": "", "events": 0}
    told.unlink(missing_ok=True)
    return Ended(status, found["told"], found["events"])


def _be_child(
    words: Sequence[str],
    folder: Path,
    fault: Fault,
    rank: int,
    names: dict[str, str],
    act: Callable[[Sequence[str]], object],
) -> None:
    """Run a command line in this process, which ends with it; an error that has no sentence is told in full."""
    status, told, watch = 70, "", Watch(folder, fault, journal_of(folder, rank))
    try:
        logging.disable(logging.INFO)
        warnings.simplefilter("ignore")
        recorder.predict = lambda trainer, settings, seconds: None  # a planned peak is no subject here
        os.environ.update(names)
        setattr(rank_zero_only, "rank", rank)  # noqa: B010 - as an import would have it, which was in the parent
        tempfile.tempdir = None
        os.chdir(folder)
        sys.argv = ["lit-sparse", *words]
        if fault.file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, resource.RLIM_INFINITY))
        watch.begin()
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            act(list(words))
        status = 0
    except BaseException as error:
        sentence = understood(error)
        status = 70 if sentence is None else 2
        told = traceback.format_exc() if sentence is None else str(sentence)
    finally:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            noted = json.dumps({"told": told, "events": watch.count})
            folder.with_name(f"{folder.name}-told-{rank}").write_text(noted)
        finally:
            os._exit(status)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
