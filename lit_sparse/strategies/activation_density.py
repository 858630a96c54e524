"""ActivationDensity: penalise MLP activations that are not zero, stacked on any gradient method.

Density-efficient fine-tuning (DEFT), arXiv 2402.01911; its released code has only the `rational` proxy. The trainable
weights learn to push activations towards zero, so that inference can skip the products with them.

One op (`glu_density`) computes the activation and the proxy's sum per token, as one node of the autograd graph. So no
forward hook has to keep activations, and activation checkpointing recomputes the node without counting it twice. The
sums are per token because padding is masked later, in `penalty`, where the batch is known.

Deliberate differences from the released code: padding does not count, and sums are in fp32. The mean is taken over the
tokens of each batch, then over the batches and ranks of a step, whatever their numbers of tokens.

`layer_weights: adaptive` is our own construction; the paper's adaptive variant has no released code. With densities
d_l, it minimises the mean of w_l d_l minus `entropy` times the entropy of w, which gives w_l ~ exp(-d_l / entropy):
layers that are already sparse are pushed further.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_sparse.anatomy import MLP, backbone, mlps
from lit_sparse.errors import BadInput
from lit_sparse.mlp_density import MLPSite, ProxySums, act_of, check_sites, masked_mean, token_mask
from lit_sparse.optim import device_of
from lit_sparse.ranks import all_reduce_mean
from lit_sparse.strategies.base import Attaches, BaseWeights, Context, Need, Probe, UpdateStrategy, no_probe

MEMORY = 0.9
"""Decay of the running densities that the adaptive weights follow, per optimizer step."""


@dataclasses.dataclass
class ActivationDensity(UpdateStrategy):
    """Penalise non-zero activations of the MLPs, stacked on any gradient method (DEFT, arXiv 2402.01911).

    Args:
        weight: Factor of the penalty in the loss. The penalty lies between 0 and 1. At 0 the model is left unchanged.
        proxy: Smooth approximation of "is not zero" for an activation o: `rational` is o^2 / (o^2 + eps) (the
            authors'), `tanh` is tanh(beta |o|), `sigmoid` is 2 sigmoid(beta |o|) - 1.
        eps: eps of `rational`. The authors' 1e-7 pushes only activations below about 1e-3.
        beta: beta of `tanh` and `sigmoid`. A smaller beta pushes larger activations.
        end: Final value of eps or beta, approached geometrically over `anneal_steps`; null keeps the first value.
        anneal_steps: Optimizer steps from the first value to `end`.
        where: Which activations of a gated MLP count: `gate_act`, the activated gate (the authors'), or `product`, the
            input of the down projection.
        layer_weights: Weight of each layer, rescaled to a mean of 1. Null weights all layers equally; `adaptive`
            follows the layers' densities.
        entropy: Temperature of the `adaptive` weights: larger makes them more uniform.
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
    attaches_to: ClassVar[Attaches] = "either"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise BadInput(f"ActivationDensity: weight is {self.weight}; it must not be negative.")
        for name in ("eps", "beta", "entropy", "end"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadInput(f"ActivationDensity: {name} is {value}; it must be above 0.")
        if self.anneal_steps < 0 or (self.end is None) != (self.anneal_steps == 0):
            raise BadInput(
                f"ActivationDensity: end is {self.end} and anneal_steps is {self.anneal_steps}; set both, with "
                "anneal_steps above 0, or neither."
            )
        given = self.layer_weights if isinstance(self.layer_weights, list) else [1.0]
        if not given or min(given) < 0 or max(given) <= 0:
            raise BadInput(
                f"ActivationDensity: layer_weights are {given}; give one for each layer, none negative and not all 0."
            )
        self._sums = ProxySums()
        self._fixed_weights: Tensor | None = None  # `layer_weights`, rescaled to a mean of 1
        self._sites: list[MLPSite] = []
        self._handles: list[RemovableHandle] = []
        self._step = 0
        self._densities: list[Tensor] = []  # (L,) of each batch since the last optimizer step
        self._means: Tensor | None = None  # running densities (L,), which adaptive weights follow

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
        device = device_of(next(model.parameters()))
        self._sums.sharpness = self._sums.sharpness.to(device)
        if isinstance(self.layer_weights, list):
            given = torch.tensor(self.layer_weights, device=device)
            self._fixed_weights = given / given.mean()
        self._sites = [self._make_site(model, layer, mlp) for layer, mlp in enumerate(found)]
        check_sites(model, self._sites, context.compute)
        for site in self._sites:
            site.install()
        self._set_sharpness()
        # A forward pass may start at either module: CausalLM calls the base model directly, and OPT's forward bypasses
        # its base model.
        roots = {model, backbone(model)}
        self._handles = [root.register_forward_pre_hook(self._sums.begin) for root in roots]

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._step = state["step"]
        self._means = state.get("means")
        self.attach(model, no_probe, context)

    def _make_site(self, model: nn.Module, layer: int, mlp: MLP) -> MLPSite:
        if mlp.gate is None and self.where == "product" and mlp.up.endswith("gate_up_proj"):
            raise BadInput(
                f"ActivationDensity: where is product, but {type(model).__name__} computes gate and up with one "
                "matrix; set where to gate_act."
            )
        proxy = "rational" if self.proxy == "rational" else "tanh"
        return MLPSite(layer, mlp, act_of(mlp.act), proxy, self.where, self._sums)

    def _set_sharpness(self) -> None:
        start = self.eps if self.proxy == "rational" else self.beta
        progress = min(self._step / self.anneal_steps, 1) if self.anneal_steps else 0
        value = start if self.end is None else start ** (1 - progress) * self.end**progress
        self._sums.sharpness.fill_(value / 2 if self.proxy == "sigmoid" else value)  # 2 sigmoid(x) - 1 = tanh(x / 2)

    # ---- training

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if not self._sites:
            return None
        taken = self._sums.take()
        if not taken:
            raise BadInput(
                "ActivationDensity: no MLP ran with gradients enabled, as under reentrant checkpointing; use "
                "model.activation_checkpointing, which is not reentrant, or leave ActivationDensity out."
            )
        mask = token_mask(batch)
        layers = sorted(taken)
        densities = torch.stack([masked_mean(taken[layer], mask) for layer in layers])
        if len(layers) == len(self._sites):  # not after LayerDrop, which skips layers at random
            self._densities.append(densities.detach())
        return self._weighted(densities, layers)

    def _weighted(self, densities: Tensor, layers: list[int]) -> Tensor:
        weights = self._weights(densities.device)
        if len(layers) < len(self._sites):  # indexing with a list makes the CPU wait for the GPU: only if it must be
            weights = weights[layers]
        return self.weight * (densities * weights).mean()

    def _weights(self, device: torch.device) -> Tensor:
        """Return the layers' weights, (L,) fp32, with a mean of 1."""
        count = len(self._sites)
        if self._fixed_weights is not None:
            return self._fixed_weights.to(device)
        if self.layer_weights is None or self._means is None:
            return torch.ones(count, device=device)
        return count * torch.softmax(-self._means.to(device) / self.entropy, 0)

    def logged(self) -> dict[str, Tensor]:
        if not self._densities:
            return {}
        densities = torch.stack(self._densities).mean(0)  # the weights do not change within a step
        return {"density_penalty": self._weighted(densities, list(range(len(self._sites))))}

    def skip_step(self) -> None:
        self._densities.clear()

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        self._step = step
        if self._sites and self.anneal_steps:
            self._set_sharpness()
        if self._sites and self.layer_weights == "adaptive":
            self._update_means()
        self._densities.clear()
        return False

    def _update_means(self) -> None:
        """Update the running densities with this step's, to the same bits on every rank.

        A rank without batches takes part too, or the collective would hang; the appended ones count the batches.
        """
        device = self._sums.sharpness.device
        counted = [torch.cat([one.float(), one.new_ones(1, dtype=torch.float32)]) for one in self._densities]
        total = all_reduce_mean(
            torch.stack(counted).sum(0) if counted else torch.zeros(len(self._sites) + 1, device=device)
        )
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
        self._densities.clear()
        self._sums.take()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step} | ({} if self._means is None else {"means": self._means})

    def describe(self) -> dict[str, Any]:
        """Return the number of penalised MLPs, their activation function, and the current adaptive weights."""
        if not self._sites:
            return {}
        described: dict[str, Any] = {"mlps": len(self._sites), "activation": self._sites[0].act}
        if self.layer_weights == "adaptive":
            described["layer_weights"] = self._weights(torch.device("cpu")).tolist()
        return described
