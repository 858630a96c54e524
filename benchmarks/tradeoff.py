"""Format the tables of the study of forgetting: domain gain against general loss, and the costs of methods."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.curves import Curve, Study, at_best, belonging, read_study
from benchmarks.measurements import Line, caption, newest, table
from benchmarks.pairing import difference
from benchmarks.ranking import SCORE, Results, end_of, mean_spread, newest_first
from benchmarks.recording import EXTRAPOLATED, PENALTY, costs

COMMAND = "python -m benchmarks.forgetting_study"
GENERAL = "general_loss"
ZERO_SHOT = "_zero_shot"
HEAD = ["method", "strength", "learning rate", "domain loss", "general loss", "zero-shot", "seeds", ""]
COST_HEAD = [
    "importance from",
    "s a sample",
    f"h of {EXTRAPOLATED:,} samples",
    "of the recorder's time",
    "MiB kept",
    "of the published bytes",
]
WAYS = {
    "recorder": "the first phase's run itself (RecordImportance)",
    "added": "of that, what recording adds to the run",
    "lean": "a Fisher of LoRA's product (RecordFisher)",
    "published": "a Fisher of all weights (EWC-LoRA's recipe)",
}


@dataclass(frozen=True)
class Point:
    """A method at one strength.

    Attributes:
        strength: None for a method without one, of which each learning rate is a point.
        rate: The learning rate chosen for the method.
        end: "lowest", "highest" or "only", if the rate is an end of the sweep.
        lines: Its trainings, one for each seed that was trained.
    """

    curve: Curve
    strength: float | None
    rate: float
    end: str
    lines: tuple[Line, ...]

    def values(self, name: str) -> list[float]:
        """Return a score after training, of each seed."""
        return [float(line["after"][name]) for line in self.lines]


def points(study: Study, results: Results) -> list[Point]:
    """Return every method and strength that was trained at the chosen rate."""
    out: list[Point] = []
    for curve in study.curves:
        trials = at_best(study, curve, study.table.seeds, results)
        for value, arm in curve.arms.items():
            found = [(one.rate, line) for one in trials if one.arm is arm and (line := results.fit(one)) is not None]
            if found:
                rate, lines = found[0][0], tuple(line for _, line in found)
                strength, end = (value, end_of(rate, arm.rates)) if curve.swept is not None else (None, "")
                out.append(Point(curve, strength, rate, end, lines))
    return out


def starts(study: Study, results: Results) -> dict[int, dict[str, float]]:
    """Return the scores at the end of the first phase by seed; only a seed's first trial measures the domain loss."""
    found: dict[int, dict[str, float]] = {}
    for line in belonging(study, results):
        found.setdefault(line["seed"], {}).update(line["before"])
    return found


def changes(path: Path) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Return, for each method, weakest first, the rise of general loss and the fall of domain loss by seed."""
    study, out = read_study(), dict[str, list[tuple[list[float], list[float]]]]()
    if (results := measured_on(study, path)) is None:
        return out
    start = starts(study, results)
    for point in points(study, results):
        rose, fell = [], []
        for line in point.lines:
            rose.append(line["after"][GENERAL] - start[line["seed"]][GENERAL])
            fell.append(start[line["seed"]][SCORE] - line["after"][SCORE])
        out.setdefault(point.curve.name, []).append((rose, fell))
    return out


# ---- the trade-off


def cells(study: Study, results: Results) -> list[list[str]]:
    """Return the rows of the table, those of the base and of the end of the first phase first."""
    found = points(study, results)
    by_seed = list(starts(study, results).values())
    names = dict.fromkeys(name for one in by_seed for name in one)
    start = {name: [one[name] for one in by_seed if name in one] for name in names}
    rows = [["first phase", "", "-", *scores(start), "-", ""]] if found else []
    free = [point for point in found if point.curve.name == "none"]
    best = min(free, key=lambda point: statistics.fmean(point.values(SCORE)), default=None)
    return untrained_rows(study, results) + rows + [row(point, best, len(study.table.seeds)) for point in found]


def untrained_rows(study: Study, results: Results) -> list[list[str]]:
    """Return the base's row: its scores before the first phase."""
    marks = {phase.stands for phase in study.phases}
    made = (line for line in results.others if line["kind"] == "phase" and line["identity"] in marks)
    lines = {line["identity"]: line for line in made}.values()  # of a phase made twice, the later
    return [
        ["base", "", "-", *scores({name: [value] for name, value in line["before"].items()}), "-", ""]
        for line in lines
        if line["before"]
    ]


