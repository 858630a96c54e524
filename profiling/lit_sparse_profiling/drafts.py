"""Text files that are replaced whole: a reader, or a kill, finds the old one or the new one and never a part."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one rename, once the disk has it; remove drafts of it that killed processes left.

    Raises:
        OSError: if it cannot be written; what was there stays, and no draft.
    """
    remove_left(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # same folder: a rename across file systems is a copy
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some file systems commit a rename before the data: a crash leaves an empty file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def remove_left(path: Path) -> None:
    """Remove the drafts of the file at `path` that killed processes left: their names end in a process's number."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        number = left.name.rpartition(".")[2]
        if number.isdigit() and not _lives(int(number)):
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
