"""LISA: train a few decoder layers at a time, and draw others every so many optimizer steps.

Layerwise Importance Sampled AdamW, arXiv 2403.17919. Only the layers that train have gradients, fp32 values and
optimizer state, so that memory is that of `active_layers` layers and of what always trains: embeddings, final norm and
head.

Differences from public implementations, each on purpose: a layer that stops training gives its optimizer state back
(the paper's runs started the optimizer anew each interval; elsewhere states pile up until they are full fine-tuning's),
draws depend on (seed, number of the draw) alone, and layers may be drawn by importance. With `train_embeddings` off,
nothing below the lowest active layer takes part in the backward.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import drop_state, shard_like
from lit_sparse.ranks import averaged
from lit_sparse.strategies.base import Claim, Context, Need, Probe, UpdateStrategy
from lit_sparse.strategies.layer_sampling import Sampler, rms, sampler_of

State = dict[str, Any]
"""What an optimizer keeps of one parameter."""


@dataclasses.dataclass
class LISA(UpdateStrategy):
    """Train a few decoder layers at a time, drawn anew every `interval` steps (LISA, arXiv 2403.17919).

    Args:
        active_layers: Decoder layers that train at a time (the paper's gamma).
        interval: Optimizer steps between draws (the paper's K).
        sampler: Which layers are drawn: `uniform` (as the paper has it), `weight_norm`, `grad_norm` (larger gradients
            more often), `cyclic` (each in its turn), or in Python a `layer_sampling.Sampler`.
        train_embeddings: Whether all that lies outside the decoder layers trains all the time: embeddings, final norm
            and head. With a large vocabulary that is most of the memory; off, the backward also ends at the lowest
            active layer.
        state: What becomes of a layer's optimizer state when it stops training: `reset` (dropped, the paper's),
            `offload` (kept in host memory until it trains again) or `keep` (kept where it is: memory grows).
        warmup: Optimizer steps over which the learning rate rises after each draw; 0 is none.
        seed: Of the draws.
    """

    active_layers: int = 2
    interval: int = 20
    sampler: str | Sampler = "uniform"
    train_embeddings: bool = True
    state: Literal["reset", "offload", "keep"] = "reset"
    warmup: int = 0
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"trainable"})
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("active_layers", 1), ("interval", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"LISA: {name} is {getattr(self, name)}; it must be at least {least}.")
        self._sampler = sampler_of(self.sampler) if isinstance(self.sampler, str) else copy.deepcopy(self.sampler)
        self._layers: list[nn.Module] = []
        self.draws: list[list[int]] = []  # the last is the next interval's: drawn ahead, so that state can be fetched
        self._seen: dict[int, list[Tensor]] = {}
        self._parked: dict[int, list[State]] = {}  # by layer, in the order of its parameters
        self._copies: torch.cuda.Stream | None = None

    @property
    def period(self) -> int | None:
        return self.interval

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"gradients"} if self._sampler.sees_gradients else ())

    @property
    def active(self) -> list[int]:
        """The layers that train."""
        return self.draws[-2]

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._find(model)
        model.requires_grad_(False)
        if self._sampler.probe_batches:
            self._sampler.observe(self._probed(probe(self._sampler.probe_batches)))
        self.draws = [self._draw(0), self._draw(1)]
        model.requires_grad_(self.train_embeddings)
        self._activate()

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._find(model)
        self.draws = [list(draw) for draw in state["draws"]]
        if wrong := sorted({layer for draw in self.draws for layer in draw} - set(range(len(self._layers)))):
            raise BadInput(
                f"LISA: the checkpoint trains decoder layer {wrong[0]}, but the model has {len(self._layers)}; give "
                "the configuration of the run that wrote it, or an undamaged checkpoint."
            )
        self._sampler.load_state_dict(state["sampler"])
        self._seen = {layer: list(norms) for layer, norms in state["seen"].items()}
        self._parked = {layer: [dict(one) for one in states] for layer, states in state["parked"].items()}
        model.requires_grad_(self.train_embeddings)
        self._activate()

    def _find(self, model: nn.Module) -> None:
        self._layers = list(decoder_layers(model))
        if self.active_layers > len(self._layers):
            raise BadInput(
                f"LISA: {self.active_layers} active layers were asked for, but the model has {len(self._layers)}; give "
                "at most so many."
            )

    def _probed(self, losses: Iterator[Tensor]) -> dict[int, float]:
        """Root mean square of each layer's gradient over some batches; gradients are freed once they are measured."""
        squares: dict[int, list[Tensor]] = {number: [] for number in range(len(self._layers))}
        steps = 0
        with _watched(self._layers, squares):
            for loss in losses:
                loss.backward()
                steps += 1
        sums = torch.stack([torch.stack(squares[number]).sum() for number in squares]) / steps
        averaged(sums)  # the same on every rank, or they would draw different layers
        counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in self._layers]
        return {n: (total / count) ** 0.5 for n, (total, count) in enumerate(zip(sums.tolist(), counts, strict=True))}

    # ---- switching

    def _draw(self, number: int) -> list[int]:
        return self._sampler.draw(self._layers, self.active_layers, self.seed, number)

    def _activate(self) -> None:
        for number, layer in enumerate(self._layers):
            layer.requires_grad_(number in self.active)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        if self._sampler.sees_gradients:
            for number in self.active:
                grads = (p.grad for p in self._layers[number].parameters() if p.grad is not None)
                self._seen.setdefault(number, []).append(rms(grads))
        if step % self.interval == 0:
            self._fetch()

    def lr_factor(self, step: int) -> float:
        place = (step - 1) % self.interval
        return (place + 1) / (self.warmup + 1) if place < self.warmup else 1.0

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        if step % self.interval:
            return False
        self._sampler.observe({layer: _mean(norms) for layer, norms in self._seen.items()})
        self._seen.clear()
        self._park(optimizer)
        self.draws.append(self._draw(len(self.draws)))
        self._activate()
        self._unpark(optimizer)
        return True

    # ---- the optimizer's state of layers that do not train

    def _park(self, optimizer: Optimizer) -> None:
        """Take the state of all layers that trained; `reset` forgets it, that of layers drawn again too."""
        for number in self.active:
            parameters = list(self._layers[number].parameters())
            if self.state != "reset":
                self._parked[number] = [self._moved(optimizer.state.get(p, {}), p, away=True) for p in parameters]
            drop_state(optimizer, parameters)

    def _unpark(self, optimizer: Optimizer) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self._copies.device).wait_stream(self._copies)
        for number in self.active:
            for parameter, state in zip(self._layers[number].parameters(), self._parked.pop(number, []), strict=False):
                if state:
                    optimizer.state[parameter] = self._moved(state, parameter, away=False)

    def _fetch(self) -> None:
        """Begin to bring the state of the next interval's layers back, while this interval's last step is computed."""
        device = next(self._layers[0].parameters()).device
        if self.state != "offload" or device.type != "cuda":
            return
        self._copies = self._copies or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copies):
            for number in set(self.draws[-1]) & self._parked.keys():
                states = zip(self._layers[number].parameters(), self._parked[number], strict=True)
                self._parked[number] = [self._moved(state, parameter, away=False) for parameter, state in states]

    def _moved(self, state: State, parameter: Tensor, away: bool) -> State:
        """The state in host memory, if it is `away` and offloaded, or else where the parameter is."""
        if away and self.state != "offload":
            return state
        device = torch.device("cpu") if away else parameter.device
        return {name: _copied(shard_like(value, parameter), device) for name, value in state.items()}

    # ---- what is kept

    def detach(self, model: nn.Module) -> None:
        self._layers = []
        self._parked.clear()
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self.draws,
            "sampler": self._sampler.state_dict(),
            "seen": self._seen,
            "parked": self._parked,
        }

    def describe(self) -> dict[str, Any]:
        """The layers of each interval that has begun, by its first step (from 1)."""
        return {"draws": {str(n * self.interval + 1): layers for n, layers in enumerate(self.draws[:-1])}}


