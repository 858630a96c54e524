"""Tables of runs side by side and of one run in detail, from their records."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_sparse_profiling import utilization, walltime
from lit_sparse_profiling.documents import plain_markdown, printable
from lit_sparse_profiling.figures_of_one import every_chosen
from lit_sparse_profiling.gate import check, parse_share, save_baseline
from lit_sparse_profiling.kernel_times import table as kernel_table
from lit_sparse_profiling.page import write_page
from lit_sparse_profiling.peft_export import write_results
from lit_sparse_profiling.reconcile import findings, format_bytes, reconcile, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import (
    LAST,
    RECORD,
    SETTINGS,
    UNREADABLE,
    Row,
    Runs,
    check_readable,
    device_kind,
    grouped,
    peak_memory,
    read_runs,
    run_name,
    unrecorded,
)
from lit_sparse_profiling.sections import Large, StateBytes

GIB = 2**30
PIPE_WIDTH = 160
"""Characters per line if the output is not a terminal."""


def report(
    runs: list[str],
    markdown: bool = False,
    check: str | None = None,
    tolerance: str = "5%",
    save_baseline: str | None = None,
    output: str | None = None,
    cards: Mapping[int, int] | None = None,
    card: int | None = None,
    peft_results: str | None = None,
    command: str = "",
) -> int:
    """Print a table that compares runs, or write a page of them, and check them against a baseline.

    Args:
        runs: Folders of runs, folders that hold such folders, or files of records.
        markdown: Print the table as Markdown.
        check: Baseline file to check the runs against.
        tolerance: Fraction by which memory and speed may be worse than the baseline's, such as 5% or 0.05.
        save_baseline: File in which to save these runs' figures as a baseline.
        output: HTML file to write a page to, in place of the table.
        cards: MiB by the GB under which a card is sold, which the page draws.
        card: GB of the user's own card, one of `cards`; by default the records' device.
        peft_results: Folder to write the runs to as results of PEFT's method comparison.
        command: Command line, for the page's head.

    Returns:
        Exit status: 1 if the check failed, else 0.

    Raises:
        ValueError: if a path has no record, if no record can be read, if the baseline or the tolerance cannot, or if a
            file cannot be written.
    """
    allowed = parse_share(tolerance)
    read = read_runs([Path(run) for run in runs])
    check_readable(read, "report")
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if output is None or markdown:
        _print_runs(read, markdown, console)
    for folder in [] if markdown else unrecorded([Path(run) for run in runs]):
        saved = folder / LAST
        going_on = f"goes on with lit-sparse fit --config {folder / SETTINGS} --ckpt_path {saved}"
        going_on = going_on if saved.is_file() else "has no checkpoint to go on from"
        _print(console, f"{folder} has no {RECORD}: it was killed, and {going_on}; or it still runs.")
    if output is not None:
        write_page(read, Path(output), cards or {}, card, command)
        size = Path(output).stat().st_size / 1e6
        _print(console, f"Page of {len(read)} runs: {output} ({size:.1f} MB, opens offline)")
    if peft_results is not None:
        _print(console, f"Results in PEFT's format: {write_results(read, Path(peft_results))} files in {peft_results}")
    passed = check is None or _print_gate(read, Path(check), allowed, console)
    if save_baseline is not None:
        _save(read, save_baseline, console)
    return 0 if passed else 1


# ---- the table


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[Row], str]
    number: bool = True


def table(runs: Runs) -> Table:
    """Return a table with a row per run, without columns that no run has.

    Runs with the same name (without its number), model, device, settings (without seeds) and status are repetitions.
    They share a row, which shows the median, and [lowest, highest] if these differ.
    """
    return _table(*_layout(runs))


def tables(runs: Runs, width: int) -> Iterator[Table]:
    """Yield the same table in parts of at most `width` columns of text: no word or figure is broken."""
    title, (name, *others), rows = _layout(runs)
    parts: list[list[_Column]] = [[name]]
    for column in others:
        if len(parts[-1]) > 1 and sum(_width(each, rows) + 1 for each in [*parts[-1], column]) > width:
            parts.append([name])
        parts[-1].append(column)
    for number, part in enumerate(parts):
        yield _table("" if number else title, part, rows)


def _width(column: _Column, rows: list[Row]) -> int:
    """Return the length of the longest word in a column; text wraps at spaces."""
    texts = [column.header, *map(column.cell, rows)]
    return max(len(word) for text in texts for word in [*text.split(), ""])


def _table(title: str, columns: list[_Column], rows: list[Row]) -> Table:
    out = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left")
    for column in columns:
        justify = "right" if column.number else "left"
        out.add_column(Text(column.header), justify=justify, vertical="top", overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(column.cell(row))) for column in columns))
    return out


def markdown(runs: Runs) -> str:
    """Return the same table in Markdown."""
    title, columns, rows = _layout(runs)
    lines = [[column.header for column in columns], ["---:" if column.number else "---" for column in columns]]
    lines += [[column.cell(row) for column in columns] for row in rows]
    escaped = [[plain_markdown(cell.replace("\n", " ")) for cell in line] for line in lines]
    return "\n".join(
        [*([plain_markdown(title), ""] if title else []), *(f"| {' | '.join(line)} |" for line in escaped)]
    )


def _layout(runs: Runs) -> tuple[str, list[_Column], list[Row]]:
    rows = grouped(runs)
    shared, told = [], []
    for column in (_Column("model", _models, number=False), _Column("device", _devices, number=False)):
        # A model or device that all runs share is in the title, and takes no column.
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


def _models(row: Row) -> str:
    return ", ".join(dict.fromkeys(record.model.base for record in row.records if record.model))


def _devices(row: Row) -> str:
    return ", ".join(dict.fromkeys(record.device.name for record in row.records if record.device))


def _trainable(row: Row) -> str:
    models = [record.model for record in row.records if record.model]
    counts = _spread([model.trainable for model in models], ".0f")
    return counts and f"{counts}\n{_spread([model.trainable_share * 100 for model in models], '.2f')}%"


def _numbers(records: list[RunRecord]) -> list[_Column]:
    columns = [
        _number("tokens/s", lambda r: r.throughput and r.throughput.tokens_per_second, ",.1f"),
        _number("with\npadding", _padded_rate, ",.1f"),
        _number("median\nstep ms", lambda r: r.throughput and _scale(r.throughput.median_step, 1e3), ".1f"),
        *map(_ratio, dict.fromkeys(record.pair.against for record in records if record.pair is not None)),
        _number("peak GiB\nreserved", lambda r: _scale(peak_memory(r, "cuda"), 1 / GIB), ".2f"),
        _number("peak GiB\nresident", lambda r: _scale(peak_memory(r, "cpu"), 1 / GIB), ".2f"),
        _number("residue\n%", lambda r: _scale(residue(r), 100), ".1f"),
        _number("select.\ns", _selection_seconds, ".1f"),
        _number("select.\npeak GiB", lambda r: _scale(peak_memory(r, device_kind(r), "selection"), 1 / GIB), ".2f"),
        _number("J/step", lambda r: r.joules_per_step, ".1f"),
        _number("utiliz.\n%", lambda r: _scale(r.utilization, 100), ".1f"),
    ]
    for loss in dict.fromkeys(_loss_name(record) for record in records):
        for moment in ("before", "after") if loss else ():
            columns.append(_number(f"{loss}\n{moment}".replace("_", "\n"), _outcome(moment, str(loss)), ".3f"))
    return columns


def _padded_rate(record: RunRecord) -> float | None:
    """Return token positions per second; None if there is no padding, since tokens/s says the same."""
    throughput = record.throughput
    if throughput is None or throughput.tokens == throughput.padded_tokens:
        return None
    return throughput.padded_tokens_per_second


def _ratio(against: str) -> _Column:
    """Return the column of step times relative to the run `against`. Of repetitions, the last is shown."""

    def cell(row: Row) -> str:
        pairs = [record.pair for record in row.records if record.pair is not None and record.pair.against == against]
        return f"{pairs[-1].median:.3f}\n[{pairs[-1].low:.3f},\n{pairs[-1].high:.3f}]" if pairs else ""

    return _Column(f"step /\n{against}", cell)


def _number(header: str, value: Callable[[RunRecord], float | None], form: str) -> _Column:
    return _Column(header, lambda row: _spread([v for r in row.records if (v := value(r)) is not None], form))


def _spread(values: list[float], form: str) -> str:
    """Format the median, and the range below it if there is one. One NaN makes the result "nan": no median hides it."""
    if not values:
        return ""
    if any(map(math.isnan, values)):
        return "nan"
    low, median, high = (_format_number(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{median}\n[{low},\n{high}]" if low != high else median


def _format_number(value: float, form: str) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:{form}}"


def _scale(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _selection_seconds(record: RunRecord) -> float | None:
    return next((phase.seconds for phase in record.phases if phase.name == "selection"), None)


def _loss_name(record: RunRecord) -> str | None:
    """Return the name of the run's first metric that is a loss."""
    names = [name for moment in ("after", "before") for name in record.outcome.get(moment, {})]
    return next((name for name in names if name.endswith("loss")), None)


