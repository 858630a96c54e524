"""Subspaces of gradients: how a matrix is projected, wherever its rows are, and who chooses the subspace.

A gradient is projected from its shorter side (GaLore's rule), so that its moments have r max(m, n) entries. All here is
in that orientation, (long, short): of a weight with more rows than columns, or as many, the weight itself, else its
transpose. Under FSDP2 rows of the weight are sharded, and of a stack of matrices (fused experts) the matrices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import zeros as sharded_zeros

from lit_sparse.optim import full_tensor, local_shard, sum_over_shards


class Layout:
    """How a parameter (m, n), or a stack of matrices (E, m, n), is projected.

    The basis (short, r) and whatever is (long, r) are sharded by rows of their own where the parameter is sharded;
    those of a stack by matrices, of which a rank then has all that is its.

    Args:
        parameter: Of two or three dimensions; a DTensor has its first one sharded.

    Attributes:
        long, short: Sides of a matrix.
        turned: Whether the long side is the weight's second one.
        scattered: Whether each rank has matrices of its own.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        *self.stack, rows, columns = parameter.shape
        self.long, self.short, self.turned = max(rows, columns), min(rows, columns), rows < columns
        self._cut = isinstance(parameter, DTensor) and parameter.ndim == 2
        self.scattered = isinstance(parameter, DTensor) and parameter.ndim == 3

    def view(self, local: Tensor) -> Tensor:
        """Return this rank's part of the parameter, or of a tensor like it, as (..., long, short)."""
        return local.mT if self.turned else local

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return zeros (*stack, *shape), sharded by their first dimension where the parameter is."""
        shape, like = (*self.stack, *shape), self._parameter
        if not isinstance(like, DTensor) or not shape:
            return torch.zeros(shape, dtype=dtype, device=like.device)
        made = sharded_zeros(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)
        return made.to(like.device)  # which is the host where shards are offloaded

    def shard(self, value: Tensor) -> Tensor:
        """Return a full tensor of the state, which every rank has, as `zeros` makes one; a DTensor is unchanged."""
        if not isinstance(self._parameter, DTensor) or isinstance(value, DTensor) or not value.ndim:
            return value
        mesh = self._parameter.device_mesh
        made = distribute_tensor(value.to(mesh.device_type), mesh, self._parameter.placements, src_data_rank=None)
        return made.to(value.device)

    # ---- products

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        """Return this rank's rows of G B, (..., long, r).

        Args:
            grad: This rank's part of G, as `view` returns it, in the dtype of `basis`.
            basis: As it is kept in the optimizer's state.
        """
        if self._cut and not self.turned:
            return grad @ self._whole(basis)
        product = grad @ local_shard(basis)
        return self._rows_of_sum(product) if self._cut else product

    def row_squares(self, grad: Tensor) -> Tensor:
        """Return this rank's entries of the squared norms of the rows of G, (..., long), fp32 at least."""
        exact = torch.promote_types(grad.dtype, torch.float32)
        squares = torch.linalg.vector_norm(grad, dim=-1, dtype=exact).square()
        return self._rows_of_sum(squares) if self._cut and self.turned else squares

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of (..., long) over the rows of all ranks."""
        return self._sum(values.sum(-1)) if self._cut else values.sum(-1)

    def rows_for_back(self, rows: Tensor) -> Tensor:
        """Return the rows (..., long, *) that an update of this rank's part of W needs, of this rank's own ones."""
        return self._gather(rows, self.long) if self._cut and self.turned else rows

    def basis_for_back(self, basis: Tensor) -> Tensor:
        """Return what an update of this rank's part of W needs of the basis."""
        return self._whole(basis) if self._cut and not self.turned else local_shard(basis)

    def gram(self, grad: Tensor, columns: Tensor) -> Tensor:
        """Return G^T G C of all ranks for columns C (..., short, k), which each rank has whole."""
        if not self._cut:
            return grad.mT @ (grad @ columns)
        if not self.turned:
            return self._sum(grad.mT @ (grad @ columns))
        product = self._sum(grad @ local_shard(self.shard(columns)))
        return self._gather(grad.mT @ product, self.short)

    def full(self, grad: Tensor) -> Tensor:
        """Return all of G; of a stack that is sharded, this rank's matrices."""
        if not self._cut:
            return grad
        return self.view(self._gather(self.view(grad).contiguous(), self._parameter.shape[0]))

    def keep(self, basis: Tensor, kept: Tensor) -> None:
        """Write a basis that each rank has whole into the state's, `kept`."""
        local_shard(kept).copy_(local_shard(self.shard(basis)) if self._cut else basis)

    def _sum(self, terms: Tensor) -> Tensor:
        return sum_over_shards(terms, self._parameter).to(terms.device)

    def _whole(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, DTensor)
        there = tensor.detach().to(tensor.device_mesh.device_type)
        return full_tensor(there).to(tensor.device)

    def _rows_of_sum(self, terms: Tensor) -> Tensor:
        """Return this rank's rows of the sum of all ranks' `terms`."""
        assert isinstance(self._parameter, DTensor)
        mesh, placements = self._parameter.device_mesh, self._parameter.placements
        kinds = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
        summed = DTensor.from_local(terms.contiguous().to(mesh.device_type), mesh, kinds)
        return summed.redistribute(placements=placements).to_local().to(terms.device)

    def _gather(self, rows: Tensor, length: int) -> Tensor:
        """Return the `length` rows of all ranks, of this rank's."""
        assert isinstance(self._parameter, DTensor)
        mesh, placements = self._parameter.device_mesh, self._parameter.placements
        like = torch.empty(length, *rows.shape[1:], device="meta")
        sharded = DTensor.from_local(
            rows.contiguous().to(mesh.device_type), mesh, placements, shape=like.shape, stride=like.stride()
        )
        return sharded.full_tensor().to(rows.device)


