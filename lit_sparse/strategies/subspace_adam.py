"""GaLore and Fira: Adam on the gradients of matrices projected to a subspace, which is chosen anew now and then.

GaLore (arXiv 2403.03507) keeps the moments of R = G B alone, B being the leading right singular vectors of the gradient
G at the last refresh (of its transpose, for a matrix that is wider than high):

    N = Adam(R)            w <- w - lr (scale N B^T + weight_decay w)

Fira (arXiv 2410.01623) adds what the projection leaves of the gradient, each row scaled as Adam scaled it in the
subspace, with a limit l to the growth of its norm:

    w <- w - lr (scale N B^T + f (G - R B^T) + weight_decay w)          f = |N| / |R| / l, of each row

Written from the texts. Ours: the basis is found by randomised range finding; epsilon and weight decay are where
torch.optim.AdamW has them; what Fira leaves is the paper's, whereas its code subtracts scale R B^T; a norm of zero
limits nothing, where theirs would hold the residual near zero for hundreds of steps. The kernels file has the rest.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.anatomy import is_target, linears
from lit_sparse.errors import BadInput
from lit_sparse.factors import check_rank, from_first_rank
from lit_sparse.optim import gradient, local_shard, trainable
from lit_sparse.roles import ByRole, roles_of
from lit_sparse.strategies.base import Context, Probe, UpdateStrategy
from lit_sparse.strategies.own_optimizer import FusedMethod
from lit_sparse.strategies.subspaces import CHOOSERS, Layout, oriented, seed_of
from lit_sparse_kernels.adamw_arguments import Rule
from lit_sparse_kernels.subspace_adam import subspace_back, subspace_moments

Residual = Literal["none", "fira"]
TINY = 1e-8
"""Number that Fira adds to a norm before it divides by it."""


@dataclasses.dataclass
class SubspaceAdam(FusedMethod, UpdateStrategy):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Keep Adam's moments in a subspace of each matrix's gradient (GaLore, arXiv 2403.03507; Fira, arXiv 2410.01623).

    It trains whatever the stacked method trains, all weights if used alone: matrices of the decoder layers in
    subspaces, the rest by AdamW.

    Args:
        rank: Dimension of a subspace; below 1, a share of the shorter side of each matrix.
        refresh_every: Optimizer steps of a matrix from one choice of its subspace to the next.
        scale: Factor of the update within the subspace, over AdamW's.
        residual: What becomes of the gradient outside the subspace: `none` of it is used (GaLore), or it is scaled as
            Adam scales the rest (`fira`).
        basis: How the subspace is found: by a random `sketch` of the gradient, or by its `svd`.
        targets: Matrices of the decoder layers by role (`q`, `k`, `v`, `o`, `gate`, `up`, `down`), ending of their
            module's name, or `all`.
        head: Whether the head is such a matrix too, unless it is tied; GaLore's authors leave it to AdamW.
        growth: Limit of the residual's norm, over that of the step before (`fira`).
        betas: Decay of the moments.
        eps: Added to the denominator of Adam's update.
        weight_decay: Decoupled weight decay of matrices, embeddings and head.
        fused_backward: Step each weight in the backward pass and free its gradient: neither accumulation nor DDP.
        two_pass_clip: With `fused_backward`, clip the norm of all gradients to this, in a second backward pass.
        seed: Of the sketches.

    Raises:
        BadInput: if a value is out of its range.
    """

    rank: float = 0.25
    refresh_every: int = 200
    scale: float = 0.25
    residual: Residual = "none"
    basis: Literal["sketch", "svd"] = "sketch"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    head: bool = False
    growth: float = 1.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    fused_backward: bool = False
    two_pass_clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rank("SubspaceAdam", self.rank)
        if self.refresh_every < 1:
            raise BadInput(
                f"SubspaceAdam: refresh_every is {self.refresh_every}; it must be a number of steps from 1 on."
            )
        if not self.scale > 0 or not self.growth >= 1 or not self.eps > 0 or not self.weight_decay >= 0:
            raise BadInput(
                f"SubspaceAdam: scale is {self.scale}, growth {self.growth}, eps {self.eps} and weight_decay "
                f"{self.weight_decay}; scale and eps must be above 0, growth 1 or more, and weight_decay 0 or more."
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise BadInput(f"SubspaceAdam: betas are {self.betas}; give two numbers from 0 to below 1.")
        if self.residual not in ("none", "fira") or self.basis not in CHOOSERS:
            raise BadInput(
                f"SubspaceAdam: residual is {self.residual} and basis {self.basis}; residual is none or fira, and "
                f"basis {' or '.join(CHOOSERS)}."
            )
        self._check_fused()

    @property
    def cycle(self) -> int | None:
        return self.refresh_every

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        super().attach(model, probe, context)
        if not self._targeted(model):
            ends = {name.rpartition(".")[2] for name in linears(model)}
            raise BadInput(
                f"SubspaceAdam: no matrix of {type(model).__name__} is among the targets {self.targets}; its linear "
                f"layers are called {', '.join(sorted(ends)) or 'nothing'}."
            )

    def _targeted(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the matrices that are projected where they train, by name."""
        roles, layers = roles_of(model, "layers_and_head" if self.head else "layers"), roles_of(model)
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if roles[parameter] == "matrix" and parameter.ndim in (2, 3)
            if layers[parameter] == "head"
            or is_target(name.rpartition(".")[0], self.targets)
            # Experts are called by their parameter's name; so would factors be, whose parameters are up and down.
            or (parameter.ndim == 3 and is_target(name, self.targets))
        }

    def _ranks(self, model: nn.Module) -> dict[nn.Parameter, int]:
        """Return the rank of each of these matrices.

        Raises:
            BadInput: if it is above a side of one that trains.
        """
        ranks = {}
        for name, parameter in self._targeted(model).items():
            side = min(parameter.shape[-2:])
            if self.rank > side and parameter.requires_grad:
                raise BadInput(
                    f"SubspaceAdam: rank is {self.rank:.0f}, but a side of {name} has {side} entries; give a rank of "
                    f"at most {side}, or a share of the shorter side below 1."
                )
            ranks[parameter] = int(self.rank) if self.rank >= 1 else max(1, round(self.rank * side))
        return ranks

    def _make(self, groups: list[dict[str, Any]], lr: float) -> ByRole:
        made = Projected(groups, lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        made.settings = self
        return made

    def _follow(self, optimizer: Any, model: nn.Module) -> None:
        optimizer.ranks = self._ranks(model)

    def optimizer_bytes(self, model: nn.Module) -> int:
        ranks = self._ranks(model)
        return sum(4 * state_size(parameter, ranks.get(parameter)) for _, parameter in trainable(model))


def state_size(parameter: Tensor, rank: int | None) -> int:
    """Return the entries of moments and basis: r (2 max(m, n) + min(m, n)) of a matrix; AdamW's without a rank."""
    if rank is None:
        return 2 * parameter.numel()
    *stack, rows, columns = parameter.shape
    return math.prod(stack) * rank * (2 * max(rows, columns) + min(rows, columns))


class Projected(ByRole):
    """AdamW, but in subspaces for the matrices that have a rank.

    The state of a matrix is `basis` (short, r), `exp_avg` and `exp_avg_sq` (long, r), and with a residual `limiter`,
    the norm that the next one is measured by; all by rows of their own where the weight is sharded.

    Attributes:
        ranks: Of the matrices that are projected.
        settings: The strategy's fields.
    """

    ranks: Mapping[Any, int] = {}
    settings: SubspaceAdam

    def takes(self, parameter: Tensor) -> bool:
        return parameter in self.ranks

    def fields(self, parameter: Tensor) -> tuple[str, ...]:
        return () if self.takes(parameter) else super().fields(parameter)

    def step_own(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        for parameter in parameters:
            self._step_matrix(parameter, rule)

    def _step_matrix(self, parameter: Tensor, rule: Rule) -> None:
        state, layout, settings = self._state_of(parameter), Layout(parameter), self.settings
        m, v, step = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"]), int(state["step"])
        grad = layout.view(gradient(parameter)).to(m.dtype)
        if (step - 1) % settings.refresh_every == 0:
            self._refresh(parameter, layout, grad)
        divisor = 1.0 if self.grad_scale is None else self.grad_scale.to(grad.device)
        projected = layout.project(grad, state["basis"]).div_(divisor).contiguous()
        moved, factor = subspace_moments(projected, m, v, step, rule), None
        if settings.residual == "fira":
            unbias = rule.corrections(step)[1] / (1 - rule.betas[0] ** step)
            squares = layout.row_squares(grad) / divisor**2
            factor = self._factor(state, layout, projected, moved, squares, unbias)
            moved = moved.mul_(settings.scale).addcmul_(factor[..., None], projected, value=-1)
            factor = layout.rows_for_back(factor) / divisor
        else:
            moved.mul_(settings.scale)
        subspace_back(
            layout.view(local_shard(self.exact(parameter))),
            layout.rows_for_back(moved),
            layout.basis_for_back(state["basis"]),
            rule.lr,
            1 - rule.lr * rule.weight_decay,
            factor,
            None if factor is None else grad,
        )

    def _factor(
        self, state: dict[str, Any], layout: Layout, projected: Tensor, moved: Tensor, squares: Tensor, unbias: float
    ) -> Tensor:
        """Return Fira's f of this rank's rows, (..., long), and keep the norm that limits the next one.

        The norm of f (G - R B^T) needs no such matrix: the basis is orthonormal, so that |g - r B^T|^2 = |g|^2 - |r|^2.
        It is taken before the corrections of the bias, which would let it grow on their own.
        """
        norms = torch.linalg.vector_norm(projected, dim=-1)
        factor = torch.linalg.vector_norm(moved, dim=-1) / (norms + TINY)
        left = (squares - norms.square()).clamp_(min=0)
        norm = layout.total(factor.square() * left).sqrt() / unbias
        last, growth = local_shard(state["limiter"]), self.settings.growth
        limit = torch.where(last > 0, (norm / (last + TINY)).clamp(min=growth) / growth, 1.0)
        last.copy_(norm / limit)
        return factor / limit[..., None]

    def _refresh(self, parameter: Tensor, layout: Layout, grad: Tensor) -> None:
        """Choose the subspace anew; replicas take rank 0's, since libraries choose signs freely."""
        state, rank = self._state_of(parameter), self.ranks[parameter]
        name = next(
            name
            for group in self.param_groups
            for name, one in zip(group["param_names"], group["params"], strict=True)
            if one is parameter
        )
        seed = seed_of(self.settings.seed, int(state["step"]), name)
        basis = oriented(CHOOSERS[self.settings.basis](layout, grad, rank, seed))
        layout.keep(basis if layout.scattered else from_first_rank(basis), state["basis"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state and self.takes(parameter):
            layout, rank = Layout(parameter), self.ranks[parameter]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["basis"] = layout.zeros(layout.short, rank, dtype=dtype)
            state["exp_avg"] = layout.zeros(layout.long, rank, dtype=dtype)
            state["exp_avg_sq"] = layout.zeros(layout.long, rank, dtype=dtype)
            if self.settings.residual == "fira":
                state["limiter"] = layout.zeros(dtype=dtype)
        return super()._state_of(parameter)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, own in self.state.items():
            if self.takes(parameter):  # saved by one process, and loaded by ranks: their rows of it
                layout = Layout(parameter)
                self.state[parameter] = {n: v if n == "master" else layout.shard(v) for n, v in own.items()}
