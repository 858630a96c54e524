"""Low-rank pre-training: linear layers as products of two factors, trained from scratch and rebalanced now and then.

Section 3 of arXiv 2505.22922 ("Scalable Parameter and Memory Efficient Pretraining for LLM"). A linear layer becomes
`y = (alpha / r) B A x`; every `refactorize_every` steps the singular value decomposition `B A = U S V^T` gives
`B = U S^1/2` and `A = S^1/2 V^T`, which compute the same and are as well conditioned as factors of this product can be.
The paper's second technique, the momentum reset, is the strategy `MomentumReset`: `low_rank.yaml` has both.

The published code has no licence, and no refactorisation of this layer; this follows the text. Ours: the decomposition
never forms the product (see `lit_sparse.factors.balanced`), is computed in fp64 of fp32 factors, keeps directions alive
that it finds dead, and leaves alone what is frozen.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lit_sparse.anatomy import replace
from lit_sparse.errors import BadInput
from lit_sparse.factors import Factorized, Recipe, check_rank, rebalance
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Probe, UpdateStrategy


@dataclasses.dataclass
class LowRank(UpdateStrategy):
    """Train factors of the linear layers from scratch, in place of their weights (arXiv 2505.22922).

    The base's own weights of these layers are given up, drawn or pre-trained; embeddings, head and norms train as they
    are. `detach` and export merge the factors into plain linear layers.

    Args:
        rank: Rank of the factors; below 1, a share of the model's width, and at most the smaller side of a matrix.
        alpha: Scale of the product, times the rank; null is a scale of 1.
        targets: Linear layers by role (`q`, `k`, `v`, `o`, `gate`, `up`, `down`), ending of their name, or `all`: those
            of the decoder layers.
        refactorize_every: Optimizer steps from one refactorisation to the next; null is never.
        seed: Seed of the factors.

    Raises:
        BadInput: if a number is out of its range.
    """

    rank: float = 0.25
    alpha: float | None = 32
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    refactorize_every: int | None = 200
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules"})
    base: ClassVar[BaseWeights] = "replaced"
    attaches_first: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank("LowRank", self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise BadInput(f"LowRank: alpha is {self.alpha}; it must be above 0, or null for a scale of 1.")
        if self.refactorize_every is not None and self.refactorize_every < 1:
            raise BadInput(
                f"LowRank: refactorize_every is {self.refactorize_every}; it must be a number of steps from 1 on, or "
                "null for never."
            )
        self._layers: dict[str, Factorized] = {}
        self._moving: list[Factorized] = []  # trained in the present step

    @property
    def cycle(self) -> int | None:
        return self.refactorize_every

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        def scale(rank: int) -> float:
            return 1.0 if self.alpha is None else self.alpha / rank

        recipe = Recipe("LowRank", self.rank, scale, "kaiming", None, self.seed)
        self._layers = recipe.factorize(model, self.targets, context.compute)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        self._moving = self._trained()

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        if self.refactorize_every is not None and step % self.refactorize_every == 0:
            for layer in self._trained():
                if layer in self._moving:  # else a method beside it trains it from the next step on
                    rebalance(layer, optimizer)
        return False

    def _trained(self) -> list[Factorized]:
        """Return the layers whose factors are both trainable now."""
        return [layer for layer in self._layers.values() if layer.up.requires_grad and layer.down.requires_grad]

    def detach(self, model: nn.Module) -> None:
        for name, layer in self._layers.items():
            replace(model, name, layer.merge())
        self._layers, self._moving = {}, []

    def describe(self) -> dict[str, Any]:
        """Return how many matrices are factorised, their weights, and those of their factors."""
        shapes = [layer.plain_shape for layer in self._layers.values()]
        return {
            "matrices": len(shapes),
            "weights": sum(rows * columns for rows, columns in shapes),
            "factors": sum(layer.up.numel() + layer.down.numel() for layer in self._layers.values()),
        }
