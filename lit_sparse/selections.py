"""Files of selections: what a method chose before training, as JSON with a checksum.

Who writes one by hand leaves the checksum out; one that is there must fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_sparse.checkpoints import strategy_state
from lit_sparse.errors import BadInput
from lit_sparse.storage.whole import replace_text

CHECKSUM = "sha256"
"""Key of the hash of all others."""


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
        OSError, ValueError, AttributeError, TypeError: if the file cannot be read, is malformed, or does not fit its
            checksum.
    """
    if path.suffix == ".ckpt":
        return strategy_state(path, strategy)
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.pop(CHECKSUM, None) not in (None, _checksum(fields)):
        raise ValueError(f"it is damaged, or was changed by hand and has its {CHECKSUM} still")
    return fields


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
