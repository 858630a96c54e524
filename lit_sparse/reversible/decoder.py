"""Decoder layers of any model as the reversible steps of MEFT (arXiv 2306.00477, section 3.2), with their adapters.

What is put into the model are partials of functions here: a copy of the model has copies of their modules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lit_sparse.anatomy import decoder_layers, has_values, mixtures, mlp_projections, role
from lit_sparse.calls import dummy_forward, evaluating
from lit_sparse.errors import BadInput
from lit_sparse.reversible.coupling import Coupling
from lit_sparse.reversible.segment import Call, Function, Half, ReversibleLayer

STD = 0.02
"""Standard deviation of the adapters' matrices at the start (the authors')."""


@dataclass(frozen=True)
class Recipe:
    """How each layer is made reversible; `strategies.MEFT` says what the fields mean."""

    variant: int
    bottleneck: int
    relative: bool
    factor: float


class Adapter(nn.Module):
    """A bottleneck of two linear layers with the model's activation (arXiv 1902.00751), without a residual.

    Args:
        hidden: Size of what it reads and gives.
        bottleneck: Size in between.
        act: The activation.
        like: A tensor whose device and dtype it takes.
    """

    def __init__(self, hidden: int, bottleneck: int, act: nn.Module, like: Tensor) -> None:
        super().__init__()
        kinds = {"device": like.device, "dtype": like.dtype}
        self.down, self.up = nn.Linear(hidden, bottleneck, **kinds), nn.Linear(bottleneck, hidden, **kinds)
        self.act = copy.deepcopy(act)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))


def adapters_of(layer: nn.Module) -> nn.ModuleDict:
    """Return the adapters that MEFT has put into a decoder layer."""
    adapters = layer.get_submodule("meft")
    assert isinstance(adapters, nn.ModuleDict)
    return adapters


@dataclass(frozen=True, eq=False)
class Parallel:
    """Where an adapter parallel to the MLP of a decoder layer reads and adds.

    Attributes:
        module: The MLP, or the mixture of experts in its place.
        reads: The module whose input the adapter reads.
        adds: The module to whose output it adds.
        act: The model's activation.
    """

    module: nn.Module
    reads: nn.Module
    adds: nn.Module
    act: nn.Module


def parallels(model: PreTrainedModel) -> list[Parallel]:
    """Return the MLP of each decoder layer, or its mixture of experts.

    Raises:
        BadInput: if a layer has neither.
    """
    layers, mixed = decoder_layers(model), mixtures(model)
    plain = [layer for layer in layers if layer not in mixed]
    try:
        single = dict(zip(plain, mlp_projections(model, plain), strict=True))
    except BadInput as error:
        if not any("expert" in name for layer in plain for name, _ in layer.named_modules()):
            raise
        raise BadInput(
            f"MEFT: {type(model).__name__} has mixtures of experts, of which a layer must hold one, in a module of its "
            "own with fused experts; use lora.yaml with activation checkpointing."
        ) from error
    config = model.config.get_text_config()
    act = ACT2FN[getattr(config, "hidden_act", None) or getattr(config, "activation_function", None) or "silu"]

    def of(layer: nn.Module) -> Parallel:
        if layer in mixed:
            return Parallel(mixed[layer], mixed[layer], mixed[layer], act)
        mlp = single[layer]
        return Parallel(mlp.module, model.get_submodule(mlp.up), model.get_submodule(mlp.down), mlp.act or act)

    return [of(layer) for layer in layers]


@dataclass
class Seen:
    """Findings of a forward pass over a few dummy tokens, of each decoder layer and of its modules.

    Attributes:
        outputs: For each module, how many values it returns as a tuple; 0 if it returns a tensor alone.
        calls: For each decoder layer, the hidden states it read, the rest of its arguments, and what it gave.
    """

    outputs: dict[nn.Module, int]
    calls: dict[nn.Module, tuple[Tensor, Call, Tensor]]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Seen:
        """Run `model` once, without a graph."""
        seen, layers = cls({}, {}), decoder_layers(model)
        inside = {module for layer in layers for module in layer.modules()}

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen.outputs[module] = len(out) if isinstance(out, tuple) else 0
            if module in layers:
                hidden = args[0] if args else kwargs["hidden_states"]
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                seen.calls[module] = hidden, (args[1:], rest), out[0] if isinstance(out, tuple) else out

        hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in inside]
        try:
            dummy_forward(model)
        finally:
            for hook in hooks:
                hook.remove()
        unread = [number for number, layer in enumerate(layers) if layer not in seen.calls]
        if unread:
            raise BadInput(
                f"MEFT: text does not reach layer {unread[0]} of {type(model).__name__}, which cannot be run backwards "
                "then; use lora.yaml with activation checkpointing."
            )
        for _, (_, given), _ in seen.calls.values():
            for name, value in given.items():
                if isinstance(value, Mapping) and value:  # filled on the way by layers below
                    raise BadInput(
                        f"MEFT: the layers of {type(model).__name__} share {name.replace('_', ' ')}, whose gradients "
                        "would be lost where each is computed back by itself; use lora.yaml with activation "
                        "checkpointing."
                    )
        return seen


def draws(module: nn.Module) -> bool:
    """Return true for a dropout that is on, or a module that calls one by a number of its own."""
    rates = (getattr(module, name, 0) for name in ("p", "dropout", "attention_dropout", "activation_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose layers are no decoder's.

    Raises:
        BadInput: naming the model.
    """
    config: Any = model.config
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or masked:
        raise BadInput(
            f"MEFT makes decoder-only models reversible, and {type(model).__name__} is an encoder or has one; use an "
            "adapter such as lora.yaml, with model.activation_checkpointing for less memory."
        )
    layers = decoder_layers(model)
    if len(set(layers)) < len(layers):
        raise BadInput(
            f"MEFT: {type(model).__name__} calls one layer several times, so that its {len(layers)} steps share their "
            "weights and adapters; use lora.yaml with activation checkpointing."
        )


