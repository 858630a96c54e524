"""Blocks of S2FT (arXiv 2412.06289): channels of MLPs and heads of attention, in all matrices that they couple.

Channel j of an MLP is row j of gate and up, and column j of down. Under grouped queries a head is a key-value head with
its group of queries: its rows of q, k and v, and its columns of o. The paper permutes channels and heads so that those
chosen are one slab; blocks need no permutation, since their kernels gather.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_sparse.anatomy import role
from lit_sparse.blocks.grid import Blocks
from lit_sparse.errors import BadInput

HEADS, CHANNELS = ("q", "k", "v", "o"), ("gate", "up", "down")
BY_COLUMNS = ("o", "down")
"""Roles of which a head or channel is columns, and a slab too; of the others it is rows."""


def coupled_blocks(matrices: Mapping[str, Tensor], config: Any, weights: float, seed: int) -> dict[str, Blocks]:
    """Return the blocks of heads and channels drawn from `seed`, with at most `weights` weights in all.

    Heads and channels get weights in proportion to their matrices' sizes, and are drawn uniformly over all layers, so
    that layers get different numbers of them.

    Args:
        matrices: The matrices (out, in) that may have blocks, by name; only their shapes are read.
        config: The configuration of the model's text decoder, which has the number of heads.

    Raises:
        BadInput: if a matrix is of no such role (projections fused to one, experts), or not even a head or a channel
            fits.
    """
    units = {name: _units(name, matrix, config) for name, matrix in matrices.items()}
    total = sum(matrix.numel() for matrix in matrices.values())
    chosen: dict[str, list[int]] = {}
    for roles in (HEADS, CHANNELS):
        groups: dict[str, list[str]] = {}  # the matrices of one attention or MLP, by its name
        for name in sorted(name for name in matrices if role(name) in roles):
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        share = sum(matrices[name].numel() for names in groups.values() for name in names) / total
        left = share * weights
        for group, number in _drawn(groups, units, f"{seed} {roles[0]}"):
            size = sum(matrices[name].numel() // units[name] for name in groups[group])
            if size > left:
                break
            left -= size
            for name in groups[group]:
                chosen.setdefault(name, []).append(number)
    if not chosen:
        raise BadInput(
            f"SMT: blocks: coupled trains whole heads and channels, of which not one fits in {int(weights):,} weights; "
            "give a larger trainable_fraction."
        )
    return {name: _blocks(name, matrices[name], units[name], chosen[name]) for name in matrices if name in chosen}


def _units(name: str, matrix: Tensor, config: Any) -> int:
    """Return the number of heads or channels that the matrix has parts of."""
    kind = role(name)
    if "[" in name or kind not in HEADS + CHANNELS:
        raise BadInput(
            f"SMT: blocks: coupled trains heads (q, k, v, o) and channels (gate, up, down), but {name} is neither; "
            "give targets that leave it out, or other blocks."
        )
    side = matrix.shape[1] if kind in BY_COLUMNS else matrix.shape[0]
    if kind in CHANNELS:
        return side
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or side % heads:
        raise BadInput(
            f"SMT: blocks: coupled trains whole heads, but {name} has {side} rows or columns for {heads} key-value "
            "heads; give targets without q, k, v and o."
        )
    return heads


def _drawn(groups: Mapping[str, Iterable[str]], units: Mapping[str, int], seed: str) -> list[tuple[str, int]]:
    """Return all heads or channels, as the name of their attention or MLP and a number, in a random order.

    Raises:
        BadInput: if the matrices of one attention or MLP have different numbers of them.
    """
    found: list[tuple[str, int]] = []
    for group, names in sorted(groups.items()):
        counts = {units[name] for name in names}
        if len(counts) > 1:
            raise BadInput(
                f"SMT: blocks: coupled needs matrices with the same heads or channels, but those of {group} have "
                f"{' and '.join(map(str, sorted(counts)))}; give other targets or blocks."
            )
        found += [(group, number) for number in range(counts.pop())]
    random.Random(seed).shuffle(found)
    return found


def _blocks(name: str, matrix: Tensor, units: int, numbers: list[int]) -> Blocks:
    rows, columns = matrix.shape
    places = torch.tensor(numbers)
    none = torch.zeros_like(places)
    if role(name) in BY_COLUMNS:
        return Blocks.of((rows, columns // units), torch.stack([none, places], dim=1))
    return Blocks.of((rows // units, columns), torch.stack([places, none], dim=1))
