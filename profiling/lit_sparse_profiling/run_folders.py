"""The folders of runs, their records, and which of them are repetitions of one another."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_sparse_profiling.record import RunRecord

RECORD = "record.json"
Runs = Sequence[tuple[Path, RunRecord | str]]
"""Files of records, each with its record or with the sentence that says why there is none."""


def folders(root: Path, name: str) -> list[Path]:
    """The folders `<name>-<n>` in `root`, by number."""
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    numbered = [(int(match[1]), path) for path in root.glob(f"{name}-*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def next_folder(root: Path, name: str) -> Path:
    """The next free folder `<name>-<n>`; it is not made."""
    taken = folders(root, name)
    return root / f"{name}-{int(taken[-1].name.rpartition('-')[2]) + 1 if taken else 1}"


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


def name_of(file: Path, record: RunRecord | str) -> str:
    if isinstance(record, RunRecord):
        return record.name
    return file.resolve().parent.name if file.name == RECORD else file.stem


def method_of(name: str) -> str:
    """A run's name without its number."""
    return re.sub(r"-\d+$", "", name)


def likeness(record: RunRecord) -> str:
    """What runs have in common that are repetitions of one another."""
    device, model = record.device, record.model
    where = None if device is None else [device.kind, device.name, device.cores]
    what = None if model is None else [model.base, model.parameters]
    return json.dumps([method_of(record.name), where, what, _seedless(record.settings)], sort_keys=True, default=repr)


def _seedless(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _seedless(item) for key, item in settings.items() if key not in ("seed", "seed_everything")}
    return [_seedless(item) for item in settings] if isinstance(settings, list) else settings


def kind_of(record: RunRecord) -> str:
    return "cpu" if record.device is None else record.device.kind


def peak_of(record: RunRecord, kind: str, phase: str | None = None) -> int | None:
    """The highest peak of a run, or of one of its phases: reserved on a GPU, resident elsewhere."""
    if kind != kind_of(record):
        return None
    if phase is None and kind == "cpu" and record.memory is not None and record.memory.peak_resident is not None:
        return record.memory.peak_resident  # the profiler's own tools, which examine a step, are not in it
    phases = [p for p in record.phases if phase in (None, p.name)]
    peaks = [p.peak_reserved if kind == "cuda" else p.peak_rss for p in phases]
    if phase is None and record.memory is not None and record.memory.allocator is not None:
        peaks.append(record.memory.allocator.reserved)
    return max((peak for peak in peaks if peak is not None), default=None)