def reversible(recipe: Recipe, layer: nn.Module, mlp: Parallel, last: bool, seen: Seen) -> ReversibleLayer:
    """Put adapters into a decoder layer; return its two steps.

    Args:
        last: Whether it is the last layer.

    Raises:
        BadInput: if the layer does not give by itself what it gave in the model, or has no two parts (variant 3).
    """
    hidden, call, gave = seen.calls[layer]
    whole = alone(layer, seen)
    with torch.no_grad(), evaluating(layer):
        check_same(whole(hidden, call), gave, layer, "keeps state that other layers share")
    parts = halves_of(layer, mlp, seen) if recipe.variant == 3 else None
    if parts is not None:
        with torch.no_grad(), evaluating(layer):
            check_same(parts[1](parts[0](hidden, call), call), gave, layer, "is not an attention and then an MLP")
    like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    # The head reads the stream that the last layer writes (the mean of both in the paper's coupling), so that in
    # variant 1 an adapter behind that one would never be read.
    ends = recipe.variant == 1 and recipe.relative and last
    own = nn.ModuleDict(
        {
            name: Adapter(hidden.shape[-1], recipe.bottleneck, mlp.act, like)
            for name in (("parallel",) if ends else ("parallel", "second"))
        }
    )
    layer.add_module("meft", own)
    put_beside(mlp.reads, mlp.adds, own["parallel"])
    weighed, plain = Coupling(recipe.factor, recipe.relative), Coupling(1.0, relative=False)
    if parts is not None:
        put_after(layer, own["second"])
        return ReversibleLayer(layer, (Half(parts[0], weighed), Half(parts[1], weighed)), False, seen.outputs[layer])
    if ends:
        return ReversibleLayer(layer, (Half(whole, weighed),), False, seen.outputs[layer])
    adapter = Half(partial(_run_adapter, own["second"]), plain)
    halves = (Half(whole, weighed), adapter) if recipe.variant == 1 else (adapter, Half(whole, weighed))
    return ReversibleLayer(layer, halves, True, seen.outputs[layer])


def _run_adapter(adapter: nn.Module, x: Tensor, _call: Call) -> Tensor:
    return adapter(x)


