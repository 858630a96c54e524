"""Fits and exports that are killed, lose power or run out of disk, and go on: they end as undisturbed ones do."""

from __future__ import annotations

import csv
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.runs import LAST
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from tests.conftest import make_home
from tests.faults import undisturbed
from tests.faults.child import LIMIT, Ended, Fault, command, journal_of, lose_unsynced
from tests.faults.undisturbed import Undisturbed
from tests.fuzz import FIXED, KEPT, METHODS, compare_values, workplace

STEPS = 6
SETTINGS = [
    *("--data.batch_size=2", f"--trainer.max_steps={STEPS}", "--checkpoint_steps=1", "--trainer.log_every_n_steps=1"),
    *("--trainer.limit_val_batches=1", "--trainer.val_check_interval=3", "--trainer.max_epochs=-1"),
]
RANKED = ("--trainer.devices=2", "--trainer.strategy=ddp")
FILE_SYSTEMS = (Path("/dev/shm"), Path("/tmp"))
"""Where TMPDIR may be on another file system than the fits."""
RUN = Path("runs/mine-1")


@dataclass
class Found:
    """The result of a trial.

    Attributes:
        how: `survived`, `refused` (named, and an earlier state kept), `nothing` (the fault came to nothing), or
            `failed`.
        lost: Optimizer steps that had been taken and were taken again.
        killed: Kills that struck.
        why: Of a failure.
    """

    how: str
    lost: int = 0
    why: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    killed: int = 0


class Bench:
    """A folder with a tiny model and rows, and of each method an undisturbed run to compare with.

    Args:
        home: The folder.
        kept: Where undisturbed runs are kept for the next campaign; by default they are not.

    Attributes:
        methods: The methods that trials draw.
    """

    def __init__(self, home: Path, kept: Path | None = None) -> None:
        self.home, self.methods, self._kept = home, METHODS, kept
        self._straight: dict[tuple[str, int], Undisturbed] = {}

    def straight(self, method: str, ranks: int) -> tuple[dict[str, Any], int, float]:
        """Return the last checkpoint of a run without faults, its number of file events, and its seconds.

        Raises:
            Refused: if the method takes no such fit.
        """
        if (method, ranks) not in self._straight:
            self._straight[method, ranks] = self._read_or_fit(method, ranks)
        found = self._straight[method, ranks]
        if found.checkpoint is None:
            raise Refused(found.refusal)
        return found.checkpoint, found.events, found.seconds

    def _read_or_fit(self, method: str, ranks: int) -> Undisturbed:
        line = words(method, ranks)
        if self._kept is None:
            return self._fit(line, ranks)
        path = self._kept / f"{method}-{ranks}.pt"
        if (found := undisturbed.read(path, line)) is None:
            found = self._fit(line, ranks)
            undisturbed.keep(found, path, line)
        return found

    def _fit(self, line: list[str], ranks: int) -> Undisturbed:
        begun = time.monotonic()
        with self.place() as place:
            ended = command(line, place, ranks=ranks)
            if refused := [one for one in ended if one.status == 2]:
                return Undisturbed(None, refusal=refused[0].told)
            assert all(one.status == 0 for one in ended), said(ended)
            checkpoint = torch.load(place / RUN / LAST, weights_only=True)
        return Undisturbed(checkpoint, ended[0].events, time.monotonic() - begun)

    @contextmanager
    def place(self) -> Iterator[Path]:
        """Give a new folder with the model and the rows."""
        with tempfile.TemporaryDirectory(dir=self.home.parent) as folder:
            place = Path(folder) / "work"
            place.mkdir()
            for path in self.home.iterdir():
                (place / path.name).symlink_to(path)
            yield place


class Refused(Exception):
    """A method that such a fit does not take, such as one that knows no ranks."""


@contextmanager
def bench(kept: Path | None = None) -> Iterator[Bench]:
    """Give a bench in a folder that is removed afterwards; undisturbed runs are kept in the folder `kept`, if any."""
    with workplace():
        make_home("plain", tiny_llm("llama"))
        home = Path.cwd() / "home"
        home.mkdir()
        for path in [*Path.cwd().iterdir()]:
            if path != home:
                path.rename(home / path.name)
        os.environ["LIT_SPARSE_CACHE"] = str(home / "cache")
        (home / "cache").mkdir()
        yield Bench(home, kept)


def words(method: str, ranks: int, *more: str) -> list[str]:
    """Return the command line of a fit."""
    fixed = [word for word in FIXED if "tests.fuzz" not in word]
    if method == "meft":  # which recomputes layers, and takes none with dropout
        fixed[fixed.index("dropout")] = "plain"
    given = ["fit", "--config", f"{method}.yaml", *fixed, *SETTINGS, "--run", "mine"]
    return [*given, *(RANKED if ranks > 1 else ()), *more]


