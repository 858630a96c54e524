"""Quadratic penalties that keep weights near an anchor: AdaptiveRegularization (EWC is one of its settings) and L2SP.

Their gradients have closed forms. They are added to the accumulated gradients once per optimizer step, before clipping,
one matrix at a time and without a graph. So gradient accumulation does not divide them, and they need one or two dense
temporaries at a time.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import classification_head
from lit_sparse.errors import BadInput
from lit_sparse.importance.matrices import (
    Space,
    TrainedMatrix,
    add_gradients,
    displacement,
    master_of,
    trained_matrices,
)
from lit_sparse.importance.recorded import (
    Kind,
    Recorded,
    Unit,
    Weighting,
    check_base,
    check_compatible,
    check_fits,
    check_start,
    layer_coefficients,
    layer_of,
    path_importance,
    read_recorded,
)
from lit_sparse.optim import local_shard, sum_scalars
from lit_sparse.strategies.base import Attaches, BaseWeights, Context, Gradients, Need, Probe, UpdateStrategy


@dataclasses.dataclass
class AdaptiveRegularization(UpdateStrategy):
    """Keep each weight near its value after an earlier run, in proportion to its importance there (arXiv 2501.13669).

    The penalty is phi * sum over layers of a_l * sum of Omega * (U - U*)^2, where U is the weight or LoRA's dense
    product, U* its anchor, Omega its importance and a_l the layer's coefficient.

    The paper leaves several points open; each is a key here. Its own choices, as far as known, are xi_scale: absolute,
    layer_weights: softmax, normalize: none. EWC-LoRA (arXiv 2305.10626) takes as importance the Fisher of a run with
    RecordFisher, with anchor: base and layer_weights: none.

    Args:
        importance: Folder or checkpoint of the earlier run, with RecordImportance or RecordFisher among its updates;
            or a list of them, newest last, whose importances are added up.
        phi: Strength of the penalty; the paper's is e^-3.
        anchor: Values to stay near: `end` of the newest of those runs (the paper's), where this run must start, or
            `base`, the values before that run, which for LoRA is a product of zero.
        xi: Damping in omega / (D^2 + xi), where D is the displacement of a weight over the run. Path integrals only.
        xi_scale: `relative` gives xi in units of each matrix's mean D^2, since no absolute value suits all layers and
            models; or `absolute`.
        negative: Treatment of negative path integrals, which come from noise: `clamp` sets them to 0, since they would
            push weights away from the anchor; or `keep`.
        normalize: `mean_one` divides the importance by its overall mean, since small noisy batches inflate the path
            integral and the Fisher has an arbitrary scale; or `none`.
        layer_weights: Coefficients a_l. `mean_softmax` is the softmax of the layers' norms divided by their mean,
            rescaled to a mean of 1. `softmax` of the raw norms is the paper's; depending on xi it picks one layer or
            is uniform. `none` is 1 for all.
        temperature: Temperature of `mean_softmax`: larger is more uniform.
        layer: Unit of the coefficients: each `matrix`, since importance differs as much within a decoder layer as
            between layers; or the whole `decoder_layer`.
        targets: Trained matrices to regularise, all of which must have been recorded: roles (q, k, v, ...), endings of
            module names, or `all`. A classification head is included only if it was recorded.
        dtype: Dtype in which the importance is stored.
        offload: Keep importance and anchor in host memory.
    """

    importance: str | list[str]
    phi: float = math.exp(-3)
    anchor: Literal["end", "base"] = "end"
    xi: float = 0.1
    xi_scale: Literal["relative", "absolute"] = "relative"
    negative: Literal["clamp", "keep"] = "clamp"
    normalize: Literal["mean_one", "none"] = "mean_one"
    layer_weights: Weighting = "mean_softmax"
    temperature: float = 1.0
    layer: Unit = "matrix"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False

    base: ClassVar[BaseWeights] = "kept"
    supports_sharding: ClassVar[bool] = True
    gradients: ClassVar[Gradients] = "adds"

    def __post_init__(self) -> None:
        if not self.importance:
            raise BadInput("AdaptiveRegularization: importance names no run; give the folder of one that recorded it.")
        for name in ("phi", "xi"):
            if not getattr(self, name) >= 0:
                raise BadInput(f"AdaptiveRegularization: {name} is {getattr(self, name)}; it must be at least 0.")
        if not self.temperature > 0:
            raise BadInput(f"AdaptiveRegularization: temperature is {self.temperature}; it must be above 0.")
        self._matrices: list[TrainedMatrix] = []
        self._space: Space = "weights"
        self._weights: dict[str, Tensor] = {}  # Omega, (out, in) by matrix name
        self._anchors: dict[str, list[Tensor]] = {}
        self._coefficients: dict[str, float] = {}
        self._value = torch.zeros(())

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        always: list[Need] = ["gradients", "fixed_set"]
        return frozenset([*always, "base"] if self.anchor == "base" else always)

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        path, recorded = "", dict[str, Recorded]()  # of the newest run once the loop ends
        before: tuple[Kind, Space] | None = None
        self._weights = {}
        for path in [self.importance] if isinstance(self.importance, str) else self.importance:
            kind, space, recorded = read_recorded(path)
            if before is not None:
                check_compatible(path, recorded, (kind, space), self._weights, before)
            before, self._space = (kind, space), space
            self._find(model, recorded)
            check_fits(path, recorded, self._matrices)
            self._add(kind, recorded)
        # Importances add up over runs, but the anchor is that of the newest: it was itself held to the older ones.
        self._anchors = {name: self._anchor(one) for name, one in recorded.items()}
        if self.anchor == "end":
            check_start(path, self._matrices, self._anchors)
        else:
            check_base(path, self._matrices, recorded)
        self._weigh(path)
        self._place()

    def _find(self, model: nn.Module, names: Mapping[str, Any]) -> None:
        # A classification head is regularised only if it was recorded: an earlier run on plain text has none.
        heads = tuple(f"{name}." for name in classification_head(model))
        found = trained_matrices(model, self.targets, self._space, "AdaptiveRegularization")
        self._matrices = [matrix for matrix in found if matrix.name in names or not matrix.name.startswith(heads)]

    def _add(self, kind: Kind, recorded: Mapping[str, Recorded]) -> None:
        for name, one in recorded.items():
            settings = (self.xi, self.xi_scale == "relative", self.negative == "clamp")
            importance = one.sums if kind == "fisher" else path_importance(one.sums, one.displacement, *settings)
            self._weights[name] = self._weights[name] + importance if name in self._weights else importance

    def _anchor(self, one: Recorded) -> list[Tensor]:
        if self.anchor == "end":
            return list(one.end)
        # The base has no update, so U* = 0, whatever the factors started as.
        return list(one.start) if one.scale is None else [torch.zeros_like(value) for value in one.start]

    def _weigh(self, path: str) -> None:
        if self.normalize == "mean_one":
            # In fp64: an fp32 sum over millions of weights of very different importance loses the small ones.
            total = sum(float(weight.sum(dtype=torch.float64)) for weight in self._weights.values())
            mean = total / sum(weight.numel() for weight in self._weights.values())
            if not mean > 0:
                raise BadInput(
                    f"importance {path} has a mean of {mean:.3g}, which cannot be scaled to 1: that run moved no "
                    "important weight; train it longer, or set normalize to none."
                )
            self._weights = {name: weight / mean for name, weight in self._weights.items()}
        squares: dict[str, float] = {}
        for name, weight in self._weights.items():
            layer = layer_of(name, self.layer)
            squares[layer] = squares.get(layer, 0.0) + float(weight.double().square().sum())
        norms = {layer: square**0.5 for layer, square in squares.items()}
        by_layer = layer_coefficients(norms, self.layer_weights, self.temperature)
        self._coefficients = {name: by_layer[layer_of(name, self.layer)] for name in self._weights}

    def on_shard(self) -> None:
        for matrix in self._matrices:
            for name, parameter in matrix.parameters.items():
                if parameter.dtype.itemsize < 4:
                    raise BadInput(
                        f"AdaptiveRegularization regularises {name}, whose gradients are in bfloat16 under fsdp2, "
                        "where a penalty much weaker than the task's gradient is lost; set model.precision to float32, "
                        "or train LoRA."
                    )
        self._place()

    def _place(self) -> None:
        for matrix in self._matrices:
            device = torch.device("cpu") if self.offload else matrix.device
            weights = matrix.shard(self._weights[matrix.name])
            self._weights[matrix.name] = weights.to(device, getattr(torch, self.dtype))
            self._anchors[matrix.name] = [matrix.shard(value).to(device) for value in self._anchors[matrix.name]]

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._space, self._coefficients = state["space"], dict(state["coefficients"])
        self._weights, self._anchors = dict(state["weights"]), dict(state["anchors"])
        self._find(model, self._weights)
        self._place()

    # ---- training

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        if self.phi:  # at 0 the run is bit for bit the one without the penalty
            self._value = sum_scalars([self._add_penalty(matrix) for matrix in self._matrices])

    def _add_penalty(self, matrix: TrainedMatrix) -> Tensor:
        """Add the gradient of the penalty on `matrix`, and return that penalty, a scalar."""
        now, strength = matrix.values(), self.phi * self._coefficients[matrix.name]
        anchor = [value.to(now[0].device) for value in self._anchors[matrix.name]]
        distance = displacement(anchor, now, matrix.scale)
        weighted = self._weights[matrix.name].to(distance) * distance
        value = strength * (weighted * distance).sum()
        matrix.add_gradient(weighted.mul_(2 * strength), now)
        return value

    def logged(self) -> dict[str, Tensor]:
        return {"adaptive_penalty": self._value}

    def detach(self, model: nn.Module) -> None:
        self._matrices = []

    def state_dict(self) -> dict[str, Any]:
        """Return importance and anchors themselves, so that resuming and exporting do not need the earlier runs."""
        return {
            "space": self._space,
            "weights": self._weights,
            "anchors": self._anchors,
            "coefficients": self._coefficients,
        }

    def describe(self) -> dict[str, Any]:
        """Return the layers' coefficients, and the bytes of importance and anchors on this rank."""
        kept = [*self._weights.values(), *(value for values in self._anchors.values() for value in values)]
        return {"coefficients": self._coefficients, "bytes": sum(local_shard(value).nbytes for value in kept)}


@dataclasses.dataclass
class L2SP(UpdateStrategy):
    """Keep all weights near the base's, uniformly: L2-SP (arXiv 1802.01483), alpha / 2 * ||w - w0||^2.

    For LoRA the penalty is alpha / 2 * ||s B A||^2, which is not weight decay on A and B; it is computed from (r, r)
    matrices. Other trained weights are moved towards the base by lr * alpha * (w - w0), decoupled from the gradient as
    in AdamW's weight decay, since Adam would rescale a gradient. This keeps a copy of them. A classification head is
    left out: it starts at random values, which are not worth keeping.

    Args:
        alpha: Strength of the penalty.
        targets: Trained matrices to regularise: roles (q, k, v, ...), endings of module names, or `all`; never a
            classification head.
    """

    alpha: float = 0.01
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])

    base: ClassVar[BaseWeights] = "kept"
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"
    gradients: ClassVar[Gradients] = "adds"
    needs: ClassVar[frozenset[Need]] = frozenset({"base", "gradients", "fixed_set"})

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise BadInput(f"L2SP: alpha is {self.alpha}; it must be at least 0.")
        self._matrices: list[TrainedMatrix] = []
        self._anchors: dict[str, list[Tensor]] = {}
        self._value = torch.zeros(())

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        heads = tuple(f"{name}." for name in classification_head(model))
        found = trained_matrices(model, self.targets, "weights", "L2SP")
        self._matrices = [matrix for matrix in found if not matrix.name.startswith(heads)]
        if not self._matrices:
            raise BadInput(
                f"L2SP: only the classifier's head is among the targets {self.targets}, and it has no base weights to "
                "stay near; give other targets, or all."
            )
        self._anchors = {matrix.name: matrix.copies() for matrix in self._matrices if matrix.scale is None}

    def on_shard(self) -> None:
        kept = {matrix.name: matrix for matrix in self._matrices if matrix.scale is None}
        self._anchors = {name: [matrix.shard(*self._anchors[name])] for name, matrix in kept.items()}

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        if not self.alpha:
            return
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        parts = [
            add_product_penalty(matrix, self.alpha)
            if matrix.scale is not None
            else decay_to_anchor(matrix, self._anchors[matrix.name][0], self.alpha, rates, optimizer)
            for matrix in self._matrices
        ]
        self._value = sum_scalars(parts)

    def logged(self) -> dict[str, Tensor]:
        return {"l2sp_penalty": self._value}

    def held(self) -> dict[str, list[Tensor]]:
        return self._anchors

    def describe(self) -> dict[str, Any]:
        """Return the bytes of the anchors on this rank."""
        return {"bytes": sum(local_shard(value).nbytes for values in self._anchors.values() for value in values)}

    def detach(self, model: nn.Module) -> None:
        self._matrices, self._anchors = [], {}


