"""Selections: how many weights a method is to train, and files of what it chose, as JSON with a checksum.

Who writes one by hand leaves the checksum out; one that is there must fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.checkpoints import strategy_state
from lit_sparse.errors import BadInput
from lit_sparse.storage.whole import replace_text

CHECKSUM = "sha256"
"""Key of the hash of all others."""
LIMIT = 2**31
"""Positions from here on are no int32."""


def write_selection(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a method that selects as JSON with its checksum, in one rename.

    Raises:
        BadInput: if it cannot be written.
    """
    fields = json.loads(json.dumps(state, default=torch.Tensor.tolist))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json.dumps({**fields, CHECKSUM: _checksum(fields)}) + "\n", path)
    except OSError as error:
        raise BadInput(
            f"{path} could not be written ({error.strerror or error}); give --output another name."
        ) from error


def read_state(path: Path, strategy: str) -> Any:
    """Return the state that `write_selection` wrote to `path`, or that a run's checkpoint (.ckpt) has of a strategy.

    Args:
        strategy: Class name of the strategy.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: if the file cannot be read, is malformed, or does not
            fit its checksum.
    """
    if path.suffix == ".ckpt":
        return strategy_state(path, strategy)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_named_once)
        if fields.pop(CHECKSUM, None) not in (None, _checksum(fields)):
            raise ValueError(f"it is damaged, or was changed by hand and has its {CHECKSUM} still")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return fields


def wanted(method: str, fraction: float, total: int, there: int, targets: Sequence[str]) -> float:
    """Return how many of a model's `total` weights a method is to train.

    Raises:
        BadInput: if that is more than `there` are in its targets.
    """
    if fraction * total > there:
        raise BadInput(
            f"{method}: {fraction:.3%} of the weights is more than the targets {targets} have ({there:,}); give a "
            "smaller trainable_fraction, or more targets."
        )
    return fraction * total


def check_shapes(entries: Mapping[str, Any], matrices: Mapping[str, Tensor], source: str) -> None:
    """Refuse a selection of matrices that have other shapes here: its positions would be other weights.

    Args:
        entries: What the selection has of each matrix; a file that was written by hand may leave `shape` out.
        matrices: The matrices by name, of all that are selected.
        source: What selects, for the message.

    Raises:
        BadInput: naming the first such matrix.
    """
    for name, entry in entries.items():
        here = list(matrices[name].shape)
        if entry.get("shape", here) != here:
            there, sides = entry["shape"], " x ".join(map(str, here))
            raise BadInput(
                f"{source} was made for another model: its {name} has the shape {there}, and this one is {sides}; give "
                "a file of the same model, or select anew."
            )


def index_of(values: Any, columns: int | None = None) -> Tensor:
    """Return the positions in a selection: of a JSON file a list, of a checkpoint a tensor.

    Args:
        columns: How many numbers a position has; None if each is a number by itself.

    Returns:
        Whole numbers from 0 to 2^31 - 1: int64 (N, columns), or (N,).

    Raises:
        ValueError: if they are anything else.
    """
    shape = (-1,) if columns is None else (-1, columns)
    if isinstance(values, Tensor):
        whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        right = whole and values.ndim == len(shape) and values.shape[1:] == shape[1:]
        if right and (not values.numel() or 0 <= int(values.min()) <= int(values.max()) < LIMIT):
            return values.long()
    else:
        rows = [values] if columns is None else values
        right = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        right = right and (columns is None or all(len(row) == columns for row in rows))
        # Not isinstance: true and false are ints, too.
        if right and all(type(number) is int and 0 <= number < LIMIT for row in rows for number in row):
            return torch.tensor(values, dtype=torch.int64).reshape(shape)
    form = "[position, ...]" if columns is None else "[[row, column], ...]"
    raise ValueError(f"`index` must be {form}, in whole numbers from 0 to {LIMIT - 1:,}")


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError if a name is there twice, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
