"""Runs jobs one after another, each in a fresh process, and leaves a record of every one."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lit_sparse_profiling.drafts import draft_of, remove_left, replace_text
from lit_sparse_profiling.paired import PairedRun, compare_rounds, dependence, interleave
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.run_folders import folders, next_folder

RECORD, JOB, LOG = "record.json", "bench.json", "log.txt"
REFUSAL = re.compile(r"^lit-sparse: (.+)$", re.MULTILINE)
REFUSED = 2
"""Exit status of a process that refused its input. Its last line begins with `lit-sparse: ` and says why."""
FINAL_STATUSES: tuple[Status, ...] = ("ok", "oom")
"""Statuses of a result. A run with another status, or without a record, is repeated.

A refusal is repeated too: it takes seconds, and its reason may be gone, such as a file that was missing.
"""
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
ROOT_OPTION = "--trainer.default_root_dir="
"""Option of a command that sets where it creates its folder."""


@dataclass(frozen=True)
class Job:
    """A command to run and measure.

    Attributes:
        name: Name of its runs, whose folders are `<name>-<n>`.
        command: Command that creates the next free of these folders, with a record in it.
        settings: Everything else on which the result depends: contents of files, versions.
        against: Job whose timed steps are interleaved with this job's. Only the ratio of their times is kept.
    """

    name: str
    command: Sequence[str]
    settings: Mapping[str, str]
    against: Job | None = None

    @property
    def identity(self) -> str:
        """Hash of command, settings and `against`. Runs with the same identity are repetitions."""
        against = None if self.against is None else self.against.identity
        return hashlib.sha256(json.dumps([list(self.command), dict(self.settings), against]).encode()).hexdigest()


@dataclass(frozen=True)
class Repeat:
    """The `number`-th run of a job, from 1; `folder` is None unless it was run earlier."""

    job: Job
    number: int
    folder: Path | None


def plan_repeats(jobs: Sequence[Job], root: Path, repeat: int) -> list[Repeat]:
    """Return all runs of the jobs, those done earlier included: every job once, then every job again.

    In this order, a slow drift of the machine affects all jobs alike.
    """
    done = {job.identity: finished_runs(root, job) for job in jobs}
    return [
        Repeat(job, number, done[job.identity][number - 1] if number <= len(done[job.identity]) else None)
        for number in range(1, repeat + 1)
        for job in jobs
    ]


def finished_runs(root: Path, job: Job) -> list[Path]:
    """Return the folders of this job's runs that have a result, oldest first."""
    ours = [folder for folder in folders(root, job.name) if _identity(folder) == job.identity]
    return [folder for folder in ours if (record := _record(folder)) is not None and record.status in FINAL_STATUSES]


def _identity(folder: Path) -> str | None:
    try:
        document = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not a bench's folder, or killed while this was written: not a result of this job
        return None
    return document.get("identity") if isinstance(document, dict) else None


def _record(folder: Path) -> RunRecord | None:
    try:
        return RunRecord.read(folder / RECORD)
    except (OSError, ValueError):  # killed before or while it was written, or of another version
        return None


def execute(job: Job, root: Path, limit: float | None = None, tick: Callable[[], None] = lambda: None) -> Path:
    """Run the job in a process of its own, make sure that it has a record, and return its folder.

    Args:
        job: Job to run.
        root: Folder in which the command creates its own. No other process may create runs there meanwhile.
        limit: Seconds after which the process is killed; None for no limit.
        tick: Called a few times a second while the process runs.

    Raises:
        OSError: if the folder cannot be written, as on a full disk; it is removed, unless it has a record.
    """
    folder, log = next_folder(root, job.name), log_of(job, root)
    root.mkdir(parents=True, exist_ok=True)
    remove_left(_named_log(job, root))
    try:
        _run_into(folder, log, job, limit, tick)
    except OSError:
        if not (folder / RECORD).exists():  # a record is kept, whichever process wrote it
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        log.unlink(missing_ok=True)  # it is in the folder, unless the run was cut short
    return folder


def log_of(job: Job, root: Path) -> Path:
    """Return the file in `root` that a process of this job writes to, until it is moved into the run's folder.

    It is hidden and has this process's number: the user may have a `lora.log`, or write this bench's own output there.
    """
    return draft_of(_named_log(job, root))


