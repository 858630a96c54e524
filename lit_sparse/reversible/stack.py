"""Run the layers of a model as a reversible stack of two streams, whichever model calls them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import Cache

from lit_sparse.anatomy import has_values
from lit_sparse.errors import BadInput
from lit_sparse.reversible.coupling import Coupling, fits, from_fixed, to_fixed

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What the model gives to a layer beside the hidden states: masks, positions, rotary tables."""

Function = Callable[[Tensor, Call], Tensor]
"""A layer, or a part of it: hidden states (B, S, H) from hidden states and a call."""

NO_DROPOUT = (
    "MEFT: exact is on, but the model's layers have dropout, and what they compute must repeat bit for bit; set their "
    "dropout to 0 in the model's config.json, or exact: false and checkpoint_every: 1."
)


@dataclass(frozen=True)
class Half:
    """One reversible step: `out = function(read, call)` and the coupling with the stream that is kept.

    Attributes:
        function: From hidden states (B, S, H), and what the model gives its layer, to hidden states.
        coupling: How the kept stream enters.
    """

    function: Function
    coupling: Coupling


@dataclass(frozen=True)
class ReversibleLayer:
    """The steps that stand for one layer of the model.

    Attributes:
        module: The layer, whose own forward the steps use.
        halves: The steps, two as a rule. The second reads what the first gave, and keeps what the first read.
        swap: Whether the streams change places after them.
        outputs: How many values the layer returns as a tuple; 0 if it returns the hidden states alone.
    """

    module: nn.Module
    halves: tuple[Half, ...]
    swap: bool
    outputs: int


@dataclass(frozen=True)
class Form:
    """The form of a reversible stack.

    Attributes:
        result: Stream that the layer above or the head takes for the model's: `read`, `kept`, or the `mean` of both.
        every: Layers in a segment; its last states are stored, and errors do not pass from one to the next. None is all
            layers in one.
        exact: Whether the streams are in fixed point, which loses nothing.
    """

    result: str
    every: int | None
    exact: bool


@dataclass
class Past:
    """What a step must know of its forward pass to run again: dropped bits, and the random state if it drew numbers."""

    dropped: Tensor | None = None
    random: Tensor | None = None


class Stack:
    """The reversible layers of a model. They take the place of its layers' `forward`; modules keep their names.

    The model still calls layer after layer, each with its own masks and positions. All but the last only note what they
    are given and return the hidden states as they came; the last runs the whole stack. So nothing is assumed of how
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
        self._calls: list[Call] = []
        self._hidden: Tensor | None = None
        for number, layer in enumerate(self.layers):
            layer.module.forward = partial(self._defer, number)  # a copy of the model has a copy of the stack

    def _defer(self, number: int, /, *args: Any, **kwargs: Any) -> Any:
        """Stand for the `forward` of a layer."""
        outputs = self.layers[number].outputs
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if number == 0:
            self._hidden, self._calls = hidden, []
        if hidden is not self._hidden or len(self._calls) != number:
            self._hidden, self._calls = None, []
            raise BadInput(
                f"the model does more between its layers than to call one after the other (before layer {number}), "
                "so that they cannot be run backwards; train it without MEFT, for example with lora.yaml and "
                "activation checkpointing."
            )
        self._calls.append((args, kwargs))
        if number == len(self.layers) - 1:
            calls, self._hidden, self._calls = self._calls, None, []
            hidden = self.run(hidden, calls)
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    def run(self, hidden: Tensor, calls: Sequence[Call]) -> Tensor:
        """Return the last hidden states (B, S, H), from the first ones and each layer's call."""
        trains = torch.is_grad_enabled()
        if trains:
            check_caches(calls)
            calls = [without_cache(call) for call in calls]
            check_constants(calls)
        dtype = hidden.dtype
        stream = hidden if dtype == torch.float64 else hidden.float()
        kept = read = stream
        every = self.form.every or len(self.layers)
        for first in range(0, len(self.layers), every):
            layers = self.layers[first : first + every]
            segment = Segment(layers, calls[first : first + every], self.form, dtype, Autocast.now(hidden.device))
            parameters = [p for layer in layers for p in layer.module.parameters() if p.requires_grad]
            if trains and (parameters or kept.requires_grad or read.requires_grad):
                before = kept.detach(), read.detach()
                kept, read = Reversible.apply(segment, kept, read, *parameters)  # pyright: ignore
                if self.errors is not None:
                    self.errors.append(segment.error(*before))
                segment.past, segment.ends = [], None  # the operation has saved them
            else:
                kept, read = segment.forward(kept, read)
        result = {"read": read, "kept": kept, "mean": (kept + read) / 2}[self.form.result]
        return result.to(dtype)


