"""Fused backward: step each parameter in the backward pass, as soon as its gradient is there, and free that.

LOMO, arXiv 2306.09782. The gradients of all weights never exist together. Hooks are post-accumulate-grad hooks: others
never fire under FSDP2, and these once a parameter, also where one is tied.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lit_sparse.errors import BadInput
from lit_sparse.optim.adamw import CLIP_EPS, AdamW
from lit_sparse.ranks import world_size


class FusedBackward:
    """Steps the parameters of an optimizer from hooks, one by one; its own `step` then finds no gradients.

    Args:
        optimizer: Its groups are read when `watch` is called, its learning rates in the backward pass.
        max_norm: Clip the norm of all gradients to this, of which `measuring` takes the norm in a pass before.
    """

    def __init__(self, optimizer: AdamW, max_norm: float | None = None) -> None:
        self.optimizer, self.max_norm = optimizer, max_norm
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._squares: list[Tensor] | None = None  # of gradients, while they are only measured

    def watch(self) -> None:
        """Hook the parameters that the optimizer has now, and take the hooks off those that left.

        Raises:
            BadInput: if a rank has a parameter whole, whose gradient nobody averages before its hook.
        """
        groups = {p: number for number, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        whole = [parameter for parameter in groups if not isinstance(parameter, DTensor)]
        if whole and world_size() > 1:
            raise BadInput(
                f"fused_backward is true, but {len(whole)} trained parameters are whole on each of {world_size()} "
                "ranks, and would be stepped before their gradients are averaged; set fused_backward to false."
            )
        for parameter in self._handles.keys() - groups.keys():
            self._handles.pop(parameter).remove()
        for parameter in groups.keys() - self._handles.keys():
            # By number: loading a state makes other groups. Weakly: torch holds a hook where the garbage collector does
            # not look, and with it all that it refers to, which would keep a model that is given up.
            hook = partial(_take, weakref.ref(self), groups[parameter])
            self._handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)

    def unwatch(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it, backward passes step nothing; their gradients' norm then clips the step that follows."""
        assert self.max_norm is not None, "there is nothing to clip to"
        self._squares = []
        try:
            yield
            norm = torch.stack(self._squares).sum().sqrt()
            self.optimizer.grad_scale = ((norm + CLIP_EPS) / self.max_norm).clamp(min=1)
        finally:
            self._squares = None

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        if self._squares is None:
            self.optimizer.step_some(self.optimizer.param_groups[number], [parameter])
        else:
            assert parameter.grad is not None
            self._squares.append(parameter.grad.float().square().sum())
        parameter.grad = None


def _take(fused: weakref.ref[FusedBackward], number: int, parameter: Tensor) -> None:
    taker = fused()
    if taker is not None:
        taker._take(number, parameter)
