"""The study of forgetting as its YAML file has it: phases, methods over their strength, and what is left to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurements import Line
from benchmarks.quality import Work
from benchmarks.ranking import Results, chosen
from benchmarks.trials import Arm, Config, Table, Trial, digest, filled, read_yaml, table_of
from lit_sparse import demo
from lit_sparse.errors import BadInput

STUDY = Path(__file__).parent / "forgetting" / "study.yaml"
STRENGTH = "${strength}"
"""Stands for each of a method's strengths in its updates."""
GENERAL, FISHER = "general", "fisher"
KEYS = {"title", "workload", "text_rows", "phases", "methods"}


@dataclass(frozen=True)
class Curve:
    """A method over its strength, or over the learning rate, where it has no strength.

    Attributes:
        arms: One for each strength or rate, lowest first.
        swept: The arm at which the learning rate is chosen for all of them; None where each has its own.
    """

    name: str
    arms: Mapping[float, Arm]
    swept: Arm | None


@dataclass(frozen=True)
class Phase:
    """A run of the first phase.

    Attributes:
        config: Of `lit-sparse fit`, with the placeholders of the text and of the phase before.
        stands: What stands for its folder in the trials' configurations: with a hash of all that makes its result, so
            that a trial's identity follows it while its folder may be anywhere.
    """

    name: str
    config: Config
    stands: str


@dataclass(frozen=True)
class Study:
    """All of it, as a YAML file has it.

    Attributes:
        table: The arms, in groups by method.
        text: A data file with general text, or `demo`.
        text_rows: How many of its rows the first phase sees.
    """

    table: Table
    curves: tuple[Curve, ...]
    phases: tuple[Phase, ...]
    text: str
    text_rows: int


# ---- reading


def read_study(path: Path = STUDY, text: str = demo.DEMO, seeds: Sequence[int] | None = None) -> Study:
    """The study in a YAML file.

    Raises:
        BadInput: if something in it makes none.
    """
    document = read_yaml(path)
    if odd := sorted(map(str, (document.keys() - {"seeds"}) ^ KEYS)):
        raise BadInput(f"{path} must have the keys {', '.join(sorted(KEYS))}, and may have seeds; correct {odd[0]}.")
    if list(document["phases"]) != [GENERAL, FISHER]:
        raise BadInput(f"{path}: the phases are {list(document['phases'])}; give {GENERAL}, then {FISHER}.")
    rows, scored = document["text_rows"], scored_by(read_yaml(path.parent / str(document["workload"])))
    phases = phases_of(document["phases"], {"text": text, "rows": rows, "scored": scored})
    names = {f"${{{phase.name}}}": phase.stands for phase in phases}
    arms, curves = dict[str, Any](), dict[str, tuple[dict[float, str], str | None]]()
    for method, body in document["methods"].items():
        curves[method] = arms_of(method, body, str(path))
        for value, arm in curves[method][0].items():
            updates = filled(body["updates"], {**names, STRENGTH: value})
            arms[arm] = {"updates": updates, "lr": body["lr"] if "strengths" in body else [value], "group": method}
    kept = {key: document[key] for key in ("title", "workload", "seeds") if key in document}
    table = table_of({**kept, "arms": arms}, path, None, None, seeds)
    by_name = {arm.name: arm for arm in table.arms}
    made = [
        Curve(method, {value: by_name[arm] for value, arm in found.items()}, by_name[swept] if swept else None)
        for method, (found, swept) in curves.items()
    ]
    return Study(table, tuple(made), phases, text, rows)


def scored_by(workload: Config) -> Config:
    """What decides which rows of general text the trials score, on which the first phase must not be trained."""
    heldout = (workload.get("data") or {}).get("init_args", {}).get("heldout")
    return {"callbacks": (workload.get("trainer") or {}).get("callbacks"), "heldout": heldout}


def arms_of(method: str, body: Config, where: str) -> tuple[dict[float, str], str | None]:
    """A method's arms by strength, with the one at which its learning rate is swept; by rate, if it has no strength."""
    swept = body.get("swept")
    values = sorted(map(float, body["strengths"] if "strengths" in body else body["lr"]))
    arms = {value: f"{method}_{value:g}" for value in values}
    if "strengths" not in body:
        return arms, None
    if swept not in arms:
        raise BadInput(f"{where}: {method} is swept at {swept}; give one of its strengths {list(arms)}.")
    return arms, arms[swept]


def phases_of(documents: Mapping[str, Config], text: Config) -> tuple[Phase, ...]:
    """The phases in their order, each of which may begin with those before."""
    names, out = dict[str, str](), list[Phase]()
    for name, document in documents.items():
        config = filled(document, names)
        out.append(Phase(name, config, f"${{{name} {digest({'config': config, **text}, {})[:12]}}}"))
        names[f"${{{name}}}"] = out[-1].stands
    return tuple(out)


# ---- what is to be done


def work(study: Study, results: Results) -> Iterator[Work]:
    """What can be done now: the sweeps, then seed by seed every strength of every method."""
    for curve in study.curves:
        yield from missing(sweep(study, curve), results)
    for seed in study.table.seeds:
        for curve in study.curves:
            yield from missing(at_best(study, curve, [seed], results), results)


def missing(trials: Sequence[Trial], results: Results) -> list[Work]:
    """Those without a line."""
    return [Work(trial) for trial in trials if results.fit(trial) is None]


def sweep(study: Study, curve: Curve) -> list[Trial]:
    """The trials that choose the curve's learning rate."""
    return study.table.sweep(curve.swept) if curve.swept is not None else []


def at_best(study: Study, curve: Curve, seeds: Sequence[int], results: Results) -> list[Trial]:
    """The curve's trials at its best learning rate, none while that is not known, or each at its own."""
    swept = sweep(study, curve)
    best = chosen(swept, results)
    if swept and (best is None or missing(swept, results)):
        return []
    arms = curve.arms.values()
    return [study.table.trial(arm, arm.rates[0] if best is None else best.rate, seed) for seed in seeds for arm in arms]


def belonging(study: Study, results: Results) -> list[Line]:
    """The lines of the study's trainings, those of the sweeps too."""
    trials = [trial for curve in study.curves for trial in sweep(study, curve)]
    trials += [trial for curve in study.curves for trial in at_best(study, curve, study.table.seeds, results)]
    found = {trial.identity(results.stack): results.fit(trial) for trial in trials}
    return [line for line in found.values() if line is not None]


def left(study: Study, results: Results) -> int:
    """How many trainings are missing."""
    total = 0
    for curve in study.curves:
        swept = len(missing(sweep(study, curve), results))
        points = len(curve.arms) * len(study.table.seeds)
        total += (
            swept + points - 1 if swept else len(missing(at_best(study, curve, study.table.seeds, results), results))
        )
    return total