def _outcome(moment: str, metric: str) -> Callable[[RunRecord], float | None]:
    return lambda record: record.outcome.get(moment, {}).get(metric)


# ---- one run


def details(record: RunRecord) -> Table:
    """Return a table of a run's memory, from the weights up to the driver's figure, with findings and notes below."""
    lines, sentences = reconcile(record), [*findings(record), *utilization.findings(record), *record.notes]
    if not any(line.name == "allocator requested" for line in lines):
        sentences.append("The allocator was not read in a step, so that nothing above is compared with it.")
    out = Table(
        title=Text(f"{printable(record.name)}: where the memory went"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption_style="",
    )
    out.add_column("what", overflow="fold")
    out.add_column("bytes", justify="right", no_wrap=True)
    out.add_column("", justify="right", no_wrap=True)
    out.add_column("note", overflow="fold", max_width=60)
    for line in lines:
        cells = (line.name, f"{line.bytes:,}", format_bytes(line.bytes), line.note)
        out.add_row(*map(Text, cells), style="bold" if line.total else None, end_section=line.total)
    sentences = sentences or ["Nothing of note: the ledgers add up."]
    sentences += filter(None, [utilization.describe(record)])
    out.caption = Text(printable("\n".join(sentences)), justify="left")
    return out


def largest(tensors: list[Large]) -> Table:
    """Return a table of the largest tensors that were alive at the peak of the examined step."""
    out = Table(title=Text("The largest tensors at the peak"), box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("size", "counted as", "shape", "made by", "at"):
        out.add_column(header, justify="right" if header == "size" else "left", overflow="fold")
    for one in tensors:
        shape = f"{one.dtype} {' x '.join(map(str, one.shape))}"
        told = (format_bytes(one.bytes), one.category, shape, one.module, one.line)
        out.add_row(*(Text(printable(text)) for text in told))
    return out


def share_map(share: dict[str, dict[str, float]]) -> Table:
    """Return a table of the trained fraction of each matrix: a row per decoder layer, a column per role.

    Args:
        share: Trained fraction, 0 to 1, by layer and role. Higher fractions have a darker cell.
    """
    roles = sorted({role for layer in share.values() for role in layer})
    most = max((part for layer in share.values() for part in layer.values()), default=0.0)
    out = Table(title=Text("Trained share of each matrix"), box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("layer", *roles):
        out.add_column(Text(printable(header)), justify="right", no_wrap=True)
    for layer, parts in share.items():
        out.add_row(Text(printable(layer)), *(_shade(parts.get(role, 0.0), most) for role in roles))
    return out


def _shade(part: float, most: float) -> Text:
    if not part:
        return Text("-", style="dim")
    strength = round(215 * (1 - part / most))  # of white, so that the largest share is the darkest
    return Text(f"{part:.1%}", style=f"black on rgb(255,{40 + strength},{40 + strength})")


# ---- printing


def _print_runs(runs: Runs, as_markdown: bool, console: Console) -> None:
    if as_markdown:
        _print(console, markdown(runs))
    else:
        for part in tables(runs, console.width):
            console.print(part)
    for file, record in runs:
        for remark in _remarks(file, record, alone=len(runs) == 1):
            _print(console, plain_markdown(remark) if as_markdown else remark)
    alone = runs[0][1] if len(runs) == 1 else None
    if isinstance(alone, RunRecord) and reconcile(alone) and not as_markdown:
        console.print(details(alone))
        if alone.memory is not None and alone.memory.largest:
            console.print(largest(alone.memory.largest))
        if alone.kernels is not None:
            console.print(kernel_table(alone.kernels))
    if isinstance(alone, RunRecord) and not as_markdown:
        for share in every_chosen(alone, "share"):
            console.print(share_map(share))


def _remarks(file: Path, record: RunRecord | str, alone: bool) -> Iterator[str]:
    """Yield sentences for which the table has no room: why a run did not end well, and how many findings it has."""
    if isinstance(record, str):
        yield f"{run_name(file, record)}: {UNREADABLE}: {record}"
        return
    if record.reason is not None:
        yield f"{record.name}: {record.status}: {record.reason}"
    if alone and record.states:
        yield describe_states(record.states)
    if alone and (told := walltime.describe(record)):
        yield told
    count = len(findings(record))
    if count and not alone:
        figures = "a memory figure is" if count == 1 else f"{count} memory figures are"
        yield f"{record.name}: {figures} not as expected: lit-sparse report {file.parent}"


def describe_states(noted: list[StateBytes]) -> str:
    """Return a sentence on whether optimizer and strategy state grew as the trainable set changed."""
    held = [state.optimizer + state.strategy for state in noted]
    low, high = format_bytes(min(held)), format_bytes(max(held))
    course = f"{low} each time" if min(held) == max(held) else f"{low} to {high}"
    return (
        f"Optimizer and strategy state, measured {len(held)} times, after each change of the trainable set: {course}."
    )


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
    # No markup: paths and messages contain brackets. Soft wrap: a line that is copied or grepped must stay one line.
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
