"""`lit-sparse bench`: a few measured steps of each way to train, on the same model and batches."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import lit_sparse
import lit_sparse_kernels
import lit_sparse_profiling
from lit_sparse.commands.bench_inputs import content, states_of_inputs
from lit_sparse.commands.configs import found
from lit_sparse.commands.shipped import methods
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import understood
from lit_sparse.places import configs_folder
from lit_sparse.storage.held import Held
from lit_sparse_profiling.cooling import Cooling
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.report import report
from lit_sparse_profiling.runner import Job, Repeat, execute, hash_sources, log_of, plan_repeats

MOST_REPEATS, MOST_MINUTES = 10_000, 10**6
"""Bounds of --repeat, each run of which is planned ahead, and of --minutes: two years."""
UNENDING = 10**6
"""`max_steps` of a measured fit, so large that the learning rate stays at the start of its schedule."""
GRACE = 600.0
"""Seconds granted beyond --minutes for loading and selection; after them a run is stopped."""
OWN = ("--repeat", "--steps", "--minutes", "--into", "--against", "--config", "-c", "-h", "--help")
MEASURED = (
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.max_epochs=-1",
    f"--trainer.max_steps={UNENDING}",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--samples=0",
    "--checkpoint_steps=0",
)
"""Options that reduce a fit to its training steps."""
TOLD = ("Predicted peak of memory", "Memory is not predicted", "Warning: this will not fit")
"""Beginnings of the lines that a fit says of its memory before its first step (`callbacks.prediction`)."""
TIMED_ONLY = ("--profile.examine=false", "--profile.profiled=0", "--profile.predict=false")
"""Options of the run named by --against, of which only the times are used."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of the verb; options that it does not know are passed to each fit."""
    out = argparse.ArgumentParser(prog="lit-sparse bench", description=__doc__, allow_abbrev=False)
    out.add_argument("yamls", nargs="*", help="methods to compare; a.yaml+b.yaml is both at once (default: all)")
    out.add_argument("-c", "--config", action="append", default=[], help="a YAML that is common to all of them")
    out.add_argument("--steps", type=int, default=5, help="timed steps of each run (default 5)")
    out.add_argument("--minutes", type=float, help="most minutes of training of each run")
    out.add_argument("--repeat", type=int, default=1, help="runs of each, interleaved (default 1)")
    out.add_argument("--against", metavar="YAML", help="interleave steps with this one's, and show the ratio of times")
    out.add_argument("--into", default="runs/bench", help="folder of the runs (default runs/bench)")
    out.epilog = (
        "Any key of `lit-sparse fit` goes to all runs, as in --model.base NAME or --data.batch_size 8. Without data of "
        "yours, rows are random tokens (configs/data/synthetic.yaml). The same command again makes what is missing."
    )
    return out


