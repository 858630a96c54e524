"""The interface of an update strategy, and the rules by which strategies of one run are combined."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput

Claim = Literal["modules", "trainable", "optimizer", "backward", "importance"]
"""Parts of the training that only one strategy of a run may take over: the module tree, the trainable set, the
optimizer, the backward pass, and the record of how important each weight is."""

Need = Literal["base", "graph", "gradients", "task_gradients", "activations", "fixed_set"]
"""Things that one strategy may depend on and another may take away; `NEEDS` says what each means."""

Backward = Literal["autograd", "fused", "none"]
BaseWeights = Literal["kept", "trained", "rewritten", "moved", "replaced"]
Leaves = Literal["plain", "adapter", "own_forward"]
Attaches = Literal["whole", "shapes", "either", "shards"]
Gradients = Literal["ignores", "reads", "masks", "adds", "scales"]


class Probe(Protocol):
    """Gives the losses of training batches before the first update."""

    def __call__(self, steps: int, /, weighed: bool = True) -> Iterator[Tensor]:
        """Yield the losses (scalars with a graph) of the first `steps` training batches, without an update.

        Args:
            steps: Number of batches; fewer come where the data end.
            weighed: Scale each by its scored tokens, so that their mean over batches and ranks is the loss of one batch
                with all their rows. Otherwise each is the mean over its own tokens, as a step of its own would be.
        """
        ...


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`."""
    return function(*args)


@dataclass(frozen=True)
class Context:
    """Facts about the run that a strategy is attached in.

    Attributes:
        siblings: The other strategies of the run.
        checkpointing: Whether decoder layers recompute their activations in the backward pass.
        units: The modules that FSDP2 will shard as one unit each; empty where the model is not sharded.
        compute: `compute(function, *args)` returns `function(*args)`, which may use the model: run its forward pass
            through this, in the training's precision, since its parameters may be of several dtypes, and sharded
            already (`attaches_to`).
        shard: Shards a frozen copy of the model over ranks and gives it the base's values; returns what `compute` is
            for it. None where the model is not sharded.
    """

    siblings: tuple[UpdateStrategy, ...] = ()
    checkpointing: bool = False
    units: tuple[nn.Module, ...] = ()
    compute: Callable[..., Any] = call
    shard: Callable[[nn.Module], Callable[..., Any]] | None = None


ALONE = Context()
"""The context of a strategy without siblings on one device."""


