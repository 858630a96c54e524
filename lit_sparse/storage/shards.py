"""Checkpoints of a model that is sharded over ranks: a small file, and beside it a folder into which each rank writes.

The file is a checkpoint as on one device, with a tensor on the meta device (a shape without values) in place of each
sharded one, and with the SHA-256 of each file in the folder. The folder is one of torch.distributed.checkpoint, which
gives any number of ranks their shards, whoever wrote them.

A new folder is written and read back before the file, in one rename, replaces the one before it, whose folder is then
removed unless the file was kept as the previous one. So what the file names is whole at any time, also after a power
cut, a full disk or a kill.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from lit_sparse.errors import BadInput
from lit_sparse.storage.hashed_files import HashedFiles, sha256_of
from lit_sparse.storage.shard_folders import ENDING, KEY, folders_of, remove_orphans
from lit_sparse.storage.whole import not_written, sync, write_whole

METADATA = ".metadata"

ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
}
"""All that is unpickled of a folder's metadata: a checkpoint is data, and runs no code."""


# ---- writing


def write_sharded(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint with DTensors to `path` and a folder beside it. Every rank of the process group must call it.

    Raises:
        BadInput: on all ranks, if one cannot write; the checkpoint that was at `path` is there still.
    """
    draft = _Draft.of(checkpoint, path)
    draft.publish(lambda: dcp.save(draft.tensors, storage_writer=draft.writer))  # pyright: ignore[reportPrivateImportUsage]


class BackgroundWriter:
    """Writes sharded checkpoints as `write_sharded` does, but in a thread, while training goes on.

    `write` returns once this rank's shards are copied to host memory. One checkpoint is written at a time. Every rank
    of the process group must make the same calls.

    Args:
        timeout: Of a collective operation of the threads, which have a process group of their own (gloo).
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self._timeout = timeout
        self._group: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def write(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Begin to write `checkpoint` to `path`, once the one before it is written.

        Raises:
            BadInput: on all ranks, if the one before it could not be written.
        """
        self.wait()
        if self._thread is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self._timeout))
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        draft = _Draft.of(checkpoint, path, self._group)
        draft.copy_small()
        shards: Any = dcp.async_save(  # pyright: ignore[reportPrivateImportUsage]
            draft.tensors, storage_writer=draft.writer, process_group=self._group
        )
        self._pending = self._thread.submit(draft.publish, shards.result)

    def wait(self) -> None:
        """Wait until what was begun is written.

        Raises:
            BadInput: on all ranks, if it could not be; the checkpoint that was there before is there still.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None


@dataclass
class _Draft:
    """A checkpoint that is being written.

    Attributes:
        path, folder: Where its file and its shards come to be.
        small: The file's contents, with meta tensors in place of DTensors.
        tensors: The DTensors by key.
        writer: Writes this rank's shards into `folder`.
        group: The process group of all ranks; None is the default one.
    """

    path: Path
    folder: Path
    small: dict[str, Any]
    tensors: dict[str, Any]
    writer: _Writer
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], path: str | Path, group: dist.ProcessGroup | None = None) -> _Draft:
        """Make the folder of a new draft, on all ranks together."""
        path = Path(_from_first(lambda: os.path.realpath(path)))  # only rank 0 knows the number of a new run
        tensors: dict[str, DTensor] = {}
        small = _separate(checkpoint, "", tensors)
        folder = path.parent / _from_first(lambda: _new_folder(path))
        return cls(path, folder, small, tensors, _Writer(folder), group)

    def copy_small(self) -> None:
        """Copy the tensors of the file, which training would change before they are written; rank 0 writes it."""
        self.small = _copies(self.small) if dist.get_rank() == 0 else {}

    def publish(self, write: Callable[[], Any]) -> None:
        """Call `write`, read the shards of all ranks back, and let the file name them, on all ranks together.

        Args:
            write: Writes this rank's shards with `writer`, or waits until they are.

        Raises:
            BadInput: on all ranks, if one could not write.
        """
        hashes = self._write_folder(write)
        _from_first(lambda: self._finish(hashes), self.group)

    def _write_folder(self, write: Callable[[], Any]) -> dict[str, str]:
        """Write this rank's shards; return the hashes of the files of all ranks, read back from the disk."""
        problem: BaseException | None = None
        try:
            write()
        except CheckpointException as error:  # on all ranks
            problem = next(iter(error.failures.values()))[0]
        files = self.writer.files
        own = {"hashes": {} if problem else files.hashes, "problem": str(problem or files.read_back() or "")}
        found = _from_all(own, self.group)
        if all(not one["problem"] for one in found):
            return {name: digest for one in found for name, digest in one["hashes"].items()}
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder)
        if problem is not None and not isinstance(problem, OSError):
            raise problem
        reason = next(one["problem"] for one in found if one["problem"])
        raise not_written(self.path, problem if isinstance(problem, OSError) else OSError(errno.EIO, reason))

    def _finish(self, hashes: dict[str, str]) -> None:
        sync(self.folder)
        sync(self.path.parent)
        try:
            write_whole({**self.small, KEY: {"folder": self.folder.name, "files": hashes}}, self.path)
        except BadInput:
            shutil.rmtree(self.folder)
            raise
        remove_orphans(self.path.parent, self.path.name)


