"""SCALE: normalised gradients without moments, and momentum for the head alone.

"A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659 (ICML 2026). With G the gradient of a matrix,

    U = G / sqrt(mean of G^2 over the inputs of each output)        w <- w - lr * (U + weight_decay * w)

For embeddings the mean is over the vocabulary, for each feature: both are columns of a matrix written (in, out). The
head's gradient is first averaged, M = 0.9 M + 0.1 G. Vectors take AdamW. Written from the text: the published code has
no licence. Ours: the floor of the root mean square is 1e-12, which in fp32 is below every gradient (theirs is 1e-8);
Adam's epsilon is where torch has it; a tied head is an embedding, and has no momentum.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from lit_sparse.anatomy import transposed_weights
from lit_sparse.errors import BadInput
from lit_sparse.optim import gradient, local_shard, sum_over_shards
from lit_sparse.roles import ByRole, sizes_of
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.strategies.own_optimizer import OptimizerMethod
from lit_sparse_kernels.adamw_arguments import Rule

FLOOR = 1e-12
"""Least root mean square that a gradient is divided by: a row of zeros stays one."""


@dataclasses.dataclass
class SCALE(OptimizerMethod, UpdateStrategy):
    """Normalise gradients by column in place of keeping moments; only the head has momentum (SCALE, arXiv 2506.16659).

    It trains whatever the stacked method trains; all weights if used alone.

    Args:
        momentum: Momentum of the head.
        weight_decay: Decoupled weight decay of matrices.
        vector_lr_factor: Learning rate of AdamW for norms and biases, over that of the matrices. The authors' scripts
            have 5 at 1B weights and 20 for smaller models.

    Raises:
        BadInput: if a number is out of its range.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0
    vector_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise BadInput(f"SCALE: momentum is {self.momentum}; it must be from 0 to below 1.")
        if self.weight_decay < 0 or self.vector_lr_factor < 0:
            raise BadInput(
                f"SCALE: weight_decay is {self.weight_decay} and vector_lr_factor {self.vector_lr_factor}; they must "
                "be 0 or more."
            )

    def _make(self, groups: list[dict[str, Any]], lr: float) -> ByRole:
        made = Normalized(groups, lr, weight_decay=self.weight_decay)
        made.momentum, made.lr_factor = self.momentum, self.vector_lr_factor
        return made

    def _follow(self, optimizer: Any, model: nn.Module) -> None:
        super()._follow(optimizer, model)
        optimizer.transposed = transposed_weights(model)

    def optimizer_bytes(self, model: nn.Module) -> int:
        sizes = sizes_of(model)
        return 4 * sizes["head"] * (self.momentum > 0) + 8 * sizes["vector"]


class Normalized(ByRole):
    """Updates of root mean square 1 for each output of a matrix, and for each column of an embedding.

    Attributes:
        momentum: Of the head.
        transposed: Matrices that are stored as (in, out).
    """

    momentum: float = 0.9
    transposed: Collection[Tensor] = ()

    def takes(self, parameter: Tensor) -> bool:
        return self.roles[parameter] != "vector"

    def fields(self, parameter: Tensor) -> tuple[str, ...]:
        if self.takes(parameter):
            return ("exp_avg",) if self.roles[parameter] == "head" and self.momentum else ()
        return super().fields(parameter)

    def step_own(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        for parameter in parameters:
            grad = gradient(parameter).float()
            if self.grad_scale is not None:
                grad = grad / self.grad_scale
            if "exp_avg" in (state := self._state_of(parameter)):
                grad = local_shard(state["exp_avg"]).lerp_(grad, 1 - self.momentum)
            weight = local_shard(self.exact(parameter))
            weight.mul_(1 - rule.lr * rule.weight_decay)
            weight.addcdiv_(grad.to(weight.dtype), self._deviation(grad, parameter).to(weight.dtype), value=-rule.lr)

    def _deviation(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """Return the root mean square of the full gradient over each output's inputs, or over an embedding's rows."""
        embedding, columns = self.roles[parameter] == "embed", parameter in self.transposed
        if embedding or (columns and parameter.ndim == 2):  # over all rows, of which a rank may have some
            squares = sum_over_shards(grad.square().sum(0, keepdim=True), parameter) / len(parameter)
        else:
            squares = grad.square().mean(-2 if columns else -1, keepdim=True)
        return squares.to(grad.device).sqrt_().clamp_(min=FLOOR)
