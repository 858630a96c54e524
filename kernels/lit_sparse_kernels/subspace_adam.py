"""Adam in a subspace of each matrix's gradient, in place: moments of the projection, and the projection back.

With the gradient G (L, S) of a matrix W (L, S), S being its shorter side, the basis B (S, r), the projection R = G B,
both computed by torch, and t the count of the matrix's own steps:

    m = b1 m + (1 - b1) R
    v = b2 v + (1 - b2) R^2
    N = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)
    W = keep W - lr C B^T                                         GaLore, arXiv 2403.03507: C = scale N
    W = keep W - lr (C B^T + f G)                                 Fira, arXiv 2410.01623: C = scale N - f R

f (L) is a number for each row: f G - f R B^T is f times what the projection leaves of the gradient. Without f the
update is a product that torch adds to W in place, of which a kernel has nothing to save. With it the kernel reads G and
W and writes W once, 8 + g bytes an entry for gradients of g bytes, where torch's two operations move 16 + g. Moments
are one pass over R, m and v, of r columns, where torch makes eight. W may be a transposed view, and there may be a
stack of matrices.

Legend: E matrices of a stack, L rows, S columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse_kernels.adamw_arguments import Rule
from lit_sparse_kernels.jit import enqueue, fp32_is_exact, jit, on_cuda, power_of_2, tl

CASES = [
    # matrices, rows, columns, rank, dtype of the gradient, transposed
    (0, 64, 48, 8, torch.float32, False),
    (0, 129, 31, 5, torch.float32, True),
    (3, 40, 24, 17, torch.float32, False),
    (0, 70, 1, 1, torch.float32, True),
    (2, 33, 20, 4, torch.bfloat16, False),
]
"""Shapes that the tests and the benchmark share; 0 matrices are one without a stack. Weights are fp32."""
SIDE = 64
"""Rows and columns of a tile of W."""


def reference(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the moments, in the inputs' dtype. Returns N, exp_avg and exp_avg_sq."""
    first, second = rule.betas
    m = first * exp_avg + (1 - first) * projected
    v = second * exp_avg_sq + (1 - second) * projected * projected
    moved = m / (1 - first**step) / (v.sqrt() / (1 - second**step) ** 0.5 + rule.eps)
    return moved, m, v


