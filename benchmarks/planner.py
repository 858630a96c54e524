"""The planner's error: what `lit-sparse plan` predicts, beside what the same training allocates on this CPU.

`python -m benchmarks.planner` trains each method on tiny models of seven families, in three shapes of batch, with and
without activation checkpointing, and on the demo model, through Lightning's own trainer. The measurement shares no code
with the planner: it adds up the events of the CPU's allocator from the loading of the model on, phase by phase, and the
ledger's exact bytes of weights, gradients and state. SMT trains the blocks that a plan draws: what is saved for the
backward pass depends on where they are, and a plan has no gradients to rank them by. Configurations come in a fixed
order, in which methods take turns, and are appended one by one to benchmarks/results/planner.jsonl, so that a run may
be stopped at any time and goes on with what is missing. After them, two ranks train together, under DDP and under
FSDP2, and one rank is compared. `--gpu` trains models of random weights on a GPU instead, and compares what its
allocator gave out and reserved.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import torch

from benchmarks.measurements import Line, read_lines
from benchmarks.planner_cases import Case, cases, cases_of_pairs, cases_on_gpu, config_in, module_of
from benchmarks.planner_measured import Measured, measured, measured_by_pair, measured_on_gpu
from benchmarks.provenance import ROOT, of_device
from benchmarks.turns import append
from lit_sparse.errors import BadInput
from lit_sparse.planning.forecast import Forecast, forecast

RESULTS = ROOT / "benchmarks" / "results" / "planner.jsonl"
CONFIGURATIONS, ON_GPU, MEDIAN, WORST, CATEGORY, TOO_LITTLE = 200, 40, 0.01, 0.03, 0.05, 0.01
"""The marks: configurations, those of a GPU, median and worst error of the peak, worst of a category, most missing."""
AT_ONCE = 12
"""Trainings that one pair of processes does."""
OF_RANKS = ("DDP buckets", "gathered weights")
"""Categories beside what is saved that two ranks hold at the beginning of a backward pass."""
NEGLIGIBLE = 0.01
"""Share of the peak below which a category's error does not count."""


def predicted(case: Case, config: Path) -> Forecast:
    """Plan the training of a case."""
    return forecast(case.method, module_of(case, config), case.setting)


def line_of(case: Case, plan: Forecast, real: Measured) -> Line:
    """Return what was predicted and what was measured, in bytes."""
    beside = sum(plan.kept.categories.get(name, 0) for name in OF_RANKS) if case.setting.ranks > 1 else 0
    ours = {
        **{name: plan.kept.categories.get(name, 0) for name in real.categories},
        "saved for backward": plan.kept.categories.get("saved for backward", 0) + beside,
        "gradients": plan.phases["optimizer step"].categories.get("gradients", 0),
    }
    ours_reserved = {"reserved": plan.reserved} if case.way == "gpu" else {}
    peaks = {name: moment.bytes for name, moment in plan.phases.items()}
    return {
        **of_device("planner", torch.device(case.setting.device)),
        **case._asdict(),
        "predicted": {"peak": plan.allocated, **peaks, **ours_reserved},
        "measured": {"peak": max(real.phases.values()), **real.phases},
        "predicted_categories": ours,
        "measured_categories": real.categories,
    }


def error(line: Line, phase: str = "peak") -> float:
    """Return the relative error of a phase's peak; above 0 where too much was predicted."""
    return line["predicted"][phase] / line["measured"][phase] - 1


def category_errors(line: Line) -> Iterator[float]:
    """Yield the relative error of each category that takes more than `NEGLIGIBLE` of the peak."""
    for name, size in line["measured_categories"].items():
        if size > NEGLIGIBLE * line["measured"]["peak"]:
            yield line["predicted_categories"][name] / size - 1


def peak_errors(line: Line) -> dict[str, float]:
    """Return the relative errors of the peak, and on a GPU of what is reserved."""
    return {name: error(line, name) for name in ("peak", "reserved") if name in line["measured"]}


def fits_wrongly(line: Line) -> bool:
    """Return whether some card of memory would have been said to fit, and does not: too little was predicted."""
    return min(peak_errors(line).values()) < -TOO_LITTLE


