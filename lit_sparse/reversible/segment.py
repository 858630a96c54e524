"""Run some reversible layers forwards, and backwards from their last states alone, as one operation of autograd."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from lit_sparse.anatomy import has_values
from lit_sparse.errors import BadInput
from lit_sparse.reversible.coupling import Coupling, fits, from_fixed, to_fixed

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments that the model gives to a layer beside the hidden states: masks, positions, rotary tables."""

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

    result: Literal["read", "kept", "mean"]
    every: int | None
    exact: bool

    def output(self, kept: Tensor, read: Tensor) -> Tensor:
        """Return the stream that is taken for the model's hidden states."""
        if self.result == "mean":
            return (kept + read) / 2
        return read if self.result == "read" else kept


@dataclass
class Past:
    """State that a step needs of its forward pass to run again: dropped bits, and the random state if it drew any."""

    dropped: Tensor | None = None
    random: Tensor | None = None


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `module` that train."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Have the whole weights of a layer that FSDP2 has sharded, as within its own forward pass."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


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
class Undone:
    """A step of which the backward pass has computed back what was before it.

    Attributes:
        layer: The layer that it belongs to.
        coupling: How the kept stream entered.
        x, f: What its function read, the start of a graph, and what it gave.
        swapped: Whether the streams changed places after it.
        before: The streams before it, `kept` and `read`.
    """

    layer: nn.Module
    coupling: Coupling
    x: Tensor
    f: Tensor
    swapped: bool
    before: tuple[Tensor, Tensor]


@dataclass
class Segment:
    """Layers that run forwards, and backwards from their last states alone.

    Attributes:
        form: The form of the stack.
        dtype: The dtype of hidden states within the layers; streams are in fp32 (fp64 for fp64).
        autocast: The casts of the forward pass.
        layers, calls: The layers that have run, and what the model gave each.
        past: For each step, what it must know to run again.
        ends: The last states.
        fits: Whether all states were numbers that fixed point bears; its results are no numbers otherwise.
    """

    form: Form
    dtype: torch.dtype
    autocast: Autocast
    layers: list[ReversibleLayer] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    past: list[Past] = field(default_factory=list)
    ends: tuple[Tensor, Tensor] | None = None
    fits: Tensor | None = None

    @property
    def sharded(self) -> bool:
        """True if FSDP2 has sharded the layers."""
        return any(isinstance(layer.module, FSDPModule) for layer in self.layers)

    def begin(self, kept: Tensor, read: Tensor) -> None:
        """Start from the streams (B, S, H) before the first layer."""
        kept, read = kept.detach(), read.detach()
        if self.form.exact:
            self.fits = fits(kept) & fits(read)
            kept, read = to_fixed(kept), to_fixed(read)
        self.ends = kept, read

    def run(self, layer: ReversibleLayer, call: Call) -> None:
        """Run the next layer."""
        assert self.ends is not None
        kept, read = self.ends
        for half in layer.halves:
            kept, read = read, self._step(half, call, read, kept)
        if layer.swap:
            kept, read = read, kept
        self.ends = kept, read
        self.layers.append(layer)
        self.calls.append(call)

    def results(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the streams after the layers in floating point."""
        assert self.ends is not None
        if self.fits is None:
            return self.ends
        nan = torch.where(self.fits, 0.0, torch.nan)  # what does not fit would come out as any number
        kept, read = self.ends
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

    def back(self, kept: Tensor, read: Tensor, past: Sequence[Past]) -> Iterator[Undone]:
        """Walk from the last states to the first, a step at a time, each within the whole weights of its layer."""
        steps = iter(reversed(past))
        for layer, call in zip(reversed(self.layers), reversed(self.calls), strict=True):
            if layer.swap:
                kept, read = read, kept
            with gathered(layer.module):
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
                    yield Undone(layer.module, half.coupling, x, f, layer.swap and number == 0, (kept, read))

    def error(self, kept: Tensor, read: Tensor) -> float:
        """Return the relative error (norms) with which the first states are computed back from the last.

        It is no number if they do not fit into fixed point; of a planned training, whose tensors have no values, 0.
        """
        assert self.ends is not None
        first = deque((step.before for step in self.back(*self.ends, self.past)), maxlen=1)[0]
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
    pass, so that hooks of DDP and of optimizers see each gradient once, and at the right moment. Weights that FSDP2 has
    sharded cannot be inputs, for in the backward pass a layer has others, gathered anew. Those get their gradients
    here, where FSDP2 finds them: at the end of the backward pass it reduces what gathered weights have.
    """

    @staticmethod
    def forward(
        ctx: Any, segment: Segment, ends: tuple[Tensor, Tensor], kept: Tensor, read: Tensor, *parameters: Tensor
    ) -> Any:
        """Return `ends`, the streams that the segment has computed from `kept` and `read` already."""
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
        kept, read, *dropped = (saved.detach() for saved in ctx.saved_tensors)
        past = [Past(d, r) for d, r in zip(dropped or [None] * len(ctx.random), ctx.random, strict=True)]
        d_kept, d_read = gradients
        found: dict[Tensor, Tensor] = {}
        with torch.enable_grad():
            for step in segment.back(kept, read, past):
                if step.swapped:
                    d_kept, d_read = d_read, d_kept
                d_out, own = d_read, trained(step.layer)
                d_x, *rest = torch.autograd.grad(step.f, (step.x, *own), d_out.to(step.f.dtype), allow_unused=True)
                for parameter, gradient in zip(own, rest, strict=True):
                    if gradient is not None:
                        found[parameter] = found[parameter] + gradient if parameter in found else gradient
                carried = step.coupling.weight * d_out
                d_read = d_kept + d_x - carried if step.coupling.relative else d_kept + d_x
                d_kept = carried
        if segment.sharded:
            for parameter, gradient in found.items():
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return (None, None, d_kept, d_read, *[found.get(parameter) for parameter in ctx.parameters])


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
