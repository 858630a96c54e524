"""Folders of a cache that are whole, or made again: each names the SHA-256 of its files, as `sha256sum` writes them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from lit_sparse.storage.hashed_files import sha256_of

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def seal(folder: Path) -> None:
    """Write the hashes of all files in `folder`, which is complete, and to be moved to its place now."""
    lines = [f"{hash_of_file(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def damaged_file(folder: Path) -> Path | None:
    """Return the first file of a sealed folder that is missing or has other contents.

    Returns:
        None if there is none, or the folder was never sealed.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return None
    lines = [LINE.fullmatch(line) for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    hashes = {folder / line[2]: line[1] for line in lines if line}
    if not lines or len(hashes) < len(lines):
        return sums
    return next((path for path, digest in hashes.items() if not path.is_file() or hash_of_file(path) != digest), None)


def hash_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, which a process reads once as long as its size and time of change stay."""
    found = path.stat()
    return _hash_once(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _hash_once(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return sha256_of(file)