def without_cache(call: Call) -> Call:
    """Return a layer's arguments without a key-value cache, into which a recomputation would write a second time."""
    args, kwargs = call
    kept = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    off = {"use_cache": False} if "use_cache" in kwargs else {}
    return tuple(None if isinstance(value, Cache) else value for value in args), kept | off


def check_caches(calls: Sequence[Call]) -> None:
    """Refuse to go on from key-value caches with gradients on, and mark those that a forward pass will leave empty."""
    for cache in {value for args, kwargs in calls for value in (*args, *kwargs.values()) if isinstance(value, Cache)}:
        if hasattr(cache, "left_empty") or cache.get_seq_length():
            raise BadInput(
                "MEFT: the model goes on from cached keys and values with gradients on, where it neither reads nor "
                "writes them; call it within torch.no_grad(), or give it the whole sequence."
            )
        cache.left_empty = True  # pyright: ignore[reportAttributeAccessIssue]


def check_constants(calls: Sequence[Call]) -> None:
    """Refuse tensors with a gradient beside the hidden states: it would be lost."""
    for args, kwargs in calls:
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    raise BadInput(
                        "the model gives its layers something that trains beside the hidden states (embeddings of "
                        "positions or layers, for example), whose gradient MEFT would lose; freeze it, or train "
                        "without MEFT."
                    )


