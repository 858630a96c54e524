"""The tables that a fit prints at its end: what it changed, what it took, and answers before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_sparse.callbacks.prediction import amount
from lit_sparse_profiling import utilization, walltime
from lit_sparse_profiling.documents import printable
from lit_sparse_profiling.kernel_times import table as kernel_table
from lit_sparse_profiling.reconcile import findings
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import INSTRUMENTED_PHASES, Predicted


def print_summary(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """Print what a fit changed and what it took as tables on the terminal."""
    console = console or Console()
    console.print(summary(record))
    if told := walltime.describe(record):
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if record.kernels is not None:
        console.print(kernel_table(record.kernels, rows=5))
    measured = filter(None, [utilization.describe(record)])
    for sentence in [*findings(record), *utilization.findings(record), *record.notes, *measured]:
        console.print(sentence, markup=False, highlight=False)
    for sample in record.samples:
        console.print(answers(sample))
    files = f"Files: {folder}/ (config.yaml, record.json, checkpoints/last.ckpt; metrics.csv of what was logged)"
    console.print(files, markup=False, highlight=False)


def summary(record: RunRecord) -> Table:
    """Return the table of scores before and after, sizes, speed, and memory."""
    table = Table(title=Text(f"{record.name}: what the fit changed, and what it took"))  # Text: a name is no markup
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    before, after = (record.outcome.get(moment, {}) for moment in ("before", "after"))
    for name in {**after, **before}:
        scores = ("-" if found.get(name) is None else f"{found[name]:.4f}" for found in (before, after))
        table.add_row(Text(name.replace("_", " ")), *scores)
    table.add_section()
    for name, value in totals(record):
        table.add_row(name, "", value)
    return table


def totals(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield names and values of sizes, speed, and peak memory of each phase, as text."""
    if record.model is not None:
        model = record.model
        yield "trainable", f"{model.trainable:,} of {model.parameters:,} ({model.trainable / model.parameters:.2%})"
    throughput = record.throughput
    if throughput is not None and throughput.tokens_per_second is not None:
        yield (
            "tokens/s (with padding)",
            f"{throughput.tokens_per_second:,.0f} ({throughput.padded_tokens_per_second:,.0f})",
        )
    if record.memory is not None and record.memory.peak_resident is not None:
        yield "peak memory of the process", f"{record.memory.peak_resident / 2**30:.2f} GiB"
    if record.predicted is not None:
        yield "peak of tensors, predicted", predicted_peak(record.predicted)
        if (measured := measured_peak(record)) is not None:
            yield "peak of tensors, measured", measured
    for phase in record.phases:
        if phase.peak_rss is not None and phase.name not in INSTRUMENTED_PHASES:
            yield f"in {phase.name}", f"{phase.peak_rss / 2**30:.2f} GiB"


def predicted_peak(predicted: Predicted) -> str:
    """Return the predicted peak, and of which batch it is."""
    return f"{amount(predicted.peak_bytes)} (at {predicted.batch_size} x {predicted.length} tokens)"


def measured_peak(record: RunRecord) -> str | None:
    """Return the measured peak: of the training on a GPU, of the examined step on a CPU; None if neither was."""
    training = [phase.peak_requested for phase in record.phases if phase.name not in INSTRUMENTED_PHASES]
    memory = record.memory
    if any(training):
        longest = None if memory is None or memory.allocator is None else memory.allocator.requested
        return amount(max(peak for peak in [*training, longest] if peak))
    if memory is None or memory.held is None:
        return None
    return f"{amount(memory.held.total)} (examined step, {memory.examined_positions} tokens)"


def answers(sample: Mapping[str, str]) -> Table:
    """Return a held-out question with the answers before and after training."""
    table = Table(show_header=False)
    for key in ("prompt", "reference", "before", "after"):
        if key in sample:
            table.add_row(key, Text(printable(sample[key])))  # Text: nothing in it is markup
    return table
