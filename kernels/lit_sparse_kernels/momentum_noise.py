"""A step of momentum over seeded noise, with or without a diagonal curvature, on many tensors in one launch.

With z_j the noise of `philox` for seed_j, at the place of each element in its full parameter:

    m  = decay m + sum_j a_j z_j
    h  = rest h + sum_j s_j z_j^2                                 where there is a curvature, and it is refreshed
    p  = keep p - step m / (gamma max(h, bound) + eps)            with a curvature h
    p  = keep p - step m bound                                    without; `bound` is a number of the tensor's

which is HELENE's update (arXiv 2411.10696) with `bound` the floor of a layer, and SPSA with momentum without. m and h
are fp32; p is rounded to nearest, or stochastically for bf16 (see `add_noise`). Weights, m and h are read and written
once, and the noise never exists: 8 + 2 p bytes an element, 12 + 2 p with h, and 16 + 2 p where it is refreshed, for
weights of p bytes. In separate operations of torch's it is about 80 + 2 p.

Legend: C chunks of pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_sparse_kernels.add_noise import BLOCK, Term, chunks_of, rounded, stochastically
from lit_sparse_kernels.jit import FLOATS, enqueue, jit, on_cuda, tl
from lit_sparse_kernels.master_adamw import addresses, sent, type_of
from lit_sparse_kernels.philox import DENSE, Kind, noise_block, parts_on_host, rounding_block, signed
from lit_sparse_kernels.philox import reference as noise_reference

CASES = [
    # (first element, elements) of each piece, dtype, number of terms, kind of noise, with a curvature
    ([(0, 4096), (0, 17)], torch.float32, 1, "rademacher", False),
    ([(77, 2500), (2**34 - 5, 300), (3, 0)], torch.float32, 2, "rademacher", True),
    ([(9, 2131)], torch.float32, 1, "gaussian", True),
    ([(128, 2200), (1, 1)], torch.bfloat16, 1, "rademacher", False),
]
"""Pieces that the tests and the benchmark share."""


class Piece(NamedTuple):
    """A range of elements of a parameter with its state, all contiguous and of one shape.

    Attributes:
        weight: The weights.
        momentum: fp32 (float64 with weights of float64).
        curvature: Of the momentum's dtype, or None.
        bound: The floor of the curvature; without one, the factor of the step.
        param: The parameter's number.
        first: Place of its first element in the full parameter.
    """

    weight: Tensor
    momentum: Tensor
    curvature: Tensor | None
    bound: float
    param: int
    first: int = 0


class Rule(NamedTuple):
    """Factors of a step: see the module's equations. `refresh` are the s_j, or None where h is not refreshed."""

    step: float
    decay: float
    keep: float = 1.0
    gamma: float = 1.0
    eps: float = 0.0
    rest: float = 1.0
    refresh: tuple[float, ...] | None = None


