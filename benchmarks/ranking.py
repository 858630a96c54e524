"""Read the results of quality trials, and make their tables: means, spread, ties, and what is missing."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import race
from benchmarks.measurements import Line, caption, parsed, table
from benchmarks.pairing import SCORE, Interval, difference
from benchmarks.power import power_of
from benchmarks.trials import Arm, Config, Table, Trial, read_table
from lit_sparse.errors import BadInput
from lit_sparse_profiling.documents import spell_nonfinite

TEXT = "text_loss"
"""The score that shows forgetting."""
UNEQUAL = 0.03
"""Relative difference from which on numbers of trained weights are not equal."""
ENOUGH = 3
"""Seeds of a complete row."""
DROPPING = ("Embedded", "Instructions")
"""Data modules that drop rows of too many tokens, held-out ones too."""
OURS = {"kind", "stack", "identity", "seconds"}
HEAD = ["arm", "group", "trained weights", "learning rate", "held-out loss", "text loss"]
COSTS = ("peak resident, GiB", "step, s")
TAIL = ["beside the best [95 %]", "right answers", "seeds", ""]


class Results:
    """The lines of a file of results that belong to one stack: device kind and versions.

    Raises:
        BadInput: if a line is no measurement.
    """

    def __init__(self, path: Path, stack: Mapping[str, str]) -> None:
        self.path, self.stack = path, dict(stack)
        self.read()

    def read(self) -> None:
        """Read the file again: other processes append to it too.

        Raises:
            BadInput: as above.
        """
        self.fits: dict[str, Line] = {}
        self.tests: dict[tuple[str, str], Line] = {}
        self.untrained: dict[str, dict[str, float]] = {}
        self.others: list[Line] = []  # neither trainings nor tests
        for line in read_results(self.path):
            self._take(line)

    def _take(self, line: Line) -> None:
        if line["stack"] != self.stack:
            return
        if line["kind"] == "test":
            self.tests[line["identity"], key(line["test"])] = line
        elif line["kind"] == "fit":
            self._take_fit(line)
        else:
            self.others.append(line)

    def _take_fit(self, line: Line) -> None:
        self.fits[line["identity"]] = line
        if line["before"]:
            self.untrained[line["untrained"]] = self.untrained.get(line["untrained"], {}) | line["before"]

    def append(self, line: Line) -> None:
        """Append a line, and flush it to disk at once."""
        text = json.dumps(spell_nonfinite(line), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - 1, 0))
            cut = file.read(1) not in (b"", b"\n")  # by a full disk
            file.write(("\n" * cut + text + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self._take(json.loads(text))

    def fit(self, trial: Trial) -> Line | None:
        """Return the line of its training, if any."""
        return self.fits.get(trial.identity(self.stack))

    def test(self, trial: Trial, test: Config | None) -> Line | None:
        """Return the line of its test, if any."""
        return None if test is None else self.tests.get((trial.identity(self.stack), key(test)))

    def before(self, trial: Trial) -> dict[str, float] | None:
        """Return the scores of its untrained base, if a trial of the same base and data has them."""
        return self.untrained.get(trial.untrained(self.stack))


def key(value: Any) -> str:
    """Return a JSON value as a string, the same for equal values."""
    return json.dumps(value, sort_keys=True)


def read_results(path: Path) -> list[Line]:
    """Read the lines of a file; none if it does not exist.

    Raises:
        BadInput: if one is no measurement of ours.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # another process may be writing the last line
    try:
        lines = [(n, parsed(line, f"{path}:{n}")) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except ValueError as error:
        raise BadInput(str(error)) from error
    for n, line in lines:
        if absent := sorted(OURS - line.keys()):
            raise BadInput(f"{path}:{n} is no measurement of quality, it has no {absent[0]}; correct or delete it.")
    return [line for _, line in lines]


def newest_first(path: Path) -> Iterator[Results]:
    """Yield the results of each stack in the file, that of the newest line first."""
    lines = sorted(read_results(path), key=lambda line: line["date"])
    for stack in {key(line["stack"]): line["stack"] for line in reversed(lines)}.values():
        yield Results(path, stack)


def score(line: Line) -> float:
    """Return the held-out loss after training; infinity if it is not finite."""
    value = float(line["after"][SCORE])
    return value if math.isfinite(value) else math.inf


def chosen(sweep: Sequence[Trial], results: Results) -> Trial | None:
    """Return the trial of the sweep with the lowest held-out loss so far; None if there is none yet."""
    scored = [(score(line), trial.rate, trial) for trial in sweep if (line := results.fit(trial)) is not None]
    return min(scored, key=lambda one: one[:2])[2] if scored else None


def swept(made: Table, arm: Arm, results: Results) -> list[Trial]:
    """Return the trials that choose an arm's learning rate: its sweep, gone on with while the best is at an end of it.

    It goes on at most `made.widen` times, by the factor of the last two rates, once all of its trials are known.
    """
    rates = list(arm.rates)
    for _ in range(made.widen):
        trials = [made.trial(arm, rate, made.seeds[0]) for rate in rates]
        best = chosen(trials, results)
        if best is None or any(results.fit(trial) is None for trial in trials):
            break
        rates = beyond(rates, end_of(best.rate, rates))
    return [made.trial(arm, rate, made.seeds[0]) for rate in rates]


def beyond(rates: list[float], end: str) -> list[float]:
    """Return rates (lowest first) with one more beyond an end, or unchanged if `end` is neither."""
    if end == "lowest":
        return [float(f"{rates[0] ** 2 / rates[1]:.2g}"), *rates]
    if end == "highest":
        return [*rates, float(f"{rates[-1] ** 2 / rates[-2]:.2g}")]
    return rates


# ---- rows


@dataclass
class Row:
    """The results of one arm.

    Attributes:
        best: The best trial of the sweep; None if nothing was trained.
        rates: The learning rates of the sweep, lowest first.
        swept: True if all of them were tried.
        fits: Its trainings at the best rate, one a seed.
        tests: Its tests at that rate.
        beside: How much higher its loss is than that of the best arm of its group; None for that one, and where the two
            cannot be compared.
        remarks: Remarks for the table.
    """

    arm: Arm
    best: Trial | None
    rates: tuple[float, ...]
    swept: bool
    fits: list[Line]
    tests: list[Line]
    beside: Interval | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Held-out losses, one a seed."""
        return [score(line) for line in self.fits]

    @property
    def trained(self) -> int:
        """Trained weights."""
        return self.fits[0]["trainable"]

    @property
    def end(self) -> str:
        """ "lowest", "highest" or "only" if the best rate is an end of a whole sweep, or else ""."""
        return end_of(self.best.rate, self.rates) if self.best is not None and self.swept else ""


def rows(made: Table, results: Results) -> list[Row]:
    """Return a row for each arm, with remarks."""
    out = [row_of(made, arm, results) for arm in made.arms]
    for group in dict.fromkeys(row.arm.group for row in out if row.arm.group is not None):
        judge([row for row in out if row.arm.group == group and row.fits])
    for row in out:
        row.remarks += missing(made, row)
    return out


def row_of(made: Table, arm: Arm, results: Results) -> Row:
    sweep = swept(made, arm, results)
    best, rates = chosen(sweep, results), tuple(trial.rate for trial in sweep)
    if best is None:
        return Row(arm, None, rates, False, [], [])
    trials = [made.trial(arm, best.rate, seed) for seed in made.seeds_of(arm)]
    fits = [line for trial in trials if (line := results.fit(trial)) is not None]
    tests = [line for trial in trials if (line := results.test(trial, made.test)) is not None]
    return Row(arm, best, rates, all(results.fit(trial) is not None for trial in sweep), fits, tests)


def judge(group: Sequence[Row]) -> None:
    """Compare a group with its best row, and add remarks: best, tie, and another number of weights.

    A row ties with the best if the interval of their difference contains 0.
    """
    if not group:
        return
    best = best_of(group)
    for row in group:
        row.beside = None if row is best else difference(row.fits, best.fits)
        if row is best and len(group) > 1:
            row.remarks.append("best")
        elif row.beside is not None and row.beside.tie:
            row.remarks.append("tie")
        if abs(row.trained / group[0].trained - 1) > UNEQUAL:
            row.remarks.append(f"unequal: {row.trained / group[0].trained - 1:+.1%} weights beside {group[0].arm.name}")


def best_of(group: Sequence[Row]) -> Row:
    """Return the row with the lowest mean loss, over the seeds that all rows of the group have.

    Rows with more seeds may tell that another one is lower: then it is that one.
    """
    losses = {row.arm.name: {line["seed"]: score(line) for line in row.fits} for row in group}
    shared = set.intersection(*(set(of) for of in losses.values()))

    def mean(row: Row) -> float:
        own = losses[row.arm.name]
        return statistics.fmean(own[seed] for seed in shared or own)

    best = min(group, key=mean)
    for _ in group:
        gaps = [(difference(row.fits, best.fits), row) for row in group if row is not best]
        lower = [(gap.difference, row) for gap, row in gaps if gap is not None and gap.high < 0]
        if not lower:
            break
        best = min(lower, key=lambda one: one[0])[1]
    return best


def missing(made: Table, row: Row) -> Iterator[str]:
    """Yield remarks on what the row lacks."""
    if not row.fits:
        yield "not measured"
        return
    if not row.swept:
        yield "incomplete: not all learning rates were tried"
    if unlike := unlike_rows(row.fits):
        yield f"its seeds were scored on unlike rows of {unlike[0]}"
    if len(row.fits) < (wanted := max(ENOUGH, len(made.seeds_of(row.arm)))):
        yield f"incomplete: {len(row.fits)} of {wanted} seeds"


def unlike_rows(lines: Sequence[Line]) -> list[str]:
    """Return the sets of rows that are not the same in all lines that keep them."""
    hashes: dict[str, set[str]] = {}
    for line in lines:
        for name, kept in line.get("rows", {}).items():
            hashes.setdefault(name, set()).add(kept["of"])
    return [name for name, found in hashes.items() if len(found) > 1]


# ---- beside one arm


def comparison(made: Table, results: Results) -> Iterator[str]:
    """Yield a sentence for each of `reduce`: how each arm differs from `against`, and at which quality."""
    if made.against is None:
        return
    found = {row.arm.name: row for row in rows(made, results)}
    base = found.pop(made.against)
    for name in made.reduce:
        told = "; ".join(f"{arm} {beside(base, row, name)}" for arm, row in found.items())
        yield f"{in_words(name).capitalize()} beside {made.against}: {told}."
    yield f"In brackets: how much higher the held-out loss is than {made.against}'s, and the interval of 95 %."


def beside(base: Row, row: Row, name: str) -> str:
    """Describe the relative change of an outcome's mean from `base` to `row`, and compare their quality."""
    theirs, ours = (outcomes(one.fits, name) for one in (base, row))
    worse = difference(row.fits, base.fits)
    if min(len(theirs), len(ours)) < ENOUGH or worse is None or not all(map(math.isfinite, [*theirs, *ours])):
        return f"not judged ({ENOUGH} seeds of both are needed)"
    quality = "a quality that is not told apart" if worse.tie else f"{'better' if worse.high < 0 else 'worse'} quality"
    return f"{statistics.fmean(ours) / statistics.fmean(theirs) - 1:+.1%} at {quality} ({worse})"


# ---- the table


def head(made: Table) -> list[str]:
    """Return the table's columns."""
    return [*HEAD, *map(in_words, made.also), *(race.HEAD if made.race else ()), *(COSTS if made.costs else ()), *TAIL]


def in_words(name: str) -> str:
    """Return the name of an outcome, for readers."""
    return name.replace("_", " ")


def cells(made: Table, results: Results) -> list[list[str]]:
    """Return the table's rows as strings, the untrained base first."""
    of_seeds = [results.before(made.trial(made.arms[0], made.arms[0].rates[0], seed)) or {} for seed in made.seeds]
    scores = [mean_spread([float(one[name]) for one in of_seeds if name in one]) for name in (SCORE, TEXT, *made.also)]
    found = rows(made, results)
    extra: list[list[str]] = [[] for _ in found]
    if made.race is not None:
        steps = race.steps_of(made.race, fits_of(found), start(made, results))
        extra = [race.cells(row.fits, steps[row.arm.name]) for row in found]
    if made.costs:
        extra = [[*more, *costs(row.fits)] for row, more in zip(found, extra, strict=True)]
    arms = [row_cells(row, made.also, more) for row, more in zip(found, extra, strict=True)]
    blank = ["-"] * (len(head(made)) - len(HEAD) - len(made.also) - len(TAIL))
    return [["untrained", "", "0", "-", *scores, *blank, "-", "-", "-", ""], *arms]


def costs(fits: Sequence[Line]) -> list[str]:
    """Format the peak memory of an arm's trainings and the median of their steps, where they are recorded."""
    peaks, steps = (
        [line[name] for line in fits if line.get(name) is not None] for name in ("peak_resident", "step_seconds")
    )
    return [f"{max(peaks) / 2**30:.2f}" if peaks else "-", f"{statistics.median(steps):.2f}" if steps else "-"]


def fits_of(found: Sequence[Row]) -> dict[str, list[Line]]:
    """Return the trainings of each arm at its best learning rate."""
    return {row.arm.name: row.fits for row in found}


def start(made: Table, results: Results) -> float:
    """Return the mean held-out loss of the untrained base; NaN if it is unknown."""
    before = [results.before(made.trial(made.arms[0], made.arms[0].rates[0], seed)) for seed in made.seeds]
    losses = [float(one[SCORE]) for one in before if one and SCORE in one]
    return statistics.fmean(losses) if losses else math.nan


def row_cells(row: Row, also: Sequence[str], extra: Sequence[str]) -> list[str]:
    named = [row.arm.name, row.arm.group or "reference"]
    if row.best is None:
        return [*named, *["-"] * (6 + len(also) + len(extra)), "0", "; ".join(row.remarks)]
    return [
        *named,
        f"{row.trained:,} ({row.fits[0]['trainable_share']:.2%})",
        rate(row),
        mean_spread(row.losses),
        *(mean_spread(outcomes(row.fits, name)) for name in (TEXT, *also)),
        *extra,
        "-" if row.beside is None else str(row.beside),
        right_answers(row.tests),
        str(len(row.fits)),
        "; ".join(row.remarks),
    ]


def outcomes(fits: Sequence[Line], name: str) -> list[float]:
    """Return an outcome after training, of the fits that have it."""
    return [float(line["after"][name]) for line in fits if name in line["after"]]


def rate(row: Row) -> str:
    """Format the learning rate, and tell if it is an end of the sweep: a better one may lie beyond."""
    assert row.best is not None
    told = {"only": " (not swept)", "": ""}.get(row.end, f" ({row.end} tried)")
    return f"{row.best.rate:g}{told}"


def end_of(rate: float, rates: Sequence[float]) -> str:
    """Return "lowest", "highest" or "only" if `rate` is an end of `rates` (lowest first), or else ""."""
    if len(rates) == 1:
        return "only"
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(rate, "")


def right_answers(tests: Sequence[Line]) -> str:
    """Format the shares of right answers for each kind of question."""
    kinds = sorted({name for line in tests for name in line["scores"]})
    shares = [mean_spread([line["scores"][kind] for line in tests if kind in line["scores"]], "%") for kind in kinds]
    named = [f"{share} of {kind.removesuffix('_accuracy')}" for share, kind in zip(shares, kinds, strict=True)]
    return "; ".join(named) or "-"


def mean_spread(values: Sequence[float], unit: Literal["", "%"] = "") -> str:
    """Format mean and standard deviation over seeds."""
    form = ".1%" if unit else ".4f"
    if not values:
        return "-"
    if len(values) == 1:
        return format(values[0], form)
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{statistics.fmean(values):{form}} ± {spread:{form}}"


def belonging(made: Table, results: Results) -> list[Line]:
    """Return the lines of all trials of the table, those of the whole sweeps included."""
    rates = {arm.name: [trial.rate for trial in swept(made, arm, results)] for arm in made.arms}
    trials = [made.trial(arm, rate, seed) for arm in made.arms for rate in rates[arm.name] for seed in made.seeds]
    lines = [results.fit(trial) for trial in trials] + [results.test(trial, made.test) for trial in trials]
    return [line for line in lines if line is not None]


def notes(made: Table, results: Results) -> str:
    """Return the notes on the table: what it can tell, how it was made and is read, and the comparison with one arm."""
    lines, found = belonging(made, results), rows(made, results)
    hours = sum(line["seconds"] for line in lines) / 3600
    machines = " and ".join(sorted({line["device"] for line in lines})) or "no machine yet"
    data = {"batch_size": 4, "heldout": "some", **made.workload["data"].get("init_args", {})}
    drops = (
        made.workload["data"]["class_path"].rpartition(".")[2] in DROPPING and data.get("overlong", "drop") == "drop"
    )
    short = f" (those of at most {data['max_length']} tokens are scored)" if drops and "max_length" in data else ""
    about = (
        f"{made.title} Model {made.workload['model'].get('base', 'demo')}, {made.steps} steps of {data['batch_size']} "
        f"rows, {data['heldout']} rows held out{short}, {hours:.1f} hours on {machines}. Mean ± standard deviation "
        f"over seeds; the learning rate has the lowest held-out loss with seed {made.seeds[0]}. Beside the best of a "
        "group: the difference on the same seeds, and rows where they are kept, with its interval of 95 %, not "
        "corrected for the number of arms; a tie: it contains 0."
    )
    if len({len(row.fits) for row in found if row.fits}) > 1:
        about += " Arms have unlike numbers of seeds, so that means in different rows are of different trainings."
    raced = race.told(made.race, fits_of(found), start(made, results)) if made.race else ()
    power = " ".join(power_of(made, found))
    text = " ".join([about, *unknown(made, lines), *comparison(made, results), *raced])
    return f"{power}\n\n{text}" if power else text


def unknown(made: Table, lines: Sequence[Line]) -> Iterator[str]:
    """Yield a sentence for each name in `also` that no trial has, once there are trials."""
    known = {name for line in lines if line["kind"] == "fit" for name in line["after"]}
    for name in made.also:
        if known and name not in known:
            yield f"No trial has the outcome {name} that `also` names; they have {', '.join(sorted(known))}."


def published(name: str, path: Path) -> str:
    """Return a table for docs/, of the newest stack that it was measured on, or how far it is.

    No arm is shown while one has a single seed: the seeds are trained in turn, for all arms alike, so that the first
    numbers would rank what is not known to differ.

    Raises:
        BadInput: if the table asks for one seed only.
    """
    made, command = read_table(name), f"python -m benchmarks.quality {name}"
    if len(made.seeds) < 2:
        raise BadInput(f"quality-{name}: a table of one seed shows no spread; give it {ENOUGH} seeds.")
    for results in newest_first(path):
        if lines := belonging(made, results):
            found = rows(made, results)
            if any(len(row.fits) < 2 for row in found):
                return under_way(found, lines, command)
            text = f"{caption(command, lines)}\n\n{notes(made, results)}"
            return f"{text}\n\n{table(head(made), cells(made, results))}"
    return f"Not measured yet: `{command}` measures this table."


def under_way(found: Sequence[Row], lines: Sequence[Line], command: str) -> str:
    """Say how far a table is that has arms of one seed."""
    trained = sum(line["kind"] == "fit" for line in lines)
    whole = sum(row.swept for row in found)
    return (
        f"Under way: {trained} trainings are done, and the learning rates of {whole} of the {len(found)} arms are "
        f"swept. Nothing is compared on one seed; `{command}` goes on."
    )
