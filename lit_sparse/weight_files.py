"""Files of weights that are known by their hashes: those of exports, and those in the cache of the Hugging Face Hub.

safetensors itself does not notice a flipped bit. An export's mark has the SHA-256 of its files of weights; the Hub's
cache names such files by theirs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lit_sparse.errors import BadInput
from lit_sparse.hashed_files import sha256_of

MARK = "lit_sparse.json"
"""A file that marks a folder as an export, with its origin, the hashes of its weights, and the error of its cast."""
WEIGHTS = "*.safetensors"


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights in a folder, by its name."""
    return {path.name: _hash(path) for path in sorted(folder.glob(WEIGHTS))}


def check_weights(folder: Path) -> None:
    """Check the files of weights in a folder of which the hashes are known.

    Raises:
        BadInput: naming the first that is missing, or has other contents.
    """
    for name, digest in known_hashes(folder):
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path} is missing, which {MARK} beside it names; bring or export the model again.")
        if _hash(path) != digest:
            raise BadInput(f"{path} is damaged: its hash is not that of its contents; bring or export the model again.")


def known_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and hashes of the files of weights in a folder: of its mark, and of links into the Hub's cache."""
    mark = folder / MARK
    try:
        marked = json.loads(mark.read_text(encoding="utf-8")).get("files", {}) if mark.is_file() else {}
        yield from {str(name): str(digest) for name, digest in marked.items()}.items()
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{mark} is damaged ({error}); export the run again, or remove the file.") from error
    for path in sorted(folder.iterdir()):
        blob = Path(os.path.realpath(path)).name
        if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob):
            yield path.name, blob


def _hash(path: Path) -> str:
    found = path.stat()
    return _hash_once(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _hash_once(path: str, size: int, changed: int, inode: int) -> str:
    """Return the hash of a file, read once in a process as long as its size and time of change stay."""
    with open(path, "rb") as file:
        return sha256_of(file)