@dataclass(frozen=True)
class Autocast:
    """The automatic casts of a forward pass, which its recomputation must make too."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        """Return the casts that are made now on `device`."""
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def __call__(self) -> torch.autocast:
        # Without its cache of cast weights: their graph would be another pass's.
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


@dataclass
class Segment:
    """Layers that run forwards, and backwards from their last states alone.

    Attributes:
        layers, calls: The layers, and what the model gave each.
        form: The form of the stack.
        dtype: The dtype of hidden states within the layers; streams are in fp32 (fp64 for fp64).
        autocast: The casts of the forward pass.
        past: For each step, what it must know to run again.
        ends: The last states.
        fits: Whether all states were numbers that fixed point bears; its results are no numbers otherwise.
    """

    layers: Sequence[ReversibleLayer]
    calls: Sequence[Call]
    form: Form
    dtype: torch.dtype
    autocast: Autocast
    past: list[Past] = field(default_factory=list)
    ends: tuple[Tensor, Tensor] | None = None
    fits: Tensor | None = None

    def forward(self, kept: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return the streams (B, S, H) after the layers."""
        dtype = kept.dtype
        if self.form.exact:
            self.fits = fits(kept) & fits(read)
            kept, read = to_fixed(kept), to_fixed(read)
        for layer, call in zip(self.layers, self.calls, strict=True):
            for half in layer.halves:
                kept, read = read, self._step(half, call, read, kept)
            if layer.swap:
                kept, read = read, kept
        self.ends = kept, read
        if self.fits is None:
            return kept, read
        nan = torch.where(self.fits, 0.0, torch.nan)  # what does not fit would come out as any number
        return from_fixed(kept, dtype).add_(nan), from_fixed(read, dtype).add_(nan)

    def _step(self, half: Half, call: Call, read: Tensor, kept: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            f = self.value(half, call, read)
            return (
                self._couple_fixed(half, f, read, kept)[0] if self.form.exact else half.coupling.couple(f, read, kept)
            )
        before = random_state(read.device)
        f = self.value(half, call, self.variable(read)).detach()
        past = Past(random=before if changed(before, random_state(read.device)) else None)
        if self.form.exact and past.random is not None:
            raise BadInput(NO_DROPOUT)
        if self.form.exact:
            out, past.dropped = self._couple_fixed(half, f, read, kept)
        else:
            out = half.coupling.couple(f, read, kept)
        self.past.append(past)
        return out

    def _couple_fixed(self, half: Half, f: Tensor, read: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        out, dropped = half.coupling.couple_fixed(f, read, kept)
        assert self.fits is not None
        self.fits = self.fits & fits(f) & fits(out)
        return out, dropped

    def variable(self, read: Tensor) -> Tensor:
        """Return what a step's function reads, in the layers' dtype, as the start of a graph."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (from_fixed(read, wide) if self.form.exact else read.detach()).requires_grad_()

    def value(self, half: Half, call: Call, x: Tensor) -> Tensor:
        """Return what a step's function gives for the stream `x`."""
        if not x.is_floating_point():
            x = from_fixed(x, self.dtype)
        with self.autocast():
            return half.function(x.to(self.dtype), call)

    def back(
        self, kept: Tensor, read: Tensor, past: Sequence[Past]
    ) -> Iterator[tuple[Coupling, Tensor, Tensor, bool, tuple[Tensor, Tensor]]]:
        """Walk from the last states to the first; yield for each step its coupling, what it read, what its function
        gave, whether the streams changed places after it, and the streams before it.
        """
        steps = iter(reversed(past))
        for layer, call in zip(reversed(self.layers), reversed(self.calls), strict=True):
            if layer.swap:
                kept, read = read, kept
            for number, half in enumerate(reversed(layer.halves)):
                its, out, read = next(steps), read, kept
                with drawing_again(its.random, read.device):
                    x = self.variable(read)
                    f = self.value(half, call, x)
                known = f.detach()
                if its.dropped is not None:
                    kept = half.coupling.invert_fixed(known, read, out, its.dropped)
                else:
                    kept = half.coupling.invert(known, read, out)
                yield half.coupling, x, f, layer.swap and number == 0, (kept, read)

    def error(self, kept: Tensor, read: Tensor) -> float:
        """Return the relative error (norms) with which the first states are computed back from the last.

        It is no number if they do not fit into fixed point; of a planned training, whose tensors have no values, 0.
        """
        assert self.ends is not None
        first = deque(self.back(*self.ends, self.past), maxlen=1)[0][-1]  # one step's graph at a time
        if not has_values(kept):
            return 0.0
        if self.fits is not None and not self.fits:
            return math.nan
        pairs = zip(first, (kept, read), strict=True)
        if self.form.exact:
            pairs = [(from_fixed(a, torch.float64), from_fixed(to_fixed(b), torch.float64)) for a, b in pairs]
        return float(torch.stack([((a - b).norm() / b.norm()).detach() for a, b in pairs]).max())  # also a nan


class Reversible(torch.autograd.Function):
    """The segment as one operation, which stores its last states (and dropped bits) and nothing else.

    The trained tensors are its inputs, and their gradients its results: nothing is accumulated within the backward
    pass, so that hooks of DDP and of optimizers see each gradient once, and at the right moment.
    """

    @staticmethod
    def forward(ctx: Any, segment: Segment, kept: Tensor, read: Tensor, *parameters: nn.Parameter) -> Any:
        with torch.enable_grad():  # the same kernels as in the backward, whatever they choose by
            ends = segment.forward(kept.detach(), read.detach())
        assert segment.ends is not None
        dropped = [past.dropped for past in segment.past if past.dropped is not None]
        ctx.save_for_backward(*segment.ends, *dropped)
        ctx.random = [past.random for past in segment.past]
        ctx.segment, ctx.parameters = segment, parameters
        return ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        segment: Segment = ctx.segment
        kept, read, *dropped = ctx.saved_tensors
        past = [Past(d, r) for d, r in zip(dropped or [None] * len(ctx.random), ctx.random, strict=True)]
        d_kept, d_read = gradients
        found: dict[nn.Parameter, Tensor] = {}
        trained = [parameter for parameter in ctx.parameters if parameter.requires_grad]
        with torch.enable_grad():
            for coupling, x, f, swapped, _ in segment.back(kept, read, past):
                if swapped:
                    d_kept, d_read = d_read, d_kept
                d_out = d_read
                d_x, *own = torch.autograd.grad(f, (x, *trained), d_out.to(f.dtype), allow_unused=True)
                for parameter, gradient in zip(trained, own, strict=True):
                    if gradient is not None:
                        found[parameter] = found[parameter] + gradient if parameter in found else gradient
                carried = coupling.weight * d_out
                d_read = d_kept + d_x - carried if coupling.relative else d_kept + d_x
                d_kept = carried
        return (None, d_kept, d_read, *[found.get(parameter) for parameter in ctx.parameters])


# ---- random numbers


def changed(before: Tensor, after: Tensor) -> bool:
    """Return true if numbers were drawn between two states; not known, and false, of a planned training."""
    return has_values(before) and not torch.equal(before, after)


def random_state(device: torch.device) -> Tensor:
    """Return the state of torch's generator on `device`, on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def drawing_again(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw the numbers again that followed `state`, and leave torch's generator as it was; None does nothing."""
    if state is None:
        yield
        return
    now = random_state(device)
    set_state = torch.cuda.set_rng_state if device.type == "cuda" else lambda state, _: torch.set_rng_state(state)
    set_state(state, device)
    try:
        yield
    finally:
        set_state(now, device)