def alone(layer: nn.Module, seen: Seen) -> Function:
    """Return the function that gives a layer's hidden states, whatever takes the place of its `forward` later."""
    return partial(_run_alone, layer, seen.outputs[layer])


def _run_alone(layer: nn.Module, outputs: int, x: Tensor, call: Call) -> Tensor:
    out = type(layer).forward(layer, x, *call[0], **call[1])
    return out[0] if outputs else out  # pyright: ignore[reportReturnType]


def check_same(got: Tensor, expected: Tensor, layer: nn.Module, why: str) -> None:
    """Refuse a layer that cannot be run by itself, or in two parts."""
    if has_values(got) and not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise BadInput(
            f"MEFT: {type(layer).__name__} {why}, so that it cannot be computed back from its output; take variant 1 "
            "where another was asked for, or train with lora.yaml and activation checkpointing."
        )


def halves_of(layer: nn.Module, mlp: Parallel, seen: Seen) -> tuple[Function, Function]:
    """Return the layer's attention and its MLP, each with its norm and residual, as functions of hidden states.

    Each is the whole layer with the other part giving zeros: the layer's own code says where norms and residuals are.
    """
    attention = attention_of(layer)
    if mlp.module is layer or attention is None or attention is mlp.module:
        raise BadInput(
            f"MEFT: variant is 3, but attention and MLP of {type(layer).__name__} are not a module each; take "
            "variant 1."
        )
    silent = set[nn.Module]()
    for module in (attention, mlp.module):
        module.forward = partial(_run_unless, silent, module, seen.outputs[module])
    whole = alone(layer, seen)
    return partial(_run_without, mlp.module, silent, whole), partial(_run_without, attention, silent, whole)


def _run_without(module: nn.Module, silent: set[nn.Module], whole: Function, x: Tensor, call: Call) -> Tensor:
    silent.add(module)
    try:
        return whole(x, call)
    finally:
        silent.discard(module)


def _run_unless(silent: set[nn.Module], module: nn.Module, outputs: int, *args: Any, **kwargs: Any) -> Any:
    """Run `module`; while it is in `silent`, give zeros of the shape of what it reads."""
    if module not in silent:
        return type(module).forward(module, *args, **kwargs)
    zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
    return (zeros, *[None] * (outputs - 1)) if outputs else zeros


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return the module that holds the layer's projections to queries and keys; None if there is not one such."""
    parents = {
        name.rpartition(".")[0] for name, _ in layer.named_modules() if name and role(name) in ("q", "k", "v", "qkv")
    }
    return layer.get_submodule(parents.pop()) if len(parents) == 1 else None


def put_after(layer: nn.Module, adapter: nn.Module) -> None:
    """Add to the attention's output projection what `adapter` makes of its output.

    Raises:
        BadInput: if the attention has no such projection.
    """
    attention = attention_of(layer)
    assert attention is not None, "halves_of refuses such a layer"
    found = [module for name, module in attention.named_modules() if name and role(f"attn.{name}") == "o"]
    if len(found) != 1:
        raise BadInput(
            f"MEFT: variant is 3, but the attention of {type(layer).__name__} has {len(found)} output projections "
            "where one is needed; take variant 1."
        )
    found[0].register_forward_hook(partial(_add_after, adapter))


def _add_after(adapter: nn.Module, _module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + adapter(out)


def put_beside(reads: nn.Module, adds: nn.Module, adapter: nn.Module) -> None:
    """Add to what `adds` gives what `adapter` makes of the input of `reads`: an adapter parallel to the MLP."""
    inputs: list[Tensor] = []
    reads.register_forward_hook(partial(_keep, inputs))
    adds.register_forward_hook(partial(_add_beside, inputs, adapter))


def _keep(inputs: list[Tensor], _module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
    inputs[:] = args[:1]


def _add_beside(
    inputs: list[Tensor], adapter: nn.Module, _module: nn.Module, _args: tuple[Tensor, ...], out: Any
) -> Any:
    first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)  # mixtures may return router scores too
    first = first + adapter(inputs.pop()).view_as(first)  # Llama 4's flattens its tokens
    return first if rest is None else (first, *rest)
