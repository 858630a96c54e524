"""The update strategies of a run, and the one place that knows in which order their hooks are called."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, parameter_groups, regroup, trainable
from lit_sparse.strategies.base import ALONE, Attaches, Backward, Context, Probe, UpdateStrategy, compose, no_probe

ATTACHES: tuple[Attaches, ...] = get_args(Attaches)


class Updates(Sequence[UpdateStrategy]):
    """The update strategies of one run. A training loop calls these methods and no strategy's own hooks.

    A loop without Lightning needs four of them, in this order: `attach`, `optimizer`, `step` (once an optimizer step),
    `detach`. A trainer that runs forward, backward and optimizer itself calls `penalized` on each loss, and
    `before_step`, `after_step` and `regroup` around each optimizer step, as `step` does.

    Args:
        strategies: The strategies; none is full fine-tuning.
        prefix: What precedes the model's parameter names in optimizer groups and checkpoints.

    Raises:
        BadInput: if a strategy's number is none, or if the strategies cannot be combined.
    """

    def __init__(self, strategies: Sequence[UpdateStrategy] = (), prefix: str = "") -> None:
        for strategy in strategies:
            check_finite(strategy)
        self._strategies = compose(strategies)
        self._prefix = prefix
        self._model: nn.Module | None = None
        self._rates: list[float] = []  # of the optimizer's groups, while lr_factor has changed them

    @overload
    def __getitem__(self, index: int) -> UpdateStrategy: ...
    @overload
    def __getitem__(self, index: slice) -> list[UpdateStrategy]: ...
    def __getitem__(self, index: int | slice) -> UpdateStrategy | list[UpdateStrategy]:
        return self._strategies[index]

    def __len__(self) -> int:
        return len(self._strategies)

    def __repr__(self) -> str:
        return repr(self._strategies)

    def fresh(self) -> Updates:
        """Return the same strategies as they were before they were attached."""
        return Updates([replace(strategy) for strategy in self], self._prefix)  # pyright: ignore[reportArgumentType]

    def costliest(self, sharded: bool) -> list[Updates]:
        """Return these strategies, as `fresh` does, with choices fixed in each way that may take the most memory.

        Args:
            sharded: Whether the model is sharded over ranks (FSDP2).
        """
        ways = product(*(strategy.costliest(sharded) for strategy in self))
        return [Updates(way, self._prefix).fresh() for way in ways]

    @property
    def names(self) -> str:
        """The strategies' names, for a sentence."""
        return " and ".join(type(strategy).__name__ for strategy in self) or "full fine-tuning"

    @property
    def backward(self) -> Backward:
        """How gradients reach the weights in this run."""
        own: list[Backward] = [strategy.backward for strategy in self if strategy.backward != "autograd"]
        return own[0] if own else "autograd"

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a forward pass of a forward-only method; None is the whole batch."""
        return min((rows for strategy in self if (rows := strategy.rows_at_once) is not None), default=None)

    @property
    def objective(self) -> Any:
        """The objective that a forward-only method minimizes: `loss`, `accuracy` or a metric."""
        return next((strategy.objective for strategy in self if strategy.backward == "none"), "loss")

    @property
    def masters(self) -> bool:
        """True if what trains is kept in fp32."""
        return all(strategy.masters for strategy in self)

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters with their full names, in the model's order."""
        assert self._model is not None, "attach or restore the strategies first"
        return [(f"{self._prefix}{name}", parameter) for name, parameter in trainable(self._model)]

    @property
    def checkpointable(self) -> bool:
        """True if activation checkpointing saves memory: there is a graph, and no method recomputes layers itself."""
        return self.backward != "none" and not any(strategy.recomputes for strategy in self)

    @property
    def quantizable(self) -> bool:
        """True if the base may be quantised: adapters train, and the base's own weights stay as they are."""
        return all(strategy.base == "kept" for strategy in self) and any("trainable" in s.claims for s in self)

    def check_quantizable(self, what: str) -> None:
        """Refuse to train a quantised base itself.

        Raises:
            BadInput: naming the strategy that would, after `what` was asked for.
        """
        if not self.quantizable:
            changing = [type(strategy).__name__ for strategy in self if strategy.base != "kept"]
            raise BadInput(
                f"{what}, but {' and '.join(changing) or 'full fine-tuning'} changes the base's own weights, which a "
                "quantised base cannot follow; take one that is not quantised, or train an adapter that leaves the "
                "base alone, such as lora.yaml."
            )

    # ---- preparing the model

    def attach(
        self,
        model: nn.Module,
        probe: Probe = no_probe,
        context: Context = ALONE,
        attaching: Collection[Attaches] = ATTACHES,
    ) -> None:
        """Prepare `model` in place, before its optimizer exists. `probe(n)` yields losses of n training batches.

        Args:
            attaching: Attach the strategies of these kinds (`attaches_to`) only.
        """
        self.follow(model)
        for strategy in self:
            if strategy.attaches_to in attaching:
                strategy.attach(model, probe, self._context_of(strategy, context))

    def restore(
        self,
        model: nn.Module,
        states: Sequence[Mapping[str, Any]],
        context: Context = ALONE,
        attaching: Collection[Attaches] = ATTACHES,
    ) -> None:
        """Prepare `model` as it was when `state_dict` returned `states`; trained values are loaded afterwards.

        Args:
            attaching: As for `attach`.

        Raises:
            BadInput: if the states are of other strategies.
        """
        saved, ours = [entry["class"] for entry in states], [type(strategy).__name__ for strategy in self]
        if saved != ours:
            raise BadInput(
                f"the checkpoint was trained with {saved or 'full fine-tuning'}, this run has "
                f"{ours or 'full fine-tuning'}; give the configuration of the run that wrote it."
            )
        self.follow(model)
        for strategy, entry in zip(self, states, strict=True):
            if strategy.attaches_to in attaching:
                strategy.restore(model, entry["state"], self._context_of(strategy, context))

    def follow(self, model: nn.Module) -> None:
        """Take `model` as the one that trains, if the strategies were attached to it one by one."""
        self._model = model

    def _context_of(self, strategy: UpdateStrategy, context: Context) -> Context:
        return replace(context, siblings=tuple(other for other in self if other is not strategy))

    def on_shard(self) -> None:
        """Tell the strategies that the model's parameters have become DTensors."""
        for strategy in self:
            strategy.on_shard()

    def detach(self, model: nn.Module) -> None:
        """Take the strategies off `model` again, the last one first; what they trained is merged in."""
        for strategy in reversed(self._strategies):
            strategy.detach(model)
        self._model = None

    # ---- training

    def optimizer(self, lr: float, make: Callable[..., Optimizer] | None = None) -> Optimizer:
        """Return the optimizer of the trainable parameters: what a strategy insists on, else `make`, else AdamW.

        Args:
            lr: Peak learning rate.
            make: Called with parameter groups (with and without weight decay) and `lr`.

        Raises:
            BadInput: if `make` is given although a strategy brings its own, or that is not made of the given groups.
        """
        groups = parameter_groups(self.named)
        own = self._own_optimizer(groups, lr)
        if own is not None and make is not None:
            raise BadInput(f"model.optimizer is set, but {own[0]} brings its own optimizer; remove model.optimizer.")
        optimizer = (make or AdamW)(groups, lr=lr) if own is None else own[1]
        for strategy in self:
            strategy.regrouped(optimizer)
        return optimizer

    def _own_optimizer(self, groups: list[dict[str, Any]], lr: float) -> tuple[str, Optimizer] | None:
        """Return the optimizer that a strategy insists on, with the strategy's name."""
        made = [(type(strategy).__name__, strategy.optimizer(groups, lr)) for strategy in self]
        own = [(name, optimizer) for name, optimizer in made if optimizer is not None]
        if len(own) > 1:
            raise BadInput(
                f"{own[0][0]} and {own[1][0]} cannot be combined: both bring an optimizer; keep one of the two."
            )
        for name, optimizer in own:
            found = [group.get("param_names") for group in optimizer.param_groups]
            if found != [group["param_names"] for group in groups]:
                raise BadInput(
                    f"the optimizer of {name} has {len(found)} parameter group(s) of its own making, which cannot "
                    f"follow a change of the trainable set; make it of the {len(groups)} groups that it is given."
                )
            return name, optimizer
        return None

    def penalized(self, loss: Tensor, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """Return `loss` plus the strategies' penalties for the same batch and the model's `output`."""
        penalties = [p for strategy in self if (p := strategy.penalty(batch, output)) is not None]
        return loss + torch.stack(penalties).sum() if penalties else loss

    def run_backward(self, loss: Tensor, backward: Callable[..., Any] = Tensor.backward) -> None:
        """Run the backward pass of `loss`, after a first one of a method that measures gradients before it updates.

        Args:
            backward: Called with the loss, and with `retain_graph` where the graph must live on.
        """
        for strategy in self:
            if (measuring := strategy.measuring()) is not None:
                with measuring:
                    backward(loss, retain_graph=True)
        backward(loss)

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by `factor`, those that strategies keep elsewhere too."""
        grads = [parameter.grad for _, parameter in self.named if parameter.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
        for strategy in self:
            strategy.scale_gradients(factor)

    def before_step(self, step: int, optimizer: Optimizer) -> dict[str, Tensor]:
        """Scale the learning rates of optimizer step `step` (from 1), call its hooks, and return what is logged.

        With `autograd` it is called with all gradients in place, else before the step's first forward pass.
        """
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for strategy in self:
            for group in optimizer.param_groups:
                group["lr"] *= strategy.lr_factor(step)
        for strategy in self:
            strategy.before_step(step, optimizer)
        return self.logged()

    def skip_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of an optimizer step whose loss is not finite; call it in place of `before_step`.

        No optimizer moves a parameter without a gradient, or touches its state.
        """
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for _, parameter in self.named:
            parameter.grad = None
        for strategy in self:
            strategy.skip_step()

    def logged(self) -> dict[str, Tensor]:
        """Return the strategies' numbers for the log, by name."""
        return {name: value for strategy in self for name, value in strategy.logged().items()}

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        """Call the hooks after optimizer step `step`, the last strategy first, and give back the learning rates.

        Returns:
            Whether the trainable set changed. Call `regroup` then.
        """
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        changed = [strategy.after_step(step, optimizer) for strategy in reversed(self._strategies)]
        return any(changed)

    def regroup(self, optimizer: Optimizer) -> None:
        """Give `optimizer` the parameters that are trainable now, after `after_step` returned True."""
        regroup(optimizer, self.named)
        for strategy in self:
            strategy.regrouped(optimizer)

    def step(self, step: int, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Tensor:
        """Take optimizer step `step` (from 1) in a loop without Lightning, and return its loss.

        Args:
            loss: Computes the loss of the step's batch, penalties included; called with or without a graph, as often as
                the method needs it.
        """
        if self.backward == "none":
            self.before_step(step, optimizer)
            with torch.no_grad():
                value = torch.as_tensor(optimizer.step(loss))  # pyright: ignore[reportArgumentType, reportCallIssue]
        else:
            if self.backward == "fused":
                self.before_step(step, optimizer)
            value = loss()
            self.run_backward(value)
            if self.backward == "autograd":
                self.before_step(step, optimizer)
            optimizer.step()
        if self.after_step(step, optimizer):
            self.regroup(optimizer)
        optimizer.zero_grad()
        return value.detach()

    # ---- what is kept

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the class name and state of each strategy, as `restore` takes them."""
        return [{"class": type(strategy).__name__, "state": strategy.state_dict()} for strategy in self]

    def written(self) -> Iterator[nn.Parameter]:
        """Yield the frozen parameters into which strategies write what they train elsewhere."""
        for strategy in self:
            yield from strategy.written()


def check_finite(strategy: UpdateStrategy) -> None:
    """Refuse NaN and infinity among a strategy's numbers, which most comparisons let pass, and seeds of over 64 bits.

    Raises:
        BadInput: naming the field.
    """
    for name, value in vars(strategy).items():
        if isinstance(value, float) and not name.startswith("_") and not math.isfinite(value):
            raise BadInput(f"{type(strategy).__name__}: {name} is {value}; it must be a finite number.")
    if not -(2**63) <= (seed := getattr(strategy, "seed", 0)) < 2**64:
        raise BadInput(f"{type(strategy).__name__}: seed is {seed}; it must fit into 64 bits.")
