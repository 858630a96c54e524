"""Find the decoder layers, linear layers, MLPs and head of a Hugging Face language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_sparse.calls import uncalled
from lit_sparse.errors import BadInput

ROLES = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "wq", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "wk"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "wv"),
    "qkv": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "in_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "attention.dense", "attn.c_proj", "attention.output.dense", "attn.Wo"),
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "c_fc", "fc1", "fc_in", "lin1", "w3", "dense_h_to_4h", "intermediate.dense", "wi", "wi_1"),
    "gate_up": ("gate_up_proj", "mlp.Wi"),
    "down": (
        "down_proj",
        "mlp.c_proj",
        "fc2",
        "fc_out",
        "lin2",
        "w2",
        "dense_4h_to_h",
        "output.dense",
        "DenseReluDense.wo",
        "mlp.Wo",
    ),
}
"""Roles of linear layers, with the usual endings of their names: attention's projections, the MLP's matrices."""


def role(name: str) -> str:
    """Return the role of the linear layer or expert `name` (a key of ROLES), or the name's last part if it has none."""
    name = name.partition("[")[0]
    matches = [
        (len(ending), role)
        for role, endings in ROLES.items()
        for ending in endings
        if f".{name}".endswith(f".{ending}")
    ]
    return max(matches)[1] if matches else name.rpartition(".")[2]


def backbone(model: nn.Module) -> nn.Module:
    """Return the model under the head: `base_model`, or the child that embeds the tokens where that names no child.

    The `base_model_prefix` of Llama 4 and Mllama names an attribute of their multimodal models, so that transformers
    gives back the whole language model as its own base model.
    """
    base = getattr(model, "base_model", model)
    if base is not model:
        return base
    embeddings = set(model.get_input_embeddings().modules())  # pyright: ignore[reportCallIssue]
    inside = [child for child in model.children() if child not in embeddings and embeddings <= set(child.modules())]
    return inside[0] if inside else model


def language_model(model: nn.Module) -> nn.Module:
    """Return the part of `model` that reads tokens: a multimodal model's text decoder, or else the whole model."""
    is_composite = model.config.get_text_config() is not model.config  # pyright: ignore
    return model.get_decoder() if is_composite else model  # pyright: ignore[reportCallIssue, reportReturnType]


def unread_by_text(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a multimodal model that text never reaches, such as its vision tower; else none."""
    text, head = language_model(model), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    read = {*text.parameters(), *(() if head is None else head.parameters())}
    heads = [model.get_submodule(name) for name in classification_head(model)]
    read |= {parameter for module in heads for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if parameter not in read]


def settle_trainable(model: nn.Module) -> None:
    """Let the head of a classifier train whatever is frozen, and freeze what text never reaches."""
    for name in classification_head(model):
        model.get_submodule(name).requires_grad_(True)
    for parameter in unread_by_text(model):  # the batches have no images: these would have no gradient
        parameter.requires_grad_(False)


def embedded_tokens(model: PreTrainedModel) -> int:
    """Return the number of tokens that `model` has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]  # pyright: ignore


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of `model`, in order: of an encoder-decoder model the encoder's, then the decoder's.

    In each stack they are the first ModuleList of as many modules as its configuration has layers. The vision tower of
    a multimodal model is no such stack.

    Raises:
        BadInput: if a stack has no such list.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        text = config.get_text_config() if isinstance(config, PretrainedConfig) else config
        return _layers_of(model if text is config else language_model(model), text)
    ends = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}  # pyright: ignore[reportCallIssue]
    stacks = [(stack, stack.config.get_text_config(**{end: True})) for end, stack in ends.items()]  # pyright: ignore
    return [layer for stack, its in stacks for layer in _layers_of(stack, its)]


def _layers_of(stack: nn.Module, config: Any) -> list[nn.Module]:
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: module for name, module in stack.named_modules() if isinstance(module, nn.ModuleList)}
    for module in lists.values():
        if len(module) == count:
            return list(module)
    found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    raise BadInput(
        f"the layers of {type(stack).__name__} were not found: its config.num_hidden_layers is {count}, and its module "
        f"lists are {found}; only models that keep their layers in one such list can be trained by layer."
    )


