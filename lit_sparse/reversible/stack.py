"""Run the layers of a model as a reversible stack of two streams, whichever model calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from lit_sparse.errors import BadInput
from lit_sparse.reversible.segment import Autocast, Call, Form, Reversible, ReversibleLayer, Segment, trained


class Stack:
    """The reversible layers of a model. They take the place of its layers' `forward`; modules keep their names.

    The model still calls layer after layer, each with its own masks and positions. Each runs its steps on the two
    streams, which are kept here; all but the last return the hidden states as they came. So nothing is assumed of how
    a model calls its layers, but that it leaves the hidden states alone in between, which is checked at each call.

    Args:
        layers: The layers in the order of calls.
        form: The form of the stack.

    Attributes:
        errors: Where it is a list, each forward pass appends the relative error of each segment's reconstruction.
    """

    def __init__(self, layers: Sequence[ReversibleLayer], form: Form) -> None:
        self.layers, self.form = list(layers), form
        self.errors: list[float] | None = None
        self._pass: Pass | None = None
        for number, layer in enumerate(self.layers):
            layer.module.forward = partial(self._run, number)  # a copy of the model has a copy of the stack

    def _run(self, number: int, /, *args: Any, **kwargs: Any) -> Any:
        """Stand for the `forward` of a layer."""
        outputs = self.layers[number].outputs
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            self._pass = Pass.begin(hidden)
        now, self._pass = self._pass, None  # of a pass that fails, nothing is kept
        if now is None or now.done != number or not shares_memory(hidden, now.hidden):
            raise BadInput(
                f"the model does more between its layers than to call one after the other (before layer {number}), "
                "so that they cannot be run backwards; train it without MEFT, for example with lora.yaml and "
                "activation checkpointing."
            )
        self._step(now, (args, kwargs))
        if now.done == len(self.layers):
            hidden = self.form.output(now.kept, now.read).to(now.hidden.dtype)
        else:
            self._pass = now
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    def _step(self, now: Pass, call: Call) -> None:
        """Run the next layer of a pass."""
        if torch.is_grad_enabled():
            check_caches(call, now.caches)
            call = without_cache(call)
            check_constants(call)
        every = self.form.every or len(self.layers)
        segment = now.segment
        if segment is None:
            segment = now.segment = Segment(self.form, now.hidden.dtype, Autocast.now(now.hidden.device))
            segment.begin(now.kept, now.read)
        segment.run(self.layers[now.done], call)
        now.done += 1
        if now.done % every == 0 or now.done == len(self.layers):
            now.kept, now.read = self._end(segment, now.kept, now.read)
            now.segment = None

    def _end(self, segment: Segment, kept: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams after a segment that has run, given those before it."""
        ends = segment.results(kept.dtype)
        if not torch.is_grad_enabled():
            return ends
        parameters = [p for layer in segment.layers for p in trained(layer.module)]
        if not (parameters or kept.requires_grad or read.requires_grad):
            return ends
        if segment.sharded:
            parameters = [torch.zeros((), device=kept.device, requires_grad=True)]  # so that there is a backward pass
        before = kept.detach(), read.detach()
        kept, read = Reversible.apply(segment, ends, kept, read, *parameters)  # pyright: ignore
        if self.errors is not None:
            self.errors.append(segment.error(*before))
        segment.past, segment.ends = [], None  # the operation has saved them
        return kept, read


@dataclass
class Pass:
    """A forward pass that is under way.

    Attributes:
        hidden: The hidden states (B, S, H) that each layer must be given.
        kept, read: The streams before the segment that runs, in fp32 (fp64 for fp64).
        done: Number of layers that have run.
        segment: The segment that runs; None between two.
        caches: The key-value caches that it was given.
    """

    hidden: Tensor
    kept: Tensor
    read: Tensor
    done: int = 0
    segment: Segment | None = None
    caches: set[Cache] = field(default_factory=set)

    @classmethod
    def begin(cls, hidden: Tensor) -> Pass:
        """Return a pass before its first layer: both streams are the embeddings."""
        stream = hidden if hidden.dtype == torch.float64 else hidden.float()
        return cls(hidden, stream, stream)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Return true for a tensor itself, and for the view of all of it that FSDP2's hooks make of it."""
    if one is other:
        return True
    return one.shape == other.shape and one.untyped_storage()._cdata == other.untyped_storage()._cdata


def without_cache(call: Call) -> Call:
    """Return a layer's arguments without a key-value cache, into which a recomputation would write a second time."""
    args, kwargs = call
    kept = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    off = {"use_cache": False} if "use_cache" in kwargs else {}
    return tuple(None if isinstance(value, Cache) else value for value in args), kept | off


def check_caches(call: Call, known: set[Cache]) -> None:
    """Refuse to go on from key-value caches with gradients on, and mark those that a forward pass will leave empty.

    Args:
        known: The caches that earlier layers of the pass were given; those of this layer are added.
    """
    args, kwargs = call
    for cache in {value for value in (*args, *kwargs.values()) if isinstance(value, Cache)} - known:
        if hasattr(cache, "left_empty") or cache.get_seq_length():
            raise BadInput(
                "MEFT: the model goes on from cached keys and values with gradients on, where it neither reads nor "
                "writes them; call it within torch.no_grad(), or give it the whole sequence."
            )
        cache.left_empty = True  # pyright: ignore[reportAttributeAccessIssue]
        known.add(cache)


def check_constants(call: Call) -> None:
    """Refuse tensors with a gradient beside the hidden states: it would be lost."""
    args, kwargs = call
    for value in (*args, *kwargs.values()):
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise BadInput(
                    "the model gives its layers something that trains beside the hidden states (embeddings of "
                    "positions or layers, for example), whose gradient MEFT would lose; freeze it, or train "
                    "without MEFT."
                )
