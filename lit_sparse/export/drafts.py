"""Exports that are complete or not there at all: written beside their place, and put there in one step."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lit_sparse.errors import BadInput

NEW, OLD, LOCK = "new", "old", "lock"
"""In the hidden folder of a draft: the export, the one that it replaces, and a file that its process keeps locked."""
RELATIVE_TO_CWD, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


@contextmanager
def written(output: Path) -> Iterator[Path]:
    """Give a path to write at; it replaces `output` at the end, or is removed on an error.

    Raises:
        BadInput: if it cannot be written.
    """
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
    for folder in output.parent.glob(f".{glob.escape(output.name)}-*"):
        try:
            with FileLock(folder / LOCK, timeout=0):
                if (folder / OLD).exists() and not output.exists():
                    (folder / OLD).rename(output)
                shutil.rmtree(folder)
        except Timeout:
            continue  # its process lives


def unveil(folder: Path) -> None:
    """Give all files in `folder` the mode of a new file here: safetensors writes such that only their owner reads."""
    (folder / "plain").touch()
    mode = (folder / "plain").stat().st_mode
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
