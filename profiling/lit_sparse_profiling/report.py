"""Runs side by side, and one run in detail.

Everything is read from records; nothing is measured here.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_sparse_profiling.gate import check, save_baseline, share
from lit_sparse_profiling.kernel_times import table as kernel_table
from lit_sparse_profiling.reconcile import amount, findings, reconcile, residue
from lit_sparse_profiling.record import RunRecord, StateBytes
from lit_sparse_profiling.run_folders import Runs, kind_of, likeness, method_of, name_of, peak_of, read_runs

UNREADABLE = "unreadable"
GIB = 2**30
PIPE_WIDTH = 160
"""Characters in a line where the output is no terminal that has a width."""


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
        key = str(file) if isinstance(record, str) else record.status + likeness(record)
        groups.setdefault(key, []).append((file, record))
    labels = [_label(group) for group in groups.values()]
    return [
        # The same name in several folders, or for several settings: only the folder tells such runs apart
        _row(label if labels.count(label) == 1 else f"{label} in {group[0][0].parent}", group)
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _label(group: Runs) -> str:
    name = name_of(*group[0])
    return name if len(group) == 1 else f"{method_of(name)}\n({len(group)} runs)"


def _row(label: str, group: Runs) -> _Row:
    records = [record for _, record in group if isinstance(record, RunRecord)]
    return _Row(label, records[0].status if records else UNREADABLE, records)


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
        _number("with\npadding", _padded, ",.1f"),
        _number("median\nstep ms", lambda r: r.throughput and _times(r.throughput.median_step, 1e3), ".1f"),
        *map(_ratio, dict.fromkeys(record.pair.against for record in records if record.pair is not None)),
        _number("peak GiB\nreserved", lambda r: _times(peak_of(r, "cuda"), 1 / GIB), ".2f"),
        _number("peak GiB\nresident", lambda r: _times(peak_of(r, "cpu"), 1 / GIB), ".2f"),
        _number("residue\n%", lambda r: _times(residue(r), 100), ".1f"),
        _number("select.\ns", _selection_seconds, ".1f"),
        _number("select.\npeak GiB", lambda r: _times(peak_of(r, kind_of(r), "selection"), 1 / GIB), ".2f"),
        _number("J/step", _joules_per_step, ".1f"),
        _number("utiliz.\n%", lambda r: _times(r.utilization, 100), ".1f"),
    ]
    for loss in dict.fromkeys(_loss(record) for record in records):
        for moment in ("before", "after") if loss else ():
            columns.append(_number(f"{loss}\n{moment}".replace("_", "\n"), _outcome(moment, str(loss)), ".3f"))
    return columns


def _padded(record: RunRecord) -> float | None:
    """Token positions a second, where some are padding."""
    throughput = record.throughput
    if throughput is None or throughput.tokens == throughput.padded_tokens:
        return None
    return throughput.padded_tokens_per_second


def _ratio(against: str) -> _Column:
    """Step time over another's, with its interval; runs that were repeated show the last."""

    def cell(row: _Row) -> str:
        pairs = [record.pair for record in row.records if record.pair is not None and record.pair.against == against]
        return f"{pairs[-1].median:.3f}\n[{pairs[-1].low:.3f},\n{pairs[-1].high:.3f}]" if pairs else ""

    return _Column(f"step /\n{against}", cell)


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


def share_map(share: dict[str, dict[str, float]]) -> Table:
    """Which part of each matrix is trained: a row a decoder layer, a column a role, the darker the more."""
    roles = sorted({role for layer in share.values() for role in layer})
    most = max((part for layer in share.values() for part in layer.values()), default=0.0)
    out = Table(title=Text("Trained share of each matrix"), box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("layer", *roles):
        out.add_column(Text(header), justify="right", no_wrap=True)
    for layer, parts in share.items():
        out.add_row(Text(layer), *(_shaded(parts.get(role, 0.0), most) for role in roles))
    return out


def _shaded(part: float, most: float) -> Text:
    if not part:
        return Text("-", style="dim")
    strength = round(215 * (1 - part / most))  # of white, so that the largest share is the darkest
    return Text(f"{part:.1%}", style=f"black on rgb(255,{40 + strength},{40 + strength})")


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
        if alone.kernels is not None:
            console.print(kernel_table(alone.kernels))
    if isinstance(alone, RunRecord) and not as_markdown:
        for update in alone.updates:
            if share := update.get("chosen", {}).get("share"):
                console.print(share_map(share))


def _remarks(file: Path, record: RunRecord | str, alone: bool) -> Iterator[str]:
    """What the table has no room for: why a run did not end well, and whether its details are worth a look."""
    if isinstance(record, str):
        yield f"{name_of(file, record)}: {UNREADABLE}: {record}"
        return
    if record.reason is not None:
        yield f"{record.name}: {record.status}: {record.reason}"
    if alone and record.states:
        yield states(record.states)
    count = len(findings(record))
    if count and not alone:
        yield f"{record.name}: {count} of its memory figures are not as they should be; report {file.parent} alone."


def states(noted: list[StateBytes]) -> str:
    """Whether optimizer and strategy state grew as the trainable set changed, in a sentence."""
    held = [state.optimizer + state.strategy for state in noted]
    low, high = amount(min(held)), amount(max(held))
    course = f"{low} each time" if min(held) == max(held) else f"{low} to {high}"
    return f"State of optimizer and strategies, noted {len(held)} times, after each change of what trains: {course}."


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
