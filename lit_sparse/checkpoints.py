"""Small checkpoints: what a run trained, and of which base."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.errors import BadInput

SAMPLES_PER_TENSOR = 2**16
LAST = Path("checkpoints") / "last.ckpt"
"""The last checkpoint in the folder of a run."""


def fingerprint(model: nn.Module) -> str:
    """A hash that tells base models apart, the same whether a checkpoint is loaded in fp32 or bf16.

    Of names, shapes and up to 65,536 evenly spaced values of each parameter, rounded to bf16.
    """
    return hash_of(sorted(model.named_parameters()))


def hash_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """The hash that `fingerprint` describes, of some tensors with their names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
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


def run_checkpoint(path: str | Path) -> dict[str, Any]:
    """The last checkpoint of the run in the folder `path`, or the checkpoint `path`.

    Raises:
        BadInput: as `read_checkpoint` does.
    """
    path = Path(path)
    return read_checkpoint(path / LAST if path.is_dir() else path)


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