def classification_head(model: nn.Module) -> list[str]:
    """Return the names of a classifier's head modules; none for other models.

    The head is everything outside of the base model, and the base model's pooler.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    base: Any = backbone(model)
    pooler = [f"{model.base_model_prefix}.pooler"] if getattr(base, "pooler", None) is not None else []
    return [name for name, child in model.named_children() if child is not base] + pooler


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers within the decoder layers by qualified name: `nn.Linear` and GPT-2's `Conv1D`."""
    layers = {module for layer in decoder_layers(model) for module in layer.modules()}
    return {name: module for name, module in model.named_modules() if module in layers and is_linear(module)}  # pyright: ignore


@dataclass(frozen=True, eq=False)
class Experts:
    """A parameter that holds a matrix of each expert: (experts, out, in), or (experts, in, out) if `transposed`."""

    parameter: nn.Parameter
    transposed: bool

    def matrix(self, number: int) -> Tensor:
        """Return the matrix of an expert as (out, in), a view that shares memory."""
        return self.parameter[number].t() if self.transposed else self.parameter[number]


def experts(model: nn.Module) -> dict[str, Experts]:
    """Return the fused experts within the decoder layers by qualified name: parameters with a matrix for each expert.

    The matrix of one expert is called by the parameter's name and the expert's number: `mlp.experts.down_proj[3]`.
    """
    layers = {module for layer in decoder_layers(model) for module in layer.modules()}
    return {
        f"{name}.{own}": Experts(parameter, _is_transposed(module, own, parameter))
        for name, module in model.named_modules()
        if module in layers and hasattr(module, "num_experts")
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def transposed_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights within the decoder layers that are stored as (in, out): GPT-2's, and some fused experts."""
    conv1d = {linear.weight for linear in linears(model).values() if isinstance(linear, Conv1D)}
    return conv1d | {fused.parameter for fused in experts(model).values() if fused.transposed}


def _is_transposed(module: nn.Module, name: str, parameter: Tensor) -> bool:
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return stated
    hidden = getattr(module, "hidden_size", None)  # Llama 4 does not say; a down projection gives hidden states back
    inner, outer = parameter.shape[1:] if role(name) == "down" else parameter.shape[:0:-1]
    return outer == hidden and inner != hidden


def weight_matrix(model: nn.Module, name: str) -> Tensor | None:
    """Return the weight of a linear layer, or the matrix of an expert, as (out, in); None if `model` has none so named.

    Raises:
        BadInput: if it is quantised.
    """
    path, _, number = name.removesuffix("]").partition("[")
    owner, _, own = path.rpartition(".") if number else (path, "", "weight")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    if not number:
        return matrix(module) if isinstance(module, nn.Linear | Conv1D) else None
    parameter = module._parameters.get(own)
    if parameter is None or parameter.ndim != 3 or int(number) >= len(parameter):
        return None
    return Experts(parameter, _is_transposed(module, own, parameter)).matrix(int(number))


@dataclass(frozen=True, eq=False)
class Projections:
    """The matrices of the MLP of one decoder layer.

    Attributes:
        module: The parent of the up projection: the MLP itself if it is gated.
        gate: Qualified name of the gate projection; None if the MLP is not gated.
        up: Qualified name of the up projection, or of gate and up in one matrix (Phi-3).
        down: Qualified name of the down projection.
        act: The activation function; None if no module, or several, are named as one.
    """

    module: nn.Module
    gate: str | None
    up: str
    down: str
    act: nn.Module | None


@dataclass(frozen=True, eq=False)
class MLP(Projections):
    """The MLP of one decoder layer, whose activation function is a module."""

    act: nn.Module


def mlp_projections(model: nn.Module, layers: Sequence[nn.Module]) -> list[Projections]:
    """Return the matrices of the MLPs of these decoder layers, whatever computes their activation.

    Raises:
        BadInput: if a layer has none, or has several, as mixtures of experts do.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_projections(model, layer, names) for layer in layers]


def mlps(model: nn.Module) -> list[MLP]:
    """Return the MLPs of `model`, in layer order. Their matrices may be wrapped already, by adapters for example.

    Raises:
        BadInput: if a layer has none, or has several, as mixtures of experts do.
    """
    names = {module: name for name, module in model.named_modules()}
    return [_mlp(model, layer, names) for layer in decoder_layers(model)]


def mixtures(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the mixture of experts of each decoder layer that has one: the parent of the module of fused experts."""
    holders = {name.rpartition(".")[0] for name in experts(model)}
    blocks = {model.get_submodule(name.rpartition(".")[0]) for name in holders}
    found = {layer: [module for module in layer.modules() if module in blocks] for layer in decoder_layers(model)}
    return {layer: inside[0] for layer, inside in found.items() if len(inside) == 1}


def _projections(model: nn.Module, layer: nn.Module, names: dict[nn.Module, str]) -> Projections:
    found: dict[str, list[str]] = {"gate": [], "up": [], "gate_up": [], "down": []}
    for module in layer.modules():
        if (kind := role(names[module])) in found:
            found[kind].append(names[module])
    gates, ups, downs = found["gate"], found["up"] + found["gate_up"], found["down"]
    if (len(ups), len(downs)) != (1, 1) or len(gates) > 1:
        raise BadInput(
            f"no MLP was found in {names[layer]} of {type(model).__name__}: it has {len(gates)} gate, {len(ups)} up "
            f"and {len(downs)} down projections, where one up and one down and at most one gate are needed; take a "
            "model with such MLPs."
        )
    parent = model.get_submodule(ups[0].rpartition(".")[0])
    acts = [child for name, child in parent.named_children() if "act" in name and not list(child.parameters())]
    return Projections(parent, gates[0] if gates else None, ups[0], downs[0], acts[0] if len(acts) == 1 else None)


def _mlp(model: nn.Module, layer: nn.Module, names: dict[nn.Module, str]) -> MLP:
    found = _projections(model, layer, names)
    if found.act is None:
        raise BadInput(
            f"no MLP was found in {names[layer]} of {type(model).__name__}: beside its projections it has no module "
            "named as an activation, or several, where one is needed; take a model with such MLPs."
        )
    return MLP(found.module, found.gate, found.up, found.down, found.act)


def target_linears(
    model: nn.Module, targets: Sequence[str], compute: Callable[..., Any] | None = None
) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers of `model` that `targets` name: by role, ending of their name, or `all`.

    Those whose weights the model reads without calling them are no targets: see `uncalled`.

    Args:
        compute: As for `dummy_forward`.

    Raises:
        BadInput: if neither a linear layer nor fused experts are among them.
    """
    found, fused = linears(model), experts(model)
    chosen = {name: linear for name, linear in found.items() if is_target(name, targets)}
    direct = uncalled(model, chosen, compute)
    chosen = {name: linear for name, linear in chosen.items() if name not in direct}
    if not chosen and not any(is_target(name, targets) for name in fused):
        roles = ", ".join(sorted({role(name) for name in [*found, *fused]} - {role(name) for name in direct})) or "none"
        raise BadInput(
            f"no linear layer of {type(model).__name__} is among the targets {list(targets)}; its layers have: {roles}."
        )
    return chosen


def target_experts(model: nn.Module, targets: Sequence[str]) -> dict[str, Experts]:
    """Return the fused experts of `model` that `targets` name, as `target_linears` does; none is no error."""
    return {name: tensor for name, tensor in experts(model).items() if is_target(name, targets)}


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Return true if `targets` name the layer `name`: by its role, an ending of its name, or `all`."""
    what = role(name)
    return any(t in ("all", what) or f".{name}".endswith(f".{t}") for t in targets)


def is_linear(module: nn.Module) -> bool:
    """Return true for a plain or quantised linear layer, also of a class that computes as `nn.Linear` (Falcon's).

    Other subclasses are no targets: they wrap a linear layer already, or return something else (Llama 4's router).
    """
    return type(module) in (nn.Linear, Conv1D) or is_quantized_linear(module) or _computes_linear(type(module))


@cache
def _computes_linear(kind: type[nn.Module]) -> bool:
    if not issubclass(kind, nn.Linear) or kind.__init__ is not nn.Linear.__init__:
        return False
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        linear, x = kind(3, 2), torch.eye(3)
    with torch.no_grad():
        return torch.allclose(linear(x), F.linear(x, linear.weight, linear.bias))


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


def has_values(tensor: Tensor) -> bool:
    """Return false for a tensor of a planned training, or a DTensor of them, which have a shape only."""
    return not isinstance(tensor.to_local() if isinstance(tensor, DTensor) else tensor, FakeTensor)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of a batch that the model reads, with the key-value cache off."""
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch} | {"use_cache": False}


def weight_count(model: nn.Module) -> int:
    """Return the number of weights in matrices: embeddings and head (tied ones once), experts; no norms and biases."""
    return sum(weights_in(p) for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("bias"))


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
