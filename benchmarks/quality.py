"""Compare methods by what they learn and forget: swept learning rates, several seeds, and the spread.

`python -m benchmarks.quality TABLE` runs a table of benchmarks/quality (or any such YAML file). Each trial is
`lit-sparse fit` in a process of its own. Its line is appended to benchmarks/results/quality.jsonl when it ends, and no
trial with a line is trained again, for any table. Processes with the same folders share the work, each for instance on
a GPU of its own (CUDA_VISIBLE_DEVICES). A line belongs to a configuration on one kind of device and one set of
versions, not to a commit: if a change of the code makes it untrue, delete it.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
import yaml
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import race
from benchmarks.measurements import Line, table
from benchmarks.provenance import ROOT, commit, provenance
from benchmarks.ranking import SCORE, Results, cells, chosen, head, notes, score, swept
from benchmarks.row_scores import RowScores, rows_of
from benchmarks.trials import Arm, Config, Table, Trial, merged, read_table
from lit_sparse.errors import BadInput
from lit_sparse.runs import LAST
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import folders
from lit_sparse_profiling.runner import REFUSED, Job, diagnose, execute, finished_runs, parent_death_hook

RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
QUIET = (
    "--samples=0",
    "--profile.examine=false",
    "--profile.profiled=0",
    "--profile.predict=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
"""Options that do not affect the result of a fit."""
WAIT = 2.0
"""Seconds between looks for work, while other processes do all that can be done now."""
AT_THE_END = 10**9
"""Steps between checkpoints: so many that one is written only at the end of training."""


@dataclass(frozen=True)
class Work:
    """A task of a table: train a trial, or test it."""

    trial: Trial
    test: bool = False

    def __str__(self) -> str:
        return f"{self.trial.name}{', answers' if self.test else ''}"


# ---- what is to be done


def work(made: Table, results: Results) -> Iterator[Work]:
    """Yield the work that can be done now: the sweeps, then all arms seed by seed.

    So a drift of the machine affects all arms alike.
    """
    for arm in made.arms:
        yield from _missing(made, swept(made, arm, results), results, tested=False)
        yield from _missing(made, _at_best(made, arm, made.seeds[:1], results), results)
    for seed in made.seeds[1:]:
        for arm in made.arms:
            if seed in made.seeds_of(arm):
                yield from _missing(made, _at_best(made, arm, [seed], results), results)


def _at_best(made: Table, arm: Arm, seeds: Sequence[int], results: Results) -> list[Trial]:
    """Return the arm's trials at its best learning rate; none while it is unknown."""
    sweep = swept(made, arm, results)
    best = chosen(sweep, results)
    if best is None or any(results.fit(trial) is None for trial in sweep):
        return []
    return [made.trial(arm, best.rate, seed) for seed in seeds]


def _missing(made: Table, trials: Sequence[Trial], results: Results, tested: bool = True) -> Iterator[Work]:
    for trial in trials:
        if results.fit(trial) is None:
            yield Work(trial)
        elif tested and made.test is not None and results.test(trial, made.test) is None:
            yield Work(trial, test=True)


def left(made: Table, results: Results) -> tuple[int, int]:
    """Count the missing trainings and tests."""
    sweeps = [trial for arm in made.arms for trial in swept(made, arm, results)]
    best = [trial for arm in made.arms for trial in _at_best(made, arm, made.seeds_of(arm), results)]
    others = [trial for trial in best if trial.seed != made.seeds[0]]
    trained = sum(results.fit(trial) is not None for trial in sweeps + others)
    tested = sum(results.test(trial, made.test) is not None for trial in best)
    rows = sum(len(made.seeds_of(arm)) for arm in made.arms)
    return len(sweeps) + rows - len(made.arms) - trained, (rows - tested if made.test is not None else 0)


def in_words(counts: tuple[int, int]) -> str:
    """Describe numbers of trainings and tests."""
    named = [(count, what) for count, what in zip(counts, ("training", "test"), strict=True) if count]
    return " and ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in named) or "nothing"


