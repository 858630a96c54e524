"""A gate that fails if memory or speed is worse than in a baseline."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lit_sparse_profiling.documents import parse_as, spell_nonfinite
from lit_sparse_profiling.drafts import begins, check_replaceable, replace_text
from lit_sparse_profiling.reconcile import format_bytes
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.run_folders import (
    SEEDS,
    Runs,
    device_kind,
    method_name,
    peak_memory,
    repetition_key,
    run_name,
    without,
)

BASELINE_SCHEMA = 1
BEGINNING = r'^\s*\{\s*"schema":\s*\d+,\s*"runs":\s*\{'
"""How a baseline of any schema begins."""
IRRELEVANT = (*SEEDS, "default_root_dir", "turns")
"""Settings that may differ from the baseline's."""
ABSENT = "nothing"
"""Word for a setting that one side does not have."""


def parse_share(text: str) -> float:
    """Return the fraction written as "5%" or "0.05".

    Raises:
        ValueError: if it is written otherwise, is negative, or is 1 or more without "%": "5" may mean 5 % or 500 %.
    """
    number = text.strip().removesuffix("%").rstrip()
    percent = text.strip().endswith("%")
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) and (percent or float(number) < 1):
        return float(number) / (100 if percent else 1)
    raise ValueError(f"A tolerance of {text!r} was asked for, but it must be a fraction; write it as 5% or as 0.05.")


Result = Literal["within tolerance", "better", "worse", "new", "not comparable"]
_ORDER: tuple[Result, ...] = ("within tolerance", "better", "worse", "not comparable")


@dataclass(frozen=True)
class Verdict:
    """Result of the gate for one run, and a sentence with the figures."""

    run: str
    result: Result
    sentence: str

    @property
    def failed(self) -> bool:
        """True if the gate fails because of this run."""
        return self.result in ("worse", "not comparable")


@dataclass(frozen=True)
class _Entry:
    """A run in a baseline: medians over its repetitions with status "ok".

    What a baseline of before has not (cores, sizes, settings, ranks) is None, and not compared.
    """

    status: Status
    device: str | None = None
    model: str | None = None
    peak: int | None = None
    tokens_per_second: float | None = None
    cores: int | None = None
    parameters: int | None = None
    trainable: int | None = None
    settings: dict[str, Any] | None = None
    ranks: int | None = None


@dataclass(frozen=True)
class _Baseline:
    schema: int
    runs: dict[str, _Entry]


def save_baseline(runs: Runs, path: Path) -> None:
    """Write the baseline that `check` reads, atomically. Its keys are the runs' names without their numbers.

    Raises:
        ValueError: if a record cannot be read, if runs of one name are not repetitions of each other, or if the folder
            of `path` does not exist, or `path` is another kind of file.
        OSError: if it cannot be written; what was there stays.
    """
    check_replaceable(path, "baseline", lambda file: begins(file, BEGINNING))
    groups: dict[str, list[RunRecord]] = {}
    for _, record in runs:
        if isinstance(record, str):
            raise ValueError(f"A baseline of all runs was asked for, but one cannot be read: {record}")
        groups.setdefault(method_name(record.name), []).append(record)
    entries = {name: _entry(records) for name, records in groups.items()}
    if not path.parent.is_dir():
        raise ValueError(f"A baseline was to be saved as {path}, but there is no folder {path.parent}; make it first.")
    document = json.dumps(asdict(_Baseline(BASELINE_SCHEMA, entries)), indent=1, allow_nan=False) + "\n"
    replace_text(path, document)


def _entry(records: list[RunRecord]) -> _Entry:
    # A run that never succeeds has an entry too: its OOM may stay one, and must not turn into another failure.
    good = [record for record in records if record.status == "ok"]
    if not good:
        return _Entry(records[0].status)
    if len({repetition_key(record) for record in good}) > 1:
        raise ValueError(
            f"A baseline knows runs by their names without the number, but {', '.join(r.name for r in good)} differ in "
            "model, device or settings; give those that it is to keep."
        )
    peaks = [peak for record in good if (peak := _figures(record)[0]) is not None]
    speeds = [speed for record in good if (speed := _figures(record)[1]) is not None]
    return _Entry(
        "ok",
        device=good[0].device and good[0].device.name,
        model=good[0].model and good[0].model.base,
        peak=round(statistics.median(peaks)) if peaks else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        cores=good[0].device and good[0].device.cores,
        parameters=good[0].model and good[0].model.parameters,
        trainable=good[0].model and good[0].model.trainable,
        settings=_settings(good[0]),
        ranks=_ranks(good[0]),
    )


