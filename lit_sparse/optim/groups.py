"""Parameter groups whose members change during a fit, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters of `model` with their names, in the model's order; tied ones appear once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_groups(named: NamedParameters) -> list[dict[str, Any]]:
    """Return two parameter groups: with weight decay, and without (biases and norms).

    These have fewer than two dimensions, but for the biases of fused experts, which are recognised by their name.

    A group may be empty. Both are always returned, so that `regroup` can fill either one later. The group with decay
    sets no `weight_decay`: it takes the optimizer's own.
    """
    named = list(named)
    plain = [(name, p) for name, p in named if p.ndim < 2 or name.endswith("bias")]
    decayed = [(name, p) for name, p in named if p.ndim >= 2 and not name.endswith("bias")]
    return [_group(decayed), {**_group(plain), "weight_decay": 0.0}]


def _group(named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {"params": [parameter for _, parameter in named], "param_names": [name for name, _ in named]}


def regroup(optimizer: Optimizer, named: NamedParameters) -> None:
    """Make `optimizer` train exactly `named`, in that order. Parameters that are removed lose their optimizer state.

    The groups themselves stay, because learning-rate schedulers hold references to them.

    Args:
        optimizer: An optimizer whose groups were made by `parameter_groups`.
        named: The trainable parameters with their names.
    """
    for group, wanted in zip(optimizer.param_groups, parameter_groups(named), strict=True):
        group["params"], group["param_names"] = wanted["params"], wanted["param_names"]
    kept = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    drop_state(optimizer, [parameter for parameter in optimizer.state if parameter not in kept])


def drop_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Drop the optimizer state and the gradients of `parameters`."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def match_by_name(optimizer: Optimizer) -> Optimizer:
    """Make `optimizer` load its state by parameter name instead of by position, and return it.

    torch matches by position, which fails as soon as a strategy trains other parameters than at the time of saving.

    `optimizer.load_state_dict` then raises:
        BadInput: if the state belongs to other parameters than those of the optimizer.
    """
    optimizer.register_load_state_dict_pre_hook(_reorder)
    return optimizer


def _reorder(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    position = {
        name: index
        for group in state["param_groups"]
        for name, index in zip(group["param_names"], group["params"], strict=True)
    }
    wanted = [name for group in optimizer.param_groups for name in group["param_names"]]
    if set(wanted) != set(position):
        differing = sorted(set(wanted) ^ set(position))
        raise BadInput(
            f"the checkpoint has the optimizer state of {len(position)} parameters, but the model trains "
            f"{len(wanted)}; the first that differs is {differing[0]}. Resume with the configuration of the run that "
            "wrote it."
        )
    groups = [
        {**saved, "params": [position[name] for name in group["param_names"]], "param_names": group["param_names"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}