def _named_log(job: Job, root: Path) -> Path:
    return root / f"{job.name}.log"


def _run_into(folder: Path, log: Path, job: Job, limit: float | None, tick: Callable[[], None]) -> None:
    deadline = None if limit is None else time.monotonic() + limit
    if job.against is None:
        code, rounds = _run_until(job.command, log, deadline, tick), []
    else:
        code, rounds = _run_interleaved(job, job.against, log, deadline, tick)
    folder.mkdir(exist_ok=True)  # the process has created it, unless it failed before
    os.replace(log, folder / LOG)
    record = _record(folder)
    if record is None:
        status, reason = diagnose(code, (folder / LOG).read_text(encoding="utf-8", errors="replace"), limit)
        RunRecord(name=folder.name, status=status, reason=reason).write(folder / RECORD)
    elif job.against is not None:
        _with_pair(record, job.against.name, rounds).write(folder / RECORD)
    # Last: a bench that is killed before this line leaves a folder without identity, and repeats the run.
    replace_text(folder / JOB, json.dumps({"identity": job.identity, "command": job.command}))


def _run_until(command: Sequence[str], log: Path, deadline: float | None, tick: Callable[[], None]) -> int | None:
    """Run `command` and return its exit status; None if it was killed at the deadline."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, preexec_fn=parent_death_hook()
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


def _run_interleaved(
    job: Job, against: Job, log: Path, deadline: float | None, tick: Callable[[], None]
) -> tuple[int | None, list[tuple[float, float]]]:
    """Run both jobs; return this job's exit status, and the seconds of both jobs' steps in each round."""
    # The other run's folder is scratch: it exists for its step times only.
    with tempfile.TemporaryDirectory() as scratch:
        command = [word if not word.startswith(ROOT_OPTION) else f"{ROOT_OPTION}{scratch}" for word in against.command]
        player = PairedRun(job.command, log, preexec_fn=parent_death_hook())
        try:
            other = partial(PairedRun, command, Path(scratch, "log.txt"), preexec_fn=parent_death_hook())
            rounds = interleave(player, other, deadline, tick)
        finally:
            code = player.end(deadline, tick)
    return code, rounds


def _with_pair(record: RunRecord, against: str, rounds: Sequence[tuple[float, float]]) -> RunRecord:
    """Return the record with the ratio of step times, or with a note if no steps were interleaved."""
    if rounds:
        pair = compare_rounds(against, rounds)
        return replace(record, pair=pair, notes=[*record.notes, *filter(None, [dependence(pair)])])
    note = f"No steps were interleaved with those of {against}: one of the two runs ended before its first timed step."
    return replace(record, notes=[*record.notes, note])


def parent_death_hook() -> Callable[[], object] | None:
    """Return a `preexec_fn` for subprocess that kills the process when this one ends; None except on Linux.

    Otherwise a run whose bench was killed would use the device while the next bench measures.
    """
    if sys.platform != "linux":
        return None
    # Loaded here: between fork and exec, only async-signal-safe calls are allowed, and dlopen may deadlock.
    libc, bench = ctypes.CDLL(None), os.getpid()

    def end_with_bench() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != bench:  # the bench ended before the call above: no signal will come
            os._exit(1)

    return end_with_bench


def diagnose(code: int | None, log: str, limit: float | None) -> tuple[Status, str]:
    """Return status and reason for a process that left no complete record.

    Args:
        code: Its exit status; None if it was stopped at the limit.
        log: Its output.
        limit: The limit in seconds.
    """
    refusals = REFUSAL.findall(log)
    lines = [line for line in log.splitlines() if line.strip()]
    if code is None:
        return "failed", f"it was stopped after {limit:,.0f} seconds."
    if code == REFUSED and refusals:
        return "refused", refusals[-1]
    if code < 0:
        hint = "; Linux does so when memory runs out" if -code == signal.SIGKILL else ""
        return "failed", f"the process was killed by {signal.Signals(-code).name}{hint}."
    return "failed", f"exit status {code} without a complete record; the log ends: {lines[-1] if lines else '(empty)'}"


def hash_sources(folders: Sequence[Path]) -> str:
    """Return a hash of the Python files in these folders: results of another version are not repetitions."""
    digest = hashlib.sha256()
    for path in _python_files(folders):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _python_files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*.py") if os.sep + "__pycache__" not in str(path))