def _copied(value: Any, device: torch.device) -> Any:
    """A tensor on another device, by way of pinned memory, so that the way back need not wait; anything else itself."""
    if not torch.is_tensor(value) or value.ndim == 0 or value.device == device:
        return value
    if device.type == "cpu" and not isinstance(value, DTensor):  # of which torch makes none in pinned memory
        return torch.empty_like(value, device=device, pin_memory=True).copy_(value)
    moved = value.to(device, non_blocking=device.type == "cuda")
    if device.type == "cuda":  # made on the stream of copies, used on the ordinary one
        own = moved.to_local() if isinstance(moved, DTensor) else moved
        own.record_stream(torch.cuda.default_stream(device))
    return moved


@contextmanager
def _watched(layers: Sequence[nn.Module], squares: dict[int, list[Tensor]]) -> Iterator[None]:
    """All layers with gradients, each of which is squared, summed and freed as soon as it is there."""

    def note(number: int) -> Any:
        def watch(parameter: Tensor) -> None:
            assert parameter.grad is not None
            squares[number].append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square())
            parameter.grad = None

        return watch

    handles = []
    for number, layer in enumerate(layers):
        layer.requires_grad_(True)
        handles += [p.register_post_accumulate_grad_hook(note(number)) for p in layer.parameters()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(norms: Sequence[Tensor]) -> float:
    """The mean of scalars, of which those before a resumed run's checkpoint may lie elsewhere than its own."""
    return float(torch.stack([norm.to(norms[-1].device) for norm in norms]).mean())
