"""ActivationDensity: a penalty on how many of the MLPs' activations are not zero, beside any way to train.

Density-efficient fine-tuning (DEFT), arXiv 2402.01911, whose released code has the `rational` proxy alone. Only what
trains learns to push activations to zero, so that inference may skip what they would be multiplied with.

The activation and a sum of the proxy for each token come from one op (`glu_density`), whose outputs are one node of the
graph: the sums need no forward hooks that keep activations, checkpointing runs that node once more and no sum is taken
twice, and since the sums are by token, padding is masked afterwards, in `penalty`, where the batch is known.

Differences from the released code, each on purpose: padding does not count; sums are in fp32. As for the task's loss,
the mean is over the tokens of each batch, and a step's is over its batches and ranks, however many tokens each has.
`layer_weights: adaptive` is our own (the paper's adaptive variant has no code): the weights w that minimise the mean of
w_l d_l less `entropy` times their entropy are w_l ~ exp(-d_l / entropy), so that layers already sparse are pushed
further.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_sparse.anatomy import MLP, mlps
from lit_sparse.errors import BadInput
from lit_sparse.mlp_density import Site, Sums, act_of, check_sites, masked_mean, token_mask
from lit_sparse.ranks import all_reduce_mean
from lit_sparse.strategies.base import BaseWeights, Context, Need, Probe, UpdateStrategy, no_probe

MEMORY = 0.9
"""What the adaptive weights' running densities keep of themselves at each optimizer step."""


