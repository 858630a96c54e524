"""Decide statements of papers by our records: `python -m benchmarks.claims` writes docs/claims.md.

The statements and the rules are in claims.yaml. A rule was written before the run that it judges, or the page says that
the record was there already.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurements import Line, read_lines, table
from benchmarks.pairing import LEVEL, Interval, difference, scores_of, smallest, t_quantile
from benchmarks.provenance import ROOT
from benchmarks.race import reached
from benchmarks.ranking import SCORE, newest_first, row_of, start
from benchmarks.rewinding import beside_end
from benchmarks.tradeoff import points, read_study
from benchmarks.trials import Table, read_table, read_yaml
from lit_sparse.errors import BadInput

COMMAND = "python -m benchmarks.claims"
CLAIMS = Path(__file__).with_name("claims.yaml")
REPRODUCED, REFUTED, OPEN = "reproduced", "refuted at this scale", "not decidable here"
MARGIN = 0.005
"""Nats a token that a difference must have to matter, where a rule names no margin."""
FORGETTING = "forgetting"
"""The study of forgetting; its arms are methods with their strength, such as `ewc 0.0498`."""
Rule = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A statement of a paper.

    Attributes:
        says: What it says.
        there: On which model and task, with its number.
        source: Its arXiv number, or another name.
        rule: What decides, as claims.yaml describes it.
        known: Whether the record was there before the rule.
    """

    says: str
    there: str
    source: str
    rule: Rule
    known: bool = False


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: one of the three verdicts, what was found or is missing, and at which scale."""

    verdict: str
    found: str
    scale: str = ""


@dataclass(frozen=True)
class Evidence:
    """An arm's trainings at its best learning rate.

    Attributes:
        end: "lowest", "highest" or "only", if that rate is an end of the sweep.
        rates: The learning rates of the sweep, lowest first.
    """

    name: str
    fits: Sequence[Line]
    rate: float
    end: str
    rates: Sequence[float]
    before: float = math.nan


class Undecided(Exception):
    """A rule cannot be applied; its text is the reason."""


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """Read the statements and their rules.

    Raises:
        BadInput: if one lacks a part, or has a rule of a kind that is not known.
    """
    out = []
    for number, body in enumerate(read_yaml(path)["claims"], 1):
        keys = {field.name for field in dataclasses.fields(Claim)}
        if not isinstance(body, dict) or not body.keys() <= keys or not body.keys() >= keys - {"known"}:
            raise BadInput(f"{path}: statement {number} must have says, there, source and rule; known may be true.")
        kind = body["rule"].get("kind")
        if kind not in RULES:
            raise BadInput(f"{path}: statement {number} has a rule of kind {kind!r}; give one of {', '.join(RULES)}.")
        if not isinstance(body["source"], str):
            raise BadInput(f"{path}: statement {number} has the source {body['source']!r}; write it in quotes.")
        out.append(Claim(**body))
    return out


def decide(claim: Claim, results: Path) -> Verdict:
    """Return the verdict on a claim.

    Args:
        results: Folder of the records.
    """
    try:
        return RULES[claim.rule["kind"]](claim.rule, results)
    except Undecided as reason:
        return Verdict(OPEN, str(reason))


# ---- evidence


def evidence(rule: Rule, results: Path) -> tuple[Evidence, Evidence, str]:
    """Return what is known of a rule's two arms, and at which scale.

    Raises:
        Undecided: if one of them was not measured, or its best learning rate is not known.
    """
    source = forgetting if rule["table"] == FORGETTING else trained
    found, scale = source(rule, results)
    for one in found:
        if one.end:
            raise Undecided(f"the best learning rate of {one.name} is at an end of its sweep")
    ours, theirs = found
    return ours, theirs, scale


def trained(rule: Rule, results: Path) -> tuple[list[Evidence], str]:
    made = read_table(rule["table"])
    arms = {arm.name: arm for arm in made.arms}
    if absent := [rule[key] for key in ("arm", "than") if rule[key] not in arms]:
        raise BadInput(f"the table {made.name} has no arm {absent[0]}, which a statement is about.")
    begun = False
    for measured in newest_first(results / "quality.jsonl"):
        rows = [row_of(made, arms[rule[key]], measured) for key in ("arm", "than")]
        begun |= all(row.fits for row in rows)
        if all(row.swept and len(row.fits) == len(made.seeds_of(row.arm)) for row in rows):
            before, fits = start(made, measured), [row.fits for row in rows]
            found = [
                Evidence(row.arm.name, row.fits, row.best.rate if row.best else math.nan, row.end, row.rates, before)
                for row in rows
            ]
            return found, scale_of(made, fits)
    if begun:
        raise Undecided(f"measured in part: `{command(made)}` goes on")
    raise Undecided(f"not measured yet: `{command(made)}`")


def command(made: Table) -> str:
    return f"make quality TABLE={made.name}"


def forgetting(rule: Rule, results: Path) -> tuple[list[Evidence], str]:
    study = read_study()
    for measured in newest_first(results / "forgetting.jsonl"):
        found = {f"{one.curve.name} {one.strength:g}": one for one in points(study, measured) if one.strength}
        if {rule["arm"], rule["than"]} <= found.keys():
            chosen = [(rule[key], found[rule[key]]) for key in ("arm", "than")]
            if any(len(one.lines) < len(study.table.seeds) for _, one in chosen):
                raise Undecided("measured in part: `python -m benchmarks.forgetting_study` goes on")
            out = [Evidence(name, one.lines, one.rate, one.end, (one.rate,)) for name, one in chosen]
            return out, scale_of(study.table, [one.lines for _, one in chosen])
    raise Undecided("not measured yet: `python -m benchmarks.forgetting_study`")


def scale_of(made: Table, fits: Sequence[Sequence[Line]]) -> str:
    """Describe at which scale arms were trained."""
    seeds = min(len(lines) for lines in fits)
    scores = scores_of(fits[0])
    tokens = "" if scores is None or scores.tokens is None else f", {int(scores.tokens.sum()):,} tokens scored"
    return f"{made.workload['model'].get('base', 'demo')}, {made.steps} steps, {seeds} seeds{tokens}"


# ---- rules


def lower(rule: Rule, results: Path) -> Verdict:
    ours, theirs, scale = evidence(rule, results)
    gap, told = compared(rule, ours, theirs)
    return Verdict(below([gap], rule), told, scale)


def tie(rule: Rule, results: Path) -> Verdict:
    ours, theirs, scale = evidence(rule, results)
    gap, told = compared(rule, ours, theirs)
    margin, side = rule.get("margin", MARGIN), rule.get("side")
    least, most = (-math.inf if side == "not_worse" else -margin), (math.inf if side == "not_better" else margin)
    if least < gap.low and gap.high < most:
        return Verdict(REPRODUCED, told, scale)
    return Verdict(REFUTED if gap.low >= most or gap.high <= least else OPEN, told, scale)


def rewound(rule: Rule, results: Path) -> Verdict:
    """Decide by the scores of an arm's runs at a scale of their changes, beside those at their end."""
    try:
        gaps, made, end = beside_end(rule["arm"], rule["scale"], results / "rewinding.jsonl")
    except LookupError as reason:
        raise Undecided(reason.args[0]) from reason
    told = "; ".join(f"{name.replace('_', ' ')} {gap}" for name, gap in gaps.items())
    return Verdict(below([*gaps.values()], rule), told, scale_of(made, [end]))


