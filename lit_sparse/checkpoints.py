"""Small checkpoints: what a run trained, and of which base."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
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


def forked_rng(device: torch.device) -> AbstractContextManager[Any]:
    """A block after which torch's random numbers, on the CPU and on `device`, go on as if it had not been."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def get_rng() -> dict[str, Any]:
    """The state of torch's and Python's random numbers, as tensors and plain values."""
    kind, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": [kind, list(words), gauss]}


def set_rng(state: Mapping[str, Any]) -> None:
    """Go on from a state that `get_rng` gave."""
    kind, words, gauss = state["python"]
    random.setstate((kind, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