def scores(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Format domain loss, general loss, and shares of right answers."""
    asked = [
        f"{name.removesuffix(ZERO_SHOT)} {mean_spread(values[name], '%')}"
        for name in sorted(values)
        if name.endswith(ZERO_SHOT)
    ]
    return [*(mean_spread(values.get(name, [])) for name in (SCORE, GENERAL)), "; ".join(asked) or "-"]


def row(point: Point, base: Point | None, seeds: int) -> list[str]:
    """Return a point's cells, with remarks on differences from `none` beyond the spread."""
    names = [name for name in point.lines[0]["after"] if name in (SCORE, GENERAL) or name.endswith(ZERO_SHOT)]
    remarks = [] if base is None or point is base else beside(point, base)
    if point.end:
        remarks.append(f"{point.end} rate tried")
    if len(point.lines) < seeds:
        remarks.append(f"incomplete: {len(point.lines)} of {seeds} seeds")
    strength = "-" if point.strength is None else f"{point.strength:g}"
    numbers = scores({name: point.values(name) for name in names})
    return [point.curve.name, strength, f"{point.rate:g}", *numbers, str(len(point.lines)), "; ".join(remarks)]


def beside(point: Point, base: Point) -> list[str]:
    """Compare both losses with those without a penalty: lower, higher, or a tie."""
    out: list[str] = []
    for name, said in ((GENERAL, "general"), (SCORE, "domain")):
        gap = difference(point.lines, base.lines, name)
        if gap is not None:
            out.append(f"{said}: {'tie' if gap.tie else 'lower' if gap.difference < 0 else 'higher'} ({gap})")
    return out


def notes(study: Study, found: Sequence[Point]) -> str:
    """Return the notes on the table of the trade-off: how it was made, and how to read it."""
    workload = study.table.workload
    data, lines = workload["data"].get("init_args", {}), [line for point in found for line in point.lines]
    hours = sum(line["seconds"] for line in lines) / 3600
    return (
        f"{study.table.title} Model {workload['model'].get('base', 'demo')}; every arm goes on from the first phase, "
        f"LoRA on {study.text_rows} passages of general text, with {study.table.steps} steps of "
        f"{data.get('batch_size', 4)} rows of {data.get('task', data.get('train', 'the domain'))}; {hours:.1f} hours. "
        f"Mean ± standard deviation over seeds; a method's learning rate has the lowest held-out domain loss with seed "
        f"{study.table.seeds[0]} at one of its strengths; `none` is there with each rate. What holds to the base "
        "(`l2sp`, `kl`) may also take back what the first phase learnt. The last column compares with `none` at the "
        "rate with the lowest domain loss, paired by seed, with the interval of 95 %; a tie: it contains 0."
    )


# ---- cost


def cost_cells(lines: Sequence[Line]) -> list[list[str]]:
    """Return the rows of the table of costs."""
    found = {line["cost"]: line for line in newest(lines, key="cost").values()}
    if (line := found.get("recorder")) is not None:
        share = 1 - 1 / line["ratio_median"]
        found["added"] = {**line, "seconds_a_sample": line["seconds_a_sample"] * share}
    return [cost_row(what, found) for what in WAYS if what in found]


def cost_row(what: str, found: Mapping[str, Line]) -> list[str]:
    line, recorder, published = found[what], found.get("recorder"), found.get("published")
    times = "-" if recorder is None else f"{line['seconds_a_sample'] / recorder['seconds_a_sample']:.2f}"
    share = "-" if published is None else f"{line['bytes'] / published['bytes']:.1%}"
    hours = line["seconds_a_sample"] * EXTRAPOLATED / 3600
    return [WAYS[what], f"{line['seconds_a_sample']:.3f}", f"{hours:.1f}", times, f"{line['bytes'] / 2**20:.1f}", share]


def cost_notes(lines: Sequence[Line]) -> str:
    """Return the notes on the table of costs, with the step time of the recorder and of each penalty."""
    found = {line["cost"]: line for line in newest(lines, key="cost").values()}
    text = (
        "The recorder's time is that of the whole first phase, which trains as well, in its batches; a Fisher's is "
        "what its samples take, one at a time, beside any training. The paper says 20 times and 10 to 15 % of the "
        "bytes (arXiv 2501.13669, beside EWC-LoRA)."
    )
    parts = {"the recorder": found["recorder"]} if "recorder" in found else {}
    parts |= {name.removeprefix(PENALTY): line for name, line in found.items() if name.startswith(PENALTY)}
    if not parts:
        return text
    ratios = (
        f"with {name} {line['ratio_median']:.3f} [{line['ratio_low']:.3f}, {line['ratio_high']:.3f}] "
        f"({line['held_bytes'] / 2**20:.1f} MiB kept, {line['rounds']} rounds)"
        for name, line in parts.items()
    )
    return f"{text} A step takes, in times of the one without (median of steps in turn, 95 %): {', '.join(ratios)}."


# ---- showing


def trade_off(study: Study, results: Results) -> str:
    """Return the first table; without the column of zero-shot answers if no questions were asked."""
    rows, asked = [HEAD, *cells(study, results)], HEAD.index("zero-shot")
    if all(row[asked] == "-" for row in rows[1:]):
        rows = [row[:asked] + row[asked + 1 :] for row in rows]
    return table(rows[0], rows[1:])


def shown(study: Study, results: Results) -> str:
    """Return both tables as far as they are known, in Markdown."""
    found, measured = points(study, results), costs(results)
    parts = [notes(study, found), trade_off(study, results)] if found else ["No curve has a point yet."]
    if measured:
        about = caption(f"{COMMAND} --only cost", list(newest(measured, key="cost").values()))
        parts += [about, cost_notes(measured), table(COST_HEAD, cost_cells(measured))]
    return "\n\n".join(parts)


def measured_on(study: Study, path: Path) -> Results | None:
    """Return the results of the newest stack that has a point of the study."""
    for results in newest_first(path):
        if points(study, results) or costs(results):
            return results
    return None


def published(path: Path) -> str:
    """Return both tables for docs/."""
    study = read_study()
    if (results := measured_on(study, path)) is None:
        return f"Not measured yet: `{COMMAND}` measures these tables."
    lines = [line for point in points(study, results) for line in point.lines]
    return "\n\n".join([*([caption(COMMAND, lines)] if lines else []), shown(study, results)])