def below(gaps: Sequence[Interval], rule: Rule) -> str:
    """Return the verdict on differences that should all be below 0."""
    if all(gap.high < 0 for gap in gaps):
        return REPRODUCED
    return REFUTED if any(gap.high >= 0 and gap.low > -rule.get("margin", MARGIN) for gap in gaps) else OPEN


def compared(rule: Rule, ours: Evidence, theirs: Evidence) -> tuple[Any, str]:
    """Return the interval of the difference, and the words for it, with the smallest difference that could be told."""
    name = rule.get("of", SCORE)
    gap = difference(ours.fits, theirs.fits, name)
    if gap is None:
        raise Undecided(f"{ours.name} or {theirs.name} diverged, or has no {name} with two shared seeds")
    scores = [one for lines in (ours.fits, theirs.fits) if (one := scores_of(lines, name)) is not None]
    return gap, f"{ours.name} - {theirs.name}: {gap}; detectable {smallest(scores) or math.nan:.4f}"


def rate(rule: Rule, results: Path) -> Verdict:
    """Decide by the ratio of best learning rates, each known to half a step of its sweep."""
    ours, theirs, scale = evidence(rule, results)
    found = ours.rate / theirs.rate
    half = math.prod(
        math.sqrt(max(b / a for a, b in zip(one.rates, one.rates[1:], strict=False))) for one in (ours, theirs)
    )
    least, most = rule["between"]
    told = f"{ours.rate:g} / {theirs.rate:g} = {found:.1f} [{found / half:.1f}, {found * half:.1f}]"
    if least <= found / half and found * half <= most:
        return Verdict(REPRODUCED, told, scale)
    return Verdict(REFUTED if found * half < least or found / half > most else OPEN, told, scale)