def missed(lines: Sequence[Line]) -> list[str]:
    """Return a sentence for each mark that the measured configurations miss."""
    errors = sorted(max(map(abs, peak_errors(line).values())) for line in lines)
    wanted = ON_GPU if lines and case_of(lines[0]).way == "gpu" else CONFIGURATIONS
    categories = [line for line in lines if max(map(abs, category_errors(line)), default=0) > CATEGORY]
    low = [line for line in lines if fits_wrongly(line)]
    said = []
    if len(lines) < wanted:
        said.append(f"{len(lines)} configurations are measured, of {wanted}.")
    if errors and errors[len(errors) // 2] > MEDIAN:
        said.append(f"The median error is {errors[len(errors) // 2]:.2%}, above {MEDIAN:.0%}.")
    off = [(line, name, wrong) for line in lines for name, wrong in peak_errors(line).items() if abs(wrong) > WORST]
    said += [f"{named(line)}: the {name} is off by {wrong:+.2%}." for line, name, wrong in off]
    said += [f"{named(line)}: a category is off by more than {CATEGORY:.0%}." for line in categories]
    said += [f"{named(line)}: {-min(peak_errors(line).values()):.2%} too little is predicted." for line in low]
    return said


def named(line: Line) -> str:
    """Return the configuration of a line, in words."""
    return " ".join(map(str, case_of(line)))


def case_of(line: Line) -> Case:
    """Return the configuration of a line; those without `way` are of one process."""
    return Case(*(line[name] for name in Case._fields if name in line))


def measure(asked: Sequence[Case], configs: dict[str, Path]) -> Iterator[tuple[Case, Line | str]]:
    """Yield each case with its line, or with why it was refused; those of two ranks are trained by one pair."""
    pairs = measured_by_pair(asked, configs) if asked[0].setting.ranks > 1 else None
    for number, case in enumerate(asked):
        try:
            plan = predicted(case, configs[case.family])
            alone = measured_on_gpu if case.way == "gpu" else measured
            real = alone(case, configs[case.family]) if pairs is None else pairs[number]
            yield case, real if isinstance(real, str) else line_of(case, plan, real)
        except BadInput as refused:
            yield case, str(refused)


def groups(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """Yield as many cases as one pair of processes trains."""
    for start in range(0, len(cases), AT_ONCE):
        yield cases[start : start + AT_ONCE]


def main() -> int:
    """Measure what is missing; return the exit status, 1 if a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many (default 60)")
    parser.add_argument("--methods", nargs="+", help="only these (default all)")
    parser.add_argument("--pairs", action="store_true", help="only the configurations of two ranks")
    parser.add_argument("--gpu", action="store_true", help="only the configurations of a GPU, which this machine has")
    for name in ("lightning.pytorch", "lit_sparse"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="measure nothing; only say which marks are missed")
    asked = parser.parse_args()
    done = read_lines(asked.results, "python -m benchmarks.planner") if asked.results.exists() else []
    known = {case_of(line) for line in done}
    end = monotonic() + asked.minutes * 60

    def missing(cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if case not in known and case.method in (asked.methods or [case.method])]

    alone = missing(cases_on_gpu()) if asked.gpu else [] if asked.pairs else missing(cases())
    pairs = [] if asked.gpu else [*groups(missing(cases_of_pairs()))]
    todo = [] if asked.check else [[case] for case in alone] + pairs
    with tempfile.TemporaryDirectory() as folder:
        families = {case.family for some in todo for case in some}
        configs = {family: config_in(Path(folder), family) for family in families}
        for some in todo:
            if monotonic() > end:
                break
            for case, line in measure(some, configs):
                if isinstance(line, str):
                    print(*case, "refused:", line, flush=True)
                    continue
                append(asked.results, [line])
                done.append(line)
                worst = max(map(abs, category_errors(line)), default=0)
                print(*case, f"{error(line):+.2%}", f"categories {worst:.2%}", flush=True)
    said = missed(done)
    for sentence in said:
        print(sentence)
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
