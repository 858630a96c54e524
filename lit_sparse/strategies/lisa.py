"""LISA: train a few decoder layers at a time, and draw new ones every `interval` optimizer steps.

Layerwise Importance Sampled AdamW, arXiv 2403.17919. Only the active layers have gradients, fp32 values and optimizer
state, so memory is that of `active_layers` layers plus what always trains: embeddings, final norm and head.

Deliberate differences from public implementations: optimizer state is freed when a layer stops training (the paper's
runs restart the optimizer each interval; elsewhere state piles up until it is that of full fine-tuning: 54 MiB against
621 MiB after 20 switches of the demo model, `python -m benchmarks.lisa_costs state`); draws depend only on (seed,
number of the draw); layers may be drawn by importance. With `train_embeddings: false`, the backward pass ends at the
lowest active layer.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.calls import unreached
from lit_sparse.errors import BadInput
from lit_sparse.optim import drop_state, shard_like
from lit_sparse.strategies.base import Attaches, Claim, Context, Need, Probe, UpdateStrategy
from lit_sparse.strategies.layer_sampling import Costliest, Sampler, rms, sampler_of

State = dict[str, Any]
"""The optimizer state of one parameter."""


@dataclasses.dataclass
class LISA(UpdateStrategy):
    """Train a few decoder layers at a time, drawn anew every `interval` steps (LISA, arXiv 2403.17919).

    Args:
        active_layers: Number of decoder layers that train at a time (the paper's gamma).
        interval: Optimizer steps between draws (the paper's K).
        sampler: How layers are drawn: `uniform` (the paper's), `weight_norm` (larger weights more often), `grad_norm`
            (larger gradients more often), `outliers` (more outliers among weights times inputs more often: OWS, arXiv
            2405.18380), `cyclic` (one after the other: BAdam, arXiv 2404.02827), or in Python a
            `layer_sampling.Sampler`.
        train_embeddings: Always train the parameters outside the decoder layers: embeddings, final norm and head. With
            a large vocabulary they take most of the memory. If false, they stay frozen, and the backward pass ends at
            the lowest active layer.
        state: Optimizer state of a layer that stops training: `reset` drops it (the paper's), `offload` moves it to
            host memory until the layer trains again, `keep` leaves it on the device, so that memory grows.
        warmup: Optimizer steps of linear learning-rate warm-up after each draw; 0 is none.
        seed: Seed of the draws.
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
    attaches_to: ClassVar[Attaches] = "either"

    def __post_init__(self) -> None:
        for name, least in (("active_layers", 1), ("interval", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"LISA: {name} is {getattr(self, name)}; it must be at least {least}.")
        self._sampler = sampler_of(self.sampler) if isinstance(self.sampler, str) else copy.deepcopy(self.sampler)
        self._layers: list[nn.Module] = []
        self.draws: list[list[int]] = []  # the last one is drawn ahead, so that its state can be prefetched
        self._norms: dict[int, list[Tensor]] = {}  # by layer: a norm per step since the last draw
        self._parked: dict[int, list[State]] = {}  # by layer: optimizer state in the order of its parameters
        self._copy_stream: torch.cuda.Stream | None = None

    @property
    def period(self) -> int | None:
        return self.interval

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"gradients"} if self._sampler.sees_gradients else ())

    def costliest(self, sharded: bool) -> Sequence[UpdateStrategy]:
        """Return the method with draws of which one takes the most memory.

        The last layers have their gradients while most is saved. Where the embeddings are frozen, the lowest active
        layer decides how far down the backward pass goes, and with it what is saved. If the model is sharded, too,
        either may take more: the whole gradients of a layer wait to be reduced while those of the layer below are
        computed.
        """
        lowest = [False] if self.train_embeddings else [True, False] if sharded else [True]
        return [dataclasses.replace(self, sampler=Costliest(self._sampler, first)) for first in lowest]

    @property
    def active(self) -> list[int]:
        """The indices of the layers that train now."""
        return self.draws[-2]  # the last draw is that of the next interval

    # ---- preparing

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._find(model)
        if missed := unreached(model, decoder_layers(model), context.compute):
            raise BadInput(
                f"LISA: decoder layer {missed[0]} of {type(model).__name__} takes no part in a forward pass over "
                "text, so drawing it would train nothing; use another method, such as lora.yaml."
            )
        model.requires_grad_(False)  # the probe needs gradients of the decoder layers only
        if self._sampler.probe_batches:
            self._sampler.observe(self._sampler.measure(self._layers, probe(self._sampler.probe_batches)))
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
        self._norms = {layer: list(norms) for layer, norms in state["seen"].items()}
        self._parked = {layer: [dict(one) for one in states] for layer, states in state["parked"].items()}
        model.requires_grad_(self.train_embeddings)
        self._activate()

    def _find(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        if self.active_layers > len(self._layers):
            raise BadInput(
                f"LISA: {self.active_layers} active layers were asked for, but the model has {len(self._layers)}; set "
                f"active_layers to at most {len(self._layers)}."
            )

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
                self._norms.setdefault(number, []).append(rms(grads))
        if step % self.interval == 0:
            self._prefetch()

    def lr_factor(self, step: int) -> float:
        done = (step - 1) % self.interval  # steps since the draw
        return (done + 1) / (self.warmup + 1) if done < self.warmup else 1.0

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        if step % self.interval:
            return False
        self._sampler.observe({layer: _mean(norms) for layer, norms in self._norms.items()})
        self._norms.clear()
        self._park(optimizer)  # while `active` is still the old draw
        self.draws.append(self._draw(len(self.draws)))
        self._activate()
        self._unpark(optimizer)
        return True

    # ---- optimizer state of inactive layers

    def _park(self, optimizer: Optimizer) -> None:
        """Take the state of the layers that trained out of the optimizer.

        `reset` drops it even for layers that are drawn again: the paper's runs restart the optimizer each interval.
        """
        for number in self.active:
            parameters = list(self._layers[number].parameters())
            if self.state != "reset":
                self._parked[number] = [self._move(optimizer.state.get(p, {}), p, away=True) for p in parameters]
            drop_state(optimizer, parameters)

    def _unpark(self, optimizer: Optimizer) -> None:
        """Give the optimizer the parked state of the layers that train now."""
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._copy_stream.device).wait_stream(self._copy_stream)
        for number in self.active:
            for parameter, state in zip(self._layers[number].parameters(), self._parked.pop(number, []), strict=False):
                if state:
                    optimizer.state[parameter] = self._move(state, parameter, away=False)

    def _prefetch(self) -> None:
        """Start copying the next interval's state to the device, during the last step of this interval."""
        device = next(self._layers[0].parameters()).device
        if self.state != "offload" or device.type != "cuda":
            return
        self._copy_stream = self._copy_stream or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copy_stream):
            for number in set(self.draws[-1]) & self._parked.keys():
                states = zip(self._layers[number].parameters(), self._parked[number], strict=True)
                self._parked[number] = [self._move(state, parameter, away=False) for parameter, state in states]

    def _move(self, state: State, parameter: Tensor, away: bool) -> State:
        """Return the state in host memory if it goes `away` and is offloaded, else on the parameter's device."""
        if away and self.state != "offload":
            return state
        device = torch.device("cpu") if away else parameter.device
        return {name: _to_device(shard_like(value, parameter), device) for name, value in state.items()}

    # ---- what is kept

    def detach(self, model: nn.Module) -> None:
        self._layers = []
        self._parked.clear()
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self.draws,
            "sampler": self._sampler.state_dict(),
            "seen": self._norms,
            "parked": self._parked,
        }

    def describe(self) -> dict[str, Any]:
        """Return the layers of each interval that has begun, by its first step (from 1)."""
        return {"draws": {str(n * self.interval + 1): layers for n, layers in enumerate(self.draws[:-1])}}


def _to_device(value: Any, device: torch.device) -> Any:
    """Copy a tensor to `device`; return scalars and other values unchanged.

    In host memory it is pinned, so that the copy back to the GPU can be asynchronous.
    """
    if not torch.is_tensor(value) or value.ndim == 0 or value.device == device:
        return value
    if device.type == "cpu" and not isinstance(value, DTensor):  # torch cannot pin the memory of a DTensor
        return torch.empty_like(value, device=device, pin_memory=True).copy_(value)
    moved = value.to(device, non_blocking=device.type == "cuda")
    if device.type == "cuda":  # allocated on the copy stream, used on the default one: must not be reused too early
        own = moved.to_local() if isinstance(moved, DTensor) else moved
        own.record_stream(torch.cuda.default_stream(device))
    return moved


def _mean(norms: Sequence[Tensor]) -> float:
    """Return the mean of scalars; after resuming, those from the checkpoint may be on another device than the rest."""
    return float(torch.stack([norm.to(norms[-1].device) for norm in norms]).mean())