def bench(argv: Sequence[str]) -> int:
    """Measure the methods in `argv`; return the exit status, 1 if a run failed or all were refused.

    Raises:
        BadInput: if an option is invalid, or another bench runs in the folder. A run that is refused beside others
            that are not is a result, not an error.
    """
    own, passed = take(argv, OWN)
    asked = parser().parse_intermixed_args(own)  # YAMLs may stand between options
    if asked.repeat < 1 or asked.steps < 1 or (asked.minutes is not None and not 0 < asked.minutes < math.inf):
        raise BadInput(
            f"--repeat {asked.repeat}, --steps {asked.steps} and --minutes {asked.minutes} were asked for; "
            "give numbers above 0."
        )
    if asked.repeat > MOST_REPEATS or asked.steps >= UNENDING or (asked.minutes or 0) > MOST_MINUTES:
        raise BadInput(
            f"--repeat {asked.repeat}, --steps {asked.steps} and --minutes {asked.minutes} were asked for; give at "
            f"most {MOST_REPEATS} repeats, {UNENDING - 1} steps and {MOST_MINUTES} minutes."
        )
    if os.path.lexists(asked.into) and not os.path.isdir(asked.into):
        raise BadInput(
            f"--into {asked.into} is a file or leads nowhere, and the runs need a folder; give another path, or "
            "remove it."
        )
    against = None if asked.against is None else job(asked.against, asked, [*passed, *TIMED_ONLY])
    jobs = [
        replace(job(yaml_, asked, passed), against=against)
        for yaml_ in asked.yamls or [path.name for path in methods()]
    ]
    names = [one.name for one in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(
            f"{twice[0]} is asked for twice; name each way to train once, and give --repeat, or give files of one "
            "name others."
        )
    return run(jobs, Path(asked.into), asked.repeat, None if asked.minutes is None else asked.minutes * 60 + GRACE)


def take(argv: Sequence[str], options: Sequence[str], switches: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Split `argv` into a verb's own words and those passed to each fit: unknown options with their values.

    Args:
        argv: The words of the command.
        options: The verb's own options.
        switches: Those of them that take no value.
    """
    own: list[str] = []
    passed: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        ours = not word.startswith("-") or word.partition("=")[0] in options
        into = own if ours else passed
        into.append(word)
        takes_value = word.startswith("-") and "=" not in word and word not in switches
        if takes_value and words and not words[0].startswith("--"):
            into.append(words.pop(0))
    return own, passed


def job(name: str, asked: argparse.Namespace, passed: Sequence[str]) -> Job:
    """Return the job of one YAML, or of several joined by +.

    Raises:
        BadInput: if there is no such file.
    """
    parts = parts_of(name)
    files = [*map(existing, asked.config), *map(existing, parts)]
    if not has_data(files, passed):
        files.insert(0, configs_folder() / "data" / "synthetic.yaml")
    configs = [f"--config={path}" for path in files]
    most = [] if asked.minutes is None else [f"--trainer.max_time={max_time(asked.minutes)}"]
    command = [sys.executable, "-m", "lit_sparse", "fit", *configs, *MEASURED, *most, *passed]
    packages = [Path(package.__path__[0]) for package in (lit_sparse, lit_sparse_kernels, lit_sparse_profiling)]
    settings = {
        **{str(path): path.read_text(encoding="utf-8", errors="surrogateescape") for path in files},
        "inputs": "\n".join(sorted(states_of_inputs(files, passed, asked.into))),
        **{package: version(package) for package in ("torch", "transformers", "peft", "lightning")},
        "devices": f"{torch.cuda.device_count()} with CUDA",
        "code": hash_sources(packages),
    }
    label = label_of(name)
    place = [f"--trainer.default_root_dir={asked.into}", f"--run={label}", f"--profile.timed={asked.steps}"]
    return Job(label, [*command, *place], settings)


def parts_of(name: str) -> list[str]:
    """Return the YAMLs of a way to train, joined by + in its name; a file whose own path has a + is one."""
    return [name] if os.path.isfile(name) else name.split("+")


def label_of(name: str) -> str:
    """Return what a way to train is called: its YAMLs, or the run whose config.yaml it is."""
    files = map(Path, parts_of(name))
    return "+".join(file.parent.resolve().name if file.name == "config.yaml" else file.stem for file in files)


def existing(name: str) -> Path:
    """Return the path of a YAML, in the working directory or among those shipped with lit_sparse.

    Raises:
        BadInput: if there is none.
    """
    path = Path(found(name))
    if not path.is_file():
        shipped = ", ".join(path.name for path in methods())
        raise BadInput(f"there is no {name}, neither here nor among the YAMLs of lit_sparse ({shipped}).")
    return path


def has_data(files: Sequence[Path], passed: Sequence[str]) -> bool:
    """Return true if a file or option names the training data; a batch size alone does not."""
    words = {word.partition("=")[0] for word in passed}
    return not words.isdisjoint(("--data", "--data.class_path")) or any(map(_names_data, files))


def _names_data(path: Path) -> bool:
    """Return true if a YAML names the data."""
    data = content(path).get("data")
    return isinstance(data, str) or (isinstance(data, dict) and "class_path" in data)


def max_time(minutes: float) -> str:
    """Return a time limit in Lightning's format, days:hours:minutes:seconds."""
    seconds = max(1, round(minutes * 60))
    return f"{seconds // 86400:02d}:{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def run(jobs: Sequence[Job], root: Path, repeat: int, limit: float | None) -> int:
    """Make the missing runs, with a progress bar, and compare all of them; return the exit status.

    Raises:
        BadInput: if another bench runs in `root`, or a run cannot be written there.
    """
    with alone_in(root):
        done = make(jobs, root, repeat, limit)
        report([str(folder) for folder in done])
    Console().print(f"The same again: lit-sparse report {root}", highlight=False, markup=False)
    statuses = {RunRecord.read(folder / "record.json").status for folder in done}
    return int("failed" in statuses or statuses == {"refused"})


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Keep other benches out of `root`, which is made: two would take the same numbers for their runs.

    Raises:
        BadInput: if another bench runs in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    held = Held(root)
    try:
        held.take()
    except BadInput as error:  # which speaks of a training
        raise BadInput(
            f"another bench makes its runs in {root}; wait until it ends, or give another folder with --into."
        ) from error
    try:
        yield
    finally:
        held.release()


def make(jobs: Sequence[Job], root: Path, repeat: int, limit: float | None) -> list[Path]:
    """Make the missing runs, with a progress bar; return the folders of all."""
    console = Console()
    done: list[Path] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    # auto_refresh starts a thread, which must not exist when processes are forked; `tick` refreshes instead.
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as progress:
        plan = plan_repeats(jobs, root, repeat)
        task = progress.add_task("bench", total=len(plan))
        cooling = Cooling(partial(progress.console.print, highlight=False, markup=False))
        for turn in plan:
            progress.update(task, description=f"{turn.job.name} ({turn.number} of {repeat})")
            relay = Relay(turn.job.name, log_of(turn.job, root), progress)
            if turn.folder is None and turn.job.against is None:  # interleaved runs measure no energy
                cooling.wait(progress.refresh)
            done.append(turn.folder or execute_or_refuse(turn.job, root, limit, relay.tick))
            progress.console.print(outcome(turn, done[-1]), highlight=False, markup=False)
            progress.advance(task)
    return done


def execute_or_refuse(job: Job, root: Path, limit: float | None, tick: Callable[[], None]) -> Path:
    """Run a job as `execute` does.

    Raises:
        BadInput: if its folder cannot be written, as on a full disk.
    """
    try:
        return execute(job, root, limit, tick=tick)
    except OSError as error:
        if understood(error) is None:
            raise
        raise BadInput(
            f"a run of {job.name} could not be written under {root}: {error.strerror}; make room or give another "
            "folder with --into. The same command again makes what is missing."
        ) from error


class Relay:
    """Shows what a run says of its memory before its first step, as soon as it is in its log.

    Args:
        name: Name of the run, with which lines begin.
        log: File that the run writes to.
        progress: The progress bar above which lines are printed.
    """

    def __init__(self, name: str, log: Path, progress: Progress) -> None:
        self.name, self.log, self.progress, self._read = name, log, progress, 0

    def tick(self) -> None:
        """Print new lines about predicted memory, and refresh the progress bar."""
        if self.log.is_file():
            with self.log.open("rb") as file:
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
            self._read += len(whole)
            for line in whole.decode("utf-8", errors="replace").splitlines():
                if line.startswith(TOLD):
                    self.progress.console.print(f"{self.name}: {line}", highlight=False, markup=False)
        self.progress.refresh()


def outcome(turn: Repeat, folder: Path) -> str:
    """Describe the result of a run in one line."""
    record = RunRecord.read(folder / "record.json")
    said = record.reason or ""
    if record.status == "ok" and record.throughput is not None and record.throughput.median_step is not None:
        said = f"{record.throughput.median_step:.3f} s a step"
    earlier = " (made earlier)" if turn.folder is not None else ""
    return f"{folder.name}: {record.status}{earlier} {said}".rstrip()
