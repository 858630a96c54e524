"""Runs side by side, one run in detail, and a gate that fails when memory or speed became worse.

Everything is read from records; nothing is measured here.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_sparse_profiling.documents import typed
from lit_sparse_profiling.reconcile import amount, findings, reconcile, residue
from lit_sparse_profiling.record import RunRecord, Status

RECORD = "record.json"
BASELINE_SCHEMA = 1
UNREADABLE = "unreadable"
GIB = 2**30
PIPE_WIDTH = 160
"""Characters in a line where the output is no terminal that has a width."""

Runs = Sequence[tuple[Path, RunRecord | str]]
"""Files of records, each with its record or with the sentence that says why there is none."""


def report(
    runs: list[str],
    markdown: bool = False,
    check: str | None = None,
    tolerance: str = "5%",
    save_baseline: str | None = None,
) -> int:
    """Compare runs on the terminal, and hold them against a baseline.

    Args:
        runs: Folders of runs, folders that hold such folders, or files of records.
        markdown: Print the table as Markdown.
        check: A baseline: its runs must not have become worse.
        tolerance: By how much memory and speed may be worse than the baseline's, such as 5% or 0.05.
        save_baseline: Keep these runs' figures in this file, as a baseline.

    Returns:
        The exit status: 1 if the gate failed, else 0.

    Raises:
        ValueError: if a path has no record, or the baseline or the tolerance cannot be read.
    """
    allowed = share(tolerance)
    read = read_runs([Path(run) for run in runs])
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    _print_runs(read, markdown, console)
    passed = check is None or _print_gate(read, Path(check), allowed, console)
    if save_baseline is not None:
        _save(read, save_baseline, console)
    return 0 if passed else 1


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


# ---- runs


def read_runs(paths: Sequence[Path]) -> list[tuple[Path, RunRecord | str]]:
    """The records under `paths` with their files, each file once, and a sentence in place of those that cannot be read.

    A path is the folder of a run, a record's file, or a folder with run folders in it or in its folders.

    Raises:
        ValueError: if no path is given, or if there is no record under one.
    """
    if not paths:
        raise ValueError("A report of no runs was asked for; give folders of runs, such as runs/smt-1.")
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _record_files(path):
            files.setdefault(file.resolve(), file)
    return [(file, _read(file)) for file in files.values()]


def _record_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / RECORD).is_file():
        return [path / RECORD]
    found = [*path.glob(f"*/{RECORD}"), *path.glob(f"*/*/{RECORD}")]
    if not found:
        raise ValueError(f"{path} was given, but there is no {RECORD} in it or two folders deep; give a run's folder.")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[str | int]:
    words = re.split(r"(\d+)", str(path))
    return [int(word) if i % 2 else word for i, word in enumerate(words)]


def _read(file: Path) -> RunRecord | str:
    try:
        return RunRecord.read(file)
    except (ValueError, OSError) as error:
        return str(error)


def _name(file: Path, record: RunRecord | str) -> str:
    if isinstance(record, RunRecord):
        return record.name
    return file.resolve().parent.name if file.name == RECORD else file.stem


def _method(name: str) -> str:
    """A run's name without its number."""
    return re.sub(r"-\d+$", "", name)


# ---- the table


@dataclass(frozen=True)
class _Row:
    """One run, or repetitions of one; `records` is empty if there is none to be read."""

    label: str
    status: str
    records: list[RunRecord]


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[_Row], str]
    number: bool = True


