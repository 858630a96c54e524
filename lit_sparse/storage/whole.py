"""Files that are whole or refused, also after a power cut, a full disk, or a flipped bit.

A checkpoint is written beside its target, hashed on the way, flushed to the disk and read back, in parts: one is read
back while the next is flushed and the one after that is written. Only then does it replace the target, in one rename.
Its last bytes are a SHA-256 of all bytes before them, which every reader checks. torch.load and zip tools ignore them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lit_sparse.errors import BadInput
from lit_sparse_profiling.drafts import ENDING

MARK = b"\nlit_sparse sha256 "
TRAILER = len(MARK) + 64
"""Bytes of the mark and the hash, in hexadecimal digits."""
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22
"""Record at the end of a zip archive without a comment, such as torch.save writes."""
CHUNK = 2**20
PARTS = 2**21, 2**24
"""Bytes of the first part that is flushed and read back, and the most: each is twice the one before it, so that a small
file has several, and a large one few flushes."""
LARGE = 2**16
"""Bytes from which hashing takes longer than handing it to another thread."""


class Hashed:
    """A file that is written from its beginning to its end, hashed on the way, and read back while the rest is written.

    Attributes:
        failure: The error of the operating system that a write met: torch.save turns it into one that does not say why.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._back = file, hashlib.sha256(), hashlib.sha256()
        self._hasher, self._flusher, self._reader = (ThreadPoolExecutor(1, name) for name in ("hash", "flush", "read"))
        self._written = self._sent = 0
        self._part, self._parts = PARTS[0], list[Future[None]]()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash `data`, both at a time where it is large; neither holds Python's lock."""
        hashed = self._hasher.submit(self._hash.update, data) if len(data) >= LARGE else self._hash.update(data)
        try:
            count = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        finally:
            if hashed is not None:
                hashed.result()  # before torch reuses the buffer
        self._written += len(data)
        if self._written - self._sent >= self._part:
            self._read_back()
            self._part = min(2 * self._part, PARTS[1])
        return count

    def flush(self) -> None:
        """Do nothing: `save` flushes."""

    def _read_back(self) -> None:
        """Have what was written since the last part flushed to the disk by one thread, and read back by another."""
        self._file.flush()
        file, start, end = self._file.fileno(), self._sent, self._written
        flushed = self._flusher.submit(os.fsync, file)
        self._parts.append(self._reader.submit(_hash_of_disk, file, start, end, self._back, flushed))
        self._sent = end

    def save(self, checkpoint: Any) -> bool:
        """Write `checkpoint` and its hash, and wait until the disk has them; return whether it has what was written."""
        try:
            torch.save(checkpoint, self)  # pyright: ignore[reportArgumentType] - it writes, and no more
            end = MARK + self._hash.hexdigest().encode()
            self._hash.update(end)
            self._file.write(end)
            self._written += len(end)
            self._read_back()
            for part in self._parts:
                part.result()
        except RuntimeError as error:
            raise self.failure or error from error
        finally:
            for pool in (self._hasher, self._flusher, self._reader):
                pool.shutdown()
        return self._back.digest() == self._hash.digest()


def _hash_of_disk(file: int, start: int, end: int, digest: Any, flushed: Future[None]) -> None:
    """Add the bytes `start` to `end` of an open file to a hash, as the disk has them, not as they are cached.

    Args:
        flushed: Done when the disk has them.
    """
    flushed.result()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, end - start, os.POSIX_FADV_DONTNEED)
    while start < end and (chunk := os.pread(file, min(CHUNK, end - start), start)):
        digest.update(chunk)
        start += len(chunk)


def sign(path: Path) -> None:
    """Append the hash of the zip archive at `path` to it, and wait until the disk has it."""
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256")
        file.seek(0, os.SEEK_END)
        file.write(MARK + digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def write_whole(checkpoint: Any, path: str | Path) -> None:
    """Write a checkpoint to `path`. What was there stays until the new file was read back and found whole.

    Raises:
        BadInput: if it cannot be written; nothing is left of it, and what was at `path` is there still.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    draft = draft_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w+b") as file:
            same = Hashed(file).save(checkpoint)
        if not same:
            raise OSError(errno.EIO, "it reads back otherwise than it was written; check the disk")
        os.replace(draft, path)
        sync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def previous_of(path: Path) -> Path:
    """Return where the checkpoint is kept that the one at `path` replaced: `previous.ckpt` beside `last.ckpt`."""
    return path.with_name(f"previous{path.suffix}")


def keep_previous(path: str | Path) -> None:
    """Keep the checkpoint at `path`, if there is one, as `previous_of` it before another replaces it.

    A second name of the same bytes, which takes no room, or a copy where the file system has no such names.

    Raises:
        BadInput: if it cannot be kept.
    """
    path = Path(os.path.realpath(path))
    if not path.is_file():
        return
    draft = draft_of(previous_of(path))
    try:
        draft.unlink(missing_ok=True)
        try:
            os.link(path, draft)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            shutil.copyfile(path, draft)
        os.replace(draft, previous_of(path))
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def not_written(path: Path, error: OSError) -> BadInput:
    """Return the error of a checkpoint that could not be written to `path`."""
    advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it"
    kept = f"The checkpoint before it is kept; {advice}, and go on with --ckpt_path {path}."
    none = f"There is none before it; {advice}, and begin again."
    reason = error.strerror or error
    return BadInput(f"the checkpoint {path} could not be written: {reason}. {kept if path.is_file() else none}")


def replace_text(text: str, path: Path) -> None:
    """Write a text file to `path` in one rename, so that a reader sees the old text or the new one."""
    path = Path(os.path.realpath(path))  # a link stays one
    draft = draft_of(path)
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(path: Path) -> Path:
    """Return where a file is written before it replaces the one at `path`: in the same folder, for a rename's sake."""
    return path.with_name(f".{path.name}.part")


def remove_drafts(run: Path) -> None:
    """Remove what killed processes have left in a run's folder of files that they were writing."""
    for pattern in (".*.part", "checkpoints/.*.part", f".record.json.*{ENDING}"):
        for draft in run.glob(pattern):
            draft.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Wait until the disk has the folder's entries, without which a rename may be undone by a power cut."""
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def check_whole(path: str | Path) -> None:
    """Check the file at `path` against its hash; one that torch.save wrote without, against its archive's checksums.

    Raises:
        BadInput: if there is no such file, or it is damaged.
    """
    if not Path(path).is_file():
        raise BadInput(f"there is no checkpoint at {path}; give a file that a run wrote under its checkpoints/ folder.")
    try:
        found = damage(Path(path))
    except OSError as error:
        found = f"it cannot be read: {error.strerror or error}"
    if found is not None:
        raise BadInput(f"{path} is damaged, or is no checkpoint ({found}); give another checkpoint, or a copy of it.")


def damage(path: Path) -> str | None:
    """Return what is wrong with the bytes of the checkpoint at `path`, None if they are as they were written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - TRAILER
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        end = file.read()
    if end.startswith(MARK):
        return None if end[len(MARK) :] == digest.hexdigest().encode() else "its hash is not that of its contents"
    if end[-ZIP_END_BYTES:].startswith(ZIP_END):
        return _archive_damage(path)
    return "it ends before its time"


def _archive_damage(path: Path) -> str | None:
    """Return what is wrong with a zip archive, by the CRC-32 of each entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:  # a few bytes may stand for gigabytes
                    return f"its part {entry.filename} is compressed, which torch.save never does"
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        return str(error)
    return None if bad is None else f"{bad} has another checksum"
