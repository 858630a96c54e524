"""Measure what a domain fit forgets with penalties against it: domain gain against general loss, and the costs.

`python -m benchmarks.forgetting_study` makes the first phase once (LoRA on general text with RecordImportance, and the
Fisher at its end), then each method's trials on a domain, all from that one checkpoint. The learning rate is swept at
one strength of each method, by held-out domain loss, and every strength is trained with each seed at the rate chosen; a
method without a strength is trained at every rate. Then it measures what recording and penalties cost
(benchmarks/recording.py).
Each line is appended to benchmarks/results/forgetting.jsonl at once, and nothing that has a line is made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.curves import STUDY, Phase, Study, belonging, left, read_study, work
from benchmarks.provenance import ROOT, provenance
from benchmarks.quality import AT_THE_END, QUIET, Runner, Work, checkpointed, claim, fitted, in_words, stack_of, written
from benchmarks.ranking import SCORE, Results
from benchmarks.recording import measure_costs
from benchmarks.tradeoff import shown
from benchmarks.trials import Config, Trial, filled
from lit_sparse import demo
from lit_sparse.callbacks.forgetting import Forgetting, Trained, rows_of, untrained
from lit_sparse.data import sources
from lit_sparse.errors import BadInput
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.runner import Job

RESULTS = ROOT / "benchmarks" / "results" / "forgetting.jsonl"
PARTS = ("trials", "cost")
TEXT = "${text}"
"""Placeholder of the file of general text in a phase's data."""


# ---- general text


def write_text(study: Study, into: Path) -> Path:
    """Write the file of general text for the first phase, without rows that are scored.

    Raises:
        BadInput: if there are too few rows.
    """
    scored = scored_rows(study.table.workload)
    rows = {mark: row for row in rows_of(study.text, "text") if (mark := sources.row_digest(row)) not in scored}
    if len(rows) < study.text_rows:
        raise BadInput(
            f"{study.text} has {len(rows)} rows that are not scored, and the first phase is to see {study.text_rows}; "
            "give more text, or lower text_rows."
        )
    into.mkdir(parents=True, exist_ok=True)
    path, kept = into / "general.jsonl", [rows[mark] for mark in sorted(rows)[: study.text_rows]]
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps(row.data) + "\n" for row in kept), encoding="utf-8")
    return partial.replace(path)  # atomic: another process may be reading it


def scored_rows(workload: Config) -> set[str]:
    """Return hashes of the general text that trials score, by Forgetting or with the demo's held-out rows.

    Raises:
        BadInput: if they score none.
    """
    callbacks = [one for one in workload["trainer"].get("callbacks", []) if one["class_path"].endswith("Forgetting")]
    if not callbacks:
        raise BadInput(
            "the workload has no lit_sparse.callbacks.Forgetting among trainer.callbacks; add it, to see what is "
            "forgotten."
        )
    own = callbacks[0].get("init_args", {})
    callback = Forgetting(**own)
    heldout = workload["data"].get("init_args", {}).get("heldout")
    if heldout is None:
        raise BadInput("the workload has no data.init_args.heldout; write it: so many passages may be scored.")
    count = max(callback.rows, heldout)
    rows = untrained(rows_of(callback.text, "text"), Trained(callback.exclude), count, callback.text)
    return {sources.row_digest(row) for row in rows}


# ---- doing it