def going_on(method: str, ranks: int, place: Path) -> list[str]:
    """Return the command line that goes on with what is in the folder, or begins anew."""
    if (place / RUN / LAST).is_file():
        return words(method, ranks, f"--ckpt_path={RUN / LAST}")
    shutil.rmtree(place / RUN, ignore_errors=True)  # it was killed before the first checkpoint
    return words(method, ranks)


def kill(bench: Bench, draw: random.Random, power: bool = False) -> Found:
    """Kill a fit at random moments, up to four times, and go on; it must end as the undisturbed one."""
    method, ranks = draw.choice(bench.methods), 2 if draw.random() < 0.15 else 1
    straight, events, seconds = bench.straight(method, ranks)
    faults: list[str] = []
    found = Found("survived", about={"method": method, "ranks": ranks, "faults": faults})
    with bench.place() as place, elsewhere(bench, draw) as temporary:
        left = events
        for _ in range(draw.randint(1, 4)):
            fault = moment(draw, left, seconds * (1 + left / events) / 2, power)  # half of it is the start
            faults.append(f"event {fault.event}" if fault.event else f"{fault.seconds:.2f} s")
            ended = command(going_on(method, ranks, place), place, fault, ranks, temporary)
            if unbidden(ended):
                return replace(found, how="failed", why=said(ended))
            found.lost += lost_steps(place)
            struck = any(one.status < 0 for one in ended)
            found.killed += struck
            if power and struck:
                faults.append(f"{lose(place, ranks, draw)} files lost their ends")
            for rank in range(ranks):
                journal_of(place, rank).unlink(missing_ok=True)
            if not struck:
                break
            left = max(1, left - fault.event) if (place / RUN / LAST).is_file() else events
        ended = command(going_on(method, ranks, place), place, None, ranks, temporary)
        if any(one.status for one in ended):
            return replace(found, how="failed", why=said(ended))
        end = compared(place, temporary, straight, found.lost, found.about)
        return replace(end, killed=found.killed)


def unbidden(ended: list[Ended]) -> bool:
    """Return whether a rank ended with an error, and not because the first one was killed: then it ends with 1."""
    struck = ended[0].status < 0
    return any(one.status > 0 and not (struck and one.status == 1) for one in ended)


def moment(draw: random.Random, events: int, seconds: float, power: bool) -> Fault:
    """Return a fault at one of the file events that are left of a fit, or at a moment of it: four of five at events."""
    if power or draw.random() < 0.8:
        return Fault(event=draw.randint(1, events), power=power)
    return Fault(seconds=draw.uniform(0, seconds))


def lose(place: Path, ranks: int, draw: random.Random) -> int:
    """Lose what no rank has synced; return the number of files that lost something."""
    return sum(lose_unsynced(journal_of(place, rank), draw) for rank in range(ranks))


def compared(place: Path, temporary: Path | None, straight: dict[str, Any], lost: int, about: dict[str, Any]) -> Found:
    """Compare a run that went on with the undisturbed one, and look for what was left behind."""
    found = read_checkpoint(place / RUN / LAST)
    try:
        for key in KEPT:
            compare_values(straight[key], found[key], key)
        record = RunRecord.read(place / RUN / "record.json")
        assert record.status == "ok", f"its record says {record.status}: {record.reason}"
        assert record.throughput is None or record.throughput.steps <= STEPS, "its record has steps twice"
    except (AssertionError, ValueError, OSError) as error:
        return Found("failed", lost, f"{type(error).__name__}: {error}", about)
    left = [str(path.relative_to(place)) for path in hidden(place / "runs")]
    left += [path.name for path in temporary.iterdir()] if temporary is not None else []
    return Found("failed", lost, f"left behind: {left}", about) if left else Found("survived", lost, about=about)


def full_disk(bench: Bench, draw: random.Random) -> Found:
    """Let a fit meet the limit of a file's size, as on a full disk; the last good checkpoint stays, and it goes on."""
    method = draw.choice(bench.methods)
    straight, *_ = bench.straight(method, 1)
    with bench.place() as place:
        about: dict[str, Any] = {"method": method}
        if draw.random() < 0.5:  # a checkpoint is there before the disk is full
            command(words(method, 1), place, Fault(event=draw.randint(20, 60)))
        before = (place / RUN / LAST).is_file()
        size = int(10 ** draw.uniform(1.5, 6.5))
        (ended,) = command(going_on(method, 1, place), place, Fault(file_size=size))
        about |= {"bytes": size, "before": before, "status": ended.status}
        if ended.status not in (0, 2):
            return Found("failed", 0, said([ended]), about)
        if before:
            read_checkpoint(place / RUN / LAST)
        if left := hidden(place / "runs"):
            return Found("failed", 0, f"left behind: {left}", about)
        (again,) = command(going_on(method, 1, place), place)
        if again.status:
            return Found("failed", 0, said([again]), about)
        return compared(place, None, straight, 0, about)


