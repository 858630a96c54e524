"""Read small checkpoints, tell base models apart, and save and restore random states."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from lit_sparse.anatomy import has_values
from lit_sparse.errors import BadInput
from lit_sparse.optim import part_of, sum_over_shards
from lit_sparse.storage.shard_folders import KEY, odd_shards
from lit_sparse.storage.shards import check_shards, read_shards
from lit_sparse.storage.whole import check_whole, previous_of

SAMPLES_PER_TENSOR = 2**16
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their number of bytes."""
LAST = Path("checkpoints") / "last.ckpt"
"""The last checkpoint in the folder of a run."""

TOKENIZER = "tokenizer"
"""Folder of a run's own tokenizer within the run's, where its data have one that is not the base's."""


def fingerprint(model: nn.Module) -> str:
    """Return a hash that tells base models apart, the same whether a checkpoint is loaded in fp32 or bf16.

    It covers names, shapes and evenly spaced values of each parameter (about 65,536), rounded to bf16.
    """
    return hash_of(sorted(model.named_parameters()))


def hash_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the hash that `fingerprint` describes, of tensors with their names; DTensors count as full tensors.

    Every rank must call it if there are DTensors among them.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if has_values(tensor):
            digest.update(_samples(tensor).cpu().to(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def sums_of(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of the sums of all bits of tensors with their names, which any single flipped bit changes.

    It is another one for each dtype. Every rank must call it if there are DTensors among them.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        if has_values(tensor):
            bits = part_of(tensor).values.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
            # In parts, since torch copies what it sums in another dtype.
            total = torch.stack([part.sum(dtype=torch.int64) for part in bits.split(2**20)]).sum()
            whole = sum_over_shards(total, tensor) if isinstance(tensor, DTensor) else total
            digest.update(f"{name} {int(whole)}".encode())
    return digest.hexdigest()


def _samples(tensor: Tensor) -> Tensor:
    """Return the bits of evenly spaced values of a tensor, rounded to bf16, as integers.

    Each rank has those of its shard of a DTensor, in which rows are one after the other, and zeros add up with them.
    """
    stride = max(1, tensor.numel() // SAMPLES_PER_TENSOR)
    part = part_of(tensor)
    before = part.start[0] * (tensor.numel() // max(1, tensor.shape[0]) if tensor.ndim else 1)  # entries of other ranks
    own = part.values.flatten()[-before % stride :: stride].to(torch.bfloat16).view(torch.int16).int()
    if not isinstance(tensor, DTensor):
        return own
    first, count = -(-before // stride), -(-tensor.numel() // stride)
    return sum_over_shards(pad(own, (first, count - first - len(own))), tensor)


def read_checkpoint(
    path: str | Path,
    keys: Collection[str] | None = None,
    mesh: DeviceMesh | None = None,
    mapped: bool = False,
    together: bool = False,
) -> dict[str, Any]:
    """Read the checkpoint at `path` to the CPU; only tensors and plain values are unpickled.

    Args:
        keys, mesh: What is read of a sharded checkpoint, and how, as for `read_shards`.
        mapped: Map the file into memory instead of reading it: what is not used takes none.
        together: Every rank of the process group calls it: each checks a part of the shards' files.

    Raises:
        BadInput: if there is none, it is damaged, or it is no checkpoint of a lit_sparse run. It names the previous
            checkpoint of the run, if that is whole.
    """
    with offering_previous(path):
        return _read(Path(path), keys, mesh, mapped, together)


@contextmanager
def offering_previous(path: str | Path) -> Iterator[None]:
    """Name the checkpoint that the one at `path` replaced in a refusal of that, if there is one and it is whole."""
    try:
        yield
    except BadInput as error:
        previous = previous_of(Path(path))
        if Path(path).name != LAST.name or not previous.is_file():
            raise
        try:
            step = _read(previous, (), None, True, False).get("global_step")
        except BadInput:
            raise error from None
        raise BadInput(f"{error} The one before it, of step {step}, is whole: {previous}.") from error


def is_whole(path: Path) -> bool:
    """Return whether there is a checkpoint at `path` that `read_checkpoint` would not refuse."""
    try:
        _read(path, (), None, True, False)
    except BadInput:
        return False
    return True


def _read(
    path: Path, keys: Collection[str] | None, mesh: DeviceMesh | None, mapped: bool, together: bool
) -> dict[str, Any]:
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: it is of another kind)."
        ) from error
    check_form(checkpoint, path)
    check_shards(checkpoint, path, together)
    return read_shards(checkpoint, path, keys, mesh)


KINDS: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "updates": (list,),
    "base_sums": (str, NoneType),
    "init_seed": (int, NoneType),
    "precision": (str, NoneType),
    "tokens_seen": (int, NoneType),
    "skipped": (int, NoneType),
    "rng": (list, Mapping, NoneType),
    "owed": (Mapping, NoneType),
    "classes": (Mapping, NoneType),
}
"""Kinds of the entries of a checkpoint's `lit_sparse`; older checkpoints lack some, which may be None here."""


def check_form(checkpoint: Any, path: str | Path) -> None:
    """Refuse a checkpoint, as it was read from the file `path`, whose contents are of another form than a run writes.

    Raises:
        BadInput: naming what is odd.
    """
    if not isinstance(checkpoint, dict) or "lit_sparse" not in checkpoint:
        raise BadInput(f"{path} is not a checkpoint of a lit_sparse run.")
    if (odd := oddity(checkpoint)) is not None:
        raise BadInput(f"{path} is no checkpoint that a run wrote: {odd}; give another checkpoint, or a copy of it.")


def oddity(checkpoint: Mapping[str, Any]) -> str | None:
    """Return what the form of a checkpoint has that no run writes, None if there is nothing."""
    ours, values = checkpoint["lit_sparse"], checkpoint.get("state_dict")
    if not isinstance(ours, Mapping):
        return f"its lit_sparse is {ours!r:.40}"
    for key, kinds in KINDS.items():
        if not isinstance(ours.get(key), kinds):
            return f"its lit_sparse has {ours[key]!r:.40} as {key}" if key in ours else f"its lit_sparse has no {key}"
    for update in ours["updates"]:
        if not isinstance(update, Mapping) or not isinstance(update.get("class"), str) or "state" not in update:
            return f"a method of its lit_sparse is {update!r:.40}"
    if not isinstance(values, Mapping):
        return f"its state_dict is {values!r:.40}"
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"its state_dict has {value!r:.40} as {name!r:.80}"
        if value.layout != torch.strided or (value.is_meta and KEY not in checkpoint):
            return f"its state_dict has a {'meta' if value.is_meta else 'sparse'} tensor as {name}"
    return odd_shards(checkpoint[KEY]) if KEY in checkpoint else None


def trained_values(checkpoint: Mapping[str, Any], path: str | Path) -> Iterator[Mapping[str, Tensor]]:
    """Yield the values of a checkpoint that was read without them: all, or of a sharded one each tensor by itself."""
    if KEY not in checkpoint:
        yield checkpoint["state_dict"]
        return
    for name, value in checkpoint["state_dict"].items():
        yield read_shards({"state_dict": {name: value}, KEY: checkpoint[KEY]}, path)["state_dict"]


def run_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read the last checkpoint of the run in the folder `path`, or the checkpoint `path`.

    Raises:
        BadInput: as `read_checkpoint` does.
    """
    path = Path(path)
    return read_checkpoint(path / LAST if path.is_dir() else path)


def strategy_state(path: str | Path, strategy: str) -> Any:
    """Return what the strategy whose class has this name saved in the checkpoint of a run.

    Raises:
        ValueError: if the run was trained without it.
    """
    for update in read_checkpoint(path)["lit_sparse"]["updates"]:
        if update["class"] == strategy:
            return update["state"]
    raise ValueError(f"it was trained without {strategy}")


def forked_rng(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that restores torch's random state, of the CPU and of `device`, when it ends."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def get_rng(device: torch.device, world: int) -> list[dict[str, Any]]:
    """Gather the random states of torch and Python from all `world` ranks; every rank must call it.

    Returns:
        For each rank, in order, the states of the CPU, of its own `device` if that is a GPU, and of Python, as tensors
        and plain values.
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
    """Restore the random states that `get_rng` returned, on the rank `rank` of `world`.

    If the world size changed, each rank seeds anew from the first rank's old state and its own rank.

    Args:
        states: One for each rank. Older checkpoints hold that of the first rank alone, with the states of all its GPUs.

    Returns:
        The world size that the states are from.
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
    """Seed torch, on all devices, and Python from a random state of the CPU and a rank."""
    digest = hashlib.sha256(state.numpy().tobytes() + f" {rank}".encode()).digest()
    seed = int.from_bytes(digest[:4])
    torch.manual_seed(seed)
    random.seed(seed)


def alike(one: Any, other: Any) -> bool:
    """Return true if two values of a checkpoint are equal: tensors (on any device), numbers, strings, lists, dicts."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and bool(one == other)