# ---- doing it


class Runner:
    """Trains and tests the trials of one table.

    Args:
        root: Folder of the runs.
        say: Prints a line.
    """

    bench: ClassVar[str] = "quality"

    def __init__(self, made: Table, results: Results, root: Path, say: Callable[[str], None] = print) -> None:
        self.made, self.results, self.root, self.say = made, results, root, say
        self.failed: dict[str, str] = {}

    def run(self, minutes: float | None = None) -> None:
        """Do all missing work; begin nothing after `minutes`, and do not retry failures."""
        begun = time.monotonic()
        while self.open():
            if minutes is not None and time.monotonic() - begun >= minutes * 60:
                return
            if not self._do_one():
                time.sleep(WAIT)

    def open(self) -> list[Work]:
        """Return the work that can be done now and has not failed, in view of what other processes did."""
        self.results.read()
        return [one for one in self.work() if str(one) not in self.failed]

    def _do_one(self) -> bool:
        """Do one piece of work that no other process does; return false if there is none."""
        for one in self.open():
            with claim(self.claim_of(one)) as ours:
                if ours and one in self.open():
                    self._do(one)
                    return True
        return False

    def claim_of(self, one: Work) -> Path:
        """Return the lock file of a piece of work, the same for all tables."""
        return self.root / "claims" / f"{one.trial.identity(self.results.stack)[:16]}{'_test' if one.test else ''}"

    def _do(self, one: Work) -> None:
        self.say(f"{one} (left: {in_words(self.left())})")
        try:
            (self.test if one.test else self.train)(one.trial)
        except RuntimeError as error:
            self.failed[str(one)] = str(error)
            self.say(f"{one}: {error}")

    def work(self) -> Iterator[Work]:
        """Yield the missing work that can be done now."""
        return work(self.made, self.results)

    def left(self) -> tuple[int, int]:
        """Count the missing trainings and tests."""
        return left(self.made, self.results)

    def begun(self, trial: Trial) -> bool:
        """Return true if the scores before training, which all arms share, are known."""
        return (self.results.before(trial) or {}).keys() >= {SCORE, *self.made.also}

    def configured(self, trial: Trial) -> Config:
        """Return the configuration for `lit-sparse fit`: the trial's, and a callback that keeps the rows' losses."""
        given = trial.config["trainer"].get("callbacks", [])
        given = given if isinstance(given, list) else [given]
        kept = f"{RowScores.__module__}.{RowScores.__name__}"
        return merged(trial.config, {"trainer": {"callbacks": [*given, kept]}})

    def train(self, trial: Trial) -> None:
        """Train a trial and append its line; of a sweep only the best checkpoint is kept.

        Raises:
            RuntimeError: if the training gave no result; it says why.
        """
        begun, source = time.monotonic(), commit()
        folder = self._fit(trial)
        record, seconds = RunRecord.read(folder / "record.json"), time.monotonic() - begun
        line = fit_line(trial, record, self.results.stack, seconds, self.bench) | {"commit": source}
        if rows := rows_of(folder):
            line["rows"] = rows
        if self.made.race is not None:
            line |= race.measured(record, folder, trial.config)
        self.results.append(line)
        self.say(f"{trial.name}: held-out loss {score(line):.4f} in {seconds:.0f} s, {folder}")
        self._discard_beaten(trial)

    def test(self, trial: Trial) -> None:
        """Test a trial, append its line, and delete its checkpoint; a missing one is trained again first.

        Raises:
            RuntimeError: if there is no answer; it says why.
        """
        assert self.made.test is not None
        folder = self._checkpointed(trial)
        if folder is None:
            self.say(f"{trial.name}: trained again for its answers, since its checkpoint is gone")
            folder = self._fit(trial)
        begun = time.monotonic()
        scores = answers(trial, self.made.test, folder)
        record = RunRecord.read(folder / "record.json")
        about = {"kind": "test", **provenance("quality", record), "stack": self.results.stack, "arm": trial.arm.name}
        identity = {"identity": trial.identity(self.results.stack), "test": self.made.test}
        self.results.append({**about, **identity, "seconds": time.monotonic() - begun, "scores": scores})
        self._discard(trial)

    def _fit(self, trial: Trial) -> Path:
        """Train a trial; return its folder.

        Raises:
            RuntimeError: if it did not end well.
        """
        name, steps = self._name(trial), 0 if self.made.test is None else AT_THE_END
        file = written(self.root / f"{name}.yaml", self.configured(trial))
        scored = 0 if self.begun(trial) else -1
        command = [sys.executable, "-m", "lit_sparse", "fit", f"--config={file}", *QUIET, f"--run={name}"]
        place = [f"--trainer.default_root_dir={self.root}", f"--trainer.num_sanity_val_steps={scored}"]
        return fitted(self.root, Job(name, [*command, *place, f"--checkpoint_steps={steps}"], {}))

    def _name(self, trial: Trial) -> str:
        return f"{trial.arm.name}_{trial.identity(self.results.stack)[:8]}"

    def _checkpointed(self, trial: Trial) -> Path | None:
        """Return the folder with the trial's checkpoint, if it still exists."""
        made = [folder for folder in folders(self.root, self._name(trial)) if (folder / LAST).is_file()]
        return made[-1] if made else None

    def _discard_beaten(self, trial: Trial) -> None:
        self.results.read()  # other processes may have trained a better one, or be training one
        sweep = [one for one in swept(self.made, trial.arm, self.results) if self.results.fit(one) is not None]
        best = chosen(sweep, self.results)
        for beaten in sweep:
            if best is not None and beaten.rate != best.rate:
                self._discard(beaten)

    def _discard(self, trial: Trial) -> None:
        """Delete a trial's checkpoints, also of killed trainings: full fine-tuning's is three times the model."""
        for folder in folders(self.root, self._name(trial)):
            (folder / LAST).unlink(missing_ok=True)


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock `path` for a `with` block; give false if another process holds it. The lock ends with its process.

    Args:
        path: The lock file.
        wait: Wait until it is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def fitted(root: Path, job: Job) -> Path:
    """Run a job; return its folder.

    Raises:
        RuntimeError: if it did not end well.
    """
    folder = execute(job, root)
    record = RunRecord.read(folder / "record.json")
    if record.status != "ok":
        raise RuntimeError(f"{job.name} {record.status}: {record.reason}")
    return folder


