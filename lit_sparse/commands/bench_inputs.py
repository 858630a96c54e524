"""The files that data and base model of a fit are read from. Where one has changed, a bench measures something else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_sparse.aliases import check_aliases
from lit_sparse.commands.configs import read_document
from lit_sparse.errors import BadInput


def content(path: Path) -> dict[str, Any]:
    """Return the content of a YAML; of one that cannot be read, nothing."""
    try:
        return read_document(str(path))
    except BadInput:  # which its fit reports
        return {}


def states_of_inputs(files: Sequence[Path], passed: Sequence[str], into: str) -> Iterator[str]:
    """Yield path, size and time of change of each file that a fit's data and base are, or that is in a folder of them.

    Contents are not read: a base has gigabytes.

    Args:
        files: The YAMLs of the fit.
        passed: The options of the fit.
        into: Folder of the bench's runs, which add to it while the data stay the same.
    """
    values = [value for path in files for value in named_in(content(path))]
    for word, after in zip(passed, [*passed[1:], ""], strict=False):
        option, given, value = word.partition("=")
        if option in ("--model.base", "--data") or option.startswith("--data."):
            text = value if given else after
            values += [text, listed(text)]
    for text in {text for value in values for text in texts(value)}:
        for path in files_at(text, os.path.realpath(into)):
            state = os.stat(path)
            yield f"{path} {state.st_size} {state.st_mtime_ns}"


def named_in(document: dict[str, Any]) -> list[Any]:
    """Return the parts of a YAML that may name data and base."""
    model = document.get("model")
    return [document.get("data"), model.get("base") if isinstance(model, dict) else None]


def listed(text: str) -> Any:
    """Return the list that the value of an option is, such as [a.txt, b.txt]; None if it is none."""
    if not text.startswith("["):
        return None
    try:
        check_aliases(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # which its fit reports
        return None


def texts(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def files_at(text: str, left_out: str) -> list[str]:
    """Return the file that a text is the path of, or all files of that folder; none if it is no path here.

    Args:
        text: Any value of an option.
        left_out: A folder in it whose files do not count, as a real path.
    """
    found = []
    try:
        place = os.path.expanduser(text)
        if os.path.isfile(place):
            return [place]
        for folder, folders, names in os.walk(place):
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) != left_out]
            found += [path for name in names if os.path.isfile(path := os.path.join(folder, name))]
    except ValueError:  # a null character, which no path has
        return []
    return found
