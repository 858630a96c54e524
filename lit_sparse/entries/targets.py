"""The linear layers of which single entries may be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lit_sparse.anatomy import decoder_layers, role, target_experts, target_linears
from lit_sparse.calls import unreached
from lit_sparse.errors import BadInput
from lit_sparse.selections import LIMIT


def entry_targets(
    model: nn.Module, targets: Sequence[str], compute: Callable[..., Any], strategy: str
) -> dict[str, Any]:
    """Return the linear layers that `targets` name, but those of layers that text does not reach (Mllama has some).

    Args:
        compute: As for `target_linears`.
        strategy: Name of the strategy, for the messages.

    Raises:
        BadInput: if fused experts are among the targets, or a weight with too many entries for positions of 32 bits.
    """
    found, layers = target_linears(model, targets, compute), decoder_layers(model)
    unread = {module for number in unreached(model, layers, compute) for module in layers[number].modules()}
    found = {name: linear for name, linear in found.items() if linear not in unread}
    if fused := [*target_experts(model, targets)]:
        roles = sorted({role(name) for name in found})
        raise BadInput(
            f"{strategy} trains entries of linear layers, but among the targets {targets} are fused experts, such as "
            f"{fused[0]}; give targets without them" + (f", such as [{', '.join(roles)}]." if roles else ".")
        )
    if large := [name for name, linear in found.items() if linear.weight.numel() >= LIMIT]:
        raise BadInput(
            f"{strategy}: {large[0]} has {found[large[0]].weight.numel():,} entries, and {LIMIT:,} or more have no "
            "positions of 32 bits; give targets without it."
        )
    return found
