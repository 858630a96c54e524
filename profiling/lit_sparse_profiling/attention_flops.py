"""FLOPs of the ops that torch's scaled dot-product attention runs, by their shapes, and whether they are causal.

torch has formulas of its own, but 2.11's refuse key and value heads that several query heads share, no release has one
for the CPU's op, and none tells causal attention apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HEADS_FIRST = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flex_attention",
)
"""Ops on (batch, heads, length, size); the name of their backward is theirs and `_backward`."""
LENGTH_FIRST = ("aten::_flash_attention", "aten::_efficient_attention")
"""Ops on (batch, length, heads, size), or on the rows of all sequences and the places where these begin; the names end
in `_forward` and `_backward`."""
BACKWARD = {f"{name}_backward" for name in (*HEADS_FIRST, *LENGTH_FIRST)}
FORWARD = {*HEADS_FIRST, *(f"{name}_forward" for name in LENGTH_FIRST)}
MASKED_BELOW = -1e4
"""An additive mask rules a position out by -inf or its dtype's lowest number, which is -65,504 in fp16."""


def is_attention(name: str) -> bool:
    """Return whether `attention_flops` knows the op of this name."""
    return name in FORWARD or name in BACKWARD


def attention_flops(name: str, given: Mapping[str, Any]) -> int:
    """Return the FLOPs of a call of the op `name`, each query with every key of its sequence.

    The forward multiplies twice (Q K^T, P V), the backward five times: it computes the scores again.

    Args:
        name: Name of an op of which `is_attention` is true.
        given: Arguments of the call, by name.
    """
    size, value_size = given["query"].shape[-1], given["value"].shape[-1]
    products = size + value_size if name in FORWARD else 3 * size + 2 * value_size  # Q K^T, dQ, dK; dV, dP
    return sum(2 * heads * queries * keys * products for heads, queries, keys in _sequences(name, given))


def _sequences(name: str, given: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Yield query heads, queries and keys of each sequence; of a batch of one length, heads times sequences."""
    query, value = given["query"], given["value"]
    if not name.startswith(LENGTH_FIRST):
        batch, heads, queries, _ = query.shape
        yield batch * heads, queries, value.shape[-2]
        return
    heads = query.shape[-2]
    begins = [_first(given, f"cum_seq_{which}", f"cu_seqlens_{which}") for which in "qk"]
    if begins[0] is None:
        yield query.shape[0] * heads, query.shape[1], value.shape[1]
        return
    lengths = (begin.diff().tolist() for begin in begins)
    yield from ((heads, queries, keys) for queries, keys in zip(*lengths, strict=True))


def is_causal(given: Mapping[str, Any]) -> bool:
    """Return whether a query of an attention sees no later key: the op was told so, or its mask says it.

    Of a mask a few rows are read: a triangle of all of it would be memory that the run itself does not allocate.
    """
    if given.get("is_causal") or given.get("custom_mask_type"):
        return True
    mask = _first(given, "attn_mask", "attn_bias")
    if not isinstance(mask, Tensor) or mask.device.type == "meta" or isinstance(mask, FakeTensor):
        return False
    queries, keys = mask.shape[-2:]
    rows = {0, queries // 2, queries - 2}
    return queries == keys > 1 and all(_rules_out(mask[..., row, row + 1 :]) for row in rows)


def _rules_out(mask: Tensor) -> bool:
    return not bool(mask.any() if mask.dtype is torch.bool else (mask > MASKED_BELOW).any())


def _first(given: Mapping[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)