def ratio(rule: Rule, results: Path) -> Verdict:
    """Decide by the ratio of an outcome, seed by seed: Student's t on the logarithms.

    Where an arm does not reach the other's loss with every seed, its steps are at least those that it took.
    """
    ours, theirs, scale = evidence(rule, results)
    mine, base = ({line["seed"]: line for line in one.fits} for one in (ours, theirs))
    shared = sorted(mine.keys() & base.keys())
    if len(shared) < 2:
        raise Undecided(f"{ours.name} and {theirs.name} share {len(shared)} seeds; two are needed")
    if rule["of"] in ("steps", "passes"):
        found = [spent(rule["of"], mine[seed], base[seed], ours.before) for seed in shared]
        values = [value for value, _ in found]
        if not all(arrived for _, arrived in found):
            told = f"{ours.name} does not reach the loss of {theirs.name} with every seed: {rule['of']} from "
            never = "most" in rule and min(values) > rule["most"]
            told += f"{min(values):.3f} to {max(values):.3f} times, or more"
            return Verdict(REFUTED if never else OPEN, told, scale)
    else:
        values = [outcome(mine[seed], rule["of"], ours) / outcome(base[seed], rule["of"], theirs) for seed in shared]
    logs = [math.log(value) for value in values]
    middle, half = (
        statistics.fmean(logs),
        t_quantile((1 + LEVEL) / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)),
    )
    low, high = math.exp(middle - half), math.exp(middle + half)
    told = f"{rule['of']}, {ours.name} / {theirs.name}: {math.exp(middle):.3f} [{low:.3f}, {high:.3f}]"
    return Verdict(bounded(rule, low, high), told, scale)


def spent(name: str, mine: Line, base: Line, before: float) -> tuple[float, bool]:
    """Return the steps or passes to the final loss of another training, in its own, and whether they lead there."""
    steps = reached(before, mine["curve"], float(base["after"][SCORE]))
    passes = mine["passes"] / base["passes"] if name == "passes" else 1.0
    return (mine["steps"] if steps is None else steps) / base["steps"] * passes, steps is not None


def outcome(line: Line, name: str, arm: Evidence) -> float:
    """Return a number of a training: an outcome or a cost."""
    value = line["after"].get(name, line.get(name))
    if value is None or not 0 < float(value) < math.inf:
        raise Undecided(f"{arm.name} has no {name}")
    return float(value)


def record(rule: Rule, results: Path) -> Verdict:
    """Decide by a recorded number, or its ratio to another's; its interval where one is recorded."""
    lines = read_lines(results / f"{rule['file']}.jsonl", f"python -m benchmarks.{rule['file']}")
    line = matching(lines, rule["where"])
    middle = number(line, rule["value"])
    low, high = (number(line, rule[end]) if end in rule else middle for end in ("low", "high"))
    if "over" in rule:
        scale = number(matching(lines, rule["over"]), rule.get("over_value", rule["value"]))
        if scale <= 0:
            raise Undecided(f"that of {named(rule['over'])} is {in_figures(scale)}: nothing can be divided by it")
        low, middle, high = low / scale, middle / scale, high / scale
    told = in_figures(middle) + (f" [{in_figures(low)}, {in_figures(high)}]" if low < high else "")
    if rule.get("over_value") in BOUNDS:
        high, told = math.inf, f"at least {told}"
    return Verdict(bounded(rule, low, high), told, f"{line.get('model', '')} on {line['device']}".strip())


def matching(lines: Sequence[Line], where: Mapping[str, Any]) -> Line:
    found = [line for line in lines if all(line.get(key) == value for key, value in where.items())]
    if not found:
        raise Undecided(f"no record has {', '.join(f'{key} {value}' for key, value in where.items())}")
    return max(reversed(found), key=lambda line: line["date"])


def number(line: Line, value: str | Sequence[str | int]) -> float:
    """Return a number of a line: at a path of keys, or one of `NUMBERS`."""
    if isinstance(value, str):
        return NUMBERS[value](line)
    found: Any = line
    for key in value:
        found = found[key]
    return float(found)


def skew(line: Line) -> float:
    """Return the norm of the embedding's weights over that of the median decoder layer."""
    norms = {at["layer"]: at["norm"] for at in line["layers"]}
    middle = statistics.median(norm for name, norm in norms.items() if name.isdigit())
    return next(norm for name, norm in norms.items() if "embed" in name) / middle


