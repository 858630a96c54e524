"""Exports that are complete or not there at all: written beside their place, and put there in one step."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lit_sparse.errors import BadInput

NEW, OLD, LOCK, PLAIN = "new", "old", "lock", "plain"
"""In the hidden folder of a draft: the export, the one that it replaces, a file that its process keeps locked, and one
that shows the mode of new files."""
RELATIVE_TO_CWD, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


@contextmanager
def written(output: Path) -> Iterator[Path]:
    """Give a path to write at; it replaces `output` at the end, or is removed on an error. A link stays one.

    Raises:
        BadInput: if it cannot be written.
    """
    output = Path(os.path.realpath(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder,
            FileLock(Path(folder) / LOCK),
        ):
            yield Path(folder) / NEW
            unveil(Path(folder))
            replace(Path(folder) / NEW, output, Path(folder) / OLD)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{output} could not be written ({error}); nothing was left there.") from error


def remove_leftovers(output: Path) -> None:
    """Remove the drafts of `output` that killed processes left, and put back what one of them had moved away."""
    output = Path(os.path.realpath(output))
    for folder in drafts(output):
        try:
            with FileLock(folder / LOCK, timeout=0):
                if (folder / OLD).exists() and not output.exists():
                    (folder / OLD).rename(output)
                shutil.rmtree(folder)
        except Timeout:
            continue  # its process lives


def drafts(output: Path) -> list[Path]:
    """Return the folders beside `output` that have the name and the contents of its drafts, and not the user's own."""
    name = re.compile(rf"\.{re.escape(output.name)}-[a-z0-9_]{{8}}")  # as tempfile makes them
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    return [path for path in beside if name.fullmatch(path.name) and is_draft(path)]


def is_draft(folder: Path) -> bool:
    """Return whether a folder holds a lock, and nothing that is not of a draft."""
    if folder.is_symlink() or not folder.is_dir() or not set(os.listdir(folder)) <= {NEW, OLD, LOCK, PLAIN}:
        return False
    lock = folder / LOCK
    return os.path.lexists(lock) and stat.S_ISREG(lock.lstat().st_mode)


def unveil(folder: Path) -> None:
    """Give all files in `folder` the mode of a new file here: safetensors writes such that only their owner reads."""
    (folder / PLAIN).touch()
    mode = (folder / PLAIN).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def replace(new: Path, output: Path, old: Path) -> None:
    """Move `new` to `output`; what was there is left at `new` or `old`. On an error, it is at `output` again."""
    if not output.exists():
        new.rename(output)
        return
    if exchange(new, output):
        return
    output.rename(old)  # a folder cannot be moved onto one that holds something
    try:
        new.rename(output)
    except OSError:
        old.rename(output)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; return whether the system and the file system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    return rename(RELATIVE_TO_CWD, os.fsencode(one), RELATIVE_TO_CWD, os.fsencode(other), EXCHANGE) == 0
