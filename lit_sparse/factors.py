"""Linear layers whose weight is a product of two thin factors, both trained from scratch; rebalanced, and merged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import has_values, is_quantized_linear, matrix, replace, target_linears
from lit_sparse.errors import BadInput
from lit_sparse.optim import device_of, full_tensor, local_shard, shard_like

DEAD = 1e-6
"""Singular values below this share of the largest are rounding: their directions would get no gradient any more."""

Start = Literal["kaiming", "cola"]
"""Draw of the factors: uniform within 1 / sqrt(inputs of the factor) (2505.22922), or normal with a variance of
1 / sqrt(rank) / (in + out) ** 0.5 each, so that the product's is 1 / (in + out) (CoLA)."""


class Factorized(nn.Module):
    """`y = up @ act(scale * down @ x) + bias` in the place of a linear layer, whose weight is given up.

    Args:
        linear: The layer, `nn.Linear` or `Conv1D`; its bias is kept.
        rank: Columns of `up` and rows of `down`.
        scale: Factor of the product.
        act: Function between the factors; None for a linear layer, which `merge` can put together again.

    Attributes:
        down: (rank, in), the paper's A.
        up: (out, rank), the paper's B.
    """

    def __init__(
        self, linear: nn.Linear | Conv1D, rank: int, scale: float = 1.0, act: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        weight = matrix(linear)
        outputs, inputs = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_empty(outputs, rank))
        self.bias, self.rank, self.scale, self.act = linear.bias, rank, scale, act
        self._plain = (linear,)  # in a tuple, so that it is no submodule
        linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down)
        if self.scale != 1:
            hidden = hidden * self.scale
        return F.linear(hidden if self.act is None else self.act(hidden), self.up, self.bias)

    @torch.no_grad()
    def draw(self, start: Start, seed: int) -> None:
        """Draw the factors on the CPU in fp32: the same on every device and rank for a seed."""
        if not has_values(self.down):
            return
        generator = torch.Generator("cpu").manual_seed(seed)
        spread = self.rank**-0.25 * sum(self.plain_shape) ** -0.25
        for factor in (self.down, self.up):
            values = torch.empty(factor.shape, dtype=torch.float32, device="cpu")
            if start == "kaiming":
                bound = 1 / math.sqrt(factor.shape[1])
                values.uniform_(-bound, bound, generator=generator)
            else:
                values.normal_(0, spread, generator=generator)
            factor.copy_(values)

    @property
    def plain_shape(self) -> tuple[int, int]:
        """Outputs and inputs of the layer."""
        return self.up.shape[0], self.down.shape[1]

    @torch.no_grad()
    def merge(self) -> nn.Linear | Conv1D:
        """Return the plain layer with the product as its weight, in the factors' dtype.

        The product is computed in fp32 (in fp64 if the factors are), and rounded once.
        """
        (linear,) = self._plain
        exact = torch.promote_types(self.up.dtype, torch.float32)
        weight = (self.scale * (self.up.to(exact) @ self.down.to(exact))).to(self.up.dtype)
        linear.weight = nn.Parameter((weight.t() if isinstance(linear, Conv1D) else weight).contiguous())
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        outputs, inputs = self.plain_shape
        return f"in={inputs}, out={outputs}, rank={self.rank}, scale={self.scale:g}"


