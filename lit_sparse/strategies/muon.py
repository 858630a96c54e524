"""Muon: momentum of matrices made orthogonal, by torch's own Muon; AdamW for embeddings, head and vectors.

Muon (github.com/KellerJordan/Muon), as torch.optim.Muon has it: Nesterov momentum, whose singular values five
Newton-Schulz steps in bf16 bring to about 1. torch's takes matrices alone; here it is one optimizer for a whole model.
Under FSDP2 its products are computed on shards, in another order: they agree with one device's to a few bf16 roundings.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.errors import BadInput
from lit_sparse.optim import gradient, local_shard
from lit_sparse.roles import ByRole, sizes_of
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.strategies.own_optimizer import OptimizerMethod
from lit_sparse_kernels.adamw_arguments import Rule


@dataclasses.dataclass
class Muon(OptimizerMethod, UpdateStrategy):
    """Move matrices along their orthogonalised momentum (Muon, torch.optim.Muon), and the rest by AdamW.

    Matrices are those of the decoder layers; it trains whatever the stacked method trains, all weights if used alone.
    An update has the root mean square 0.2 of an entry, about AdamW's, so that its learning rates serve.

    Args:
        momentum: Momentum of matrices.
        weight_decay: Decoupled weight decay of matrices, embeddings and head.
        adamw_lr_factor: Learning rate of AdamW for embeddings, head and vectors, over that of the matrices.

    Raises:
        BadInput: if a number is out of its range.
    """

    momentum: float = 0.95
    weight_decay: float = 0.0
    adamw_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise BadInput(f"Muon: momentum is {self.momentum}; it must be from 0 to below 1.")
        if self.weight_decay < 0 or self.adamw_lr_factor < 0:
            raise BadInput(
                f"Muon: weight_decay is {self.weight_decay} and adamw_lr_factor {self.adamw_lr_factor}; they must be "
                "0 or more."
            )

    def _make(self, groups: list[dict[str, Any]], lr: float) -> ByRole:
        made = Orthogonalized(groups, lr, weight_decay=self.weight_decay)
        made.momentum, made.lr_factor = self.momentum, self.adamw_lr_factor
        return made

    def optimizer_bytes(self, model: nn.Module) -> int:
        sizes = sizes_of(model)
        return 4 * sizes["matrix"] + 8 * (sizes["embed"] + sizes["head"] + sizes["vector"])


class Orthogonalized(ByRole):
    """torch.optim.Muon for matrices, one by one where they are stacked (blocks, experts).

    Attributes:
        momentum: Of matrices.
    """

    momentum: float = 0.95

    def takes(self, parameter: Tensor) -> bool:
        return self.roles[parameter] == "matrix"

    def fields(self, parameter: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.takes(parameter) else super().fields(parameter)

    def step_own(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        matrices: list[Tensor] = []
        states: dict[Tensor, dict[str, Tensor]] = {}
        for parameter in parameters:
            grad = parameter.grad if parameter.ndim == 2 else gradient(parameter)
            assert grad is not None
            scaled = grad.float() if self.grad_scale is None else grad.float() / self.grad_scale
            parts = (self.exact(parameter), scaled, self._state_of(parameter)["momentum_buffer"])
            for weight, its, momentum in zip(*map(self._matrices, parts), strict=True):
                weight.grad = its.to(weight.dtype)
                matrices.append(weight)
                states[weight] = {"momentum_buffer": momentum}
        options = {"weight_decay": rule.weight_decay, "momentum": self.momentum, "adjust_lr_fn": "match_rms_adamw"}
        theirs = torch.optim.Muon(matrices, rule.lr, **options)
        theirs.state = defaultdict(dict, states)
        theirs.step()
        for weight in matrices:
            weight.grad = None

    def _matrices(self, tensor: Tensor) -> list[Tensor]:
        """Return the matrices of which `tensor` consists, which share its memory: itself, or those of this rank."""
        return [tensor.detach()] if tensor.ndim == 2 else list(local_shard(tensor).detach().flatten(0, -3).unbind())