def checkpointed(root: Path, job: Job) -> Path | None:
    """Return the folder of the newest run of exactly this job that has a checkpoint, if any."""
    done = [folder for folder in finished_runs(root, job) if (folder / LAST).is_file()]
    return done[-1] if done else None


def fit_line(trial: Trial, record: RunRecord, stack: Mapping[str, str], seconds: float, bench: str = "quality") -> Line:
    """Return the line of results of a training."""
    assert record.model is not None
    return {
        "kind": "fit",
        **provenance(bench, record),
        "stack": dict(stack),
        "identity": trial.identity(stack),
        "untrained": trial.untrained(stack),
        "arm": trial.arm.name,
        "lr": trial.rate,
        "seed": trial.seed,
        "steps": trial.config["trainer"]["max_steps"],
        "trainable": record.model.trainable,
        "trainable_share": record.model.trainable_share,
        "seconds": seconds,
        "before": record.outcome.get("before", {}),
        "after": record.outcome["after"],
        "step_seconds": None if record.throughput is None else record.throughput.median_step,
        "peak_resident": None if record.memory is None else record.memory.peak_resident,
        "config": trial.config,
    }


def answers(trial: Trial, test: Config, folder: Path) -> dict[str, float]:
    """Run `lit-sparse test` on the checkpoint in `folder`; return shares of right answers by kind of question.

    Raises:
        RuntimeError: if the test failed, or nothing was asked in it.
    """
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder), "name": ""}}
    logger["init_args"]["version"] = "test"
    config = merged(merged(trial.config, test), {"trainer": {"logger": logger, "enable_progress_bar": False}})
    file = written(folder / "test.yaml", config)
    command = [sys.executable, "-m", "lit_sparse", "test", f"--config={file}", f"--ckpt_path={folder / LAST}"]
    with (folder / "test.txt").open("wb") as log:
        end = parent_death_hook()
        run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end)
    if code := run.returncode:
        said = (folder / "test.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{'refused' if code == REFUSED else 'failed'}: {diagnose(code, said, None)[1]}")
    return accuracies(folder / "test" / "metrics.csv")