@dataclass(frozen=True)
class Recipe:
    """How linear layers are factorised.

    Attributes:
        method: Name of the method, for sentences.
        rank: A number, or below 1 a share of the model's width, then at most the smaller side of each matrix.
        scale: `scale(rank)` is the factor of the product.
        start: Draw of the factors.
        act: Function between them, or None.
        seed: Seed of the draw, beside the layer's name.
    """

    method: str
    rank: float
    scale: Callable[[int], float]
    start: Start
    act: Callable[[Tensor], Tensor] | None
    seed: int

    def factorize(self, model: nn.Module, targets: list[str], compute: Callable[..., Any]) -> dict[str, Factorized]:
        """Replace the linear layers of `model` that `targets` name; return the new modules by name.

        Raises:
            BadInput: if there are none of these, one is quantised, or the rank is above a matrix's side.
        """
        linears = target_linears(model, targets, compute)
        ranks = self._ranks(model, linears)
        made = {}
        for name, linear in linears.items():
            made[name] = Factorized(linear, ranks[name], self.scale(ranks[name]), self.act)
            made[name].draw(self.start, int(hashlib.sha256(f"{self.seed} {name}".encode()).hexdigest()[:15], 16))
            replace(model, name, made[name])
        return made

    def _ranks(self, model: nn.Module, linears: Mapping[str, nn.Linear | Conv1D]) -> dict[str, int]:
        if not linears:
            raise BadInput(
                f"{self.method}: the {type(model).__name__} has fused experts among its targets and no linear layer; "
                "they cannot be factorised: give targets such as [q, k, v, o]."
            )
        width = model.config.get_text_config().hidden_size  # pyright: ignore
        ranks = {}
        for name, linear in linears.items():
            if is_quantized_linear(linear):
                raise BadInput(f"{self.method}: {name} is quantised; give a base that is not.")
            side = min(matrix(linear).shape)
            ranks[name] = int(self.rank) if self.rank >= 1 else min(side, max(1, round(self.rank * width)))
            if ranks[name] > side:
                shape = "x".join(str(one) for one in matrix(linear).shape)
                raise BadInput(
                    f"{self.method}: rank is {ranks[name]}, but {name} is {shape}, whose rank is at most {side}; set "
                    f"rank to {side} or less, or to a share of the width such as 0.25."
                )
        return ranks


def check_rank(method: str, rank: float) -> None:
    """Refuse a rank that is none.

    Raises:
        BadInput: if it is neither a share between 0 and 1 nor a whole number from 1 on.
    """
    if not 0 < rank < float("inf") or (rank >= 1 and rank != int(rank)):
        raise BadInput(f"{method}: rank is {rank}; give a whole number from 1 on, or a share of the width below 1.")


# ---- rebalancing


@torch.no_grad()
def rebalance(layer: Factorized, optimizer: Optimizer) -> None:
    """Refactorise a layer: the product stays, and both factors get the same singular values.

    Factors that are DTensors are gathered, one layer at a time. bf16 ones are rebalanced by the fp32 masters that the
    optimizer keeps: to round anew each time would move the product by 0.24 % a time. Rank 0 computes for all ranks,
    since libraries choose the signs of singular vectors freely. Every rank must call it.
    """
    factors = (layer.up, layer.down)
    if not all(has_values(factor) for factor in factors):
        return
    exact = [optimizer.state.get(factor, {}).get("master", factor) for factor in factors]
    whole = [full_tensor(one.detach().to(device_of(one))) for one in exact]
    new = [from_first_rank(one.to(old.dtype)) for one, old in zip(balanced(*whole), whole, strict=True)]
    for factor, master, value in zip(factors, exact, new, strict=True):
        for tensor in {id(one): one for one in (factor, master)}.values():
            local_shard(tensor).copy_(local_shard(shard_like(value, tensor)))


def from_first_rank(tensor: Tensor) -> Tensor:
    """Return rank 0's values of `tensor`, which every rank has in the same shape; a single process keeps its own."""
    tensor = tensor.contiguous()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product, `up = U S^1/2` and `down = S^1/2 V^T` for its singular values S, in fp64.

    The product is never formed: of QR decompositions `up = Q_u R_u` and `down^T = Q_d R_d` the (r, r) matrix
    `R_u R_d^T` has the singular values, O((m + n) r^2) in all.

    Where the product has a lower rank than r, both halves of a dead direction would be zero, and so would their
    gradients be for ever. There the column of `up` is zero, and the row of `down` a unit vector orthogonal to the
    others, times the root mean square of the old rows' norms.

    Args:
        up: (m, r), r at most m and n.
        down: (r, n).
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().t())
    left, values, right = torch.linalg.svd(r_up @ r_down.t())
    alive = values > DEAD * values[0]
    roots = values.sqrt()
    spare = down.double().norm() / math.sqrt(len(down))
    new_up = q_up @ (left * torch.where(alive, roots, 0))
    new_down = torch.where(alive, roots, spare).unsqueeze(1) * (right @ q_down.t())
    return new_up, new_down