def add_product_penalty(matrix: TrainedMatrix, alpha: float) -> Tensor:
    """Add the gradient of alpha / 2 * ||s B A||^2 to the gradients of A and B, and return the penalty, a scalar.

    ||B A||^2 = <B^T B, A A^T>: both are (r, r), so the product (out, in) is never formed.
    """
    assert matrix.scale is not None
    (a, b), factor = matrix.values(), alpha * matrix.scale**2
    inner_a, inner_b = a @ a.t(), b.t() @ b
    add_gradients(list(matrix.parameters.values()), [factor * (inner_b @ a), factor * (b @ inner_a)])
    return factor / 2 * (inner_a * inner_b).sum()


def decay_to_anchor(
    matrix: TrainedMatrix, anchor: Tensor, alpha: float, rates: Mapping[nn.Parameter, float], optimizer: Optimizer
) -> Tensor:
    """Move a parameter towards `anchor` by lr * alpha of its distance; return the penalty before that, a scalar.

    A parameter without a gradient stays: the optimizer does not move it in this step either. The optimizer's fp32
    master moves where there is one, or it would overwrite the parameter at the next step.
    """
    (parameter,) = matrix.parameters.values()
    master = master_of(parameter, optimizer)
    distance = master - anchor
    if parameter.grad is not None:
        master.sub_(distance, alpha=float(rates[parameter]) * alpha)
        if master is not parameter:
            parameter.copy_(master)
    return alpha / 2 * distance.square().sum()