def _ranks(record: RunRecord) -> int:
    return max(1, len(record.ranks))


def _settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings on which a run's figures depend, as JSON has them."""
    return spell_nonfinite(json.loads(json.dumps(without(record.settings, IRRELEVANT), default=repr)))


def _figures(record: RunRecord) -> tuple[int | None, float | None]:
    """Return a run's memory peak in bytes, and its tokens per second."""
    return peak_memory(record, device_kind(record)), record.throughput and record.throughput.tokens_per_second


def check(runs: Runs, baseline: Path, tolerance: float) -> list[Verdict]:
    """Compare the runs with the baseline's run of the same name, without the number; repetitions by their median.

    A run of the baseline that is missing in `runs` fails the gate too: a method that no longer runs must not pass.

    Args:
        runs: Runs to compare.
        baseline: A file written by `save_baseline`.
        tolerance: Fraction, 0 to 1, by which memory may be higher or speed lower.

    Raises:
        ValueError: if `baseline` is not such a file.
    """
    entries = _read_baseline(baseline).runs
    groups: dict[str, list[RunRecord]] = {}
    verdicts: list[Verdict] = []
    for file, record in runs:
        if isinstance(record, str):
            verdicts.append(Verdict(run_name(file, record), "not comparable", f"not comparable: {record}"))
        else:
            groups.setdefault(method_name(record.name), []).append(record)
    verdicts += [_verdict(records, entries.get(name), tolerance) for name, records in groups.items()]
    gone = entries.keys() - {method_name(run_name(file, record)) for file, record in runs}
    sentence = "not comparable: the baseline has it, but no run of that name was given"
    return [*verdicts, *(Verdict(name, "not comparable", sentence) for name in entries if name in gone)]


def _read_baseline(path: Path) -> _Baseline:
    if path.exists() and not path.is_file():  # reading a pipe may not end
        raise ValueError(f"{path} is no file, so it is no baseline; save one with --save_baseline.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a baseline ({error}); save one with --save_baseline.") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != BASELINE_SCHEMA:
        raise ValueError(
            f"{path} is a baseline of schema {schema}, and this version reads {BASELINE_SCHEMA}; save it again."
        )
    try:
        return parse_as(document, _Baseline, "baseline")
    except ValueError as error:
        raise ValueError(f"{path} is not a valid baseline: {error}; correct it, or save it again.") from error


def _verdict(records: list[RunRecord], entry: _Entry | None, tolerance: float) -> Verdict:
    """Return the verdict on the repetitions of one run."""
    first = records[0]
    name = first.name if len(records) == 1 else f"{method_name(first.name)} ({len(records)} runs)"
    wrong = next((record for record in records if record.status != "ok"), None)
    if entry is None and wrong is None:
        return Verdict(name, "new", "new: the baseline does not have it (ok)")
    if wrong is not None:
        return _verdict_on_failure(name, wrong, entry)
    assert entry is not None
    for record in records:
        if (sentence := _not_finite(record)) is not None:
            return Verdict(name, "worse", sentence)
        if (sentence := _difference(record, entry)) is not None:
            return Verdict(name, "not comparable", f"not comparable: {sentence}")
    if entry.status != "ok":
        return Verdict(name, "better", f"better: ok where the baseline is {entry.status}")
    return _compare(name, records, entry, tolerance)