def reference_back(
    weight: Tensor,
    moved: Tensor,
    basis: Tensor,
    lr: float,
    keep: float,
    factor: Tensor | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """The definition of the projection back, with C = `moved`. Returns W."""
    update = moved @ basis.mT
    if factor is not None and grad is not None:
        update = update + factor[..., None] * grad
    return keep * weight - lr * update


# ---- Triton


@jit(do_not_specialize=["decay1", "rest1", "decay2", "rest2", "eps", "unbias", "root"])
def _subspace_moments_kernel(
    projected,
    exp_avg,
    exp_avg_sq,
    moved,
    count,
    decay1,
    rest1,
    decay2,
    rest2,
    eps,
    unbias,
    root,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    r = tl.load(projected + at, mask=inside, other=0.0)
    m = tl.load(exp_avg + at, mask=inside, other=0.0) * decay1 + rest1 * r
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0) * decay2 + rest2 * r * r
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(moved + at, tl.div_rn(m * unbias, tl.div_rn(tl.sqrt_rn(v), root) + eps), mask=inside)


@jit(do_not_specialize=["lr", "keep"])
def _subspace_back_kernel(
    weight,
    moved,
    basis,
    factor,
    grad,
    lr,
    keep,
    rows,
    columns,
    rank,
    of_matrix,
    of_row,
    of_column,
    grad_of_matrix,
    grad_of_row,
    grad_of_column,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # A program makes one tile of W: the product over the rank, then the update.
    number = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    update = tl.zeros([SIDE, SIDE], tl.float32)
    left = moved + number * rows * rank + row[:, None].to(tl.int64) * rank
    right = basis + number * columns * rank + column[None, :].to(tl.int64) * rank
    for start in range(0, rank, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(left + k[None, :], mask=(row < rows)[:, None] & (k < rank)[None, :], other=0.0)
        b = tl.load(right + k[:, None], mask=(column < columns)[None, :] & (k < rank)[:, None], other=0.0)
        update = tl.dot(a, b, update, input_precision=PRECISION)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = number * grad_of_matrix + row[:, None].to(tl.int64) * grad_of_row
    f = tl.load(factor + number * rows + row, mask=row < rows, other=0.0)
    g = tl.load(grad + place + column[None, :].to(tl.int64) * grad_of_column, mask=inside, other=0.0)
    update += f[:, None] * g.to(tl.float32)
    at = weight + number * of_matrix + row[:, None].to(tl.int64) * of_row + column[None, :].to(tl.int64) * of_column
    tl.store(at, tl.load(at, mask=inside, other=0.0) * keep - lr * update, mask=inside)


def launch(
    projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, moved: Tensor, step: float, rule: Rule, block: int = 1024
) -> None:
    """The kernel of the moments, which writes N into `moved`."""
    first, second = rule.betas
    rates = (first, 1 - first, second, 1 - second, rule.eps, 1 / (1 - first**step), (1 - second**step) ** 0.5)
    count = projected.numel()
    if not count:
        return
    enqueue(
        _subspace_moments_kernel,
        (-(-count // block),),
        projected.device,
        projected,
        exp_avg,
        exp_avg_sq,
        moved,
        count,
        *(float(rate) for rate in rates),
        BLOCK=block,
        num_warps=4,
    )
    torch.autograd.graph.increment_version([exp_avg, exp_avg_sq, moved])


def launch_back(
    weight: Tensor, moved: Tensor, basis: Tensor, lr: float, keep: float, factor: Tensor, grad: Tensor
) -> None:
    """The kernel of the projection back, with what the projection leaves."""
    *_, rows, columns = weight.shape
    if not weight.numel():
        return
    stacked, grads = (tensor if tensor.ndim == 3 else tensor[None] for tensor in (weight, grad))
    rank = basis.shape[-1]
    exact = fp32_is_exact()  # what torch's own products are computed in
    enqueue(
        _subspace_back_kernel,
        (-(-rows // SIDE), -(-columns // SIDE), len(stacked)),
        weight.device,
        weight,
        moved,
        basis,
        factor,
        grad,
        float(lr),
        float(keep),
        rows,
        columns,
        rank,
        *stacked.stride(),
        *grads.stride(),
        PRECISION="ieee" if exact else "tf32",
        SIDE=SIDE,
        DEPTH=min(32, max(16, power_of_2(rank))),
        num_warps=4,
    )
    torch.autograd.graph.increment_version(weight)


# ---- torch


def on_host(projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, moved: Tensor, step: float, rule: Rule) -> None:
    """The moments by torch."""
    first, second = rule.betas
    exp_avg.lerp_(projected, 1 - first)
    exp_avg_sq.mul_(second).addcmul_(projected, projected, value=1 - second)
    torch.sqrt(exp_avg_sq, out=moved)
    moved.div_((1 - second**step) ** 0.5).add_(rule.eps)
    torch.div(exp_avg, moved, out=moved)
    moved.mul_(1 / (1 - first**step))


def on_host_back(
    weight: Tensor, moved: Tensor, basis: Tensor, lr: float, keep: float, factor: Tensor | None, grad: Tensor | None
) -> None:
    """The projection back by torch, whose product updates W in place."""
    update = weight.addmm_ if weight.ndim == 2 else weight.baddbmm_
    update(moved, basis.mT, beta=keep, alpha=-lr)
    if factor is not None and grad is not None:
        weight.addcmul_(factor[..., None], grad.to(weight.dtype), value=-lr)


@torch.no_grad()
def subspace_moments(projected: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: float, rule: Rule) -> Tensor:
    """Update the moments in place, and return N, of the same shape.

    Args:
        projected: R, (..., L, r), fp32 (fp64 on the host), contiguous as all others.
        exp_avg, exp_avg_sq: First and second moments of R.
        step: Number of this step of the matrix, from 1.
        rule: Betas and eps are read.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or the step is below 1.
    """
    for name, tensor in (("projected", projected), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check(name, tensor, tuple(projected.shape), projected)
    if step < 1:
        raise ValueError(f"step is {step}; expected 1 or more.")
    moved = torch.empty_like(projected)
    (launch if on_cuda(projected) else on_host)(projected, exp_avg, exp_avg_sq, moved, step, rule)
    return moved


@torch.no_grad()
def subspace_back(
    weight: Tensor,
    moved: Tensor,
    basis: Tensor,
    lr: float,
    keep: float = 1.0,
    factor: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    """Update `weight` in place: keep W - lr (C B^T + f G).

    Args:
        weight: W, (L, S) or (E, L, S), fp32 (fp64 on the host); its last two dimensions may be transposed in memory.
        moved: C, (..., L, r), as W in dtype.
        basis: B, (..., S, r), likewise.
        lr: Learning rate.
        keep: 1 - lr times the weight decay.
        factor: f, (..., L), in W's dtype; with `grad`, or without either one.
        grad: G, of W's shape, in any floating dtype and memory order.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together.
    """
    *stack, rows, columns = weight.shape
    if len(stack) > 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected a matrix, or a stack of them.")
    if (factor is None) != (grad is None):
        raise ValueError("one of factor and grad is given; expected both, or neither.")
    _check("moved", moved, (*stack, rows, basis.shape[-1]), weight)
    _check("basis", basis, (*stack, columns, basis.shape[-1]), weight)
    if factor is not None and grad is not None:
        _check("factor", factor, (*stack, rows), weight)
        if grad.shape != weight.shape or grad.device != weight.device:
            raise ValueError(
                f"grad has shape {tuple(grad.shape)} on {grad.device}; expected {tuple(weight.shape)} on "
                f"{weight.device}."
            )
    if factor is not None and grad is not None and on_cuda(weight):
        launch_back(weight, moved, basis, lr, keep, factor, grad)
    else:
        on_host_back(weight, moved, basis, lr, keep, factor, grad)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse a tensor that has another shape, dtype or device, or gaps.

    Raises:
        ValueError: naming it, what it is and what was expected.
    """
    allowed = (torch.float32,) if like.is_cuda else (torch.float32, torch.float64)
    if like.dtype not in allowed or (tensor.dtype, tensor.device) != (like.dtype, like.device):
        wanted = like.dtype if like.dtype in allowed else torch.float32
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; expected {wanted} on {like.device}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; expected a contiguous tensor.")
