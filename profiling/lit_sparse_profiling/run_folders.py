"""Folders of runs, their records, and which runs are repetitions of each other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_sparse_profiling.peft_results import is_result, to_record
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import CEILINGS

RECORD, SETTINGS, LAST = "record.json", "config.yaml", "checkpoints/last.ckpt"
SEEDS = ("seed", "seed_everything")
UNREADABLE = "unreadable"
"""Status of a run whose record cannot be read."""
Runs = Sequence[tuple[Path, RunRecord | str]]
"""Files of records, each with its record or with the sentence that says why it cannot be read."""


def folders(root: Path, name: str) -> list[Path]:
    """Return the folders `<name>-<n>` in `root`, ordered by number; `name` may be in a folder of its own: `a/b`."""
    first = root / f"{name}-1"
    pattern = re.compile(re.escape(first.name.removesuffix("-1")) + r"-(\d+)")
    beside = first.parent.iterdir() if first.parent.is_dir() else ()  # no glob: a name may have its special characters
    numbered = [(int(match[1]), path) for path in beside if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def next_folder(root: Path, name: str) -> Path:
    """Return the next free folder `<name>-<n>`, without creating it."""
    taken = folders(root, name)  # after the highest number: a gap from a deleted run stays, so that order is age
    return root / f"{name}-{int(taken[-1].name.rpartition('-')[2]) + 1 if taken else 1}"


def read_runs(paths: Sequence[Path]) -> list[tuple[Path, RunRecord | str]]:
    """Read the records under `paths`. A record that cannot be read is replaced by a sentence that says why.

    Args:
        paths: Folders of runs, files of records, folders that hold run folders up to two levels deep, and results of
            PEFT's method comparison, files or folders of them.

    Returns:
        Each file once, with its record or sentence.

    Raises:
        ValueError: if `paths` is empty, or if there is no record under one of them.
    """
    if not paths:
        raise ValueError("A report of no runs was asked for; give folders of runs, such as runs/smt-1.")
    files: dict[Path, Path] = {}
    for path in paths:
        for file in _record_files(path):
            files.setdefault(file.resolve(), file)
    return [(file, _read(file)) for file in files.values()]


def check_readable(runs: Runs, what: str) -> None:
    """Refuse to make a report of runs none of which can be read; `what` is its kind, as in "page".

    Raises:
        ValueError: naming the number of records, and why the first cannot be read.
    """
    if not any(isinstance(record, RunRecord) for _, record in runs):
        raise ValueError(f"A {what} of {len(runs)} records was asked for, but none can be read: {runs[0][1]}")


def _record_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / RECORD).is_file():
        return [path / RECORD]
    found = [*path.glob(f"*/{RECORD}"), *path.glob(f"*/*/{RECORD}")]
    found += [file for file in path.glob("*.json") if is_result(document_of(file))]
    if not found:
        raise ValueError(f"{path} was given, but there is no {RECORD} in it or two folders deep; give a run's folder.")
    return sorted(found, key=_natural_key)


def unrecorded(paths: Sequence[Path]) -> list[Path]:
    """Return the folders of runs under `paths` that have settings and no record: killed, or still running."""
    found = {
        file.parent.resolve(): file.parent
        for path in paths
        for pattern in (SETTINGS, f"*/{SETTINGS}", f"*/*/{SETTINGS}")
        for file in path.glob(pattern)
        if not (file.parent / RECORD).is_file()
    }
    return sorted(found.values(), key=_natural_key)


def _natural_key(path: Path) -> list[str | int]:
    # Numbers are at the odd places of all keys, so that texts are never compared with numbers.
    words = re.split(r"(\d+)", str(path))
    return [int(word) if i % 2 else word for i, word in enumerate(words)]


def _read(file: Path) -> RunRecord | str:
    document = document_of(file)
    try:
        return to_record(document, file.stem) if is_result(document) else RunRecord.read(file)
    except (ValueError, OSError) as error:
        return str(error)


def document_of(file: Path) -> Any:
    """Return the JSON in a file; None if it is none, of which `RunRecord.read` says why."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None  # reading a pipe may not end
    except (ValueError, OSError, RecursionError):
        return None


def run_name(file: Path, record: RunRecord | str) -> str:
    """Return the name of a run; for a record that cannot be read, the name of its folder."""
    if isinstance(record, RunRecord):
        return record.name
    return file.resolve().parent.name if file.name == RECORD else file.stem


def method_name(name: str) -> str:
    """Return a run's name without its number."""
    return re.sub(r"-\d+$", "", name)


def repetition_key(record: RunRecord) -> str:
    """Return a key that is equal for repetitions: same name, device, number of ranks, model and settings but seeds."""
    device, model = record.device, record.model
    where = None if device is None else [device.kind, device.name, device.cores]
    what = None if model is None else [model.base, model.parameters]
    return json.dumps(
        [method_name(record.name), where, len(record.ranks), what, without(record.settings, SEEDS)],
        sort_keys=True,
        default=repr,
    )


@dataclass(frozen=True)
class Row:
    """One run, or the repetitions of one; `records` is empty if the record cannot be read.

    Attributes:
        label: Name that no other row has.
        files: Files of the records.
    """

    label: str
    status: str
    records: list[RunRecord]
    files: list[Path]


def grouped(runs: Runs) -> list[Row]:
    """Return the runs with repetitions together: same name (without its number), settings (without seeds) and status.

    The order is that of the first run of each row.
    """
    groups: dict[str, list[tuple[Path, RunRecord | str]]] = {}
    for file, record in runs:
        key = str(file) if isinstance(record, str) else record.status + repetition_key(record)
        groups.setdefault(key, []).append((file, record))
    labels = [_label(group) for group in groups.values()]
    return [
        # One name in several folders, or with several settings: only the folder tells such runs apart.
        _row(label if labels.count(label) == 1 else f"{label} in {group[0][0].parent}", group)
        for label, group in zip(labels, groups.values(), strict=True)
    ]


def _label(group: Runs) -> str:
    name = run_name(*group[0])
    return name if len(group) == 1 else f"{method_name(name)}\n({len(group)} runs)"


def _row(label: str, group: Runs) -> Row:
    records = [record for _, record in group if isinstance(record, RunRecord)]
    status = records[0].status if records else UNREADABLE
    return Row(label, status, records, [file for file, _ in group])


def without(settings: Any, names: Sequence[str]) -> Any:
    """Return nested settings without the keys of these names."""
    if isinstance(settings, dict):
        return {key: without(item, names) for key, item in settings.items() if key not in names}
    return [without(item, names) for item in settings] if isinstance(settings, list) else settings


def device_kind(record: RunRecord) -> str:
    """Return "cuda" or "cpu"; "cpu" if the record has no device."""
    return "cpu" if record.device is None else record.device.kind


def peak_memory(record: RunRecord, kind: str, phase: str | None = None) -> int | None:
    """Return the memory peak of a run, or of one of its phases, in bytes: reserved on a GPU, resident on a CPU.

    It is None if it was not measured, or if the run's device is not of this kind.
    """
    if kind != device_kind(record):
        return None
    if phase is None and kind == "cpu" and record.memory is not None and record.memory.peak_resident is not None:
        return record.memory.peak_resident  # unlike the phases', it excludes the profiler's own instruments
    phases = [p for p in record.phases if phase == p.name or (phase is None and p.name != CEILINGS)]
    peaks = [p.peak_reserved if kind == "cuda" else p.peak_rss for p in phases]
    if phase is None and record.memory is not None and record.memory.allocator is not None:
        peaks.append(record.memory.allocator.reserved)
    return max((peak for peak in peaks if peak is not None), default=None)
