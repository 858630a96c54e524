"""Shared hooks of methods that bring an optimizer with a rule for each role of a parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import FusedBackward
from lit_sparse.roles import ByRole, roles_of
from lit_sparse.strategies.base import Attaches, Backward, BaseWeights, Claim, Context, Need, Probe


class OptimizerMethod(ABC):
    """The common part of strategies that bring an optimizer; a method is this, `UpdateStrategy` and a dataclass.

    It trains whatever the stacked method trains, all weights if used alone.
    """

    claims: ClassVar[frozenset[Claim]] = frozenset({"optimizer"})
    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"

    _model: nn.Module | None = None

    @abstractmethod
    def _make(self, groups: list[dict[str, Any]], lr: float) -> ByRole:
        """Return the method's optimizer of the given groups."""

    def _follow(self, optimizer: Any, model: nn.Module) -> None:
        """Tell the optimizer what it needs to know of the parameters that train now: by default, their roles."""
        optimizer.roles = roles_of(model)

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._model = model

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        return self._make(groups, lr)

    def regrouped(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, ByRole)
        assert self._model is not None, "attach or restore it first"
        self._follow(optimizer, self._model)
        optimizer.check(type(self).__name__)

    def detach(self, model: nn.Module) -> None:
        self._model = None


class FusedMethod(OptimizerMethod, ABC):
    """A method whose optimizer may step in the backward pass, by `fused_backward` and `two_pass_clip`.

    Its `__post_init__` calls `_check_fused`.
    """

    fused_backward: bool
    two_pass_clip: float | None

    _fused: FusedBackward | None = None

    def _check_fused(self) -> None:
        """Refuse a norm to clip to in two backward passes that is none, or where there is one pass only."""
        norm, fused = self.two_pass_clip, self.fused_backward
        if norm is not None and not (fused and norm > 0):
            raise BadInput(
                f"{type(self).__name__}: two_pass_clip is {norm} and fused_backward {str(fused).lower()}; give a norm "
                "above 0 with fused_backward true, or clip by trainer.gradient_clip_val without it."
            )

    @property
    def claims(self) -> frozenset[Claim]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"optimizer", "backward"} if self.fused_backward else {"optimizer"})

    @property
    def backward(self) -> Backward:
        return "fused" if self.fused_backward else "autograd"

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"graph"} if self.fused_backward else {"gradients"})

    @property
    def supports_sharding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.two_pass_clip is None

    @property
    def unsharded_reason(self) -> str:
        return (
            "FSDP2 frees a layer's gathered weights in the first backward pass, and two_pass_clip asks for two; leave "
            "two_pass_clip out"
        )

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        made = self._make(groups, lr)
        if self._fused is not None:  # of an earlier fit
            self._fused.unwatch()
        self._fused = FusedBackward(made, self.two_pass_clip) if self.fused_backward else None
        return made

    def regrouped(self, optimizer: Optimizer) -> None:
        super().regrouped(optimizer)
        if self._fused is not None:
            self._fused.watch()

    def measuring(self) -> AbstractContextManager[None] | None:
        return None if self._fused is None or self.two_pass_clip is None else self._fused.measuring()

    def detach(self, model: nn.Module) -> None:
        if self._fused is not None:
            self._fused.unwatch()
        self._fused = None
        super().detach(model)
