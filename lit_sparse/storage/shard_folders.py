"""The folders of sharded checkpoints: which there are, and which of them a checkpoint names."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path
from typing import Any

import torch

from lit_sparse.storage.whole import previous_of

KEY = "shards"
"""Entry of a checkpoint: the name of the folder beside it, and the SHA-256 of each of its files."""
ENDING = ".shards-"


def folders_of(path: Path) -> list[Path]:
    """Return the folders with shards of the checkpoint at `path`, of which it names one."""
    return [one for one in path.parent.glob(f"{glob.escape(path.name)}{ENDING}*") if one.is_dir()]


def remove_shards(path: Path) -> None:
    """Remove the shards of the checkpoint at `path`, once that is removed."""
    for folder in folders_of(path):
        shutil.rmtree(folder)


def remove_orphans(folder: Path, name: str = "") -> None:
    """Remove shards in `folder` that no checkpoint names: those of saves that were killed.

    Args:
        name: Of the checkpoint whose shards are looked at; all if not given.
    """
    for shards in folder.glob(f"{glob.escape(name) or '*'}{ENDING}*"):
        if shards.is_dir() and not _is_named(shards):
            shutil.rmtree(shards)


def _is_named(shards: Path) -> bool:
    """Return whether the checkpoint beside a folder of shards, or the previous one, names it."""
    file = shards.with_name(shards.name.rpartition(ENDING)[0])
    return any(_names(one, shards) for one in (file, previous_of(file)))


def _names(file: Path, shards: Path) -> bool:
    """Return whether the checkpoint `file` names a folder of shards, or cannot be read to find out."""
    if not file.is_file():
        return False
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or of another kind: not ours to judge
        return True
    if not isinstance(checkpoint, dict) or KEY not in checkpoint:
        return False
    return odd_shards(checkpoint[KEY]) is not None or checkpoint[KEY]["folder"] == shards.name


def odd_shards(entry: Any) -> str | None:
    """Return what a checkpoint's entry on its shards has that no run writes, None if there is nothing."""
    folder, files = (entry.get("folder"), entry.get("files")) if isinstance(entry, dict) else (None, None)
    if not isinstance(folder, str) or ENDING not in folder or Path(folder).name != folder:
        return f"its {KEY} name no folder beside it"
    if not isinstance(files, dict) or not all(isinstance(one, str) for pair in files.items() for one in pair):
        return f"its {KEY} name no files with their hashes"
    return next((f"its {KEY} name the file {name!r:.80}" for name in files if Path(name).name != name), None)
