"""Scores that need no data: those of each matrix's best low-rank approximation (LIFT, arXiv 2506.00772)."""

import math

import torch
from torch import Tensor

from lit_sparse.anatomy import has_values, matrix
from lit_sparse.blocks.grid import Size, grid
from lit_sparse.blocks.selection import block_scores, random_scores
from lit_sparse.blocks.targets import Targets
from lit_sparse.optim import full_tensor


def principal_scores(weight: Tensor, rank: int) -> Tensor:
    """Return the magnitudes of the best approximation of `weight` (m, n) of that rank (LIFT), (m, n).

    By the eigenvectors of the smaller Gram matrix, in fp64: exact, at half the time of an SVD. Approximate SVDs choose
    other entries: half of them with two power iterations.
    """
    if rank >= min(weight.shape):
        return weight.abs()
    wide = weight.shape[0] <= weight.shape[1]
    matrix = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    gram = matrix @ matrix.t() if wide else matrix.t() @ matrix
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    return (vectors @ (vectors.t() @ matrix) if wide else matrix @ vectors @ vectors.t()).abs_()


def principal_block_scores(targets: Targets, size: Size, weights: float) -> dict[str, Tensor]:
    """Return the mean magnitude of the approximation of each matrix in its blocks, (rows, columns) fp32, by matrix.

    The rank of an approximation is that of a LoRA with as many weights as the matrix's share of `weights`. Matrices
    are decomposed one at a time; a sharded one is gathered for that, so that every rank must call it.

    Args:
        targets: The matrices that may have blocks.
        weights: Number of weights that will be trained in all of them.

    Raises:
        BadInput: if a matrix is quantised.
    """
    shapes = targets.shapes
    share = weights / sum(math.prod(shape.shape) for shape in shapes.values())
    scores: dict[str, Tensor] = {}

    def add(name: str, weight_OK: Tensor) -> None:
        whole = full_tensor(weight_OK.detach())
        rank = max(1, round(share * whole.numel() / sum(whole.shape)))
        scores[name] = block_scores(principal_scores(whole, rank), size, "abs_mean")

    for name, linear in targets.linears.items():
        add(name, matrix(linear))
    for name, tensor in targets.fused.items():
        for number in range(len(tensor.parameter)):
            add(f"{name}[{number}]", tensor.matrix(number))
    if not all(map(has_values, scores.values())):  # a planned training: any blocks have about the same cost
        return random_scores({name: grid(shapes[name], size) for name in scores}, seed=0)
    return scores
