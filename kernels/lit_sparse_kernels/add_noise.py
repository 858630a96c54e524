"""Weights and seeded noise on many tensors in one launch: perturb, or restore, update and perturb anew in one pass.

    out = keep w + sum_j a_j z(seed_j)

where w is a tensor, or a range of a tensor's elements, in row-major order; out may be w itself. z is the noise of
`philox`, which depends on the element's place in the full parameter and never exists as a tensor of that size.

The sum is taken in fp32, a term at a time, so that Rademacher noise gives the same bits on every device. It is rounded
to nearest or, for bf16 with `stochastic`, up or down with the probability that makes the mean exact (16 bits of the
stream ROUNDING of the first term's seed): an update of 1e-6 of a weight of 0.02 is lost by rounding to nearest.

The weights are read once and written once, whatever the number of terms: 2 P bytes for P bytes of weights.

Legend: C chunks of pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lit_sparse_kernels.jit import FLOATS, enqueue, jit, on_cuda, tl
from lit_sparse_kernels.master_adamw import addresses, sent, type_of
from lit_sparse_kernels.philox import (
    DENSE,
    Kind,
    noise_block,
    parts_on_host,
    rounding_block,
    rounding_on_host,
    signed,
)
from lit_sparse_kernels.philox import reference as noise_reference

CASES = [
    # (first element, elements) of each piece, dtype, number of terms, kind of noise
    ([(0, 4096), (0, 17)], torch.float32, 1, "rademacher"),
    ([(77, 5000), (2**34 - 5, 300), (3, 0)], torch.float32, 3, "rademacher"),
    ([(0, 2100), (9, 31)], torch.float32, 2, "gaussian"),
    ([(128, 4097), (1, 1)], torch.bfloat16, 2, "rademacher"),
    ([(5, 700)], torch.float16, 1, "gaussian"),
]
"""Pieces that the tests and the benchmark share."""
BLOCK = 2048


class Term(NamedTuple):
    """A multiple of the noise of a seed (64 bits)."""

    seed: int
    scale: float


class Piece(NamedTuple):
    """A range of elements of a parameter.

    Attributes:
        out: What is written, contiguous; may be `weight` itself.
        weight: What is read, contiguous, of the same shape and dtype.
        param: The parameter's number.
        first: Place of its first element in the full parameter.
    """

    out: Tensor
    weight: Tensor
    param: int
    first: int = 0


def reference(
    piece: Piece, terms: Sequence[Term], keep: float = 1.0, kind: Kind = "rademacher", stream: int = DENSE
) -> Tensor:
    """The definition in float64, not rounded to the weight's dtype. Returns the new values in its shape."""
    value = keep * piece.weight.double()
    for term in terms:
        z = noise_reference(piece.first, piece.weight.numel(), term.seed, piece.param, stream, kind)
        value = value + term.scale * z.view(value.shape).to(value.device)
    return value


# ---- Triton


@jit
def stochastically(x, bits):
    # fp32 rounded to bf16 values: up with the probability of the bits that are cut off.
    return ((x.to(tl.int32, bitcast=True) + bits) & -65536).to(tl.float32, bitcast=True)


@jit(do_not_specialize=["terms", "keep"])
def _add_noise_kernel(
    table,
    chunks,
    seeds,
    scales,
    terms,
    keep,
    TYPE: tl.constexpr,
    STREAM: tl.constexpr,
    RADEMACHER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program makes one block of one piece; blocks begin at a multiple of 128 of the parameter's elements.
    row = table + tl.load(chunks + tl.program_id(0) * 2) * 5
    out = tl.load(row).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    weight = tl.load(row + 1).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    count, first, param = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4).to(tl.int32)
    base = first // 128 * 128 + tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * BLOCK
    at = base + tl.arange(0, BLOCK) - first
    inside = (at >= 0) & (at < count)
    x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * keep
    for j in range(terms):
        x += tl.load(scales + j) * noise_block(tl.load(seeds + j), base, param, STREAM, RADEMACHER, BLOCK)
    if STOCHASTIC:
        x = stochastically(x, rounding_block(tl.load(seeds), base, param, BLOCK))
    tl.store(out + at, x.to(TYPE), mask=inside)