class UpdateStrategy(ABC):
    """One way to update a model. Subclasses are dataclasses: their fields are the keys in YAML.

    Every hook has a default that does nothing; `Updates` calls them. A subclass is final (nobody derives from a
    concrete strategy) and imports no Lightning, so that it also serves a bare loop or another trainer.

    The attributes below are class attributes. Where the fields decide, a subclass makes one a property.

    Attributes:
        claims: What no second strategy of the same run may also take over.
        backward: How gradients reach the weights: by `autograd`; `fused`, where the optimizer updates each weight
            during the backward pass and frees its gradient; or `none`, where the optimizer's `step` gets a closure that
            computes the loss without a graph.
        base: What the method itself does to the base's own weights. `kept`: it leaves them alone until `detach`, as do
            methods that act on whatever another one trains; only such a base can be quantised. `trained`: some of them
            train. `rewritten`: `attach` itself gives them other values, which `detach` restores up to rounding.
            `moved`: `attach` trains weights that are frozen afterwards, so that checkpoints hold all weights.
            `replaced`: `attach` puts others in their place, and they are gone.
        leaves: What `detach` gives back: the `plain` model, one whose `adapter` was merged, or one with its
            `own_forward`.
        needs: What the method depends on. A strategy that denies one of these cannot be in the same run.
        attaches_first: Whether `attach` and `restore` must see the model's modules before other strategies change them.
        supports_sharding: Whether the method works with parameters that are DTensors (FSDP2), after `attach` or
            `restore` has seen the whole model.
        unsharded_reason: Where it does not: why, and what to use in its place, to end a sentence.
        attaches_to: What `attach` and `restore` must see under FSDP2: the `whole` model, which each rank then loads; a
            model of which only the `shapes` are right, before it is sharded; the whole one or its shards (`either`);
            or its `shards`, in which case the other strategies of the run see those too.
        selects: The key that takes a file in place of selecting, where `attach` selects what is trained and
            `state_dict` is that selection: `lit-sparse select` writes it to such a file. Empty where it does not.
        gradients: What `before_step` does with gradients: it `ignores` them, `reads` them, `masks` them, `adds` to
            them, or `scales` them. The strategies of a run are called in that order, after those that attach first. A
            mask holds for the gradient that it was computed of; what another strategy adds later may enter masked
            entries.
        accumulates: Whether a forward-only method takes a batch some rows at a time (`rows_at_once`) instead of
            accumulating over batches.
        recomputes: Whether the method recomputes layers in the backward pass itself, and refuses activation
            checkpointing.
        objective: What a forward-only method minimizes: the `loss`, `accuracy` (its distance from 1), or a metric of
            torchmetrics over labels and the likeliest classes or tokens.
        masters: Whether what trains is kept in fp32 while the frozen weights are in bf16. Forward-only methods, which
            must not hold a second copy, opt out.
    """

    claims: ClassVar[frozenset[Claim]] = frozenset()
    backward: ClassVar[Backward] = "autograd"
    base: ClassVar[BaseWeights] = "trained"
    leaves: ClassVar[Leaves] = "plain"
    needs: ClassVar[frozenset[Need]] = frozenset()
    attaches_first: ClassVar[bool] = False
    supports_sharding: ClassVar[bool] = False
    unsharded_reason: ClassVar[str] = ""
    attaches_to: ClassVar[Attaches] = "whole"
    selects: ClassVar[str] = ""
    gradients: ClassVar[Gradients] = "ignores"
    accumulates: ClassVar[bool] = False
    recomputes: ClassVar[bool] = False
    objective: Any = "loss"
    masters: ClassVar[bool] = True

    @property
    def denies(self) -> frozenset[Need]:
        """The needs of other strategies that this one does not leave them."""
        denied: dict[Need, bool] = {
            "base": self.base in ("rewritten", "moved", "replaced"),
            "graph": self.backward == "none",
            "gradients": self.backward != "autograd",
            "task_gradients": type(self).penalty is not UpdateStrategy.penalty,
            "activations": self.leaves == "own_forward",
            "fixed_set": self.period is not None,
        }
        return frozenset(need for need, taken in denied.items() if taken)

    @property
    def period(self) -> int | None:
        """Optimizer steps from one change of the trainable set to the next; None if it never changes.

        Memory and speed are measured after the first change.
        """
        return None

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a forward pass of a forward-only method, which accumulates by itself; None is the whole batch."""
        return None

    @property
    def cycle(self) -> int | None:
        """Optimizer steps from one act of the method to the next where it does not act at each; None if it does.

        An act is a change of the trainable set, or a restart, a new basis and the like. Tests set it to two steps.
        """
        return self.period

    def costliest(self, sharded: bool) -> Sequence[UpdateStrategy]:
        """Return the method with its choices fixed, in each of the ways of which one takes the most memory.

        A plan traces these, since a long training meets all of its choices. Of most methods all take the same.

        Args:
            sharded: Whether the model is sharded over ranks (FSDP2).
        """
        return [self]

    def describe(self) -> dict[str, Any]:
        """Return what was chosen, for the record of a run: numbers, strings, and lists or dicts of them."""
        return {}

    # ---- preparing the model

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        """Prepare `model` in place, once, before the optimizer exists. `probe` gives losses on training batches."""

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        """Prepare `model` as `attach` did, from what `state_dict` returned. Trained values are loaded afterwards."""
        self.attach(model, no_probe, context)

    def on_shard(self) -> None:
        """React to FSDP2 having replaced the model's parameters by DTensors; own tensors may be sharded alike.

        Called once, after `attach` or `restore`.
        """

    def detach(self, model: nn.Module) -> None:
        """Merge what was trained, put the model's own modules back, remove every hook."""

    # ---- training

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> Optimizer | None:
        """Return the optimizer that this method insists on; None keeps the configured one.

        A run with `model.optimizer` is refused then, and its betas and weight decay are the method's to choose. Claim
        `optimizer` too.

        Args:
            groups: Parameter groups with `params` and `param_names`: one with weight decay, one without. The optimizer
                must be made of these very groups, since `regroup` fills them anew when the trainable set changes.
            lr: Peak learning rate.
        """
        return None

    def optimizer_bytes(self, model: nn.Module) -> int | None:
        """Return the bytes that the optimizer keeps for what trains in `model`, without counts of steps and the like.

        By the formula of the method that brings the optimizer; None is two fp32 numbers a trained weight. Of DTensors
        those of all shards.
        """
        return None

    def regrouped(self, optimizer: Optimizer) -> None:
        """React to the optimizer's parameters, at its start and after each change; for example by hooking them."""

    def measuring(self) -> AbstractContextManager[None] | None:
        """Return a context in which a fused method only measures gradients, in a backward pass before its own.

        None, of methods that need no such pass.
        """
        return None

    def lr_factor(self, step: int) -> float:
        """Return the factor of the learning rate of step `step` (from 1): a warm-up after a change, for example."""
        return 1.0

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        """Return a scalar to add to this batch's loss, or None."""
        return None

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply by `factor` the gradients that the method keeps beside the parameters' own.

        Losses of an accumulation window are divided by its scored tokens, whose number is known at its end only.
        """

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Run before optimizer step `step` (from 1), with the accumulated, unclipped gradients in place.

        `optimizer` is the torch optimizer, without a trainer's wrapper.

        Under a `fused` or forward-only (`none`) method it runs before the step's first forward pass: there are no
        gradients then.
        """

    def skip_step(self) -> None:
        """Forget what the batches of a step have left whose loss is not finite; runs in place of `before_step`."""

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Run after optimizer step `step` (from 1). Return True if the set of trainable parameters changed."""
        return False

    def logged(self) -> Mapping[str, Tensor]:
        """Return numbers for the log, by name; asked for after `before_step`, or after a forward-only step.

        Names begin with the method's, so that they are unique in a run. They are scalars, the same on all ranks.
        """
        return {}

    def written(self) -> Iterator[nn.Parameter]:
        """Yield the frozen parameters into which the method writes what it trains elsewhere."""
        return iter(())

    # ---- what is kept

    def state_dict(self) -> dict[str, Any]:
        """Return what `restore` needs: tensors, numbers, strings, and lists or dicts of them."""
        return {}

    def held(self) -> Any:
        """Return the tensors that the method keeps beside the model's parameters, nested in lists or dicts."""
        return self.state_dict()

    def save(self, folder: Path) -> None:
        """Write what was trained into the new folder `folder`, in the method's own format.

        Raises:
            BadInput: if the method has none.
        """
        other = "use it through lit_sparse.runs.load_run" if self.leaves == "own_forward" else "export it with --to hf"
        raise BadInput(f"{type(self).__name__} trains no adapter that could be saved by itself; {other}.")

    @classmethod
    def load(cls, folder: str | Path, model: Any) -> UpdateStrategy:
        """Put what `save` wrote on `model`, the base that it was trained on; return the strategy.

        Only for methods with an `own_forward`: an `adapter` is saved in the format of PEFT, which loads it.

        Raises:
            BadInput: if the method has no format of its own, or the folder is not of it.
        """
        raise BadInput(f"{cls.__name__} has no format of its own; load its export by PEFT or transformers.")