def added_at_most(line: Line) -> float:
    """Return the seconds a sample that recording adds to the run, by the upper end of the interval of its ratio."""
    return line["seconds_a_sample"] / line["ratio_median"] * (line["ratio_high"] - 1)


def bounded(rule: Rule, low: float, high: float) -> str:
    """Return the verdict on a number in an interval that should be at most `most`, or at least `least`."""
    if "most" in rule:
        return REPRODUCED if high <= rule["most"] else REFUTED if low > rule["most"] else OPEN
    return REPRODUCED if low >= rule["least"] else REFUTED if high < rule["least"] else OPEN


NUMBERS: dict[str, Callable[[Line], float]] = {"skew": skew, "added_at_most": added_at_most}
BOUNDS = {"added_at_most"}
"""Those that are upper bounds, so that a ratio over one is a lower bound."""
RULES: dict[str, Callable[[Rule, Path], Verdict]] = {
    "lower": lower,
    "tie": tie,
    "rate": rate,
    "rewound": rewound,
    "ratio": ratio,
    "record": record,
}


# ---- the page


def in_words(rule: Rule) -> str:
    """Say what a rule decides by."""
    kind, where = rule["kind"], f"`{rule.get('table', rule.get('file'))}`"
    bound = f"at most {in_figures(rule['most'])}" if "most" in rule else f"at least {rule.get('least', 0):g}"
    if kind in ("lower", "tie"):
        arms = f"{rule.get('of', SCORE).replace('_', ' ')} of {rule['arm']} - {rule['than']}"
        margin = rule.get("margin", MARGIN)
        ends = {"not_worse": f"below {margin:g}", "not_better": f"above -{margin:g}"}
        within = ends.get(rule.get("side", ""), f"within ±{margin:g}")
        told = f"below 0; refuted above -{margin:g}" if kind == "lower" else f"{within}; refuted outside"
        return f"{where}: {arms} {told}"
    if kind == "rate":
        return f"{where}: best rate of {rule['arm']} / {rule['than']} from {rule['between'][0]} to {rule['between'][1]}"
    if kind == "rewound":
        margin = rule.get("margin", MARGIN)
        told = f"held-out and text loss of {rule['arm']} at scale {rule['scale']:g} - at its end, both below 0"
        return f"`rewinding`: {told}; refuted if either is above -{margin:g}"
    if kind == "ratio":
        return f"{where}: {rule['of'].replace('_', ' ')} of {rule['arm']} / {rule['than']} {bound}"
    value = rule["value"] if isinstance(rule["value"], str) else str(rule["value"][0])
    over = f" / that of {named(rule['over'])}" if "over" in rule else ""
    over += f" ({rule['over_value'].replace('_', ' ')})" if "over_value" in rule else ""
    return f"{where}: {value.replace('_', ' ')} of {named(rule['where'])}{over} {bound}"


def named(where: Mapping[str, Any]) -> str:
    """Describe a record by the values that it is found by."""
    return ", ".join(" / ".join(value) if isinstance(value, list) else str(value) for value in where.values())


def in_figures(value: float) -> str:
    """Format a number: four digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def link(source: str) -> str:
    return f"[{source}](https://arxiv.org/abs/{source})" if re.fullmatch(r"\d{4}\.\d{5}", source) else source


def ledger(results: Path, claims: Sequence[Claim] | None = None) -> str:
    """Return the counts of verdicts and the table of claims.

    Args:
        results: Folder of the records.
        claims: The statements; those of claims.yaml if not given.
    """
    rows, counts = [], Counter[str]()
    for claim in read_claims() if claims is None else claims:
        verdict = decide(claim, results)
        counts[verdict.verdict] += 1
        known = " *(the record was there before the rule)*" if claim.known else ""
        scale = f" ({verdict.scale})" if verdict.scale else ""
        said = f"{claim.says} {link(claim.source)}: {claim.there}"
        rows.append([said, f"{in_words(claim.rule)}{known}", f"{verdict.found}{scale}", f"**{verdict.verdict}**"])
    told = ", ".join(f"{counts[name]} {name}" for name in (REPRODUCED, REFUTED, OPEN))
    made = table(["statement", "rule", "found here", "verdict"], rows).replace("---:", "---")
    return f"{len(rows)} statements: {told}. Decided by `{COMMAND}` from the records in benchmarks/results.\n\n{made}"


def main() -> int:
    """Write the page, as `make readme` does; return the exit status."""
    made = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py")], check=False)
    print(ledger(ROOT / "benchmarks" / "results").partition("\n")[0])
    return made.returncode


if __name__ == "__main__":
    sys.exit(main())
