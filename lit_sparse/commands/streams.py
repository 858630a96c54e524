"""What a command prints, where nobody may be left to read it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GONE = errno.EPIPE, errno.EIO
"""Errors of a pipe whose reader has left, and of a terminal that was closed."""


class Outlived:
    """A stream whose reader may leave, as `head` does: what is printed then goes nowhere, and the work goes on.

    Characters that its encoding lacks are written as their numbers.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`, if anybody reads it; return its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._close(error)
        return len(text)

    def flush(self) -> None:
        """Write what is held back, if anybody reads it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._close(error)

    def _close(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also for what Python flushes as it exits
        os.close(nowhere)


@contextmanager
def outlived() -> Iterator[None]:
    """Let a command outlive the readers of what it prints; streams that were closed are empty, or lead nowhere."""
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull, "r+") as nowhere:
        written = [Outlived(stream or nowhere) for stream in before[1:]]
        sys.stdin = sys.stdin or nowhere
        sys.stdout, sys.stderr = written  # pyright: ignore[reportAttributeAccessIssue] - they are what they hold
        try:
            yield
        finally:
            for stream in written:
                stream.flush()
            sys.stdin, sys.stdout, sys.stderr = before
