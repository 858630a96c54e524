"""MEFT: fine-tune adapters in a model made reversible, whose activations are computed back from its output.

Memory-efficient fine-tuning (MEFT), arXiv 2306.00477. The authors' code is for BERT alone; decoder-only models, the
relative coupling, segments and fixed point are ours.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lit_sparse.anatomy import (
    MLP,
    classification_head,
    decoder_layers,
    dummy_forward,
    evaluating,
    has_values,
    mlps,
    role,
)
from lit_sparse.errors import BadInput
from lit_sparse.reversible.coupling import Coupling
from lit_sparse.reversible.stack import NO_DROPOUT, Call, Form, Half, ReversibleLayer, Stack
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Leaves, Probe, UpdateStrategy

CONFIG, WEIGHTS = "meft.json", "meft.safetensors"
"""Files of a saved adapter."""

STD = 0.02
"""Standard deviation of the adapters' matrices at the start (the authors')."""


@dataclass
class MEFT(UpdateStrategy):
    """Fine-tune adapters in a reversible model: activations in memory do not grow with depth (MEFT, arXiv 2306.00477).

    Two streams start from the embeddings. A layer computes `y1 = F(x2) + factor * x1` and `y2 = G(y1) + x2`, which can
    be solved for x1 and x2, so that the backward pass computes each layer's input from its output. F and G are the
    model's own layers with adapters, so that the model starts as about the one that was pre-trained (section 3.2).

    Args:
        variant: Which part is F and which G. 1: F is the layer, with an adapter parallel to its MLP, and G an adapter.
            2: F is an adapter and G the layer. 3: F is the attention with an adapter after it, and G the MLP with a
            parallel one; for layers whose MLP reads what the attention gave.
        bottleneck: Width of the adapters (the authors' 8).
        coupling: `difference` subtracts what F (or G) reads from the stream that is weighed by `factor`, since a
            pre-norm layer carries its residual; the start differs from the base by about `factor` of one layer's
            update. `paper` does not, so that each layer adds `factor` of the state before it.
        factor: Weight of the stream that is carried along, above 0 and at most 1; the paper's is 0.1. Smaller starts
            closer to the base, and loses more: a reconstruction multiplies errors by 1 / factor a layer (in variant 3
            by its square).
        exact: Streams in fixed point: the reconstruction is exact at any depth, and stores log2(1 / factor) bits a
            hidden unit and layer (twice that in variant 3). `factor` must be 1/2, 1/4, 1/8, ... It excludes
            `checkpoint_every`, and dropout within the layers.
        checkpoint_every: With `exact: false`, store the streams every so many layers and compute back only in between;
            null stores the last ones alone.
        max_error: Relative error of the reconstruction, measured on a batch before training, above which to refuse.

    Raises:
        BadInput: if a number is out of its range, or if settings exclude each other.
    """

    variant: Literal[1, 2, 3] = 1
    bottleneck: int = 8
    coupling: Literal["difference", "paper"] = "difference"
    factor: float = 0.125
    checkpoint_every: int | None = None
    exact: bool = True
    max_error: float = 0.01

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    base: ClassVar[BaseWeights] = "kept"
    leaves: ClassVar[Leaves] = "own_forward"
    unsharded_reason: ClassVar[str] = (
        "it runs all layers at the last one's call, when FSDP2 has given the others' weights back; use lora.yaml with "
        "model.activation_checkpointing"
    )

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 3) or self.coupling not in ("difference", "paper"):
            raise BadInput(
                f"MEFT: variant is {self.variant} and coupling {self.coupling}; they must be 1, 2 or 3, and difference "
                "or paper."
            )
        if not 0 < self.factor <= 1:
            raise BadInput(f"MEFT: factor is {self.factor}; it must be above 0 and at most 1.")
        if self.bottleneck < 1 or (self.checkpoint_every is not None and self.checkpoint_every < 1):
            raise BadInput(
                f"MEFT: bottleneck is {self.bottleneck} and checkpoint_every {self.checkpoint_every}; they must be at "
                "least 1."
            )
        if not self.max_error > 0:
            raise BadInput(f"MEFT: max_error is {self.max_error}; it must be above 0.")
        if self.exact:
            self._check_exact()
        self._stack: Stack | None = None
        self._error: float | None = None

    def _check_exact(self) -> None:
        try:
            _ = Coupling(self.factor, relative=True).shift
        except ValueError:
            raise BadInput(
                f"MEFT: exact is on and factor is {self.factor:g}; in fixed point it must be 1, 1/2, 1/4, 1/8, ... "
                "1/128, such as 0.125."
            ) from None
        if self.checkpoint_every is not None:
            raise BadInput(
                f"MEFT: exact is on and checkpoint_every is {self.checkpoint_every}, but an exact reconstruction needs "
                "no stored states; set checkpoint_every to null, or exact to false."
            )

    # ---- preparing the model

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._place(model, context)
        self._measure(probe)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._place(model, context)
        self._error = state["error"]

    def _place(self, model: nn.Module, context: Context) -> None:
        assert isinstance(model, PreTrainedModel)
        check_model(model)
        if context.checkpointing:
            raise BadInput(
                "MEFT and activation checkpointing both recompute the layers in the backward pass; set "
                "model.activation_checkpointing to false, or train an adapter such as lora.yaml with it."
            )
        if self.coupling == "paper":
            growth = 1 / self.factor ** (2 if self.variant == 3 else 1)
            warnings.warn(
                f"MEFT: coupling is paper, which adds {self.factor:g} of the state before to each layer's, so that the "
                f"start is far from a base with pre-norm layers, and each layer computed back multiplies errors by "
                f"about {growth:g}; difference starts closer.",
                stacklevel=2,
            )
        layers = decoder_layers(model)
        if self.exact and any(map(draws, {module for layer in layers for module in layer.modules()})):
            raise BadInput(NO_DROPOUT)
        seen = Seen.of(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in classification_head(model):
            model.get_submodule(name).requires_grad_(True)
        made = [reversible(self, model, layer, mlp, seen) for layer, mlp in zip(layers, mlps(model), strict=True)]
        result = "mean" if self.coupling == "paper" else "kept" if self.variant == 2 else "read"
        self._stack = Stack(made, Form(result, self.checkpoint_every, self.exact))

    def _measure(self, probe: Probe) -> None:
        """Measure the error of the reconstruction on a training batch.

        Raises:
            BadInput: if it is above `max_error`.
        """
        assert self._stack is not None
        self._stack.errors = []
        try:
            for _ in probe(1):
                pass
            self._error = max(self._stack.errors, default=0.0)
        finally:
            self._stack.errors = None
        if not self._error <= self.max_error:
            depth = self.checkpoint_every or len(self._stack.layers)
            raise BadInput(
                f"MEFT: computed back from {depth} layers above, hidden states have a relative error of "
                f"{self._error:.2g}, and max_error is {self.max_error:g}: gradients would be noise; set "
                f"exact to true with checkpoint_every: null, or checkpoint_every to {max(depth // 2, 1)} or less."
            )

    def describe(self) -> dict[str, Any]:
        """Return the relative error of the reconstruction that was measured before training (0 if exact)."""
        return {"reconstruction_error": self._error}

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        return {"error": self._error}

    def save(self, folder: Path) -> None:
        """Write the adapters and their settings, which `load` puts on the base again."""
        assert self._stack is not None, "there is no adapter to save: attach or restore it first"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(asdict(self), indent=2) + "\n")
        save_file(
            {
                f"{number}.{name}": value.detach().contiguous().clone()
                for number, layer in enumerate(self._stack.layers)
                for name, value in adapters_of(layer.module).named_parameters()
            },
            folder / WEIGHTS,
        )

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> MEFT:
        """Put saved adapters on `model`, the base that they were trained on, and return the strategy.

        Raises:
            BadInput: if the folder is of no such adapter, or of one for another model.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise BadInput(f"{folder} has no {CONFIG}; give a folder that `lit-sparse export --to adapter` wrote.")
        try:
            strategy, values = cls(**json.loads((folder / CONFIG).read_text())), load_file(folder / WEIGHTS)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise BadInput(f"{folder} cannot be read ({error}); export the run again.") from error
        layers = decoder_layers(model)
        strategy.restore(model, {"error": None}, Context())
        own = {
            f"{number}.{name}": parameter
            for number, layer in enumerate(layers)
            for name, parameter in adapters_of(layer).named_parameters()
        }
        if {name: value.shape for name, value in values.items()} != {name: p.shape for name, p in own.items()}:
            raise BadInput(
                f"{folder} has adapters for a model of other sizes than this {type(model).__name__} of {len(layers)} "
                "layers; give the base that they were trained on."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])
        return strategy


