"""Small checkpoints: what a run trained, and of which base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_sparse.errors import BadInput

SAMPLES_PER_TENSOR = 2**16


def fingerprint(model: nn.Module) -> str:
    """A hash that tells base models apart, the same whether a checkpoint is loaded in fp32 or bf16.

    Of names, shapes and up to 65,536 evenly spaced values of each parameter, rounded to bf16.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        digest.update(flat[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU; only tensors and plain values are unpickled.

    Raises:
        BadInput: if there is none, or it is no checkpoint of a lit_sparse run.
    """
    if not Path(path).is_file():
        raise BadInput(f"there is no checkpoint at {path}; give a file that a run wrote under its checkpoints/ folder.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: it is truncated, or of another kind)."
        ) from error
    if not isinstance(checkpoint, dict) or "lit_sparse" not in checkpoint:
        raise BadInput(f"{path} is not a checkpoint of a lit_sparse run.")
    return checkpoint