# ---- who chooses


class Chooser(Protocol):
    """Chooses the basis of a matrix's subspace; others of the family (rows, adaptive ranks) are others of these."""

    def __call__(self, layout: Layout, grad: Tensor, rank: int, seed: int) -> Tensor:
        """Return an orthonormal basis (..., short, rank) of G's rows, the same on every rank that has a part of G.

        Args:
            grad: This rank's part of G, (..., long, short), fp32 at least. It may be zero.
            seed: Of what is drawn.
        """
        ...


@dataclass(frozen=True)
class Sketch:
    """The leading right singular vectors by randomised range finding (Halko, Martinsson and Tropp, arXiv 0909.4061).

    Attributes:
        oversampling: Vectors beside the rank's that are iterated on.
        iterations: Products with G^T G.
    """

    oversampling: int = 8
    iterations: int = 2

    def __call__(self, layout: Layout, grad: Tensor, rank: int, seed: int) -> Tensor:
        count = min(rank + self.oversampling, layout.short)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(layout.short, count, generator=generator, dtype=torch.float32)
        basis = torch.linalg.qr(drawn.to(grad.device, grad.dtype))[0].expand(*grad.shape[:-2], -1, -1)
        for _ in range(self.iterations):
            product = layout.gram(grad, basis)
            # Of no gradient, as a layer's that no token reached, the drawn subspace is as good as any.
            size = product.abs().amax((-2, -1), keepdim=True)
            basis = torch.linalg.qr(torch.where(size > 0, product / size, basis))[0]
        small = basis.mT @ layout.gram(grad, basis)  # of whose eigenvectors the last ones are the leading directions
        scale = small.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(small.dtype).tiny)
        turns = torch.linalg.eigh((small / scale + (small / scale).mT) / 2)[1]
        return basis @ turns[..., -rank:].flip(-1)


@dataclass(frozen=True)
class Exact:
    """The leading right singular vectors by a singular value decomposition of the whole gradient."""

    def __call__(self, layout: Layout, grad: Tensor, rank: int, seed: int) -> Tensor:
        return torch.linalg.svd(layout.full(grad), full_matrices=False)[2][..., :rank, :].mT


CHOOSERS: dict[str, Chooser] = {"sketch": Sketch(), "svd": Exact()}


def oriented(basis: Tensor) -> Tensor:
    """Return the basis (..., short, r) with signs that depend on its directions alone.

    Libraries choose the signs of singular vectors by rounding; moments that are kept over a refresh would turn around
    with them. A sign is that of the product with one fixed vector, to which no direction is likely to be orthogonal.
    """
    fixed = torch.arange(basis.shape[-2], device=basis.device, dtype=basis.dtype).cos()
    return basis * torch.where(fixed @ basis < 0, -1.0, 1.0)[..., None, :]


def seed_of(seed: int, step: int, name: str) -> int:
    """Return the seed of what is drawn for a parameter at a step, the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {name}".encode()).digest()[:7], "big")
