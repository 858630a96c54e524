"""Small checkpoints: what a run trained, and of which base."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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


def get_rng(device: torch.device, world: int) -> list[dict[str, Any]]:
    """The states of torch's and Python's random numbers on each of `world` processes, which all have to call it.

    Tensors and plain values, first process first: of the CPU, of its own `device` if that is a GPU, and of Python.
    """
    kind, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    own = {"torch": torch.get_rng_state(), "cuda": cuda, "python": [kind, list(words), gauss]}
    if world == 1:
        return [own]
    states: list[Any] = [None] * world
    dist.all_gather_object(states, own)
    return states


def set_rng(
    states: Sequence[Mapping[str, Any]] | Mapping[str, Any], device: torch.device, rank: int, world: int
) -> int:
    """Go on from what `get_rng` gave, on the process `rank` of `world`; the number of processes that it was of.

    With another number of them each process starts anew, from a seed of the first one's old state and its own rank.

    Args:
        states: Of each process; or of the first one alone with those of all its GPUs, as checkpoints had it once.
    """
    kept = [states] if isinstance(states, Mapping) else states
    if len(kept) != world:
        _seed(kept[0]["torch"], rank)
        return len(kept)
    kind, words, gauss = kept[rank]["python"]
    random.setstate((kind, tuple(words), gauss))
    torch.set_rng_state(kept[rank]["torch"])
    cuda = kept[rank]["cuda"]
    if device.type == "cuda" and cuda is not None and len(cuda):
        torch.cuda.set_rng_state(cuda[0] if isinstance(cuda, list) else cuda, device)
    return world


def _seed(state: Tensor, rank: int) -> None:
    """Seed torch, on all devices, and Python from a state of the CPU's random numbers and a rank."""
    digest = hashlib.sha256(state.numpy().tobytes() + f" {rank}".encode()).digest()
    seed = int.from_bytes(digest[:4])
    torch.manual_seed(seed)
    random.seed(seed)


def alike(one: Any, other: Any) -> bool:
    """Whether two values of a checkpoint are the same: tensors (wherever they are), numbers, strings, lists, dicts."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and bool(one == other)