def _verdict_on_failure(name: str, record: RunRecord, entry: _Entry | None) -> Verdict:
    """Return the verdict on a run that did not end well: an OOM or a refusal may stay, a failure never passes."""
    if entry is None and record.status != "failed":
        return Verdict(name, "new", f"new: the baseline does not have it ({record.status})")
    if entry is None:
        return Verdict(name, "worse", f"worse: failed, and the baseline does not have it: {record.reason}")
    if record.status == entry.status != "failed":
        return Verdict(name, "within tolerance", f"{record.status}, as in the baseline")
    result: Result = "worse" if entry.status in ("ok", record.status) else "not comparable"
    where = "as" if record.status == entry.status else "where"
    return Verdict(name, result, f"{result}: {record.status} {where} the baseline is {entry.status}: {record.reason}")


def _not_finite(record: RunRecord) -> str | None:
    """Return a sentence on a loss that is no number: such a run is no result, however fast it is."""
    scores = {f"{name} {moment}": value for moment, found in record.outcome.items() for name, value in found.items()}
    wrong = [f"{name} training is {value}" for name, value in scores.items() if not math.isfinite(value)]
    return f"worse: {record.name} diverged, since its {', '.join(wrong)}" if wrong else None


def _difference(record: RunRecord, entry: _Entry) -> str | None:
    """Return what makes the run another than the baseline's; None if they can be compared.

    On another device, with another model or other settings, a change says nothing. It fails rather than pass unseen.
    """
    if entry.status != "ok":
        return None
    device, model = record.device, record.model
    pairs = [
        ("device", device and device.name, entry.device, True),
        ("cores", device and device.cores, entry.cores, entry.cores is not None),
        ("model", model and model.base, entry.model, True),
        ("parameters", model and model.parameters, entry.parameters, entry.parameters is not None),
        ("trainable", model and model.trainable, entry.trainable, entry.trainable is not None),
        ("ranks", _ranks(record), entry.ranks, entry.ranks is not None),
    ]
    for what, now, was, known in pairs:
        if known and now != was:
            return f"{what} {now} where the baseline has {was}"
    if entry.settings is None:
        return None
    now, was = flat(_settings(record)), flat(entry.settings)
    changed = [key for key in sorted({*now, *was}) if now.get(key, ABSENT) != was.get(key, ABSENT)]
    told = [f"{key} {now.get(key, ABSENT)} where the baseline has {was.get(key, ABSENT)}" for key in changed[:3]]
    more = f", and {len(changed) - 3} other settings" if len(changed) > 3 else ""
    return f"{', '.join(told)}{more}" if told else None


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys."""
    if not isinstance(settings, dict) or not settings:
        return {path: settings} if path else {}
    nested = (flat(value, f"{path}.{key}" if path else str(key)) for key, value in settings.items())
    return {key: value for part in nested for key, value in part.items()}


def _compare(name: str, records: list[RunRecord], entry: _Entry, tolerance: float) -> Verdict:
    figures = [_figures(record) for record in records]
    peak, speed = (_median(values) for values in zip(*figures, strict=True))
    found = [
        _compare_figure("memory", peak, entry.peak, tolerance, -1, lambda size: format_bytes(round(size))),
        _compare_figure("tokens/s", speed, entry.tokens_per_second, tolerance, 1, "{:,.1f}".format),
    ]
    known = [one for one in found if one is not None]
    if not known:
        return Verdict(name, "not comparable", "not comparable: neither memory nor speed was measured")
    results: list[Result] = [result for result, _ in known]
    return Verdict(name, max(results, key=_ORDER.index), "; ".join(sentence for _, sentence in known))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _compare_figure(
    what: str, now: float | None, was: float | None, tolerance: float, sign: int, form: Callable[[float], str]
) -> tuple[Result, str] | None:
    """Compare one figure; return its result and a sentence, or None if neither side measured it.

    `sign` is 1 if higher is better, -1 if lower is.
    """
    if now is None and was is None:
        return None
    if now is None or was is None:
        return "not comparable", f"{what} not comparable: it was measured only {'now' if was is None else 'then'}"
    gain, allowed = sign * (now - was), tolerance * was
    # In this order, a NaN in a baseline written by hand is "worse": every comparison with it is False.
    result = "better" if gain > allowed else "within tolerance" if gain >= -allowed else "worse"
    change = f" ({now / was - 1:+.1%})" if was else ""
    return result, f"{what} {result}: {form(now)}, was {form(was)}{change}"
