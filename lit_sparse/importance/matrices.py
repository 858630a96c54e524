"""The matrices that a run trains: their values, displacement, and dense gradient, also where LoRA's factors train them.

LoRA's update of a weight is U = s B A, with A (r, in), B (out, r) and s the scale; everything here is dense (out, in),
and outside of autograd. U's gradient G is the sum over tokens of delta x^T, with x the adapter's input (after its
dropout) and delta the gradient of the layer's output; then dB = s G A^T and dA = s B^T G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from lit_sparse.anatomy import is_target
from lit_sparse.blocks.linear import in_precision
from lit_sparse.checkpoints import hash_of
from lit_sparse.errors import BadInput
from lit_sparse.optim import full_tensor, shard_like

Space = Literal["weights", "factors"]
"""`weights`: LoRA's product B A is one dense matrix. `factors`: each trained tensor is a matrix of its own."""

Values = Sequence[Tensor]
"""The tensors of a matrix: the parameter itself, or LoRA's A (r, in) and B (out, r)."""


@dataclass(frozen=True, eq=False)
class TrainedMatrix:
    """A trained parameter, or the product of LoRA's factors.

    Attributes:
        name: Of the parameter, or of the adapted layer.
        owners: The module of the parameter, or those of A and B, by the parameters' names in the model.
        scale: LoRA's s; None for a parameter.
        base: A hash of the frozen weight that the product is added to; empty for a parameter.
        layer: LoRA's layer.
    """

    name: str
    owners: Mapping[str, nn.Module]
    scale: float | None = None
    base: str = ""
    layer: Any = field(default=None, repr=False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameter, or A and B, by name. Looked up at each call: FSDP2 replaces parameters when it shards."""
        return {name: getattr(module, name.rpartition(".")[2]) for name, module in self.owners.items()}

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device

    def values(self, optimizer: Optimizer | None = None) -> list[Tensor]:
        """Return the current values, in at least fp32: the optimizer's fp32 masters where it keeps them.

        The tensors may share memory with the parameters. For a sharded parameter the result is a DTensor; A and B are
        always gathered into full tensors, since their product needs all of both.
        """
        held = [p if optimizer is None else master_of(p, optimizer) for p in self.parameters.values()]
        wide = [value.detach().to(torch.promote_types(value.dtype, torch.float32)) for value in held]
        return wide if self.scale is None else [full_tensor(value) for value in wide]

    def copies(self, optimizer: Optimizer | None = None) -> list[Tensor]:
        """Return copies of the current values; otherwise as `values`."""
        return [value.clone() for value in self.values(optimizer)]

    def shard(self, tensor: Tensor) -> Tensor:
        """Return the local shard of a full tensor, if the matrix is a sharded parameter, or else the tensor."""
        return shard_like(tensor, *self.parameters.values()) if self.scale is None else tensor

    def displacement_from(self, before: Values, optimizer: Optimizer | None = None) -> Tensor:
        """Return the dense displacement from `before`, (out, in)."""
        return displacement(before, self.values(optimizer), self.scale)

    def add_gradient(self, gradient: Tensor, now: Values) -> None:
        """Add a dense gradient (out, in) to those of the parameters; of a product, by the chain rule at `now`."""
        parameters = list(self.parameters.values())
        if self.scale is None:
            parts = [gradient]
        else:
            a, b = now
            parts = [self.scale * (b.t() @ gradient), self.scale * (gradient @ a.t())]
        add_gradients(parameters, parts)


def add_gradients(parameters: Sequence[nn.Parameter], parts: Sequence[Tensor]) -> None:
    """Add `parts` to the parameters' gradients; skip parameters without one, which do not move this step."""
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(shard_like(part, parameter).to(parameter.grad.dtype))


def master_of(parameter: nn.Parameter, optimizer: Optimizer) -> Tensor:
    """Return the tensor that `optimizer` updates: its fp32 master of `parameter`, or the parameter itself."""
    return optimizer.state[parameter].get("master", parameter) if parameter in optimizer.state else parameter


def displacement(before: Values, after: Values, scale: float | None) -> Tensor:
    """Return `after` minus `before`, dense; for a product s (B1 A1 - B0 A0) = s ((B1 - B0) A1 + B0 (A1 - A0)).

    The second form does not subtract two nearly equal products, so that equal factors give exactly zero.
    """
    if scale is None:
        return after[0] - before[0]
    (a0, b0), (a1, b1) = before, after
    return scale * torch.cat([b1 - b0, b0], dim=1) @ torch.cat([a1, a1 - a0])


def trained_matrices(model: nn.Module, targets: Sequence[str], space: Space, who: str) -> list[TrainedMatrix]:
    """Return the trained matrices of `model` that `targets` name: by role, ending of the layer's name, or `all`.

    `all` includes embeddings.

    Raises:
        BadInput: if there are none, or an adapter's update is no plain product of LoRA's (DoRA, LoHa). The message
            begins with `who`.
    """
    products = lora_products(model, who) if space == "weights" else []
    within = {parameter for product in products for parameter in product.parameters.values()}
    plain = [
        TrainedMatrix(name, {name: model.get_submodule(name.rpartition(".")[0])})
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in within
    ]
    found = [matrix for matrix in products + plain if is_target(layer_name(matrix.name), targets)]
    if not found:
        raise BadInput(
            f"{who}: nothing that is trained is among the targets {list(targets)}; give targets among what the run "
            "trains, or all."
        )
    if space == "weights":
        _refuse_factors(model, found, who)
    return found


def _refuse_factors(model: nn.Module, found: Sequence[TrainedMatrix], who: str) -> None:
    names = {
        parameter: matrix.name for matrix in found if matrix.scale is None for parameter in matrix.parameters.values()
    }
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        own = set(layer.get_base_layer().parameters())
        for parameter in layer.parameters():
            if parameter in names and parameter not in own:
                raise BadInput(
                    f"{who}: {names[parameter]} is a factor of {type(layer).__name__}, not a weight, and the update it "
                    "makes is no plain product of LoRA's; use plain LoRA, other targets, or space: factors where there "
                    "is that key."
                )


def layer_name(name: str) -> str:
    """Return the name of the layer that holds the matrix `name`, as the base model calls it."""
    for ending in (".weight", ".bias", ".blocks"):
        name = name.removesuffix(ending)
    return name.partition(".lora_")[0].removesuffix(".base_layer")


def lora_products(model: nn.Module, who: str) -> list[TrainedMatrix]:
    """Return the products of LoRA's factors in `model`, in module order."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return [lora_product(name, layer, who) for name, layer in layers.items() if adapter_of(layer) in layer.lora_A]


def lora_product(name: str, layer: Any, who: str) -> TrainedMatrix:
    """Return the product of `layer`'s factors.

    Raises:
        BadInput: if the layer's update is more than this product.
    """
    adapter = adapter_of(layer)
    if isinstance(layer, ParamWrapper):
        raise BadInput(
            f"{who}: {name} adapts {layer.parameter_name}, one parameter with several matrices, whose update is no "
            "plain product of two factors; give PEFT the names of linear layers as target_modules, such as [q_proj, "
            "v_proj], or set space: factors where there is that key."
        )
    if adapter in layer.lora_variant:
        raise BadInput(
            f"{who}: {name} has {type(layer.lora_variant[adapter]).__name__}, whose update is no plain product of two "
            "factors; use plain LoRA, or space: factors."
        )
    factors = {"A": layer.lora_A[adapter], "B": layer.lora_B[adapter]}
    owners = {f"{name}.lora_{factor}.{adapter}.weight": module for factor, module in factors.items()}
    base = hash_of([("weight", layer.get_base_layer().weight)])
    return TrainedMatrix(name, owners, float(layer.scaling[adapter]), base, layer)


def adapter_of(layer: Any) -> str:
    """Return the name of `layer`'s only adapter."""
    return layer.active_adapters[0]


# ---- the gradient of a product


class DenseGradient:
    """Sum the dense gradient of a LoRA product in the backward pass, from tensors that autograd keeps anyway.

    It saves the same input tensor as LoRA's first factor does for its own gradient, so that no activation is stored
    twice; activation checkpointing recomputes it. Each backward costs one product of (out, tokens) and (tokens, in).
    An fp32 buffer (out, in) is held until `take`.

    Attributes:
        on: Sum gradients; if false, the layer computes as without hooks.
        total: The sum times LoRA's scale, (out, in), in at least fp32; None before the first backward.
    """

    def __init__(self, matrix: TrainedMatrix) -> None:
        layer, adapter = matrix.layer, adapter_of(matrix.layer)
        assert matrix.scale is not None
        self.scale, self.on = matrix.scale, True
        self.total: Tensor | None = None
        self._input: Tensor | None = None
        self._hooks = [
            layer.lora_A[adapter].register_forward_pre_hook(torch.compiler.disable(self._note)),
            layer.lora_B[adapter].register_forward_hook(torch.compiler.disable(self._watch)),
        ]

    def _note(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (self.on and torch.is_grad_enabled()):
            return None
        (self._input,) = in_precision(args[0])  # cast here as the layer would, to keep the tensor that it keeps
        return (self._input,)  # pyright: ignore[reportReturnType]

    def _watch(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        x, self._input = self._input, None
        return None if x is None else _Watch.apply(output, x, self)  # pyright: ignore[reportReturnType]

    def add(self, dy_TO: Tensor, x_TI: Tensor) -> None:
        """Add the gradient of T tokens: of the output, dy (T, O), and the input, x (T, I)."""
        dtype = torch.promote_types(dy_TO.dtype, torch.float32)
        if self.total is None:
            self.total = torch.zeros(dy_TO.shape[1], x_TI.shape[1], dtype=dtype, device=dy_TO.device)
        if dy_TO.dtype == x_TI.dtype == dtype:
            self.total.addmm_(dy_TO.t(), x_TI)
        else:
            self.total += dy_TO.t() @ x_TI.to(dy_TO.dtype)

    def take(self) -> Tensor | None:
        """Return the gradient of U and reset the sum; None if no backward went through the layer."""
        total, self.total, self._input = self.total, None, None
        return None if total is None else total.div_(self.scale)

    def remove(self) -> None:
        """Remove the hooks from the layer."""
        for hook in self._hooks:
            hook.remove()


class _Watch(torch.autograd.Function):
    # Returns the output of LoRA's second factor unchanged; its backward sees dy. Shapes: T tokens, O out, I in.

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, gradient: DenseGradient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), (dy,) = ctx.saved_tensors, grads
        ctx.gradient.add(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
        return dy, None, None


def watch(matrices: Sequence[TrainedMatrix]) -> dict[str, DenseGradient]:
    """Register a `DenseGradient` for each product among `matrices`; return them by name."""
    return {matrix.name: DenseGradient(matrix) for matrix in matrices if matrix.scale is not None}


def gradient_of(matrix: TrainedMatrix, watchers: Mapping[str, DenseGradient]) -> Tensor | None:
    """Return a dense copy of the gradient accumulated on this rank, and reset it; None if there is none."""
    if matrix.scale is not None:
        return watchers[matrix.name].take()
    (parameter,) = matrix.parameters.values()
    if parameter.grad is None:
        return None
    return parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