@dataclasses.dataclass
class ActivationDensity(UpdateStrategy):
    """Penalise non-zero activations of the MLPs, beside any gradient method (DEFT, arXiv 2402.01911).

    Args:
        weight: Of the penalty in the loss; the penalty itself lies between 0 and 1. 0 changes nothing at all.
        proxy: Smooth stand-in for "is not zero" of an activation o: `rational` is o^2 / (o^2 + eps) (the authors'),
            `tanh` is tanh(beta |o|), `sigmoid` is 2 sigmoid(beta |o|) - 1.
        eps: Of `rational`. At the authors' 1e-7 only activations below about 1e-3 are pushed.
        beta: Of `tanh` and `sigmoid`. The smaller, the larger are the activations that are pushed.
        end: Value that eps or beta ends at, approached by equal factors over `anneal_steps`; none keeps it.
        anneal_steps: Optimizer steps from the first value to `end`.
        where: What is counted in a gated MLP: `gate_act`, the activated gate (the authors'), or `product`, what the
            down projection reads.
        layer_weights: Weight of each layer, scaled to a mean of 1; none is the same for all, `adaptive` follows the
            layers' densities.
        entropy: How far `adaptive` weights are kept from one layer alone: the larger, the more alike.
    """

    weight: float = 1.0
    proxy: Literal["rational", "tanh", "sigmoid"] = "rational"
    eps: float = 1e-7
    beta: float = 10.0
    end: float | None = None
    anneal_steps: int = 0
    where: Literal["gate_act", "product"] = "gate_act"
    layer_weights: list[float] | Literal["adaptive"] | None = None
    entropy: float = 0.1

    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"activations", "graph"})
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise BadInput(f"ActivationDensity: weight is {self.weight}; it must not be negative.")
        for name in ("eps", "beta", "entropy", "end"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadInput(f"ActivationDensity: {name} is {value}; it must be above 0.")
        if self.anneal_steps < 0 or (self.end is None) != (self.anneal_steps == 0):
            raise BadInput(
                f"ActivationDensity: end is {self.end} and anneal_steps is {self.anneal_steps}; give both, the steps "
                "above 0, or neither."
            )
        given = self.layer_weights if isinstance(self.layer_weights, list) else [1.0]
        if not given or min(given) < 0 or max(given) <= 0:
            raise BadInput(
                f"ActivationDensity: layer_weights are {given}; give one for each layer, of which none may be "
                "negative, nor all be 0."
            )
        self._sums = Sums()
        self._given: Tensor | None = None  # `layer_weights`, scaled to a mean of 1
        self._sites: list[Site] = []
        self._handles: list[RemovableHandle] = []
        self._step = 0
        self._seen: list[Tensor] = []  # densities (L,) of the batches since the last optimizer step
        self._means: Tensor | None = None  # running densities (L,), that adaptive weights follow

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        if self.weight == 0:
            return
        found = mlps(model)
        if isinstance(self.layer_weights, list) and len(self.layer_weights) != len(found):
            raise BadInput(
                f"ActivationDensity: {len(self.layer_weights)} layer_weights were given, but the model has "
                f"{len(found)} layers; give one for each."
            )
        device = next(model.parameters()).device
        self._sums.sharpness = self._sums.sharpness.to(device)
        if isinstance(self.layer_weights, list):
            given = torch.tensor(self.layer_weights, device=device)
            self._given = given / given.mean()
        self._sites = [self._site(model, layer, mlp) for layer, mlp in enumerate(found)]
        check_sites(model, self._sites)
        for site in self._sites:
            site.install()
        self._set_sharpness()
        # A pass may begin at either: the task calls the base model, and OPT's own forward passes the base model by.
        roots = {model, getattr(model, "base_model", model)}
        self._handles = [root.register_forward_pre_hook(self._sums.begin) for root in roots]

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._step = state["step"]
        self._means = state.get("means")
        self.attach(model, no_probe, context)

    def _site(self, model: nn.Module, layer: int, mlp: MLP) -> Site:
        if mlp.gate is None and self.where == "product" and mlp.up.endswith("gate_up_proj"):
            raise BadInput(
                f"ActivationDensity: where is product, but {type(model).__name__} makes gate and up in one matrix; "
                "set where to gate_act."
            )
        proxy = "rational" if self.proxy == "rational" else "tanh"
        return Site(layer, mlp, act_of(mlp.act), proxy, self.where, self._sums)

    def _set_sharpness(self) -> None:
        start = self.eps if self.proxy == "rational" else self.beta
        way = min(self._step / self.anneal_steps, 1) if self.anneal_steps else 0
        value = start if self.end is None else start ** (1 - way) * self.end**way
        self._sums.sharpness.fill_(value / 2 if self.proxy == "sigmoid" else value)  # 2 sigmoid(x) - 1 = tanh(x / 2)

    # ---- training

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if not self._sites:
            return None
        taken = self._sums.take()
        if not taken:
            raise BadInput(
                "ActivationDensity: no MLP was run where gradients are kept, as happens under reentrant checkpointing; "
                "use model.activation_checkpointing, which is not, or leave ActivationDensity out."
            )
        mask = token_mask(batch)
        layers = sorted(taken)
        densities = torch.stack([masked_mean(taken[layer], mask) for layer in layers])
        if len(layers) == len(self._sites):  # layers that were dropped at random are not seen
            self._seen.append(densities.detach())
        return self._weighted(densities, layers)

    def _weighted(self, densities: Tensor, layers: list[int]) -> Tensor:
        weights = self._weights(densities.device)
        if len(layers) < len(self._sites):  # else no index, for which a GPU would be waited for
            weights = weights[layers]
        return self.weight * (densities * weights).mean()

    def _weights(self, device: torch.device) -> Tensor:
        """The layers' weights (L,), fp32, whose mean is 1."""
        count = len(self._sites)
        if self._given is not None:
            return self._given.to(device)
        if self.layer_weights is None or self._means is None:
            return torch.ones(count, device=device)
        return count * torch.softmax(-self._means.to(device) / self.entropy, 0)

    def logged(self) -> dict[str, Tensor]:
        if not self._seen:
            return {}
        densities = torch.stack(self._seen).mean(0)  # of a step's batches, for which the weights are the same
        return {"density_penalty": self._weighted(densities, list(range(len(self._sites))))}

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        self._step = step
        if self._sites and self.anneal_steps:
            self._set_sharpness()
        if self._sites and self.layer_weights == "adaptive":
            self._remember()
        self._seen.clear()
        return False

    def _remember(self) -> None:
        """Move the running densities towards this step's, to the same bits on every rank, even one that saw none."""
        device = self._sums.sharpness.device
        seen = [torch.cat([one.float(), one.new_ones(1, dtype=torch.float32)]) for one in self._seen]
        total = all_reduce_mean(torch.stack(seen).sum(0) if seen else torch.zeros(len(self._sites) + 1, device=device))
        if total[-1] == 0:
            return
        new = total[:-1] / total[-1]
        self._means = new if self._means is None else MEMORY * self._means.to(new.device) + (1 - MEMORY) * new

    # ---- what is kept

    def detach(self, model: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        for site in reversed(self._sites):
            site.remove()
        self._sites, self._handles = [], []
        self._seen.clear()
        self._sums.take()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step} | ({} if self._means is None else {"means": self._means})

    def describe(self) -> dict[str, Any]:
        """How many MLPs are penalised, their activation, and the adaptive weights as they are now."""
        if not self._sites:
            return {}
        told: dict[str, Any] = {"mlps": len(self._sites), "activation": self._sites[0].act}
        if self.layer_weights == "adaptive":
            told["layer_weights"] = self._weights(torch.device("cpu")).tolist()
        return told