EXPORTS = {
    "hf": ["export", str(RUN), "--output", "out"],
    "adapter": ["export", str(RUN), "--to", "adapter", "--output", "out"],
    "delta": ["export", str(RUN), "--to", "delta", "--output", "out"],
    "page": ["report", "runs", "-o", "out"],
    "baseline": ["report", "runs", "--save_baseline", "out"],
}


def export(bench: Bench, draw: random.Random) -> Found:
    """Kill an export or a report, or let it run out of disk: the earlier one stays, and the next leaves no litter."""
    kind = draw.choice([*EXPORTS])
    verb = EXPORTS[kind]
    again = [*verb, "--overwrite=true"] if verb[0] == "export" else verb
    with bench.place() as place:
        fitted(bench, place)
        (first,) = command(verb, place)
        if first.status:
            return Found("failed", 0, said([first]), {"kind": kind})
        before = contents(place / "out")
        if draw.random() < 0.4:
            fault = Fault(file_size=int(10 ** draw.uniform(1, 6)))
        else:
            fault = Fault(event=draw.randint(1, first.events + 4))
        about = {"kind": kind, "event": fault.event, "bytes": fault.file_size}
        (ended,) = command(again, place, fault)
        if ended.status > 0 and ended.status != 2:
            return Found("failed", 0, said([ended]), about)
        if (place / "out").exists() and contents(place / "out") != before and kind not in ("page", "baseline"):
            return Found("failed", 0, "another export is there, or a part of one", about)
        if not (place / "out").exists():
            return Found("failed", 0, "the earlier export is gone", about)
        if ended.status == 2 and (left := hidden(place)):
            return Found("failed", 0, f"left behind by a refusal: {left}", about)
        (last,) = command(again, place)
        if last.status:
            return Found("failed", 0, said([last]), about)
        if left := hidden(place):
            return Found("failed", 0, f"left behind: {left}", about)
        return Found("refused" if ended.status == 2 else "survived", about=about)


def fitted(bench: Bench, place: Path) -> None:
    """Put a run of LoRA into the folder, fitted once for the bench."""
    kept = bench.home.parent / "fitted"
    if not kept.is_dir():
        with bench.place() as work:
            (ended,) = command(words("lora", 1, "--trainer.max_steps=2"), work)
            assert ended.status == 0, ended.told
            shutil.copytree(work / "runs", kept)
    shutil.copytree(kept, place / "runs")


@contextmanager
def elsewhere(bench: Bench, draw: random.Random) -> Iterator[Path | None]:
    """Give a folder for TMPDIR on another file system in half of all cases."""
    own = bench.home.stat().st_dev
    others = [path for path in FILE_SYSTEMS if path.is_dir() and path.stat().st_dev != own]
    if draw.random() < 0.5 or not others:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=others[0]) as folder:
        yield Path(folder)


def lost_steps(place: Path) -> int:
    """Return the steps in metrics.csv that the last checkpoint does not have."""
    table = place / RUN / "metrics.csv"
    if not table.is_file():
        return 0
    with table.open(errors="replace") as file:
        rows = csv.DictReader(line for line in file if "\0" not in line)
        steps = [int(row["step"]) for row in rows if (row.get("step") or "").isdigit()]
    try:
        saved = read_checkpoint(place / RUN / LAST)["global_step"]
    except BadInput:
        saved = 0
    return max(0, max(steps, default=-1) + 1 - saved)


def hidden(folder: Path) -> list[Path]:
    """Return the hidden files and folders under `folder`."""
    return [path for path in folder.rglob(".*") if path.name != ".metadata"] if folder.is_dir() else []


def contents(path: Path) -> dict[str, bytes]:
    """Return the contents of a file, or of all files of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


def said(ended: list[Ended]) -> str:
    """Return what the processes said that ended by themselves, or that none did."""
    told = [f"status {one.status}: {one.told[-1500:]}" for one in ended if one.status > 0 or one.told]
    return " / ".join(told) or f"it did not end within {LIMIT} s"
