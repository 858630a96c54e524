"""Means over processes, where there are several."""

import torch.distributed as dist
from torch import Tensor


def averaged(tensor: Tensor) -> Tensor:
    """`tensor` with its mean over all ranks, in place; each ends with the same bits."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor
