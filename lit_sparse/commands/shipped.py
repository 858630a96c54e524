"""YAMLs and help texts that come with lit_sparse; without torch, so that `list` and `fit --help` are quick."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from lit_sparse.places import configs_folder

FACTS = ("trains", "costs", "claims", "page")
"""Facts that a method's YAML says below its first line, each in a comment of its own, as in `# trains: ...`."""
STACKS = {
    "recipes": "settings for a situation",
    "models": "models to pre-train from scratch, with their text",
    "trainers": "devices, ranks, and the demo",
    "data": "your own rows, texts or labels",
    "tasks": "another task than the next token",
    "phases": "second runs, which go on from a first one",
}
"""Folders of YAMLs that stack on a method's or follow one, with what they are for."""
NARROWEST = 60
COLUMN = 34
"""Characters of the column of keys in a help text."""


class Method(NamedTuple):
    """A method as its YAML describes it.

    Attributes:
        name: File name, such as `smt.yaml`.
        what: Its first comment.
        classes: Names of its update strategies, in order; none is full fine-tuning.
        facts: What it says of each of `FACTS`.
    """

    name: str
    what: str
    classes: list[str]
    facts: dict[str, str]


def methods() -> list[Path]:
    """Return the YAML of each method, sorted by name."""
    return sorted(configs_folder().glob("*.yaml"))


def described(path: Path) -> Method:
    """Return what a method's YAML says of it.

    Raises:
        KeyError: if it lacks one of `FACTS`.
    """
    text = path.read_text(encoding="utf-8")
    said = dict(re.findall(r"^# (\w+): (.+)$", text, re.MULTILINE))
    classes = re.findall(r"^    - class_path: (?:[\w.]+\.)?(\w+)", text, re.MULTILINE)
    what = text.partition("\n")[0].removeprefix("# ")
    return Method(path.name, what, classes, {fact: said[fact] for fact in FACTS})


def first_sentence(path: Path) -> str:
    """Return the first sentence of a YAML's first comment."""
    line = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return re.split(r"(?<=[.;])\s", line)[0].rstrip(".:;")


def listing() -> str:
    """Return all methods with what each trains, costs and claims, and where its page is; then the YAMLs that stack."""
    width = max(NARROWEST, min(shutil.get_terminal_size().columns, 120))
    blocks = ["Methods: lit-sparse fit --config NAME trains with one; two stack if they claim nothing in common."]
    for method in map(described, methods()):
        facts = {"classes": ", ".join(method.classes) or "none", **method.facts}
        lines = [method.name, *wrapped(method.what, width, "    ")]
        for fact, value in facts.items():
            lines += wrapped(value, width, f"    {fact + ':':<9}")
        blocks.append("\n".join(lines))
    for folder, purpose in STACKS.items():
        lines = [f"{folder}/: {purpose}"]
        for path in sorted((configs_folder() / folder).glob("*.yaml")):
            lines += wrapped(first_sentence(path), width, f"    {folder}/{path.name}  ", 4)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def short_help(verb: str) -> str | None:
    """Return the help of a verb whose keys are those of a fit, as `make readme` wrote it; None for any other verb."""
    path = Path(__file__).parent / "short_help" / f"{verb}.txt"
    return laid_out(path.read_text(encoding="utf-8").rstrip("\n")) if path.is_file() else None


def laid_out(text: str) -> str:
    """Return a help text with its keys, of a line each, wrapped to the terminal's width, from 80 to 120 characters."""
    width = max(80, min(shutil.get_terminal_size().columns, 120))
    lines: list[str] = []
    for line in text.split("\n"):
        key = line.startswith("  --")
        indent = " " * COLUMN
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False) if key else [line]
    return "\n".join(lines)


def wrapped(text: str, width: int, head: str, more: int | None = None) -> list[str]:
    """Return `text` after `head` in lines of at most `width` characters; later ones are indented by `more` further."""
    indent = len(head) if more is None else 4 + more
    return textwrap.wrap(head + text, width, subsequent_indent=" " * indent, break_on_hyphens=False)