def table(runs: Runs) -> Table:
    """Runs as rows; what no run has is no column.

    Runs of one name (without the number), model, device and settings (without seeds) that ended alike are repetitions.
    They share a row: the median, and [lowest, highest] if they differ.
    """
    title, columns, rows = _layout(runs)
    out = Table(title=Text(title), box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left")
    for column in columns:
        justify = "right" if column.number else "left"
        out.add_column(Text(column.header), justify=justify, vertical="top", overflow="fold")
    for row in rows:
        out.add_row(*(Text(column.cell(row)) for column in columns))
    return out


def markdown(runs: Runs) -> str:
    """The same table in Markdown."""
    title, columns, rows = _layout(runs)
    lines = [[column.header for column in columns], ["---:" if column.number else "---" for column in columns]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    escaped = [[cell.replace("\n", " ").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join([*([title, ""] if title else []), *(f"| {' | '.join(line)} |" for line in escaped)])


def _layout(runs: Runs) -> tuple[str, list[_Column], list[_Row]]:
    rows = _rows(runs)
    shared, told = [], []
    for column in (_Column("model", _models, number=False), _Column("device", _devices, number=False)):
        values = {column.cell(row) for row in rows if row.records} - {""}
        if len(values) == 1:
            shared.append(f"{column.header} {values.pop()}")
        else:
            told.append(column)
    columns = [
        _Column("run", lambda row: row.label, number=False),
        _Column("status", lambda row: row.status, number=False),
        *told,
        _Column("trainable", _trainable),
        *_numbers([record for row in rows for record in row.records]),
    ]
    return ", ".join(shared), [column for column in columns if any(map(column.cell, rows))], rows


def _rows(runs: Runs) -> list[_Row]:
    groups: dict[str, list[tuple[Path, RunRecord | str]]] = {}
    for file, record in runs:
        key = str(file) if isinstance(record, str) else record.status + _likeness(record)
        groups.setdefault(key, []).append((file, record))
    labels = [_label(group) for group in groups.values()]
    return [
        # The same name in several folders, or for several settings: only the folder tells such runs apart
        _row(label if labels.count(label) == 1 else f"{label} in {group[0][0].parent}", group)
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _label(group: Runs) -> str:
    name = _name(*group[0])
    return name if len(group) == 1 else f"{_method(name)}\n({len(group)} runs)"


def _row(label: str, group: Runs) -> _Row:
    records = [record for _, record in group if isinstance(record, RunRecord)]
    return _Row(label, records[0].status if records else UNREADABLE, records)


def _likeness(record: RunRecord) -> str:
    """What runs have in common that are repetitions of one another."""
    device, model = record.device, record.model
    where = None if device is None else [device.kind, device.name, device.cores]
    what = None if model is None else [model.base, model.parameters]
    return json.dumps([_method(record.name), where, what, _seedless(record.settings)], sort_keys=True, default=repr)


def _seedless(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _seedless(item) for key, item in settings.items() if key not in ("seed", "seed_everything")}
    return [_seedless(item) for item in settings] if isinstance(settings, list) else settings


def _models(row: _Row) -> str:
    return ", ".join(dict.fromkeys(record.model.base for record in row.records if record.model))


def _devices(row: _Row) -> str:
    return ", ".join(dict.fromkeys(record.device.name for record in row.records if record.device))


def _trainable(row: _Row) -> str:
    models = [record.model for record in row.records if record.model]
    counts = _spread([model.trainable for model in models], ".0f")
    return counts and f"{counts}\n{_spread([model.trainable_share * 100 for model in models], '.2f')}%"


def _numbers(records: list[RunRecord]) -> list[_Column]:
    columns = [
        _number("tokens/s", lambda r: r.throughput and r.throughput.tokens_per_second, ",.1f"),
        _number("median\nstep ms", lambda r: r.throughput and _times(r.throughput.median_step, 1e3), ".1f"),
        _number("peak GiB\nreserved", lambda r: _times(_peak(r, "cuda"), 1 / GIB), ".2f"),
        _number("peak GiB\nresident", lambda r: _times(_peak(r, "cpu"), 1 / GIB), ".2f"),
        _number("residue\n%", lambda r: _times(residue(r), 100), ".1f"),
        _number("select.\ns", _selection_seconds, ".1f"),
        _number("select.\npeak GiB", lambda r: _times(_peak(r, _kind(r), "selection"), 1 / GIB), ".2f"),
        _number("J/step", _joules_per_step, ".1f"),
        _number("utiliz.\n%", lambda r: _times(r.utilization, 100), ".1f"),
    ]
    for loss in dict.fromkeys(_loss(record) for record in records):
        for moment in ("before", "after") if loss else ():
            columns.append(_number(f"{loss}\n{moment}".replace("_", "\n"), _outcome(moment, str(loss)), ".3f"))
    return columns


def _number(header: str, value: Callable[[RunRecord], float | None], form: str) -> _Column:
    return _Column(header, lambda row: _spread([v for r in row.records if (v := value(r)) is not None], form))


def _spread(values: list[float], form: str) -> str:
    """The median, and below it the range if there is one; a NaN among the values hides behind no median."""
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    low, median, high = (_spelled(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{median}\n[{low},\n{high}]" if low != high else median


def _spelled(value: float, form: str) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{form}}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _kind(record: RunRecord) -> str:
    return "cpu" if record.device is None else record.device.kind


def _peak(record: RunRecord, kind: str, phase: str | None = None) -> int | None:
    """The highest peak of a run, or of one of its phases: reserved on a GPU, resident elsewhere."""
    if kind != _kind(record):
        return None
    phases = [p for p in record.phases if phase in (None, p.name)]
    peaks = [p.peak_reserved if kind == "cuda" else p.peak_rss for p in phases]
    if phase is None and record.memory is not None:
        allocator = record.memory.allocator
        peaks.append(record.memory.peak_resident if kind == "cpu" else allocator and allocator.reserved)
    return max((peak for peak in peaks if peak is not None), default=None)


def _selection_seconds(record: RunRecord) -> float | None:
    return next((phase.seconds for phase in record.phases if phase.name == "selection"), None)


def _joules_per_step(record: RunRecord) -> float | None:
    if record.driver is None or record.driver.joules is None or record.throughput is None:
        return None
    return record.driver.joules / record.throughput.steps


def _loss(record: RunRecord) -> str | None:
    """The first metric of the run that is a loss."""
    names = [name for moment in ("after", "before") for name in record.outcome.get(moment, {})]
    return next((name for name in names if name.endswith("loss")), None)


def _outcome(moment: str, metric: str) -> Callable[[RunRecord], float | None]:
    return lambda record: record.outcome.get(moment, {}).get(metric)


# ---- one run


def details(record: RunRecord) -> Table:
    """Where a run's memory went, from the weights up to what the driver says; below it findings and the run's notes."""
    lines, sentences = reconcile(record), [*findings(record), *record.notes]
    if not any(line.name == "allocator requested" for line in lines):
        sentences.append("The allocator was not read in a step, so that nothing above is held against it.")
    out = Table(
        title=Text(f"{record.name}: where the memory went"), box=box.SIMPLE_HEAD, pad_edge=False, caption_style=""
    )
    out.add_column("what", overflow="fold")
    out.add_column("bytes", justify="right", no_wrap=True)
    out.add_column("", justify="right", no_wrap=True)
    out.add_column("note", overflow="fold", max_width=60)
    for line in lines:
        cells = (line.name, f"{line.bytes:,}", amount(line.bytes), line.note)
        out.add_row(*map(Text, cells), style="bold" if line.total else None, end_section=line.total)
    out.caption = Text("\n".join(sentences or ["Nothing of note: the ledgers add up."]), justify="left")
    return out


# ---- the gate


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
        groups.setdefault(_method(record.name), []).append(record)
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
    if len({_likeness(record) for record in good}) > 1:
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
    return _peak(record, _kind(record)), record.throughput and record.throughput.tokens_per_second


def check(runs: Runs, baseline: Path, tolerance: float) -> list[Verdict]:
    """Hold each run against the baseline's of its name (without the number), and find those that are gone.

    Args:
        baseline: A file that `save_baseline` wrote.
        tolerance: A share, 0 to 1: by how much memory may be higher, and speed lower.

    Raises:
        ValueError: if `baseline` is no such file.
    """
    entries = _read_baseline(baseline).runs
    verdicts = [_verdict(_name(file, record), record, entries, tolerance) for file, record in runs]
    gone = entries.keys() - {_method(_name(file, record)) for file, record in runs}
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
    entry = entries.get(_method(name))
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


# ---- printing


def _print_runs(runs: Runs, as_markdown: bool, console: Console) -> None:
    if as_markdown:
        _print(console, markdown(runs))
    else:
        console.print(table(runs))
    for file, record in runs:
        for remark in _remarks(file, record, alone=len(runs) == 1):
            _print(console, remark)
    alone = runs[0][1] if len(runs) == 1 else None
    if isinstance(alone, RunRecord) and reconcile(alone) and not as_markdown:
        console.print(details(alone))


def _remarks(file: Path, record: RunRecord | str, alone: bool) -> Iterator[str]:
    """What the table has no room for: why a run did not end well, and whether its details are worth a look."""
    if isinstance(record, str):
        yield f"{_name(file, record)}: {UNREADABLE}: {record}"
        return
    if record.reason is not None:
        yield f"{record.name}: {record.status}: {record.reason}"
    count = len(findings(record))
    if count and not alone:
        yield f"{record.name}: {count} of its memory figures are not as they should be; report {file.parent} alone."


def _print_gate(runs: Runs, baseline: Path, tolerance: float, console: Console) -> bool:
    verdicts = check(runs, baseline, tolerance)
    for verdict in verdicts:
        _print(console, f"{'FAILED' if verdict.failed else 'passed'}  {verdict.run}: {verdict.sentence}")
    failed = sum(verdict.failed for verdict in verdicts)
    outcome = f"failed for {failed} of {len(verdicts)}" if failed else f"passed for all {len(verdicts)}"
    _print(console, f"Against {baseline} within {tolerance:.1%}: {outcome}.")
    return not failed


def _save(runs: Runs, path: str, console: Console) -> None:
    save_baseline(runs, Path(path))
    _print(console, f"Baseline of {len(runs)} runs: {path}")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
