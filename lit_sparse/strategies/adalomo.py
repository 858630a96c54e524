"""AdaLomo: full fine-tuning whose optimizer state and gradients take next to no memory.

AdaLomo (arXiv 2310.10195), on LOMO's fused backward (arXiv 2306.09782). With G the gradient of a matrix w (m, n) and
b = 1 - t^-0.8 at its step t:

    R = b R + (1 - b) mean of G^2 over columns         C = b C + (1 - b) mean of G^2 over rows
    D = G / sqrt(R / mean(R)) / sqrt(C)                D = D / max(1, rms(D))
    a = lr max(1e-3, rms(w))                           w <- w (1 - a weight_decay) - a D

which clips the update of each group, a matrix or a vector, by itself: no norm of all gradients is needed. Vectors keep
the mean of G^2 of each entry. Ours: of a stack of matrices (fused experts) each one is a group; sums of squares are
fp32; where shards of a matrix are on several ranks, its statistics and norms are the whole matrix's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_sparse.errors import BadInput
from lit_sparse.optim import gradient, local_shard, part_of, sum_over_shards, trainable
from lit_sparse.roles import ByRole, roles_of
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.strategies.own_optimizer import FusedMethod
from lit_sparse_kernels.adamw_arguments import Rule

FLOOR = 1e-30
"""Added to squared gradients: where all were zero, an update is zero."""
LEAST = 1e-3
"""Least root mean square of weights that a learning rate is multiplied by."""


@dataclasses.dataclass
class AdaLomo(FusedMethod, UpdateStrategy):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Update each weight in the backward pass, by factored second moments (AdaLomo, arXiv 2310.10195).

    It trains whatever the stacked method trains; all weights if used alone. A gradient is freed as soon as its weight
    has moved, and the state of a matrix (m, n) is m + n numbers.

    Args:
        weight_decay: Decoupled weight decay of matrices and embeddings; it is multiplied by a, not by `lr`.
        decay: The exponent of b = 1 - t^-decay.
        fused_backward: Step in the backward pass; without it gradients live until the optimizer step, as accumulation,
            `trainer.gradient_clip_val` and DDP need.
        two_pass_clip: With `fused_backward`, clip the norm of all gradients to this, in a second backward pass.

    Raises:
        BadInput: if a value is out of its range.
    """

    weight_decay: float = 0.0
    decay: float = 0.8
    fused_backward: bool = True
    two_pass_clip: float | None = None

    def __post_init__(self) -> None:
        if self.weight_decay < 0 or not 0 < self.decay <= 1:
            raise BadInput(
                f"AdaLomo: weight_decay is {self.weight_decay} and decay {self.decay}; weight_decay must be 0 or more, "
                "and decay above 0 and at most 1."
            )
        self._check_fused()

    def _make(self, groups: list[dict[str, Any]], lr: float) -> ByRole:
        made = Factored(groups, lr, weight_decay=self.weight_decay)
        made.decay = self.decay
        return made

    def optimizer_bytes(self, model: nn.Module) -> int:
        roles = roles_of(model)
        return sum(
            4 * (p.numel() if roles[p] == "vector" else sum(p.numel() // side for side in p.shape[-2:]))
            for _, p in trainable(model)
        )


class Factored(ByRole):
    """AdaLomo's rule for all parameters.

    The state of a matrix is `row` (..., m) and `column` (..., n), whole on every rank; of a vector `exp_avg_sq`.

    Attributes:
        decay: The exponent of b.
    """

    decay: float = 0.8

    def takes(self, parameter: Tensor) -> bool:
        return True

    def fields(self, parameter: Tensor) -> tuple[str, ...]:
        return ("exp_avg_sq",) if self.roles[parameter] == "vector" else ()

    def step_own(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        for parameter in parameters:
            state = self._state_of(parameter)
            weight, grad = local_shard(self.exact(parameter)), gradient(parameter)
            grad = grad.to(weight.dtype)
            if self.grad_scale is not None:
                grad = grad / self.grad_scale
            share = float(state["step"]) ** -self.decay
            if "row" in state:
                update = self._factored(parameter, state, grad, share)
            else:
                update = self._diagonal(state, grad, share)
            self._move(parameter, weight, update, rule)

    def _diagonal(self, state: dict[str, Any], grad: Tensor, share: float) -> Tensor:
        mean = local_shard(state["exp_avg_sq"])
        mean.lerp_(grad.square().add_(FLOOR), share)
        return grad * mean.rsqrt()

    def _factored(self, parameter: Tensor, state: dict[str, Any], grad: Tensor, share: float) -> Tensor:
        """Move the statistics, and return D before it is normalised."""
        squares, (*_, rows, columns) = grad.square(), parameter.shape
        here = part_of(parameter).start[0]
        row, column = (torch.zeros_like(state[name]) for name in ("row", "column"))
        row[here : here + len(grad)] = squares.sum(-1)
        if parameter.ndim == 2:
            column += squares.sum(0)
        else:  # a stack, of which a rank has whole matrices
            column[here : here + len(grad)] = squares.sum(-2)
        if isinstance(parameter, DTensor):  # in one message, in which each row is some rank's alone
            summed = sum_over_shards(torch.cat([row.flatten(), column.flatten()]), parameter).to(row.device)
            row, column = summed[: row.numel()].view_as(row), summed[row.numel() :].view_as(column)
        state["row"].lerp_(row.div_(columns).add_(FLOOR), share)
        state["column"].lerp_(column.div_(rows).add_(FLOOR), share)
        own = slice(here, here + len(grad))
        of_row = (state["row"] / state["row"].mean(-1, keepdim=True)).rsqrt_()[own]
        of_column = state["column"].rsqrt()[own if parameter.ndim > 2 else ...]
        return torch.mul(grad, of_row[..., None], out=squares).mul_(of_column[..., None, :])

    def _move(self, parameter: Tensor, weight: Tensor, update: Tensor, rule: Rule) -> None:
        """Normalise the update of each group and take it; `update` is written."""
        matrices = self.roles[parameter] != "vector" and parameter.ndim > 2
        dims = (-2, -1) if matrices else None
        norms = [torch.linalg.vector_norm(tensor, dim=dims) for tensor in (update, weight)]
        squares, entries = torch.stack(norms).square_(), parameter[0].numel() if matrices else parameter.numel()
        if isinstance(parameter, DTensor) and not matrices:
            squares = sum_over_shards(squares, parameter).to(squares.device)
        update_rms, weight_rms = (squares / entries).sqrt_()
        rate = rule.lr * weight_rms.clamp_(min=LEAST)
        rate = rate[..., None, None] if matrices else rate
        update_rms = update_rms[..., None, None] if matrices else update_rms
        if rule.weight_decay:
            weight.mul_(1 - rate * rule.weight_decay)
        weight.sub_(update.mul_(rate / update_rms.clamp_(min=1)))

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state and self.roles[parameter] != "vector":
            *stack, rows, columns = parameter.shape
            options: dict[str, Any] = {"dtype": torch.promote_types(parameter.dtype, torch.float32)}
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["row"] = torch.zeros(*stack, rows, device=parameter.device, **options)
            state["column"] = torch.zeros(*stack, columns, device=parameter.device, **options)
        return super()._state_of(parameter)
