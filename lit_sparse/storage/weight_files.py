"""Folders of weights and settings that are known by their hashes: exports, and those in the Hugging Face Hub's cache.

safetensors itself does not notice a flipped bit. An export's mark has the SHA-256 of its files; the Hub's cache names
large files by theirs, and small ones by the hash that git has of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lit_sparse.errors import BadInput
from lit_sparse.storage.sealed import hash_of_file

MARK, CARD = "lit_sparse.json", "README.md"
"""A file that marks a folder as an export, with its origin, the hashes of its files, and the error of its cast; and the
model card, which is everyone's to change."""
BLOB = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder but its mark and its card, by its name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hash_of_file(path) for path in files if path.name not in (MARK, CARD)}


def check_hashes(folder: Path) -> None:
    """Check the files in a folder of which the hashes are known.

    Raises:
        BadInput: naming the first that is missing, or has other contents.
    """
    mark = folder / MARK
    yours = f", or if the change is yours, remove its line from {mark}" if mark.is_file() else ""
    for name, digest in known_hashes(folder):
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path} is missing, which {MARK} beside it names; bring or export the model again.")
        if digest != (hash_of_file(path) if len(digest) == 64 else git_hash_of_file(path)):
            raise BadInput(
                f"{path} is damaged: its hash is not that of its contents; bring or export the model again{yours}."
            )


def known_hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and hashes of the files in a folder: of its mark, and of links into the Hub's cache."""
    mark = folder / MARK
    try:
        marked = json.loads(mark.read_text(encoding="utf-8")).get("files", {}) if mark.is_file() else {}
        yield from {str(name): str(digest) for name, digest in marked.items()}.items()
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{mark} is damaged ({error}); export the run again, or remove the file.") from error
    for path in sorted(folder.iterdir()):
        blob = Path(os.path.realpath(path)).name
        if path.is_symlink() and BLOB.fullmatch(blob):
            yield path.name, blob


def git_hash_of_file(path: Path) -> str:
    """Return the hash that git has of a file's contents: a SHA-1, in hexadecimal digits."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
