"""Runs what is to be compared one after another, each in a fresh process, and has a record of every one."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lit_sparse_profiling.paired import Player, dependence, pair_of, play
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.run_folders import folders, next_folder

RECORD, JOB, LOG = "record.json", "bench.json", "log.txt"
REFUSAL = re.compile(r"^lit-sparse: (.+)$", re.MULTILINE)
REFUSED = 2
"""Exit status of a process that refused its input, and said why in a last line that begins with `lit-sparse: `."""
FINAL: tuple[Status, ...] = ("ok", "oom", "refused")
"""What is a result; a run that failed is made again."""
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
ROOT = "--trainer.default_root_dir="
"""The word of a command that says where it makes its folder."""


@dataclass(frozen=True)
class Job:
    """One run to make.

    Attributes:
        name: Of the runs: their folders are `<name>-<n>`.
        command: What is executed; it makes the next free one of these folders, and a record in it.
        settings: What else makes its result another one: contents of files, versions.
        against: A job whose timed steps take turns with this one's, for the ratio of their times; only that is kept.
    """

    name: str
    command: Sequence[str]
    settings: Mapping[str, str]
    against: Job | None = None

    @property
    def identity(self) -> str:
        """A hash: runs of the same one are repetitions of each other."""
        against = None if self.against is None else self.against.identity
        return hashlib.sha256(json.dumps([list(self.command), dict(self.settings), against]).encode()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """The `number`-th run (from 1) of a job; `folder` is there if it was made earlier."""

    job: Job
    number: int
    folder: Path | None


def turns(jobs: Sequence[Job], root: Path, repeat: int) -> list[Turn]:
    """What there is to do, and what is done: all jobs once, then all of them again, so that drift meets all alike."""
    done = {job.identity: finished(root, job) for job in jobs}
    return [
        Turn(job, number, done[job.identity][number - 1] if number <= len(done[job.identity]) else None)
        for number in range(1, repeat + 1)
        for job in jobs
    ]


def finished(root: Path, job: Job) -> list[Path]:
    """The folders of this very job's runs that have a result, oldest first."""
    ours = [folder for folder in folders(root, job.name) if _identity(folder) == job.identity]
    return [folder for folder in ours if (record := _record(folder)) is not None and record.status in FINAL]


def _identity(folder: Path) -> str | None:
    try:
        document = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not ours, or killed while it was written: no result of this job
        return None
    return document.get("identity") if isinstance(document, dict) else None


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.read(folder / RECORD)
    except (OSError, ValueError):  # killed before or while it was written, or not ours
        return None


def execute(job: Job, root: Path, limit: float | None = None, tick: Callable[[], None] = lambda: None) -> Path:
    """Run the job in a process of its own and see that there is a record of it; its folder.

    Args:
        job: What to run.
        root: Where the command makes its folder. Nobody else makes runs there meanwhile.
        limit: Seconds after which the process is killed.
        tick: Called a few times a second meanwhile.
    """
    folder, log = next_folder(root, job.name), root / f"{job.name}.log"
    root.mkdir(parents=True, exist_ok=True)
    deadline = None if limit is None else time.monotonic() + limit
    if job.against is None:
        code, rounds = _wait(job.command, log, deadline, tick), []
    else:
        code, rounds = _in_turn(job, job.against, log, deadline, tick)
    folder.mkdir(exist_ok=True)  # the process made it, unless it failed before
    os.replace(log, folder / LOG)
    record = _record(folder)
    if record is None:
        status, reason = verdict(code, (folder / LOG).read_text(encoding="utf-8", errors="replace"), limit)
        RunRecord(name=folder.name, status=status, reason=reason).write(folder / RECORD)
    elif job.against is not None:
        _compared(record, job.against.name, rounds).write(folder / RECORD)
    (folder / JOB).write_text(json.dumps({"identity": job.identity, "command": job.command}), encoding="utf-8")
    return folder


def _wait(command: Sequence[str], log: Path, deadline: float | None, tick: Callable[[], None]) -> int | None:
    """The exit status of `command`; None if it was killed at the deadline."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=ends_with_parent()
        )
        try:
            while process.poll() is None:
                if deadline is not None and time.monotonic() > deadline:
                    return None
                tick()
                time.sleep(0.2)
            return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _in_turn(
    job: Job, against: Job, log: Path, deadline: float | None, tick: Callable[[], None]
) -> tuple[int | None, list[tuple[float, float]]]:
    """The exit status of the job, and seconds of its steps and of the other's in each round."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [word if not word.startswith(ROOT) else f"{ROOT}{scratch}" for word in against.command]
        player = Player(job.command, log, preexec_fn=ends_with_parent())
        try:
            other = partial(Player, command, Path(scratch, "log.txt"), preexec_fn=ends_with_parent())
            rounds = play(player, other, deadline, tick)
        finally:
            code = player.end(deadline, tick)
    return code, rounds


def _compared(record: RunRecord, against: str, rounds: Sequence[tuple[float, float]]) -> RunRecord:
    """The record with what its steps took of the other's; with a note where no steps took turns."""
    if rounds:
        pair = pair_of(against, rounds)
        return replace(record, pair=pair, notes=[*record.notes, *filter(None, [dependence(pair)])])
    note = f"No step took turns with one of {against}: one of the two runs ended before its first timed step."
    return replace(record, notes=[*record.notes, note])


def ends_with_parent() -> Callable[[], object] | None:
    """On Linux, for subprocess's `preexec_fn`: a process that lost its bench ends too.

    Otherwise it would hold the device while the next bench measures.
    """
    if sys.platform != "linux":
        return None
    libc, bench = ctypes.CDLL(None), os.getpid()  # loaded here: not to be done between fork and exec

    def end_with_bench() -> None:
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != bench:  # it ended before it was listened for
            os._exit(1)

    return end_with_bench


def verdict(code: int | None, log: str, limit: float | None) -> tuple[Status, str]:
    """How a process ended that left no whole record, and why, in a sentence."""
    refusals = REFUSAL.findall(log)
    lines = [line for line in log.splitlines() if line.strip()]
    if code is None:
        return "failed", f"it had not ended after {limit:,.0f} seconds and was stopped."
    if code == REFUSED and refusals:
        return "refused", refusals[-1]
    if code < 0:
        hint = "; Linux ends so what takes too much memory" if -code == signal.SIGKILL else ""
        return "failed", f"the process was ended by {signal.Signals(-code).name}{hint}."
    return "failed", f"exit status {code} without a whole record; the log ends: {lines[-1] if lines else '(empty)'}"


def sources(folders: Sequence[Path]) -> str:
    """A hash of the Python files in these folders: a changed program measures something else."""
    digest = hashlib.sha256()
    for path in _python_files(folders):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _python_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*.py") if os.sep + "__pycache__" not in str(path))