def reference(
    piece: Piece, terms: Sequence[Term], rule: Rule, kind: Kind = "rademacher"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition in float64. Returns weight, momentum and curvature."""
    p, m = piece.weight.double(), rule.decay * piece.momentum.double()
    h = None if piece.curvature is None else piece.curvature.double()
    if h is not None and rule.refresh is not None:
        h = rule.rest * h
    for number, term in enumerate(terms):
        z = noise_reference(piece.first, p.numel(), term.seed, piece.param, 0, kind).view(p.shape).to(p.device)
        m = m + term.scale * z
        if h is not None and rule.refresh is not None:
            h = h + rule.refresh[number] * z * z
    moved = m * piece.bound if h is None else m / (rule.gamma * h.clamp(min=piece.bound) + rule.eps)
    return rule.keep * p - rule.step * moved, m, h


# ---- Triton


@jit(do_not_specialize=["terms", "step", "decay", "keep", "gamma", "eps", "rest"])
def _momentum_noise_kernel(
    table,
    bounds,
    chunks,
    seeds,
    scales,
    refreshes,
    terms,
    step,
    decay,
    keep,
    gamma,
    eps,
    rest,
    TYPE: tl.constexpr,
    RADEMACHER: tl.constexpr,
    CURVED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program makes one block of one piece; blocks begin at a multiple of 128 of the parameter's elements.
    piece = tl.load(chunks + tl.program_id(0) * 2)
    row = table + piece * 6
    weight = tl.load(row).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    momentum = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    curvature = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    count, first, param = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5).to(tl.int32)
    bound = tl.load(bounds + piece)
    base = first // 128 * 128 + tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * BLOCK
    at = base + tl.arange(0, BLOCK) - first
    inside = (at >= 0) & (at < count)
    m = tl.load(momentum + at, mask=inside, other=0.0) * decay
    h = tl.zeros([BLOCK], tl.float32)
    if CURVED:
        h = tl.load(curvature + at, mask=inside, other=0.0)
        if refreshes is not None:
            h = h * rest
    for j in range(terms):
        z = noise_block(tl.load(seeds + j), base, param, 0, RADEMACHER, BLOCK)
        m += tl.load(scales + j) * z
        if refreshes is not None:
            h += tl.load(refreshes + j) * (z * z)
    tl.store(momentum + at, m, mask=inside)
    if refreshes is not None:
        tl.store(curvature + at, h, mask=inside)
    moved = tl.div_rn(m, gamma * tl.maximum(h, bound) + eps) if CURVED else m * bound
    p = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * keep - step * moved
    if STOCHASTIC:
        p = stochastically(p, rounding_block(tl.load(seeds), base, param, BLOCK))
    tl.store(weight + at, p.to(TYPE), mask=inside)


def launch(
    pieces: Sequence[Piece], terms: Sequence[Term], rule: Rule, kind: Kind = "rademacher", stochastic: bool = False
) -> None:
    """The kernel on pieces of one device, a launch for each dtype, with and without a curvature."""
    kinds: dict[tuple[torch.dtype, bool], list[Piece]] = {}
    for piece in pieces:
        if piece.weight.numel():
            kinds.setdefault((piece.weight.dtype, piece.curvature is not None), []).append(piece)
    for (dtype, curved), alike in kinds.items():
        device = alike[0].weight.device
        rows = tuple(
            (
                piece.weight.data_ptr(),
                piece.momentum.data_ptr(),
                0 if piece.curvature is None else piece.curvature.data_ptr(),
                piece.weight.numel(),
                piece.first,
                piece.param,
            )
            for piece in alike
        )
        chunks_C2 = chunks_of(tuple((piece.first, piece.weight.numel()) for piece in alike), device)
        refresh = rule.refresh if curved else None
        enqueue(
            _momentum_noise_kernel,
            (len(chunks_C2),),
            device,
            addresses(rows, device),
            sent([piece.bound for piece in alike], torch.float32, device),
            chunks_C2,
            sent([signed(term.seed) for term in terms], torch.int64, device),
            sent([term.scale for term in terms], torch.float32, device),
            None if refresh is None else sent(refresh, torch.float32, device),
            len(terms),
            *(float(value) for value in (rule.step, rule.decay, rule.keep, rule.gamma, rule.eps, rule.rest)),
            TYPE=type_of(dtype),
            RADEMACHER=kind == "rademacher",
            CURVED=curved,
            STOCHASTIC=stochastic and dtype == torch.bfloat16,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # a fused product and sum would give other bits than torch's two
        )
    torch.autograd.graph.increment_version(
        [t for p in pieces for t in (p.weight, p.momentum, p.curvature) if t is not None]
    )


# ---- torch


def on_host(
    pieces: Sequence[Piece], terms: Sequence[Term], rule: Rule, kind: Kind = "rademacher", stochastic: bool = False
) -> None:
    """The same by torch, a part at a time."""
    plain = [Term(term.seed, 1.0) for term in terms]
    for piece in pieces:
        weight, momentum = piece.weight.detach().view(-1), piece.momentum.view(-1)
        curvature = None if piece.curvature is None else piece.curvature.view(-1)
        parts = parts_on_host(piece.first, weight.numel(), plain, piece.param, DENSE, kind, weight.device)
        for part, noises in parts:
            m, h = momentum[part].mul_(rule.decay), None if curvature is None else curvature[part]
            if h is not None and rule.refresh is not None:
                h.mul_(rule.rest)
            for number, z in enumerate(noises):
                if h is not None and rule.refresh is not None:
                    h.add_(z.square().mul_(rule.refresh[number]))
                m.add_(z.mul_(terms[number].scale))
            moved = m * piece.bound if h is None else m / h.clamp(min=piece.bound).mul_(rule.gamma).add_(rule.eps)
            value = weight[part].to(m.dtype) * rule.keep - moved.mul_(rule.step)
            if stochastic and weight.dtype == torch.bfloat16:
                value = rounded(value, piece.param, piece.first + part.start, terms[0].seed)
            weight[part] = value


def check(pieces: Sequence[Piece]) -> None:
    """Refuse what cannot be read and written end to end.

    Raises:
        ValueError: naming the piece, what it is and what was expected.
    """
    for number, piece in enumerate(pieces):
        weight = piece.weight
        allowed = FLOATS if weight.is_cuda else (*FLOATS, torch.float64)
        if weight.dtype not in allowed:
            raise ValueError(f"weight {number} is {weight.dtype}; expected {' or '.join(map(str, allowed))}.")
        state = torch.promote_types(weight.dtype, torch.float32)
        for name, tensor in (("momentum", piece.momentum), ("curvature", piece.curvature)):
            if tensor is not None and (tensor.dtype, tensor.shape, tensor.device) != (
                state,
                weight.shape,
                weight.device,
            ):
                raise ValueError(
                    f"{name} {number} is {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; expected "
                    f"{state} of shape {tuple(weight.shape)} on {weight.device}."
                )
        if not all(t is None or t.is_contiguous() for t in (weight, piece.momentum, piece.curvature)):
            raise ValueError(f"piece {number} has gaps or another order in memory; expected contiguous tensors.")


def momentum_noise(
    pieces: Sequence[Piece], terms: Sequence[Term], rule: Rule, kind: Kind = "rademacher", stochastic: bool = False
) -> None:
    """Take a step of momentum over noise, in place.

    Args:
        pieces: Tensors of one device.
        terms: Seeds and factors of the noise, at least one.
        rule: The factors of the step.
        kind: `rademacher` or `gaussian`.
        stochastic: Round bf16 weights stochastically.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if tensors do not go together or are not contiguous, or terms and refreshes are not as many.
    """
    check(pieces)
    if not terms or (rule.refresh is not None and len(rule.refresh) != len(terms)):
        refreshes = "" if rule.refresh is None else f" and {len(rule.refresh)} refreshes"
        raise ValueError(f"there are {len(terms)} terms{refreshes}; expected 1 or more, and as many refreshes.")
    if pieces:
        (launch if on_cuda(pieces[0].weight) else on_host)(pieces, terms, rule, kind, stochastic)
