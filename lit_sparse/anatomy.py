"""Where things are in a Hugging Face language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_sparse.errors import BadInput

ROLES = {
    "q": ("q_proj", "query", "q_lin", "wq"),
    "k": ("k_proj", "key", "k_lin", "wk"),
    "v": ("v_proj", "value", "v_lin", "wv"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "attention.dense", "attn.c_proj", "attention.output.dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "lin1", "w3", "dense_h_to_4h", "intermediate.dense"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "mlp.c_proj", "fc2", "fc_out", "lin2", "w2", "dense_4h_to_h", "output.dense"),
}
"""What the usual names of linear layers do: the query, key, value and output projections, and the MLP's matrices."""


def role(name: str) -> str:
    """The role of the linear layer called `name` (a key of ROLES), or the last part of its name where it has none."""
    matches = [
        (len(ending), role)
        for role, endings in ROLES.items()
        for ending in endings
        if f".{name}".endswith(f".{ending}")
    ]
    return max(matches)[1] if matches else name.rpartition(".")[2]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of `model`'s layers: its first ModuleList that is as long as its configuration says.

    Raises:
        BadInput: where the model has no such list.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for module in lists.values():
        if len(module) == count:
            return module
    found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    raise BadInput(
        f"the layers of {type(model).__name__} were not found: its config.num_hidden_layers is {count}, and its module "
        f"lists are {found}; only models that keep their layers in one such list can be trained by layer."
    )


def classification_head(model: nn.Module) -> list[str]:
    """Names of the modules that make a class of a classifier's hidden states; none in other models.

    They are all that lies outside its base model, and the base model's pooler.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    base: Any = model.base_model
    pooler = [f"{model.base_model_prefix}.pooler"] if getattr(base, "pooler", None) is not None else []
    return [name for name, child in model.named_children() if child is not base] + pooler


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers inside `model`'s layers by qualified name, `nn.Linear` and GPT-2's `Conv1D`; not the head."""
    layers = set(decoder_layers(model).modules())
    return {name: module for name, module in model.named_modules() if module in layers and is_linear(module)}  # pyright: ignore


@dataclass(frozen=True, eq=False)
class MLP:
    """One layer's feed-forward part.

    Attributes:
        module: What holds the matrices up to the activation: the MLP itself where it is gated.
        gate: Qualified name of the matrix under the activation; None where the MLP is not gated.
        up: Qualified name of the other matrix that reads the input, or of both in one (Phi-3).
        down: Qualified name of the matrix that reads the activations.
        act: The activation function.
    """

    module: nn.Module
    gate: str | None
    up: str
    down: str
    act: nn.Module


def mlps(model: nn.Module) -> list[MLP]:
    """The MLPs of `model`'s layers, first layer first; matrices may be wrapped already, by adapters say.

    Raises:
        BadInput: if a layer has none, or has several, as mixtures of experts do.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_mlp(model, layer, names) for layer in decoder_layers(model)]


def _mlp(model: nn.Module, layer: nn.Module, names: dict[nn.Module, str]) -> MLP:
    found: dict[str, list[str]] = {"gate": [], "up": [], "gate_up": [], "down": []}
    for module in layer.modules():
        if (kind := role(names[module])) in found:
            found[kind].append(names[module])
    gates, ups, downs = found["gate"], found["up"] + found["gate_up"], found["down"]
    parent = model.get_submodule(ups[0].rpartition(".")[0]) if ups else layer
    acts = [child for name, child in parent.named_children() if "act" in name and not list(child.parameters())]
    if (len(ups), len(downs), len(acts)) != (1, 1, 1) or len(gates) > 1:
        raise BadInput(
            f"no MLP was found in {names[layer]} of {type(model).__name__}: it has {len(gates)} gate, {len(ups)} up "
            f"and {len(downs)} down projections and beside them {len(acts)} modules named as activations, where one up "
            "and one down, at most one gate, and one activation are needed; take a model with such MLPs."
        )
    return MLP(parent, gates[0] if gates else None, ups[0], downs[0], acts[0])


def target_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of `model` that `targets` name by role, by an ending of their name, or by `all`.

    Raises:
        BadInput: if there are none.
    """
    found = linears(model)
    chosen = {name: linear for name, linear in found.items() if is_target(name, targets)}
    if not chosen:
        roles = ", ".join(sorted({role(name) for name in found})) or "none"
        raise BadInput(
            f"no linear layer of {type(model).__name__} is among the targets {list(targets)}; its layers have: {roles}."
        )
    return chosen


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether `targets` name the layer called `name`: by its role, by an ending of its name, or by `all`."""
    return any(t in ("all", role(name)) or f".{name}".endswith(f".{t}") for t in targets)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is exactly a plain linear layer, or one that bitsandbytes quantised (subclasses wrap them)."""
    return type(module) in (nn.Linear, Conv1D) or is_quantized_linear(module)


def is_quantized_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that bitsandbytes quantised, told by its name: it may not be installed."""
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def is_quantized(model: nn.Module) -> bool:
    """Whether a linear layer of `model` is quantised."""
    return any(is_quantized_linear(module) for module in model.modules())


def weights_in(parameter: Tensor) -> int:
    """Weights that `parameter` holds: its elements, or where bitsandbytes packed them, those that it packed."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def matrix(linear: nn.Linear | Conv1D) -> Tensor:
    """The weight as (out, in), a view that shares memory; GPT-2's Conv1D keeps it transposed.

    Raises:
        BadInput: if it is quantised, and so has no such matrix.
    """
    if is_quantized_linear(linear):
        raise BadInput(
            f"the weight of a {type(linear).__name__} was asked for, but it is quantised and cannot be trained in "
            "place; take a base that is not quantised, or an adapter such as lora.yaml."
        )
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def shared_inputs(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Groups of the named modules that read the very same input tensor (q, k and v of a layer, for example).

    Found by a forward pass over a few dummy tokens, so that no model's structure need be known.
    """
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # the tensor is kept: its id must not be given to another

    def watcher(name: str):
        def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return watch

    hooks = [model.get_submodule(name).register_forward_pre_hook(watcher(name)) for name in names]
    try:
        dummy_forward(model, "logits")
    finally:
        for hook in hooks:
            hook.remove()
    groups = [group for _, group in seen.values()]
    missing = set(names) - {name for group in groups for name in group}
    return groups + [[name] for name in sorted(missing)]


def dummy_forward(model: nn.Module, field: str = "logits") -> Tensor:
    """A field of `model`'s output for three dummy tokens, in evaluation mode and without a graph, (1, 3, ...)."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        return model(input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False)[field]


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What of a batch the model reads; nothing is cached for generation."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, then each of its modules as it was."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def weight_count(model: nn.Module) -> int:
    """Weights in the model's matrices (embeddings and head included, tied ones once, norms and biases not)."""
    return sum(weights_in(p) for p in model.parameters() if p.ndim == 2)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
