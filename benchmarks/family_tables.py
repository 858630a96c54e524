"""The table of families: which method works on which model, and why the others are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurements import Line, caption, read_lines, table

MODEL = re.compile(r"\b\w+(?:For(?:CausalLM|SequenceClassification|ConditionalGeneration)|LMHeadModel)\b")
PLACE = re.compile(r"[\w.]+\.(?:layers?|block|h)\.\d+[\w.\[\]]*|\w*(?:Experts|Router)\b(?!\s+of)")
COUNT = re.compile(
    r"\b\d+(?= (?:gate|up|down|modules|more|layers))|(?<=base layer )\d+|[\w.]+ \(\d+\)|\{'[^}]*\}"
    r"|(?<=model_type=)'\w+'"
)
"""Parts of a refusal that stand for one model: its class, its modules, and their numbers."""


def families(task: str, results: Path) -> str:
    """Return what each method does on each family of a task: a table, and the reasons of what is refused."""
    from benchmarks.families import COMMAND, FAMILIES, methods  # loads torch, which other tables do not need

    rows_of = [name for name, family in FAMILIES.items() if family.task == task]
    lines = [line for line in read_lines(results / "families.jsonl", COMMAND) if line["family"] in rows_of]
    cells = {(line["family"], line["method"], line["ranks"]): line for line in lines}  # of each, the last
    tried = [method for method in methods() if any(line["method"] == method for line in cells.values())]
    notes: dict[str, int] = {}
    rows = []
    for family in rows_of:
        found = ([cells.get((family, method, ranks)) for ranks in (1, 2)] for method in tried)
        rows.append([family, *(family_cell(lines, notes) for lines in found)])
    made = table(["family", *tried], rows).replace("---:", "---")
    left = ", ".join(f"`{method}`" for method in methods() if method not in tried)
    reasons = [f"{place}. {reason}" for reason, place in notes.items()]
    missing = [f"\nNot tried on any of them yet: {left}."] if left else []
    return "\n".join([f"{caption(COMMAND, [*cells.values()])}\n", f"{made}\n", *reasons, *missing])


def family_cell(lines: Sequence[Line | None], notes: dict[str, int]) -> str:
    """Return the stages that held, by letter, or the number of the note that says why they were refused."""
    one, two = lines
    if one is None:
        return "-"
    if not one["ok"]:
        return note_of(one, notes)
    sharded = "" if two is None else "S" if two["ok"] else f" {note_of(two, notes)}"
    return f"FRE{sharded}"


def note_of(line: Line, notes: dict[str, int]) -> str:
    if "failed" in line:
        return "fails"
    reason = COUNT.sub("...", PLACE.sub("...", MODEL.sub("the model", line["refused"])))
    return f"[{notes.setdefault(reason, len(notes) + 1)}]"
