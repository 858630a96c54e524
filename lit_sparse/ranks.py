"""Means over ranks; a single process keeps its value."""

import torch.distributed as dist
from torch import Tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its mean over all ranks, in place, and return it.

    Every rank must call it, and every rank gets the same bits.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
