"""Files of torch.distributed.checkpoint, hashed as they are written and read back from the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.filesystem import FileSystem

from lit_sparse.storage.whole import CHUNK


class HashedFiles(FileSystem):
    """Files of torch.distributed.checkpoint, hashed as they are written."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        self._paths: dict[str, Path] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file:
            stream = _Stream(file)  # pyright: ignore[reportArgumentType]
            yield stream
        self._note(Path(path), stream.hash.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self._note(Path(new_path), self.hashes.pop(Path(path).name))

    def _note(self, path: Path, digest: str) -> None:
        self.hashes[path.name], self._paths[path.name] = digest, path

    def read_back(self) -> str | None:
        """Return what is wrong with the files on the disk, None if they are as they were written."""
        for name, digest in self.hashes.items():
            with self._paths[name].open("rb") as file:
                if hasattr(os, "posix_fadvise"):  # so that the disk is read, and not what is cached of the write
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if sha256_of(file) != digest:
                    return f"{name} reads back otherwise than it was written; check the disk"
        return None


class _Stream:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of what is left of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
