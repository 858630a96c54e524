"""A gate that fails when memory or speed became worse than a baseline's."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lit_sparse_profiling.documents import typed
from lit_sparse_profiling.reconcile import amount
from lit_sparse_profiling.record import RunRecord, Status
from lit_sparse_profiling.run_folders import Runs, kind_of, likeness, method_of, name_of, peak_of

BASELINE_SCHEMA = 1


def share(text: str) -> float:
    """A share written as "5%" or "0.05".

    Raises:
        ValueError: if it is written otherwise, or is none from 0 up; without "%" it must be below 1.
    """
    number = text.strip().removesuffix("%").rstrip()
    percent = text.strip().endswith("%")
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number) and (percent or float(number) < 1):
        return float(number) / (100 if percent else 1)
    raise ValueError(f"A tolerance of {text!r} was asked for, but it is a share; write it as 5% or as 0.05.")


Result = Literal["within tolerance", "better", "worse", "new", "not comparable"]
_ORDER: tuple[Result, ...] = ("within tolerance", "better", "worse", "not comparable")


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one run, with the numbers that it says it for."""

    run: str
    result: Result
    sentence: str

    @property
    def failed(self) -> bool:
        """Whether the gate fails for it."""
        return self.result in ("worse", "not comparable")


@dataclass(frozen=True)
class _Entry:
    """What a baseline knows of a run: medians of its repetitions that ended well."""

    status: Status
    device: str | None = None
    model: str | None = None
    peak: int | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class _Baseline:
    schema: int
    runs: dict[str, _Entry]


def save_baseline(runs: Runs, path: Path) -> None:
    """Write what `check` compares with, at one stroke. Runs are known by their names without the number.

    Raises:
        ValueError: if a record cannot be read, if runs of one name are no repetitions of one another, or if there is no
            folder for the file.
    """
    groups: dict[str, list[RunRecord]] = {}
    for _, record in runs:
        if isinstance(record, str):
            raise ValueError(f"A baseline of all runs was asked for, but one cannot be read: {record}")
        groups.setdefault(method_of(record.name), []).append(record)
    entries = {name: _entry(records) for name, records in groups.items()}
    if not path.parent.is_dir():
        raise ValueError(f"A baseline was to be saved as {path}, but there is no folder {path.parent}; make it first.")
    document = json.dumps(asdict(_Baseline(BASELINE_SCHEMA, entries)), indent=1, allow_nan=False) + "\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(document, encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _entry(records: list[RunRecord]) -> _Entry:
    good = [record for record in records if record.status == "ok"]
    if not good:
        return _Entry(records[0].status)
    if len({likeness(record) for record in good}) > 1:
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
    )


def _figures(record: RunRecord) -> tuple[int | None, float | None]:
    """A run's peak in bytes, and its tokens a second."""
    return peak_of(record, kind_of(record)), record.throughput and record.throughput.tokens_per_second


def check(runs: Runs, baseline: Path, tolerance: float) -> list[Verdict]:
    """Hold each run against the baseline's of its name (without the number), and find those that are gone.

    Args:
        baseline: A file that `save_baseline` wrote.
        tolerance: A share, 0 to 1: by how much memory may be higher, and speed lower.

    Raises:
        ValueError: if `baseline` is no such file.
    """
    entries = _read_baseline(baseline).runs
    verdicts = [_verdict(name_of(file, record), record, entries, tolerance) for file, record in runs]
    gone = entries.keys() - {method_of(name_of(file, record)) for file, record in runs}
    sentence = "not comparable: the baseline has it, but no run of that name was given"
    return [*verdicts, *(Verdict(name, "not comparable", sentence) for name in entries if name in gone)]


def _read_baseline(path: Path) -> _Baseline:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a baseline ({error}); save one of runs that are good.") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != BASELINE_SCHEMA:
        raise ValueError(
            f"{path} is a baseline of schema {schema}, and this version reads {BASELINE_SCHEMA}; save it anew."
        )
    try:
        return typed(document, _Baseline, "baseline")
    except ValueError as error:
        raise ValueError(f"{path} is no valid baseline: {error}; correct it, or save it anew.") from error


def _verdict(name: str, record: RunRecord | str, entries: dict[str, _Entry], tolerance: float) -> Verdict:
    entry = entries.get(method_of(name))
    if isinstance(record, str):
        return Verdict(name, "not comparable", f"not comparable: {record}")
    if entry is None:
        return Verdict(name, "new", f"new: the baseline does not have it ({record.status})")
    if "ok" not in (record.status, entry.status) and record.status == entry.status:
        return Verdict(name, "within tolerance", f"{record.status}, as in the baseline")
    if record.status != "ok":
        result: Result = "worse" if entry.status == "ok" else "not comparable"
        return Verdict(name, result, f"{result}: {record.status} where the baseline is {entry.status}: {record.reason}")
    if entry.status != "ok":
        return Verdict(name, "better", f"better: ok where the baseline is {entry.status}")
    return _compared(name, record, entry, tolerance)


def _compared(name: str, record: RunRecord, entry: _Entry, tolerance: float) -> Verdict:
    device, model = record.device and record.device.name, record.model and record.model.base
    for what, now, was in (("device", device, entry.device), ("model", model, entry.model)):
        if now != was:
            return Verdict(name, "not comparable", f"not comparable: {what} {now} where the baseline has {was}")
    peak, speed = _figures(record)
    found = [
        _against("memory", peak, entry.peak, tolerance, -1, lambda size: amount(round(size))),
        _against("tokens/s", speed, entry.tokens_per_second, tolerance, 1, "{:,.1f}".format),
    ]
    known = [one for one in found if one is not None]
    if not known:
        return Verdict(name, "not comparable", "not comparable: neither memory nor speed was measured")
    results: list[Result] = [result for result, _ in known]
    return Verdict(name, max(results, key=_ORDER.index), "; ".join(sentence for _, sentence in known))


def _against(
    what: str, now: float | None, was: float | None, tolerance: float, sign: int, form: Callable[[float], str]
) -> tuple[Result, str] | None:
    """One figure's result and sentence; `sign` is 1 if more is better. None if it was measured on neither side."""
    if now is None and was is None:
        return None
    if now is None or was is None:
        return "not comparable", f"{what} not comparable: it was measured only {'now' if was is None else 'then'}"
    gain, allowed = sign * (now - was), tolerance * was
    # A NaN in a baseline written by hand is neither: it must not pass
    result = "better" if gain > allowed else "within tolerance" if gain >= -allowed else "worse"
    change = f" ({now / was - 1:+.1%})" if was else ""
    return result, f"{what} {result}: {form(now)}, was {form(was)}{change}"