class StudyRunner(Runner):
    """Makes the first phase and the trials of a study."""

    bench: ClassVar[str] = "forgetting"

    def __init__(self, study: Study, results: Results, root: Path) -> None:
        super().__init__(study.table, results, root)
        self.study, self.folders = study, dict[str, str]()

    def work(self) -> Iterator[Work]:
        return work(self.study, self.results)

    def left(self) -> tuple[int, int]:
        return left(self.study, self.results), 0

    def begun(self, trial: Trial) -> bool:
        lines = belonging(self.study, self.results)
        return any(line["seed"] == trial.seed and SCORE in line["before"] for line in lines)

    def configured(self, trial: Trial) -> Config:
        return filled(super().configured(trial), self.folders)

    def run(self, minutes: float | None = None) -> None:
        """Run as for a table, after the first phase, which is made if missing.

        Raises:
            RuntimeError: if the first phase failed.
        """
        begun = time.monotonic()
        if not any(self.left()) or minutes == 0:
            return
        self.made_phases()
        super().run(None if minutes is None else max(0.0, minutes - (time.monotonic() - begun) / 60))

    def made_phases(self) -> Mapping[str, str]:
        """Make the missing phases; return the paths of text and phases by placeholder.

        Raises:
            RuntimeError: if one failed.
        """
        if self.folders:
            return self.folders
        self.folders[TEXT] = str(write_text(self.study, self.root))
        for phase in self.study.phases:
            with claim(self.root / "claims" / phase.name, wait=True):
                self.folders[phase.stands] = str(self.made_phase(phase))
        return self.folders

    def made_phase(self, phase: Phase) -> Path:
        """Return the folder of a phase; make it if there is none with a checkpoint.

        Raises:
            RuntimeError: if it failed.
        """
        name = f"{phase.name}_{hashlib.sha256(phase.stands.encode()).hexdigest()[:8]}"
        file = written(self.root / f"{name}.yaml", filled(phase.config, self.folders))
        command = [sys.executable, "-m", "lit_sparse", "fit", f"--config={file}", *QUIET, f"--run={name}"]
        place = [f"--trainer.default_root_dir={self.root}", f"--checkpoint_steps={AT_THE_END}"]
        job = Job(name, [*command, *place], {"phase": phase.stands, **self.results.stack})
        if (done := checkpointed(self.root, job)) is not None:
            return done
        self.say(f"first phase: {phase.name}")
        begun, folder = time.monotonic(), fitted(self.root, job)
        record = RunRecord.read(folder / "record.json")
        self.results.append(phase_line(phase, record, self.results.stack, time.monotonic() - begun))
        return folder


def phase_line(phase: Phase, record: RunRecord, stack: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Return the line of results of a phase: seconds, and scores if it has some."""
    about = {"kind": "phase", **provenance("forgetting", record), "stack": dict(stack), "identity": phase.stands}
    scores = {when: record.outcome.get(when, {}) for when in ("before", "after")}
    return {**about, "phase": phase.name, "seconds": seconds, **scores}


# ---- the command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.forgetting_study", description=__doc__)
    out.add_argument("--only", choices=PARTS, help="measure one part (default: both)")
    out.add_argument(
        "--study", type=Path, default=STUDY, help="YAML of the study (default: the one that comes with it)"
    )
    out.add_argument("--text", default=demo.DEMO, help="data file with general text, in rows `text` (default: demo)")
    out.add_argument("--minutes", type=float, help="begin no trial after so many minutes; 0 only shows the tables")
    out.add_argument("--seeds", type=int, nargs="+", help="instead of the study's; the first is the sweeps'")
    out.add_argument("--samples", type=int, default=16, help="samples that each Fisher is timed on (default 16)")
    out.add_argument(
        "--rounds", type=int, default=12, help="timed steps with and without a recorder or penalty (default 12)"
    )
    out.add_argument("--into", type=Path, default=Path("runs/forgetting"), help="folder of the runs")
    out.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing and show it; return the exit status, 1 if something failed, 2 for bad input."""
    asked = parser().parse_args(arguments)
    try:
        return measured(asked)
    except BadInput as error:
        print(f"forgetting: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"forgetting: {error}", file=sys.stderr)
        return 1


def measured(asked: argparse.Namespace) -> int:
    """Do what is missing and print the tables; the exit status."""
    if asked.minutes is not None and not asked.minutes >= 0:
        raise BadInput(f"--minutes {asked.minutes} was asked for; give 0 or more.")
    if asked.samples < 1 or asked.rounds < 1:
        raise BadInput(f"--samples {asked.samples} and --rounds {asked.rounds} were asked for; give 1 or more.")
    study = read_study(asked.study, asked.text, asked.seeds)
    results = Results(asked.results, stack_of(study.table.workload))
    runner = StudyRunner(study, results, asked.into)
    try:
        if asked.only != "cost":
            runner.run(asked.minutes)
        if asked.only != "trials" and asked.minutes != 0:
            sizes = {"rounds": asked.rounds, "samples": asked.samples}
            with claim(asked.into / "claims" / "cost", wait=True):
                results.read()
                measure_costs(study, results, runner.made_phases, asked.into, sizes)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on.", file=sys.stderr)
        return 130
    print(shown(study, results))
    if any(runner.left()):
        print(f"{in_words(runner.left())} left; the same command goes on with them.", file=sys.stderr)
    for name, reason in runner.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return int(bool(runner.failed))


if __name__ == "__main__":
    sys.exit(main())