def _separate(value: Any, key: str, tensors: dict[str, DTensor]) -> Any:
    """Move the DTensors nested in dicts, lists and tuples to `tensors`, by key; meta tensors take their places."""
    if isinstance(value, DTensor):
        tensors[key] = cast(DTensor, value.detach())
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {name: _separate(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_separate(item, f"{key}/{n}", tensors) for n, item in enumerate(value))
    return value


def _copies(value: Any) -> Any:
    """Copy the tensors nested in dicts, lists and tuples to host memory."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copies(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copies(item) for item in value)
    return value


def _new_folder(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(path.parent, path.name)
    taken = {folder.name for folder in folders_of(path)}
    name = next(name for n in range(len(taken) + 1) if (name := f"{path.name}{ENDING}{n}") not in taken)
    (path.parent / name).mkdir()
    return name


def _from_first(act: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return what `act` returns on rank 0, to all ranks; where it raises there, raise on all."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except (BadInput, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _from_all(own: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group=group)
    return found


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.fs = self.files = HashedFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # else the folder's name today, a path, which it may not keep


# ---- reading


def check_shards(checkpoint: Mapping[str, Any], path: Path, together: bool = False) -> None:
    """Check the files of a checkpoint's shards against their hashes; one without shards is fine.

    Args:
        together: Every rank of the process group calls it, and each reads its part of the files; it raises on all.

    Raises:
        BadInput: naming the first that is missing or has other contents.
    """
    if KEY not in checkpoint:
        return
    folder, files = path.parent / checkpoint[KEY]["folder"], list(checkpoint[KEY]["files"].items())
    own = files[dist.get_rank() :: dist.get_world_size()] if together else files
    wrong = next(((name, why) for name, digest in own if (why := _difference(folder / name, digest))), None)
    if together:
        wrong = next((one for one in _from_all(wrong) if one is not None), None)
    if wrong is not None:
        raise BadInput(
            f"{path} is damaged: of its shards in {folder.name}/, {wrong[0]} is not as it was written ({wrong[1]}); "
            "give another checkpoint, or a copy of it with that folder beside it."
        )


def _difference(file: Path, digest: str) -> str | None:
    """Return why a file is not the one that was hashed, None if it is."""
    try:
        with file.open("rb") as opened:
            return None if sha256_of(opened) == digest else "its hash is not that of its contents"
    except OSError as error:
        return error.strerror or str(error)


def read_shards(
    checkpoint: Mapping[str, Any], path: str | Path, keys: Collection[str] | None = None, mesh: DeviceMesh | None = None
) -> dict[str, Any]:
    """Return a checkpoint with the values of its sharded tensors, in host memory: full ones, or this rank's shards.

    Args:
        checkpoint: As it was read from the file `path`.
        keys: Read what is under these entries only, such as `state_dict`, or `state_dict/model.norm.weight`; the rest
            stays on the meta device. None reads all.
        mesh: Return DTensors on this mesh, sharded by rows, on its device.
    """
    if KEY not in checkpoint:
        return dict(checkpoint)
    wanted: dict[str, Tensor] = {}
    filled = _place(checkpoint, "", keys, mesh, wanted)
    if wanted:
        _load(wanted, Path(path).parent / checkpoint[KEY]["folder"])
    return filled


def _load(wanted: dict[str, Tensor], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads by itself
            dcp.load(wanted, storage_reader=_Reader(folder), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]
    except CheckpointException as error:  # which is no Exception
        reason = str(next(iter(error.failures.values()))[0]).rstrip(".")
        raise BadInput(f"the shards in {folder} cannot be read ({reason}); give another checkpoint.") from error


def _place(
    value: Any, key: str, keys: Collection[str] | None, mesh: DeviceMesh | None, wanted: dict[str, Tensor]
) -> Any:
    """Replace the meta tensors under `keys` by empty ones, which are also put into `wanted`."""
    if isinstance(value, Tensor):
        under = keys is None or any(f"{key}/".startswith(f"/{one}/") for one in keys)
        if value.is_meta and under:
            wanted[key] = value = _empty(value, mesh)
        return value
    if isinstance(value, Mapping):
        return {name: _place(item, f"{key}/{name}", keys, mesh, wanted) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_place(item, f"{key}/{n}", keys, mesh, wanted) for n, item in enumerate(value))
    return value


def _empty(like: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return empty_dtensor(like.shape, dtype=like.dtype, device_mesh=mesh, placements=placements)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **options: Any) -> Any:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not among what a checkpoint's metadata consists of")
        return super().find_class(module, name)
