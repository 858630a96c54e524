"""MLP forward passes that also return, for each token, a smooth count of the activations that are not zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_sparse.anatomy import MLP, has_values
from lit_sparse.calls import dummy_forward
from lit_sparse.errors import BadInput
from lit_sparse_kernels.glu_density import ACTS, activation, glu_density, glu_density_grad


class ProxySums:
    """Collect the layers' mean proxies during a forward pass, and hold the sharpness of the proxy.

    Attributes:
        sharpness: eps or beta of the proxy, a fp32 scalar on the device of the model. A tensor, so that annealing it
            does not recompile a compiled model.
    """

    def __init__(self) -> None:
        self.sharpness = torch.ones(())
        self._by_layer: dict[int, Tensor] = {}
        self._open = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ProxySums:
        new = ProxySums()  # drops the current pass: torch cannot deepcopy tensors that are inside a graph
        new.sharpness = self.sharpness.clone()
        return new

    def begin(self, model: nn.Module, args: Any) -> None:
        """Start a forward pass; registered as the model's forward pre-hook."""
        self.sharpness = self.sharpness.to(next(model.parameters()).device)  # the model may have moved
        self._by_layer.clear()
        self._open = True

    def add(self, layer: int, means: Tensor) -> None:
        """Add a layer's mean proxies, (T,). Does nothing after `take`: a checkpointed layer runs again in backward."""
        if self._open:
            self._by_layer[layer] = means

    def take(self) -> dict[int, Tensor]:
        """End the forward pass, and return the mean proxies by layer."""
        taken, self._by_layer, self._open = self._by_layer, {}, False
        return taken


@dataclasses.dataclass(eq=False)
class MLPSite:
    """Replace the forward of a gated MLP, or of the activation function of a plain one.

    The linear layers are looked up by name at each call: an adapter may wrap them before or after `install`.
    """

    layer: int
    mlp: MLP
    act: str
    proxy: str
    where: str
    sums: ProxySums
    plain: Callable[[Tensor], Tensor] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.module.forward
        self._was = self.module.__dict__.get(
            "forward"
        )  # set only if something else has replaced it before (accelerate)

    @property
    def module(self) -> nn.Module:
        """The module whose forward is replaced: the MLP itself, or a plain MLP's activation function."""
        return self.mlp.act if self.mlp.gate is None else self.mlp.module

    def install(self) -> None:
        """Replace the module's forward."""
        self.module.forward = self  # on the instance: the module keeps its class, hooks and parameters

    def remove(self) -> None:
        """Put the module's forward back."""
        del self.module.forward
        if self._was is not None:
            self.module.forward = self._was

    def __call__(self, x: Tensor) -> Tensor:
        # Must not depend on `sums`: checkpointing raises if the recomputation saves other tensors than the first run.
        if not (self.module.training and torch.is_grad_enabled()):
            return self.plain(x)
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the plain forward for x (..., H), and add the mean proxies to the sums."""
        if self.mlp.gate is None:
            return self._activated(x, None)
        gate, up, down = (
            getattr(self.mlp.module, name.rpartition(".")[2]) for name in (self.mlp.gate, self.mlp.up, self.mlp.down)
        )
        return down(self._activated(gate(x), up(x)))

    def _activated(self, gate: Tensor, up: Tensor | None) -> Tensor:
        flat = gate.flatten(0, -2)
        other = None if up is None else up.flatten(0, -2).to(gate.dtype)  # the op takes both in one dtype
        h, rows = GLUDensity.apply(flat, other, self.sums.sharpness, self.act, self.proxy, self.where)  # pyright: ignore
        self.sums.add(self.layer, rows / gate.shape[-1])
        return h.view(gate.shape)


class GLUDensity(torch.autograd.Function):
    """Differentiate `glu_density`. One node has both outputs, so its backward runs once, with both gradients."""

    @staticmethod
    def forward(
        ctx: Any, gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gate_TI, up_TI, sharpness)
        ctx.names = act, proxy, where
        return glu_density(gate_TI, up_TI, sharpness, act, proxy, where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TI: Tensor, drows_T: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_TI, up_TI, sharpness = ctx.saved_tensors
        dgate_TI, dup_TI = glu_density_grad(dh_TI, drows_T, gate_TI, up_TI, sharpness, *ctx.names)
        return dgate_TI, None if up_TI is None else dup_TI, None, None, None, None


def act_of(module: nn.Module) -> str:
    """Return the name of the activation function of `module`, recognised by its values on a grid.

    Raises:
        BadInput: if `glu_density` does not know it.
    """
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        got = module(x)
    for name in ACTS:
        # By value, since class names differ between models; the exact and the tanh GELU differ by up to 5e-4 here.
        if torch.allclose(got, activation(x, name), rtol=0, atol=1e-5):
            return name
    raise BadInput(
        f"ActivationDensity: the MLPs' activation is {type(module).__name__}, which is none of {', '.join(ACTS)}; use "
        "a model with one of these."
    )


def check_sites(model: nn.Module, sites: list[MLPSite], compute: Callable[..., Any] | None = None) -> None:
    """Check that every gated MLP computes down(act(gate(x)) * up(x)), as its replacement does.

    Args:
        compute: As for `dummy_forward`.

    Raises:
        BadInput: naming the first module that computes something else.
    """

    reached: set[int] = set()

    def checker(site: MLPSite) -> Callable[..., None]:
        def check(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            reached.add(site.layer)
            _check_site(site, args[0], output)  # within the forward pass, where sharded weights are gathered

        return check

    gated = [site for site in sites if site.mlp.gate is not None]
    handles = [site.module.register_forward_hook(checker(site)) for site in gated]
    try:
        if gated:  # in training mode, adapters' dropout would differ between the two ways
            dummy_forward(model, compute=compute)
    finally:
        for handle in handles:
            handle.remove()
    for site in gated:
        if site.layer not in reached:
            raise BadInput(
                f"ActivationDensity: decoder layer {site.layer} of {type(model).__name__} takes no part in a "
                "forward pass over text, so its activations cannot be counted; use a model whose layers all do."
            )


def _check_site(site: MLPSite, x: Tensor, theirs: Tensor) -> None:
    ours = site.forward(x)
    # Half precision rounds by 2^-8 per operation; a different formula is off by far more than 2^-5.
    # More children than gate, up, down and the activation would be skipped, such as a dropout, inactive in evaluation.
    differs = has_values(ours) and bool((ours - theirs).norm() > 2**-5 * theirs.norm())
    if len(list(site.module.children())) != 4 or differs:
        raise BadInput(
            f"ActivationDensity: the {type(site.module).__name__} that holds {site.mlp.up} does not compute "
            "down(act(gate(x)) * up(x)); use a model whose MLPs do."
        )


# ---- which tokens count


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Return a mask of the tokens that are not padding, (B, S) bool; all true if the batch has no mask."""
    name = next((name for name in ("token_mask", "attention_mask") if name in batch), None)
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if name is None else batch[name].bool()


def masked_mean(means: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `means` (T,) over the tokens of `mask` (B, S), a scalar; 0, with a graph, if there are none.

    `where` keeps the shape static: indexing with the mask would make the CPU wait for the GPU.
    """
    return torch.where(mask.flatten(), means.flatten(), 0).sum() / mask.sum().clamp(min=1)
