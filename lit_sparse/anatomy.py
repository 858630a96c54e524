"""Find the decoder layers, linear layers, MLPs and head of a Hugging Face language model."""

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
"""Roles of linear layers, with the usual endings of their names: attention's projections, the MLP's matrices."""


def role(name: str) -> str:
    """Return the role of the linear layer `name` (a key of ROLES), or the last part of its name if it has none."""
    matches = [
        (len(ending), role)
        for role, endings in ROLES.items()
        for ending in endings
        if f".{name}".endswith(f".{ending}")
    ]
    return max(matches)[1] if matches else name.rpartition(".")[2]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of `model`: its first ModuleList of `config.num_hidden_layers` modules.

    Raises:
        BadInput: if the model has no such list.
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
    """Return the names of a classifier's head modules; none for other models.

    The head is everything outside of the base model, and the base model's pooler.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    base: Any = model.base_model
    pooler = [f"{model.base_model_prefix}.pooler"] if getattr(base, "pooler", None) is not None else []
    return [name for name, child in model.named_children() if child is not base] + pooler


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers within the decoder layers by qualified name: `nn.Linear` and GPT-2's `Conv1D`."""
    layers = set(decoder_layers(model).modules())
    return {name: module for name, module in model.named_modules() if module in layers and is_linear(module)}  # pyright: ignore


@dataclass(frozen=True, eq=False)
class MLP:
    """The MLP of one decoder layer.

    Attributes:
        module: The parent of the up projection: the MLP itself if it is gated.
        gate: Qualified name of the gate projection; None if the MLP is not gated.
        up: Qualified name of the up projection, or of gate and up in one matrix (Phi-3).
        down: Qualified name of the down projection.
        act: The activation function.
    """

    module: nn.Module
    gate: str | None
    up: str
    down: str
    act: nn.Module


def mlps(model: nn.Module) -> list[MLP]:
    """Return the MLPs of `model`, in layer order. Their matrices may be wrapped already, by adapters for example.

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
    """Return the linear layers of `model` that `targets` name: by role, ending of their name, or `all`.

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
    """Return true if `targets` name the layer `name`: by its role, an ending of its name, or `all`."""
    return any(t in ("all", role(name)) or f".{name}".endswith(f".{t}") for t in targets)


def is_linear(module: nn.Module) -> bool:
    """Return true for a plain or quantised linear layer. Subclasses are no targets: they wrap one already."""
    return type(module) in (nn.Linear, Conv1D) or is_quantized_linear(module)


def is_quantized_linear(module: nn.Module) -> bool:
    """Return true for a linear layer of bitsandbytes, recognised by name: the package may not be installed."""
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def is_quantized(model: nn.Module) -> bool:
    """Return true if a linear layer of `model` is quantised."""
    return any(is_quantized_linear(module) for module in model.modules())


def weights_in(parameter: Tensor) -> int:
    """Return the number of weights in `parameter`, counted before packing if bitsandbytes packed them."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def matrix(linear: nn.Linear | Conv1D) -> Tensor:
    """Return the weight as (out, in), a view that shares memory: GPT-2's Conv1D stores it transposed.

    Raises:
        BadInput: if it is quantised, and so is no such matrix.
    """
    if is_quantized_linear(linear):
        raise BadInput(
            f"the weight of a {type(linear).__name__} was asked for, but it is quantised and cannot be trained in "
            "place; take a base that is not quantised, or an adapter such as lora.yaml."
        )
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def shared_inputs(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Group the named modules by the input tensor that they read (q, k and v of a layer read one, for example).

    A forward pass over a few dummy tokens finds them, so that nothing is assumed about the model's structure.
    """
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # holds the tensor: once freed, its id could be reused

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
    """Return a field of the output for three dummy tokens, (1, 3, ...), in evaluation mode and without a graph."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        return model(input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False)[field]


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of a batch that the model reads, with the key-value cache off."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the duration of a `with` block, then restore the mode of each module."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def weight_count(model: nn.Module) -> int:
    """Return the number of weights in matrices: with embeddings and head (tied ones once), without norms and biases."""
    return sum(weights_in(p) for p in model.parameters() if p.ndim == 2)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
