"""CoLA: linear layers of the decoder as bottlenecks with a nonlinearity, an architecture to pre-train from scratch.

CoLA ("Compute-Efficient Pre-Training of LLMs via Low-Rank Activation"), arXiv 2502.10940, EMNLP 2025:
`y = B silu(A x) + b` in the place of `y = W x + b`. Written from the text: the published code has no licence. CoLA-M,
which recomputes all but the activations of width r, is `model.activation_checkpointing` by whole layers here.
"""

import dataclasses
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from lit_sparse.anatomy import mlps
from lit_sparse.factors import Factorized, Recipe, check_rank
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Leaves, Probe, UpdateStrategy


@dataclasses.dataclass
class CoLA(UpdateStrategy):
    """Train a bottleneck with a nonlinearity in the place of each linear layer, from scratch (CoLA, arXiv 2502.10940).

    The base's own weights of these layers are given up. The result is another architecture than the base's, which
    cannot be merged: lit_sparse.runs.load_run loads it, and there is no export.

    Args:
        rank: Width of the bottleneck; below 1, a share of the model's width, and at most the smaller side of a matrix.
        mlp_activation: Whether the MLP keeps its own activation beside those of the bottlenecks; the authors keep it at
            60M and 130M weights and drop it from 350M on.
        targets: Linear layers by role (`q`, `k`, `v`, `o`, `gate`, `up`, `down`), ending of their name, or `all`: those
            of the decoder layers.
        seed: Seed of the factors.

    Raises:
        BadInput: if the rank is none.
    """

    rank: float = 0.25
    mlp_activation: bool = True
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules"})
    base: ClassVar[BaseWeights] = "replaced"
    attaches_first: ClassVar[bool] = True
    leaves: ClassVar[Leaves] = "own_forward"
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rank("CoLA", self.rank)
        self._layers: dict[str, Factorized] = {}

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        dropped = [] if self.mlp_activation else [(mlp.module, mlp.act) for mlp in mlps(model)]
        recipe = Recipe("CoLA", self.rank, lambda rank: 1.0, "cola", F.silu, self.seed)
        self._layers = recipe.factorize(model, self.targets, context.compute)
        for parent, act in dropped:
            (name,) = [name for name, child in parent.named_children() if child is act]
            setattr(parent, name, nn.Identity())

    def describe(self) -> dict[str, Any]:
        """Return how many matrices are replaced, their weights, and those of the bottlenecks."""
        shapes = [layer.plain_shape for layer in self._layers.values()]
        return {
            "matrices": len(shapes),
            "weights": sum(rows * columns for rows, columns in shapes),
            "factors": sum(layer.up.numel() + layer.down.numel() for layer in self._layers.values()),
        }