# ---- the model's layers as reversible steps


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


@dataclass
class Seen:
    """What a forward pass over a few dummy tokens showed of each decoder layer and of its modules.

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


def reversible(settings: MEFT, model: nn.Module, layer: nn.Module, mlp: MLP, seen: Seen) -> ReversibleLayer:
    """Put adapters into a decoder layer; return its two steps.

    Raises:
        BadInput: if the layer does not give by itself what it gave in the model, or has no two parts (variant 3).
    """
    hidden, call, gave = seen.calls[layer]
    whole = alone(layer, seen)
    with torch.no_grad(), evaluating(layer):
        check_same(whole(hidden, call), gave, layer, "keeps state that other layers share")
    parts = halves_of(model, layer, mlp, seen) if settings.variant == 3 else None
    if parts is not None:
        with torch.no_grad(), evaluating(layer):
            check_same(parts[1](parts[0](hidden, call), call), gave, layer, "is not an attention and then an MLP")
    like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
    relative = settings.coupling == "difference"
    # The head reads the stream that the last layer writes (the mean of both in the paper's coupling), so that in
    # variant 1 an adapter behind that one would never be read.
    ends = settings.variant == 1 and relative and layer is decoder_layers(model)[-1]
    own = nn.ModuleDict(
        {
            name: Adapter(hidden.shape[-1], settings.bottleneck, mlp.act, like)
            for name in (("parallel",) if ends else ("parallel", "second"))
        }
    )
    layer.add_module("meft", own)
    put_beside(model.get_submodule(mlp.up), model.get_submodule(mlp.down), own["parallel"])
    weighed, plain = Coupling(settings.factor, relative), Coupling(1.0, relative=False)
    if parts is not None:
        attention = attention_of(layer)
        assert attention is not None
        put_after(layer, attention, own["second"])
        return ReversibleLayer(layer, (Half(parts[0], weighed), Half(parts[1], weighed)), False, seen.outputs[layer])
    if ends:
        return ReversibleLayer(layer, (Half(whole, weighed),), False, seen.outputs[layer])
    adapter = Half(lambda x, call: own["second"](x), plain)
    halves = (Half(whole, weighed), adapter) if settings.variant == 1 else (adapter, Half(whole, weighed))
    return ReversibleLayer(layer, halves, True, seen.outputs[layer])


def alone(layer: nn.Module, seen: Seen) -> Callable[[Tensor, Call], Tensor]:
    """Return the function that gives a layer's hidden states, whatever takes the place of its `forward` later."""

    def function(x: Tensor, call: Call) -> Tensor:
        out = type(layer).forward(layer, x, *call[0], **call[1])
        return out[0] if seen.outputs[layer] else out  # pyright: ignore[reportReturnType]

    return function