def accuracies(path: Path) -> dict[str, float]:
    """Read the columns `..._accuracy` of the last line of a CSV file.

    Raises:
        RuntimeError: if there is none.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = csv.DictReader(text.splitlines())
    found = {name: float(text) for line in lines for name, text in line.items() if name.endswith("_accuracy") and text}
    if not found:
        raise RuntimeError("the data have nothing to be answered; leave `test` out of the table.")
    return found


def written(path: Path, config: Config) -> Path:
    """Write the configuration to a YAML file; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def stack_of(workload: Config) -> dict[str, str]:
    """Return the stack that trials run on: kind of device, and versions."""
    cuda = torch.cuda.is_available() and workload["trainer"].get("accelerator", "auto") != "cpu"
    packages = {package: version(package) for package in ("torch", "lightning", "transformers", "peft")}
    return {"device": "cuda" if cuda else "cpu", **packages}


# ---- the command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    out.add_argument("table", help="name of a table in benchmarks/quality, or a YAML file")
    out.add_argument("--minutes", type=float, help="begin nothing after so many minutes; 0 only shows the table")
    out.add_argument(
        "--seeds", type=int, nargs="+", help="instead of the table's, for all arms; the first is the sweeps'"
    )
    out.add_argument("--steps", type=int, help="optimizer steps of each training, instead of the table's")
    out.add_argument("--workload", type=Path, help="YAML of model, data and trainer, instead of the table's")
    out.add_argument("--into", type=Path, default=Path("runs/quality"), help="folder of the runs")
    out.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    out.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return out


def show(made: Table, results: Results, markdown: bool) -> None:
    """Print the table as far as it is known."""
    if markdown:
        print(f"{notes(made, results)}\n\n{table(head(made), cells(made, results))}")
        return
    out = RichTable(*head(made), title=made.name)
    for row in cells(made, results):
        out.add_row(*row)
    console = Console()
    console.print(out)
    console.print(notes(made, results), markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the missing work of a table and show it; return the exit status, 1 if something failed, 2 for bad input."""
    asked = parser().parse_args(arguments)
    try:
        if asked.minutes is not None and not asked.minutes >= 0:
            raise BadInput(f"--minutes {asked.minutes} was asked for; give 0 or more.")
        made = read_table(asked.table, asked.workload, asked.steps, asked.seeds)
        if made.base is not None:
            with claim(asked.into / "claims" / made.base.path.name, wait=True):
                made.base.write()
        results = Results(asked.results, stack_of(made.workload))
        runner = Runner(made, results, asked.into)
        code = ended(runner, asked.minutes)
    except BadInput as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    show(made, results, asked.markdown)
    for name, reason in runner.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return code


def ended(runner: Runner, minutes: float | None) -> int:
    """Run the command; return the exit status."""
    code = 0
    try:
        runner.run(minutes)
    except KeyboardInterrupt:
        code = 130
    if any(missing := runner.left()):
        print(f"{in_words(missing)} left; the same command goes on with them.", file=sys.stderr)
    return code or int(bool(runner.failed))


if __name__ == "__main__":
    sys.exit(main())
