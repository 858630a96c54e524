"""Lightning's reading and writing of checkpoints, by `lit_sparse.storage.whole` and `lit_sparse.storage.shards`."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed.device_mesh import DeviceMesh

from lit_sparse.checkpoints import check_form, offering_previous
from lit_sparse.storage.shard_folders import remove_orphans, remove_shards
from lit_sparse.storage.shards import check_shards, read_shards
from lit_sparse.storage.whole import check_whole, write_whole


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written and checked by `lit_sparse.storage.whole` where they are local.

    Lightning itself collects a file in host memory and stages it in $TMPDIR, and moving it from there to another file
    system is a copy, which leaves a torn file if it is interrupted.

    Attributes:
        mesh: Where set, sharded tensors are read as DTensors on this mesh, each rank its shards; else whole.
    """

    mesh: DeviceMesh | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_whole(checkpoint, path)
            remove_orphans(Path(path).parent, Path(path).name)  # of a checkpoint that was there before

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        if is_remote(path):
            return super().load_checkpoint(path, *args, **options)
        with offering_previous(path):
            check_whole(path)
            checkpoint = super().load_checkpoint(path, *args, **options)
            check_form(checkpoint, path)
            check_shards(checkpoint, Path(path), together=dist.is_available() and dist.is_initialized())
        return read_shards(checkpoint, path, mesh=self.mesh)

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        if not is_remote(path):
            remove_shards(Path(path))


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL, such as s3://bucket/last.ckpt."""
    return "://" in str(path)