def check_same(got: Tensor, expected: Tensor, layer: nn.Module, why: str) -> None:
    """Refuse a layer that cannot be run by itself, or in two parts."""
    if has_values(got) and not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise BadInput(
            f"MEFT: {type(layer).__name__} {why}, so that it cannot be computed back from its output; take variant 1 "
            "where another was asked for, or train with lora.yaml and activation checkpointing."
        )


def halves_of(
    model: nn.Module, layer: nn.Module, mlp: MLP, seen: Seen
) -> tuple[Callable[[Tensor, Call], Tensor], Callable[[Tensor, Call], Tensor]]:
    """Return the layer's attention and its MLP, each with its norm and residual, as functions of hidden states.

    Each is the whole layer with the other part giving zeros: the layer's own code says where norms and residuals are.
    """
    attention = attention_of(layer)
    if mlp.module is layer or attention is None or attention is mlp.module:
        raise BadInput(
            f"MEFT: variant is 3, but attention and MLP of {type(layer).__name__} are not a module each; take "
            "variant 1."
        )
    whole, silent = alone(layer, seen), set[nn.Module]()

    def without(module: nn.Module) -> Callable[[Tensor, Call], Tensor]:
        def function(x: Tensor, call: Call) -> Tensor:
            silent.add(module)
            try:
                return whole(x, call)
            finally:
                silent.discard(module)

        return function

    for module in (attention, mlp.module):
        silence(module, silent, seen.outputs[module])
    return without(mlp.module), without(attention)


def silence(module: nn.Module, silent: set[nn.Module], outputs: int) -> None:
    """Let `module` give zeros of the shape of what it reads, while it is in `silent`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if module not in silent:
            return type(module).forward(module, *args, **kwargs)
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, *[None] * (outputs - 1)) if outputs else zeros

    module.forward = forward


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Return the module that holds the layer's projections to queries and keys; None if there is not one such."""
    parents = {
        name.rpartition(".")[0] for name, _ in layer.named_modules() if name and role(name) in ("q", "k", "v", "qkv")
    }
    return layer.get_submodule(parents.pop()) if len(parents) == 1 else None


def put_after(layer: nn.Module, attention: nn.Module, adapter: nn.Module) -> None:
    """Add to the attention's output projection what `adapter` makes of its output.

    Raises:
        BadInput: if the attention has no such projection.
    """
    found = [module for name, module in attention.named_modules() if name and role(f"attn.{name}") == "o"]
    if len(found) != 1:
        raise BadInput(
            f"MEFT: variant is 3, but the attention of {type(layer).__name__} has {len(found)} output projections "
            "where one is needed; take variant 1."
        )
    found[0].register_forward_hook(lambda module, args, out: out + adapter(out))


def put_beside(up: nn.Module, down: nn.Module, adapter: nn.Module) -> None:
    """Add to what `down` gives what `adapter` makes of the input of `up`: an adapter parallel to the MLP."""
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], _out: Tensor) -> None:
        inputs[:] = args[:1]

    def add(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + adapter(inputs.pop())

    up.register_forward_hook(keep)
    down.register_forward_hook(add)
