"""Text files that are replaced whole: a reader, or a kill, finds the old one or the new one and never a part."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

ENDING = ".lit-sparse-draft"
"""Ending of a draft's name, after the number of its process: `.report.html.20261128` may be a user's copy."""


def check_replaceable(path: Path, what: str, ours: Callable[[Path], bool]) -> None:
    """Refuse to write to `path` if that would destroy anything but an earlier file of the same kind.

    Args:
        path: Where a file is to be written; an empty file there may be replaced.
        what: The kind of file, as in "page".
        ours: Returns whether the file at a path is of that kind, by its contents.

    Raises:
        ValueError: if a folder, a device, a pipe or another kind of file is there.
        OSError: if it cannot be read.
    """
    asked = f"The {what} was to be written to {path}"
    if path.is_dir():
        raise ValueError(f"{asked}, which is a folder; name a file.")
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{asked}, which is a device or a pipe; name a file.")
    if path.stat().st_size and not ours(path):
        raise ValueError(f"{asked}, but the file there is no earlier {what}; give another path, or remove it.")


def begins(path: Path, pattern: str) -> bool:
    """Return whether a regular expression is found in the beginning of the file at `path`, however long that is."""
    with path.open("rb") as file:
        return re.search(pattern.encode(), file.read(4096)) is not None


def draft_of(path: Path) -> Path:
    """Return the path at which this process writes what is to replace `path`: hidden, so that no user has a file there.

    It is in the same folder: across file systems, a rename copies.
    """
    return path.with_name(f".{path.name}.{os.getpid()}{ENDING}")


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one rename, once the disk has it; remove drafts of it that killed processes left.

    Raises:
        OSError: if it cannot be written; what was there stays, and no draft.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    remove_left(path)
    draft = draft_of(path)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some file systems commit a rename before the data: a crash leaves an empty file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_left(path: Path) -> None:
    """Remove the drafts of the file at `path` that killed processes left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{ENDING}"):
        number = left.name.removesuffix(ENDING).rpartition(".")[2]
        if re.fullmatch("[0-9]{1,9}", number) and not _lives(int(number)):
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
