"""MEFT: fine-tune adapters in a model made reversible, whose activations are computed back from its output.

Memory-efficient fine-tuning (MEFT), arXiv 2306.00477. The authors' code is for BERT alone; decoder-only models, the
relative coupling, segments and fixed point are ours.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from lit_sparse.anatomy import classification_head, decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.ranks import largest_of_ranks
from lit_sparse.reversible.coupling import LIMIT, Coupling
from lit_sparse.reversible.decoder import Recipe, Seen, adapters_of, check_model, draws, parallels, reversible
from lit_sparse.reversible.segment import NO_DROPOUT, Form
from lit_sparse.reversible.stack import Stack
from lit_sparse.storage.weight_files import check_hashes
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Leaves, Probe, UpdateStrategy

CONFIG, WEIGHTS = "meft.json", "meft.safetensors"
"""Files of a saved adapter."""


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
            hidden unit and layer (twice that in variant 3). `factor` must be 1, 1/2, 1/4, ... 1/128. It excludes
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
    recomputes: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True

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
        self._heads: dict[str, nn.Module] = {}
        self._error: float | None = None
        self._probe: Probe | None = None  # until the model is sharded

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
        if context.units:
            self._probe = probe
        else:
            self._measure(probe)

    def on_shard(self) -> None:
        """Measure now, where `attach` was before a model that is sharded, and may not fit on one device."""
        probe, self._probe = self._probe, None
        if probe is not None:
            self._measure(probe)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._place(model, context)
        self._error = state["error"]

    def _place(self, model: nn.Module, context: Context) -> None:
        if not isinstance(model, PreTrainedModel) or any(name.endswith(".meft") for name, _ in model.named_modules()):
            raise BadInput(
                f"MEFT: the {type(model).__name__} is not a model of transformers without adapters; give the base by "
                "itself, newly loaded."
            )
        check_model(model)
        if context.checkpointing:
            raise BadInput(
                "MEFT and activation checkpointing both recompute the layers in the backward pass; set "
                "model.activation_checkpointing to false, or train an adapter such as lora.yaml with it."
            )
        if self.coupling == "paper":
            times = 1 / self.factor ** (2 if self.variant == 3 else 1)
            growth = "" if self.exact else f", and each layer computed back multiplies errors by about {times:g}"
            warnings.warn(
                f"MEFT: coupling is paper, which adds {self.factor:g} of the state before to each layer's, so that the "
                f"start is far from a base with pre-norm layers{growth}; difference starts closer.",
                stacklevel=2,
            )
        layers = decoder_layers(model)
        if self.exact and any(map(draws, {module for layer in layers for module in layer.modules()})):
            raise BadInput(NO_DROPOUT)
        seen = Seen.of(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._heads = {name: model.get_submodule(name) for name in classification_head(model)}
        for head in self._heads.values():
            head.requires_grad_(True)
        recipe = Recipe(self.variant, self.bottleneck, self.coupling == "difference", self.factor)
        parts = zip(layers, parallels(model), strict=True)
        made = [reversible(recipe, layer, mlp, layer is layers[-1], seen) for layer, mlp in parts]
        result = "mean" if self.coupling == "paper" else "kept" if self.variant == 2 else "read"
        self._stack = Stack(made, Form(result, self.checkpoint_every, self.exact))

    def _measure(self, probe: Probe) -> None:
        """Measure the error of the reconstruction on a training batch, the worst of all ranks' batches.

        Raises:
            BadInput: if it is above `max_error`, or in fixed point if there is any.
        """
        assert self._stack is not None
        self._stack.errors = []
        try:
            for _ in probe(1):
                pass
            self._error = largest_of_ranks([0.0, *self._stack.errors])
        finally:
            self._stack.errors = None
        if self._error <= (0.0 if self.exact else self.max_error):
            return
        if self.exact:
            beyond = f"hidden states are not within {LIMIT:,} either way, which is what fixed point holds"
            unlike = f"what layers compute does not repeat bit for bit (relative error {self._error:.2g})"
            raise BadInput(
                f"MEFT: exact is on, but on a training batch {beyond if math.isnan(self._error) else unlike}; set "
                "exact: false and checkpoint_every: 1."
            )
        depth = self.checkpoint_every or len(self._stack.layers)
        less = f", or checkpoint_every to {depth // 2} or less" if depth > 1 else ""
        raise BadInput(
            f"MEFT: computed back from {depth} layers above, hidden states have a relative error of {self._error:.2g}, "
            f"and max_error is {self.max_error:g}: gradients would be noise; set exact to true with checkpoint_every: "
            f"null{less}."
        )

    def describe(self) -> dict[str, Any]:
        """Return the relative error of the reconstruction that was measured before training (0 if exact)."""
        return {"reconstruction_error": self._error}

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        return {"error": self._error}

    def save(self, folder: Path) -> None:
        """Write the adapters, a classifier's head and the settings, which `load` puts on the base again."""
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(asdict(self), indent=2) + "\n")
        values = {name: value.detach().contiguous().clone() for name, value in self._saved().items()}
        save_file(values, folder / WEIGHTS)

    def _saved(self) -> dict[str, nn.Parameter]:
        """Return what trains by its name in a saved folder: a layer's number and an adapter, or a head."""
        assert self._stack is not None, "there is no adapter: attach or restore it first"
        layers = {str(number): adapters_of(layer.module) for number, layer in enumerate(self._stack.layers)}
        owners = layers | self._heads
        return {f"{owner}.{name}": p for owner, module in owners.items() for name, p in module.named_parameters()}

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> MEFT:
        """Put saved adapters on `model`, the base that they were trained on, and return the strategy.

        Raises:
            BadInput: if the folder is of no such adapter, or of one for a model of other sizes.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise BadInput(f"{folder} has no {CONFIG}; give a folder that `lit-sparse export --to adapter` wrote.")
        check_hashes(folder)
        try:
            strategy, values = cls(**json.loads((folder / CONFIG).read_text())), load_file(folder / WEIGHTS)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise BadInput(f"{folder} cannot be read ({error}); export the run again.") from error
        strategy.restore(model, {"error": None}, Context())
        own = strategy._saved()
        if {name: value.shape for name, value in values.items()} != {name: p.shape for name, p in own.items()}:
            raise BadInput(
                f"{folder} has adapters for a model of other sizes than this {type(model).__name__} of "
                f"{len(decoder_layers(model))} layers; give the base that they were trained on, and for a classifier "
                "the number of its classes (num_labels)."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])
        return strategy
