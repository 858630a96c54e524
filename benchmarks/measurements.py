"""Read measurements, JSON lines with their provenance, and format tables with captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PROVENANCE = {"commit", "date", "device", "versions"}

Line = dict[str, Any]


def read_lines(path: Path, command: str) -> list[Line]:
    """Read the measurements in a file of JSON lines, which `command` writes.

    Raises:
        ValueError: if the file is missing or empty, or a line of it is no JSON object with its provenance.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [parsed(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no measurements; run `{command}` first.")
    return lines


def parsed(line: str, where: str) -> Line:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); correct or delete the line.") from error
    if not isinstance(value, dict) or not value.keys() >= PROVENANCE:
        raise ValueError(f"{where} is no measurement: no object with {sorted(PROVENANCE)}; correct or delete the line.")
    return value


def newest(lines: Iterable[Line], key: str) -> dict[str, Line]:
    """Return the newest line for each value of `key`, in the order in which the values first appear."""
    found: dict[str, Line] = {}
    for line in lines:
        name = json.dumps(line[key])
        if name not in found or line["date"] >= found[name]["date"]:
            found[name] = line
    return found


def caption(command: str, lines: Sequence[Line], verb: str = "Measured") -> str:
    """Return a caption: the command, and every device, date, commit and version among the lines.

    Args:
        verb: What the command did.
    """
    versions = {f"{name} {version}" for line in lines for name, version in line["versions"].items()}
    devices, dates, commits = (sorted({line[key] for line in lines}) for key in ("device", "date", "commit"))
    facts = [" and ".join(devices), *sorted(versions), " and ".join(dates), f"commit {', '.join(commits)}"]
    return f"{verb} by `{command}` on {', '.join(facts)}; table by `python benchmarks/readme.py`."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])


def number(value: float | None, form: str, factor: float = 1.0) -> str:
    """Return `value * factor` in this format; "-" for none."""
    return "-" if value is None else format(value * factor, form)
