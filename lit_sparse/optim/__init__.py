"""The default optimizer, and the optimizer plumbing that strategies and the host share."""

from lit_sparse.optim.adamw import AdamW, gradient
from lit_sparse.optim.fused import FusedBackward
from lit_sparse.optim.groups import (
    NamedParameters,
    drop_state,
    match_by_name,
    parameter_groups,
    regroup,
    trainable,
)
from lit_sparse.optim.sharded import (
    Part,
    device_of,
    full_tensor,
    local_shard,
    part_of,
    shard_like,
    sum_over_shards,
    sum_scalars,
    total_norm,
)

__all__ = [
    "AdamW",
    "FusedBackward",
    "NamedParameters",
    "Part",
    "device_of",
    "drop_state",
    "full_tensor",
    "gradient",
    "local_shard",
    "match_by_name",
    "parameter_groups",
    "part_of",
    "regroup",
    "shard_like",
    "sum_over_shards",
    "sum_scalars",
    "total_norm",
    "trainable",
]
