"""Score runs with what they trained scaled: `python -m benchmarks.rewinding`.

A run is rewound to a scale between 0, its base, and 1, its end: each weight becomes the base's plus so many times what
training changed of it, as `lit-sparse export --scale` has it. The runs are those of rewinding/study.yaml, seed by seed;
each line is appended to benchmarks/results/rewinding.jsonl at once, and nothing that has a line is made again.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.measurements import Line, caption, table
from benchmarks.pairing import SCORE, Interval, difference
from benchmarks.provenance import ROOT, provenance
from benchmarks.quality import Runner, Work, ended, stack_of
from benchmarks.ranking import TEXT, Results, belonging, mean_spread, newest_first, unlike_rows
from benchmarks.row_scores import TokensByRow, described
from benchmarks.trials import Arm, Table, Trial, read_table
from lit_sparse.data import TokenData
from lit_sparse.errors import BadInput
from lit_sparse.export.merge import Merge
from lit_sparse.modules import CausalLM
from lit_sparse_profiling.record import RunRecord

COMMAND = "python -m benchmarks.rewinding"
STUDY = Path(__file__).parent / "rewinding" / "study.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "rewinding.jsonl"
SCALES = (0.5, 0.7, 0.85)
"""Scales that a run is scored at, beside its end."""
END = 1.0
FIGURE = "![Held-out loss over text loss, from the base to the end](../../benchmarks/figures/rewinding.svg)"
HEAD = ["arm", "scale", "held-out loss", "text loss", "held-out, beside the end", "text, beside the end", "seeds"]


# ---- measuring


class Rewinder(Runner):
    """Trains the runs of a table of one learning rate an arm, and scores each at all scales."""

    bench: ClassVar[str] = "rewinding"

    def work(self) -> Iterator[Work]:
        for trial in trials_of(self.made):
            if self.results.fit(trial) is None:
                yield Work(trial)
            elif missing(trial, self.results):
                yield Work(trial, test=True)

    def left(self) -> tuple[int, int]:
        trials = trials_of(self.made)
        unscored = sum(bool(missing(trial, self.results)) for trial in trials)
        return sum(self.results.fit(trial) is None for trial in trials), unscored

    def test(self, trial: Trial) -> None:
        """Score a run at the scales that are missing, append their lines, and delete its checkpoint.

        Raises:
            RuntimeError: if the run is trained again for it, and does not end well.
        """
        folder = self._checkpointed(trial) or self._fit(trial)
        record = RunRecord.read(folder / "record.json")
        about = {"kind": "test", **provenance(self.bench, record), "stack": self.results.stack}
        about |= {"identity": trial.identity(self.results.stack), "arm": trial.arm.name, "seed": trial.seed}
        rewound = Rewound(folder)
        for scale in missing(trial, self.results):
            begun = time.monotonic()
            rows = rewound.scores(scale)
            seconds = {"seconds": time.monotonic() - begun}
            self.results.append({**about, **seconds, "test": {"scale": scale}, "after": losses(rows), "rows": rows})
            self.say(f"{trial.name}, scale {scale:g}: {losses(rows)}")
        self._discard(trial)


class Rewound:
    """A run at its end, whose changes can be scaled.

    Args:
        folder: The run's folder, with a checkpoint.

    Raises:
        BadInput: if the run cannot be merged into its base, or is of another task than a language model's.
    """

    def __init__(self, folder: Path) -> None:
        merge = Merge.of(folder)
        if not isinstance(merge.module, CausalLM):
            raise BadInput(f"{folder} is no run of a language model; give one of task CausalLM.")
        self.module, self.config = merge.module, merge.config
        parameters = dict(merge.model.named_parameters())
        # Copied: what `changes` yields as the run's value is the parameter itself, which is overwritten.
        self.changes = [(parameters[name], before, after.clone()) for name, before, after in merge.changes()]
        self.data = data_of(merge.config)

    @torch.no_grad()
    def scores(self, scale: float) -> dict[str, dict[str, Any]]:
        """Return what `RowScores` keeps of each validation set, with all changes scaled."""
        for parameter, before, after in self.changes:
            parameter.copy_(torch.lerp(before, after, scale))
        limit = self.config["trainer"].get("limit_val_batches")
        batches = limit if isinstance(limit, int) else None  # a share means all: tables have whole numbers
        loaders = zip(self.data.val_names, self.data.val_dataloader(), strict=True)
        return {name: scored(self.module, islice(loader, batches)) for name, loader in loaders}


def scored(module: CausalLM, batches: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows' losses of some batches, and the hash of the rows."""
    kept, found = TokensByRow(), hashlib.sha256()
    for batch in batches:
        kept.update(*module.scores(batch), batch["labels"])
        for row in described(batch):
            found.update(row.encode())
    return {"of": found.hexdigest()[:16], **kept.by_row()}


def data_of(config: Mapping[str, Any]) -> TokenData:
    """Return the data of a run, set up."""
    module, _, kind = config["data"]["class_path"].rpartition(".")
    data = getattr(import_module(module), kind)(**{"tokenizer": config["model"]["base"], **config["data"]["init_args"]})
    data.prepare_data()
    data.setup("fit")
    return data


def losses(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the loss of each set in nats a token."""
    return {f"{name}_loss": sum(one["nll"]) / sum(one["tokens"]) for name, one in rows.items()}


def trials_of(made: Table) -> list[Trial]:
    """Return the trials, seed by seed, each arm at its one learning rate.

    Raises:
        BadInput: if an arm has several.
    """
    if several := [arm.name for arm in made.arms if len(arm.rates) > 1]:
        raise BadInput(f"{made.name}: {several[0]} has several learning rates; runs that are rewound have one.")
    return [made.trial(arm, arm.rates[0], seed) for seed in made.seeds for arm in made.arms]


def missing(trial: Trial, results: Results) -> list[float]:
    """Return the scales that a run was not scored at."""
    return [scale for scale in SCALES if results.test(trial, {"scale": scale}) is None]


# ---- the table


def at_scale(made: Table, arm: Arm, scale: float, results: Results) -> list[Line]:
    """Return the lines of an arm at a scale, one a seed."""
    trials = [trial for trial in trials_of(made) if trial.arm == arm]
    lines = [results.fit(one) if scale == END else results.test(one, {"scale": scale}) for one in trials]
    return [line for line in lines if line is not None]


def cells(made: Table, results: Results) -> list[list[str]]:
    """Return the table's rows: each arm at each scale, its end last."""
    return [row(made, arm, scale, results) for arm in made.arms for scale in (*SCALES, END)]


def row(made: Table, arm: Arm, scale: float, results: Results) -> list[str]:
    lines, end = at_scale(made, arm, scale, results), at_scale(made, arm, END, results)
    beside = ["-" if scale == END else str(difference(lines, end, name) or "-") for name in (SCORE, TEXT)]
    means = [mean_spread([float(line["after"][name]) for line in lines]) for name in (SCORE, TEXT)]
    return [arm.name, f"{scale:g}", *means, *beside, str(len(lines))]


def beside_end(name: str, scale: float, path: Path) -> tuple[dict[str, Interval], Table, list[Line]]:
    """Return how much higher an arm's losses are at a scale than at its end, the table, and the lines at the end.

    Raises:
        LookupError: if not every seed was scored, or one diverged; it says which.
    """
    made = read_table(str(STUDY))
    arm = next(arm for arm in made.arms if arm.name == name)
    begun = False
    for results in newest_first(path):
        ours, end = (at_scale(made, arm, one, results) for one in (scale, END))
        begun |= bool(ours)
        if min(len(ours), len(end)) < len(made.seeds):
            continue
        gaps = {loss: gap for loss in (SCORE, TEXT) if (gap := difference(ours, end, loss)) is not None}
        if len(gaps) < 2:
            raise LookupError(f"{name} diverged, or has no {TEXT}")
        return gaps, made, end
    raise LookupError(f"measured in part: `{COMMAND}` goes on" if begun else f"not measured yet: `{COMMAND}`")


def published(path: Path) -> str:
    """Return the table for docs/, of the newest stack that it was measured on, or how far it is.

    No number is shown before every arm has two seeds at all scales.

    Raises:
        BadInput: if runs were scored on unlike rows.
    """
    made, begun = read_table(str(STUDY)), 0
    for results in newest_first(path):
        lines = [*belonging(made, results), *results.tests.values()]
        begun = begun or len(lines)
        if not enough(made, results):
            continue
        if unlike := unlike_rows(lines):
            raise BadInput(f"{path}: runs were scored on unlike rows of {unlike[0]}; delete the older lines.")
        text = f"{caption(COMMAND, lines)}\n\n{about(made, results)}\n\n{table(HEAD, cells(made, results))}"
        return f"{text}\n\n{FIGURE}" if (path.parent.parent / "figures" / "rewinding.svg").exists() else text
    if begun:
        asked = len(trials_of(made)) * (1 + len(SCALES))
        return f"Under way: {begun} of {asked} scores are made; `{COMMAND}` goes on."
    return f"Not measured yet: `{COMMAND}` measures this table."


def enough(made: Table, results: Results) -> bool:
    """Return true if every arm has two seeds at all scales."""
    return all(len(at_scale(made, arm, scale, results)) > 1 for arm in made.arms for scale in (*SCALES, END))


def curves(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Return scale, mean held-out loss and mean text loss of each arm from base to end; {} before they are shown."""
    made = read_table(str(STUDY))
    for results in newest_first(path):
        if enough(made, results):
            return {arm.name: curve(made, arm, results) for arm in made.arms}
    return {}


def curve(made: Table, arm: Arm, results: Results) -> list[tuple[float, float, float]]:
    """Return the points of an arm, its base first, if that was scored."""
    at = {scale: [line["after"] for line in at_scale(made, arm, scale, results)] for scale in (*SCALES, END)}
    base = [results.before(trial) for trial in trials_of(made) if trial.arm == arm]
    scores = {0.0: [one for one in base if one is not None], **at}
    return [(scale, mean(found, SCORE), mean(found, TEXT)) for scale, found in scores.items() if found]


def mean(found: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the mean of an outcome."""
    return statistics.fmean(float(one[name]) for one in found)


def about(made: Table, results: Results) -> str:
    """Return the note on the table."""
    line = at_scale(made, made.arms[0], END, results)[0]
    counts = {name: (len(one["tokens"]), sum(one["tokens"])) for name, one in line["rows"].items()}
    told = " and ".join(f"{rows} rows of {name} ({tokens:,} tokens)" for name, (rows, tokens) in counts.items())
    return (
        f"{made.title} Model {made.workload['model'].get('base', 'demo')}, {made.steps} steps of "
        f"{made.workload['data']['init_args']['batch_size']} rows, scored on {told}. Each weight is the base's plus "
        "`scale` times what the run changed of it. Mean ± standard deviation over seeds; beside the end: the "
        "difference to the run itself (scale 1), paired over seeds and rows, with its interval of 95 %."
    )


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing and show the table; return the exit status, 1 if something failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--minutes", type=float, help="begin nothing after so many minutes; 0 only shows the table")
    parser.add_argument("--study", type=Path, default=STUDY, help="YAML of the runs (default: those that come with it)")
    parser.add_argument("--into", type=Path, default=Path("runs/rewinding"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    try:
        made = read_table(str(asked.study))
        runner = Rewinder(made, Results(asked.results, stack_of(made.workload)), asked.into)
        code = ended(runner, asked.minutes)
    except BadInput as error:
        print(f"rewinding: {error}", file=sys.stderr)
        return 2
    print(table(HEAD, cells(made, runner.results)))
    for name, reason in runner.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