def launch(
    pieces: Sequence[Piece],
    terms: Sequence[Term],
    keep: float = 1.0,
    kind: Kind = "rademacher",
    stream: int = DENSE,
    stochastic: bool = False,
) -> None:
    """The kernel on pieces of one device, a launch for each dtype."""
    for dtype in dict.fromkeys(piece.weight.dtype for piece in pieces):
        alike = [piece for piece in pieces if piece.weight.dtype == dtype and piece.weight.numel()]
        if not alike:
            continue
        device = alike[0].weight.device
        rows = tuple((p.out.data_ptr(), p.weight.data_ptr(), p.weight.numel(), p.first, p.param) for p in alike)
        chunks_C2 = chunks_of(tuple((piece.first, piece.weight.numel()) for piece in alike), device)
        enqueue(
            _add_noise_kernel,
            (len(chunks_C2),),
            device,
            addresses(rows, device),
            chunks_C2,
            sent([signed(term.seed) for term in terms], torch.int64, device),
            sent([term.scale for term in terms], torch.float32, device),
            len(terms),
            float(keep),
            TYPE=type_of(dtype),
            STREAM=stream,
            RADEMACHER=kind == "rademacher",
            STOCHASTIC=stochastic and dtype == torch.bfloat16,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # a fused product and sum would give other bits than torch's two
        )
    torch.autograd.graph.increment_version([piece.out for piece in pieces])  # as an operation of torch's would


@lru_cache(maxsize=64)
def chunks_of(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return which piece and which block of it each program takes, (C, 2) int32."""
    blocks = [-(-(first % 128 + count) // BLOCK) for first, count in ranges]
    pairs = [(number, block) for number, many in enumerate(blocks) for block in range(many)]
    return sent(pairs, torch.int32, device)


# ---- torch


def on_host(
    pieces: Sequence[Piece],
    terms: Sequence[Term],
    keep: float = 1.0,
    kind: Kind = "rademacher",
    stream: int = DENSE,
    stochastic: bool = False,
) -> None:
    """The same by torch, a part at a time."""
    for piece in pieces:
        out, weight = piece.out.detach().view(-1), piece.weight.detach().view(-1)
        exact = torch.promote_types(weight.dtype, torch.float32)
        parts = parts_on_host(piece.first, weight.numel(), terms, piece.param, stream, kind, weight.device)
        for part, noises in parts:
            value = weight[part].to(exact)
            if keep != 1:
                value = value * keep
            for noise in islice(noises, len(terms) - 1):
                value = value + noise
            last = next(noises)
            if stochastic and out.dtype == torch.bfloat16:
                out[part] = rounded(value + last, piece.param, piece.first + part.start, terms[0].seed)
            else:
                torch.add(value, last, out=out[part])  # computed in the dtype of `value`, and written once


def rounded(value: Tensor, param: int, first: int, seed: int) -> Tensor:
    """Return fp32 values rounded to bf16 stochastically, in bf16: a range of a parameter from element `first` on."""
    bits = rounding_on_host(first, value.numel(), seed, param, value.device).view(value.shape)
    return (value.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32).bfloat16()


def check(pieces: Sequence[Piece]) -> None:
    """Refuse what cannot be read and written end to end.

    Raises:
        ValueError: naming the piece, what it is and what was expected.
    """
    for number, (out, weight, _, first) in enumerate(pieces):
        allowed = FLOATS if weight.is_cuda else (*FLOATS, torch.float64)
        if weight.dtype not in allowed:
            raise ValueError(f"weight {number} is {weight.dtype}; expected {' or '.join(map(str, allowed))}.")
        if (out.dtype, out.shape, out.device) != (weight.dtype, weight.shape, weight.device):
            raise ValueError(
                f"out {number} is {out.dtype} of shape {tuple(out.shape)} on {out.device}; expected {weight.dtype} of "
                f"shape {tuple(weight.shape)} on {weight.device}."
            )
        if not (out.is_contiguous() and weight.is_contiguous()):
            raise ValueError(f"piece {number} has gaps or another order in memory; expected contiguous tensors.")
        if first < 0:
            raise ValueError(f"piece {number} begins at element {first}; expected 0 or more.")


def add_noise(
    pieces: Sequence[Piece],
    terms: Sequence[Term],
    keep: float = 1.0,
    kind: Kind = "rademacher",
    stream: int = DENSE,
    stochastic: bool = False,
) -> None:
    """Write keep w + sum of scale z(seed) into `out` of each piece.

    Args:
        pieces: Tensors of one device, fp32, bf16 or fp16 (on a CPU also float64).
        terms: At least one.
        keep: Factor of the weights: 1 - lr x weight decay in an update.
        kind: `rademacher` or `gaussian`.
        stream: The stream of the noise.
        stochastic: Round bf16 stochastically; other dtypes are rounded to nearest.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if tensors do not go together or are not contiguous, or there is no term.
    """
    check(pieces)
    if not terms:
        raise ValueError("there are 0 terms; expected 1 or more.")
    if pieces:
        (launch if on_cuda(pieces[0].weight) else on_host)(pieces, terms, keep, kind, stream, stochastic)
