"""Folders in which one process at a time may write."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lit_sparse.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PATIENCE = 10.0
"""Seconds to wait for a folder: the data loader's workers of a killed process have it until they notice it."""


class Held:
    """The right of this process to write in a folder, which ends with `release` or with the process.

    Windows, and file systems without such locks, give it to everybody. Nothing is written for it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entry: int | None = None

    def take(self) -> None:
        """Take the folder, which must exist; no effect where this process has it.

        Raises:
            BadInput: if another process has it, still after `PATIENCE`.
        """
        if fcntl is None or self._entry is not None:
            return
        entry, until = os.open(self.folder, os.O_RDONLY), time.monotonic() + PATIENCE
        while _taken(entry):
            if time.monotonic() > until:
                os.close(entry)
                raise BadInput(
                    f"another process is training the run in {self.folder}; wait until it ends, or end it. Another "
                    "--run begins a run of its own."
                )
            time.sleep(0.1)
        self._entry = entry

    def release(self) -> None:
        """Give the folder back."""
        if fcntl is not None and self._entry is not None:
            fcntl.flock(self._entry, fcntl.LOCK_UN)  # workers may have it too, which closing would not tell
            os.close(self._entry)
            self._entry = None


def _taken(entry: int) -> bool:
    """Take an open folder for this process; return whether another one has it."""
    assert fcntl is not None
    try:
        fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # this file system has no locks, or none of folders
        return False
    return False
