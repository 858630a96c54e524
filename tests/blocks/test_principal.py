"""Blocks of the best low-rank approximation."""

import pytest
import torch

from lit_sparse.anatomy import linears, matrix
from lit_sparse.errors import BadInput
from lit_sparse.strategies import SMT
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, tiny_llm


@pytest.mark.parametrize("kind", TINY)
def test_blocks_are_those_of_the_exact_svd(kind):
    """Without data; of a LoRA's rank with as many weights."""
    model, base = tiny_llm(kind), tiny_llm(kind)
    options = {"targets": ["all"], "block_size": 4, "ranking": "per_matrix", "trainable_fraction": 0.1}
    strategy = SMT(score="principal", **options)
    strategy.attach(model, no_probe, ALONE)
    share = 0.1 * sum(p.numel() for p in base.parameters() if p.ndim == 2)
    share /= sum(layer.weight.numel() for layer in linears(base).values())
    for name, layer in linears(base).items():
        weight = matrix(layer).detach().double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = max(1, round(share * weight.numel() / sum(weight.shape)))
        scores = (u[:, :rank] * s[:rank] @ v[:rank]).abs().unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).mean((1, 3))
        inside = torch.zeros_like(scores, dtype=torch.bool)
        inside[tuple(strategy.choice[name].index.long().t())] = True
        assert scores[inside].min() >= scores[~inside].max() - 1e-6


def test_a_warmup_is_refused():
    with pytest.raises(BadInput, match=r"score principal and mode in_place\. Use warmup score_only"):
        SMT(score="principal", warmup="update")