def no_probe(steps: int, /, weighed: bool = True) -> Iterator[Tensor]:
    """Stand in for a probe where there is no training data.

    Raises:
        BadInput: always, when asked for a loss.
    """
    raise BadInput(f"{steps} training batches are needed before training, but there are none here; give the run data.")


# ---- composition


@dataclass(frozen=True)
class Rule:
    """Why a need that is denied refuses a pair: `{needy}` and `{denier}` stand for the two names."""

    reason: str
    way_out: str


NEEDS: dict[Need, Rule] = {
    "base": Rule(
        "{needy} needs the base's weights as they came, and {denier} rewrites them as it starts",
        "give {denier} a start that leaves the base alone (for PEFT, init_lora_weights: true, and bias: none with "
        "start_from; for SMT, warmup: score_only), or leave {needy} out",
    ),
    "graph": Rule(
        "{needy} trains through gradients, and {denier} computes losses without a graph",
        "train with {needy} and an optimizer that uses gradients, or put {denier} on an adapter such as lora.yaml",
    ),
    "gradients": Rule(
        "{needy} needs gradients that live until the optimizer step, and {denier} has none then",
        "leave one of the two out",
    ),
    "task_gradients": Rule(
        "{needy} reads the gradient of the task's loss, to which {denier} adds its own",
        "record in a run without {denier}",
    ),
    "activations": Rule(
        "the penalty of {needy} needs gradients through what the layers compute inside, which {denier} hides",
        "keep one of the two",
    ),
    "fixed_set": Rule(
        "{needy} follows the weights that train from the start, and {denier} trains others later",
        "leave one of the two out",
    ),
}

ORDER = ("ignores", "reads", "masks", "adds", "scales")


def compose(strategies: Sequence[UpdateStrategy]) -> list[UpdateStrategy]:
    """Return `strategies` in the order in which their hooks are called.

    Raises:
        BadInput: if two of them claim the same part of the training, or one needs what another denies.
    """
    taken: dict[str, str] = {}
    for strategy in strategies:
        name = type(strategy).__name__
        for claim in sorted(strategy.claims):
            if claim in taken:
                raise BadInput(
                    f"{taken[claim]} and {name} cannot be combined: both take over the model's {claim}; keep one of "
                    "the two."
                )
            taken[claim] = name
    for needy in strategies:
        for denier in strategies:
            if needy is not denier:
                _check_pair(needy, denier)
    return sorted(strategies, key=lambda strategy: (not strategy.attaches_first, ORDER.index(strategy.gradients)))


def _check_pair(needy: UpdateStrategy, denier: UpdateStrategy) -> None:
    names = {"needy": type(needy).__name__, "denier": type(denier).__name__}
    for need in sorted(needy.needs & denier.denies):
        reason, way_out = NEEDS[need].reason.format(**names), NEEDS[need].way_out.format(**names)
        raise BadInput(f"{names['needy']} and {names['denier']} cannot be combined: {reason}; {way_out}.")
