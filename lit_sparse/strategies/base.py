"""What every update strategy has in common, and which of them go together."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput

Claim = Literal["modules", "trainable", "optimizer", "backward", "importance"]
"""What no second strategy can also take: the module tree, the trainable set, the optimizer, the backward, and the
record of how important each weight is."""

Probe = Callable[[int], Iterator[Tensor]]
"""`probe(steps)` yields the losses (scalars with a graph) of the first `steps` training batches, without an update."""


class UpdateStrategy(ABC):
    """One way to update a model. Subclasses are dataclasses: their fields are the keys in YAML.

    Every hook has an honest default that does nothing; a subclass is final (nobody derives from a concrete strategy)
    and imports no Lightning, so that it also serves a bare loop or another trainer.

    Attributes:
        claims: What no second strategy of the same run may also take.
        backward: How gradients reach the weights: by `autograd`, `fused` into the backward pass, or `none` at all.
        leaves: What `detach` gives back: the `plain` model (bitwise the base, where nothing was trained), a model
            whose `adapter` was merged, or one with its `own_forward`.
        keeps_base: Whether the base's own weights stay as they are until `detach`; only such a base can be quantised.
            May be a property, where settings decide.
        rewrites_base: Whether `attach` itself gives the base's own weights other values; then `detach` gives them back
            to rounding only.
        needs_base: Whether the method needs the weights that the base came with, beside the trained ones.
        attaches_first: Whether `attach` and `restore` have to see the model's modules before others change them.
        shards: Whether the method works where parameters are divided among processes, as DTensors, after `attach` or
            `restore` has seen the whole model (FSDP2). May be a property, where settings decide.
        gradients: What `before_step` does with the gradients of the weights that train from the start: it `ignores`
            them, `reads` them (as the task's alone), or `adds` to them. In that order the strategies of a run are
            called.
        penalizes_activations: Whether `penalty` is made of what the layers compute inside, which autograd must see.
    """

    claims: ClassVar[frozenset[Claim]] = frozenset()
    backward: ClassVar[Literal["autograd", "fused", "none"]] = "autograd"
    leaves: ClassVar[Literal["plain", "adapter", "own_forward"]] = "plain"
    keeps_base: ClassVar[bool] = False
    rewrites_base: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    attaches_first: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    gradients: ClassVar[Literal["ignores", "reads", "adds"]] = "ignores"
    penalizes_activations: ClassVar[bool] = False

    @property
    def period(self) -> int | None:
        """Optimizer steps from one change of the trainable set to the next; None if it never changes.

        Memory and speed are measured after the first of them.
        """
        return None

    @property
    def moves_all(self) -> bool:
        """Whether `attach` moves weights that are frozen afterwards: checkpoints hold all weights then."""
        return False

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the record of a run: numbers, strings, and lists or dicts of them."""
        return {}

    def attach(self, model: nn.Module, probe: Probe) -> None:
        """Prepare `model` in place, once, before the optimizer exists. `probe` gives losses on training batches."""

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Prepare `model` as `attach` did, from what `state_dict` gave; trained values are loaded afterwards."""
        self.attach(model, no_probe)

    def divided(self) -> None:
        """Called when FSDP2 has made DTensors of the model's parameters: what is kept of them may be divided too."""

    def optimizer(self, named_params: Sequence[tuple[str, nn.Parameter]], lr: float) -> Optimizer | None:
        """The optimizer that this method insists on; None leaves the configured one."""
        return None

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        """A scalar to add to this batch's loss, or None."""
        return None

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Called once an optimizer step, with the accumulated, unclipped gradients in place."""

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Called after the optimizer's `step`-th step (from 1). True: the set of trainable parameters changed."""
        return False

    def logged(self) -> Mapping[str, Tensor]:
        """Numbers for the log, by name, asked for after `before_step`."""
        return {}

    def detach(self, model: nn.Module) -> None:
        """Merge what was trained, put the model's own modules back, take every hook off."""

    def state_dict(self) -> dict[str, Any]:
        """What `restore` needs: tensors, numbers, strings, and lists or dicts of them."""
        return {}

    def held(self) -> Any:
        """The tensors that the method keeps beside the model's parameters, nested in lists or dicts, for ledgers."""
        return self.state_dict()


def no_probe(steps: int) -> Iterator[Tensor]:
    """The probe of a place that has no training data.

    Raises:
        BadInput: always, when asked for a loss.
    """
    raise BadInput(
        f"{steps} training batches were asked for to look at, but none are at hand here; give the run training data."
    )


def compose(strategies: Sequence[UpdateStrategy]) -> list[UpdateStrategy]:
    """`strategies` as a list, if they go together: those that attach first, then by what they do with gradients.

    Raises:
        BadInput: if two of them claim the same part of the training, one needs the base that another rewrites, or one
            needs gradients that another does not leave, of the weights, of the task alone, or of what the layers
            compute.
    """
    taken: dict[str, UpdateStrategy] = {}
    for strategy in strategies:
        for claim in sorted(strategy.claims):
            if claim in taken:
                first, second = type(taken[claim]).__name__, type(strategy).__name__
                raise BadInput(
                    f"{first} and {second} cannot be combined: both take over the model's {claim}; keep one of the two."
                )
            taken[claim] = strategy
    _check_base(strategies)
    _check_gradients(strategies)
    _check_recording(strategies)
    _check_activations(strategies)
    order = ("ignores", "reads", "adds")
    return sorted(strategies, key=lambda strategy: (not strategy.attaches_first, order.index(strategy.gradients)))


def _check_activations(strategies: Sequence[UpdateStrategy]) -> None:
    needy = [type(strategy).__name__ for strategy in strategies if strategy.penalizes_activations]
    hiding = [
        type(strategy).__name__
        for strategy in strategies
        if strategy.backward == "none" or strategy.leaves == "own_forward"
    ]
    if needy and hiding:
        raise BadInput(
            f"{needy[0]} and {hiding[0]} cannot be combined: the penalty of {needy[0]} needs gradients through what "
            f"the layers compute inside, which {hiding[0]} leaves none of; keep one of the two."
        )


def _check_base(strategies: Sequence[UpdateStrategy]) -> None:
    needy = [type(strategy).__name__ for strategy in strategies if strategy.needs_base]
    rewriting = [type(strategy).__name__ for strategy in strategies if strategy.rewrites_base]
    if needy and rewriting:
        raise BadInput(
            f"{needy[0]} and {rewriting[0]} cannot be combined: {needy[0]} needs the base's weights as they came, and "
            f"{rewriting[0]} rewrites them as it starts; give {rewriting[0]} a start that leaves the base alone (for "
            "PEFT, init_lora_weights: true, and bias: none with start_from; for SMT, warmup: score_only), or leave "
            f"{needy[0]} out."
        )


def _check_gradients(strategies: Sequence[UpdateStrategy]) -> None:
    needy = [type(strategy).__name__ for strategy in strategies if strategy.gradients != "ignores"]
    for strategy in strategies:
        name = type(strategy).__name__
        if needy and strategy.backward != "autograd":
            raise BadInput(
                f"{needy[0]} and {name} cannot be combined: {needy[0]} needs gradients that live until the step, and "
                f"{name} has none (its backward is {strategy.backward}); leave one of the two out."
            )
        if needy and strategy.period is not None:
            raise BadInput(
                f"{needy[0]} and {name} cannot be combined: {needy[0]} follows the weights that train from the start, "
                f"and {name} trains others every {strategy.period} steps; leave one of the two out."
            )


def _check_recording(strategies: Sequence[UpdateStrategy]) -> None:
    kinds = [type(strategy) for strategy in strategies]
    reading = [
        kind.__name__
        for kind in kinds
        if kind.gradients == "reads" and kind.before_step is not UpdateStrategy.before_step  # else it reads a probe's
    ]
    adding = [kind.__name__ for kind in kinds if kind.penalty is not UpdateStrategy.penalty]
    if reading and adding:
        name = adding[0]
        raise BadInput(
            f"{reading[0]} and {name} cannot be combined: {reading[0]} reads the gradient of the task's loss, to which "
            f"{name} adds its own; record in a run without {name}."
        )


def check_keeps_base(what: str, updates: Sequence[UpdateStrategy]) -> None:
    """Refuse to train a quantised base itself.

    Raises:
        BadInput: naming the strategy that would, after `what` was asked for.
    """
    changing = [type(update).__name__ for update in updates if not update.keeps_base]
    if changing or not any("trainable" in update.claims for update in updates):
        who = " and ".join(changing) or "full fine-tuning"
        raise BadInput(
            f"{what}, but {who} changes the base's own weights, which a quantised base cannot follow; take one that is "
            "not quantised, or train an adapter that leaves the base alone, such as lora.yaml."
        )
