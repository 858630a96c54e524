"""AdamW with fp32 state, and with fp32 masters of what trains in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_sparse.errors import BadInput
from lit_sparse.optim.sharded import local_shard, total_norm
from lit_sparse_kernels.adamw_arguments import Rule, same_layout
from lit_sparse_kernels.block_adamw import block_adamw
from lit_sparse_kernels.master_adamw import master_adamw

CLIP_EPS = 1e-6
"""The epsilon that `torch.nn.utils.clip_grad_norm_` adds to the norm before it divides by it."""


@dataclass(frozen=True)
class _Scattered:
    """Where the master of blocks is written."""

    weight: Tensor
    index: Tensor
    transposed: bool
    expert: int | None

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in), taken anew each time: moving a module changes the memory of its parameters."""
        weight = self.weight.detach() if self.expert is None else self.weight.detach()[self.expert]
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class _Held:
    """A state's tensor while torch loads it, which would cast a bare one to its parameter's dtype."""

    tensor: Tensor


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with fp32 state and an fp32 master for bf16 and fp16 parameters, in a launch or two a step.

    The state is torch's (`step`, `exp_avg`, `exp_avg_sq`), so that checkpoints go both ways, and `master` beside it for
    parameters of fewer than 32 bits. The master is made from the parameter at its first step; who changes such a
    parameter otherwise must drop its state. CUDA tensors take Triton kernels, others torch's fused CPU operation, and
    DTensors either one on their local shards. `step` is kept on the host, where its bias corrections are computed.

    Args:
        foreach, fused: Taken for the sake of torch's signature; there is one way here, the fused one.
        amsgrad, capturable, differentiable: Likewise, and refused where they are set.

    Attributes:
        grad_scale: One fp32 number that divides the gradients of the next steps, or None. A gradient scaler of torch's
            does not set it, but divides the gradients itself, and skips steps that overflow.
        masks: For a parameter, which entries of its local shard the next step updates, bool of its shape. The other
            entries keep their value, moments and master. The count of steps in the bias correction is the parameter's:
            an entry that is first updated late moves up to (1 - b1) / sqrt(1 - b2), 3.2 by default, times lr.

    Raises:
        BadInput: if a group asks for what is not there (see above), also when its state is loaded.
    """

    grad_scale: Tensor | None = None
    masks: Mapping[Tensor, Tensor] = {}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._scattered: dict[Tensor, _Scattered] = {}
        self._wrote: frozenset[Tensor] = frozenset()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._step_supports_amp_scaling = False  # else a scaler skips a step on the device, unseen by `step`

    def scatter(
        self, parameter: Tensor, weight: Tensor, index: Tensor, transposed: bool = False, expert: int | None = None
    ) -> None:
        """From now on write `parameter` (N, h, w), the fp32 master of blocks of `weight`, into it at every step.

        Args:
            weight: Matrix (out, in), or (in, out) if `transposed`; give a module's own parameter and no view of it,
                so that it is still the module's after the module was moved.
            index: (N, 2) integers: row and column of each block of the matrix (out, in).
            expert: The place of the matrix in a `weight` that holds one of each expert.
        """
        self._scattered[parameter] = _Scattered(weight, index, transposed, expert)

    def fields(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the names of the tensors of the shape of `parameter` that its state has, beside a master."""
        return "exp_avg", "exp_avg_sq"

    def wrote(self, parameter: Tensor) -> bool:
        """Return whether the last step wrote the blocks of which this is the master."""
        return parameter in self._wrote

    def clip_norm(self, max_norm: float) -> None:
        """Clip the norm of all gradients to `max_norm` in the next step, which divides them as it reads them."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.grad_scale = ((norm + CLIP_EPS) / max_norm).clamp(min=1)

    def reset(self) -> None:
        """Forget the moments and counts of steps, as if the next step were the first; masters stay."""
        for state in self.state.values():
            for name, value in state.items():
                if name != "master":
                    value.zero_()  # in place: who holds the tensor has the new one

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all parameters that have a gradient; the others get no state. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_some(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        self._wrote = frozenset(self._scattered.keys() - self.masks.keys())
        self.masks = {}
        return loss

    def step_some(self, group: dict[str, Any], moving: Sequence[Tensor]) -> None:
        """Step some of the parameters of a group, which have gradients; call it without a graph."""
        rule = Rule(float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"], group["maximize"])
        plain = [parameter for parameter in moving if parameter not in self.masks]
        self._step_whole([parameter for parameter in plain if parameter not in self._scattered], rule)
        self._step_blocks([parameter for parameter in plain if parameter in self._scattered], rule)
        for parameter in moving:
            if parameter in self.masks:
                self._step_masked(parameter, self.masks[parameter], rule)

    def _step_masked(self, parameter: Tensor, mask: Tensor, rule: Rule) -> None:
        """Step one parameter whole, then put back what is masked; copies are of one parameter at a time.

        Blocks are not written within this step, where masked entries have not been put back yet.
        """
        state = self._state_of(parameter)
        like = {*self.fields(parameter), "master"}  # others have no entry for each of the weight's
        moving = [parameter.detach(), *(value for name, value in state.items() if name in like)]
        before = [local_shard(tensor).clone() for tensor in moving]
        self._step_whole([parameter], rule)
        for tensor, old in zip(moving, before, strict=True):
            local_shard(tensor).copy_(torch.where(mask, local_shard(tensor), old))

    def _step_whole(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        states = [self._state_of(parameter) for parameter in parameters]
        weights = [local_shard(parameter) for parameter in parameters]
        masters = [
            local_shard(state["master"]) if "master" in state else weight
            for weight, state in zip(weights, states, strict=True)
        ]
        master_adamw(
            weights,
            [gradient(parameter) for parameter in parameters],
            masters,
            [local_shard(state["exp_avg"]) for state in states],
            [local_shard(state["exp_avg_sq"]) for state in states],
            _count_up(states),
            rule,
            self.grad_scale,
        )

    def _step_blocks(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        places = [self._scattered[parameter] for parameter in parameters]
        for tensor in (*parameters, *(place.weight for place in places)):
            if isinstance(tensor, DTensor):
                raise BadInput("blocks of a weight are trained, and it or they are divided among ranks; use DDP.")
        states = [self._state_of(parameter) for parameter in parameters]
        block_adamw(
            [place.matrix for place in places],
            [place.index for place in places],
            [gradient(parameter) for parameter in parameters],
            list(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            _count_up(states),
            rule,
            self.grad_scale,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter's state, made when it has none."""
        state, dtype = self.state[parameter], _master_dtype(parameter)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in self.fields(parameter):
                state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        if dtype != parameter.dtype and "master" not in state:  # also for a state that torch's AdamW has written
            state["master"] = parameter.detach().to(dtype)
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            BadInput: if the group asks for what is not there.
        """
        super().add_param_group(param_group)
        _refuse(self.param_groups[-1:])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW, moments and masters in fp32 whatever the parameters are.

        Raises:
            BadInput: if a group asks for what is not there.
        """
        _refuse(state_dict["param_groups"])
        known = {key for group in state_dict["param_groups"] for key in group["params"]}
        held = {key: _hold(state) if key in known else state for key, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": held})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scattered": self._scattered, "_wrote": self._wrote}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state at the end of loading and copying."""
        super().__setstate__(state)
        self._step_supports_amp_scaling = False
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter in self.state:
                self.state[parameter] = _released(self.state[parameter], parameter)


def _refuse(groups: Sequence[dict[str, Any]]) -> None:
    for name in ("amsgrad", "capturable", "differentiable"):
        if any(group.get(name) for group in groups):
            raise BadInput(f"{name} is set, which lit_sparse.optim.AdamW does not have; use torch.optim.AdamW for it.")


def _count_up(states: Sequence[dict[str, Any]]) -> list[float]:
    """Add 1 to all `step`, which are on the host, and return them; in one call, since each costs microseconds."""
    steps = [state["step"] for state in states]
    if not steps:
        return []
    torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(steps).tolist()


def _hold(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _Held(value) if torch.is_tensor(value) and name != "step" else value for name, value in state.items()}


def _released(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    dtype = _master_dtype(parameter)
    released = {
        name: value.tensor.to(parameter.device, dtype) if isinstance(value, _Held) else value
        for name, value in state.items()
        if name != "master" or dtype != parameter.dtype  # an fp32 parameter is its own master
    }
    if "step" in released:  # torch's fused AdamW keeps it on the device
        released["step"] = released["step"].to("cpu", torch.float32)
    return released


def _master_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of this rank's shard, laid out in memory as the shard is, which autograd's own gradients are."""
    grad = cast(Tensor, parameter.grad)
    if isinstance(parameter, DTensor) and isinstance(grad, DTensor):
        grad = grad.redistribute(placements=parameter.placements)  # nothing, where it is divided alike already
    grad, shard = local_shard(grad), local_shard(parameter)
    if grad.layout == torch.strided and not same_layout(grad, shard):
        grad = torch.empty_like(shard, dtype=grad.dtype).copy_(grad)
    return grad
