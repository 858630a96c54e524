"""Parameter groups whose members change during a fit, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput

NamedParameters = Iterable[tuple[str, nn.Parameter]]
PLAIN = (bool, int, float, str, tuple, type(None))
"""Types of an optimizer's settings that can be compared, and stand in a checkpoint."""


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
    A setting of the groups that was another one when the state's optimizer was made is this optimizer's; torch would
    take the saved one without a word.

    `optimizer.load_state_dict` then raises:
        BadInput: if the state belongs to other parameters than those of the optimizer, or to another optimizer.
    """
    given = {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", "groups": _settings(optimizer)}
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "given": given})
    optimizer.register_load_state_dict_pre_hook(lambda made, state: _reorder(made, state, given))
    return optimizer


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group that are plain values, but for the learning rate, which the schedule sets."""
    others = ("params", "param_names", "lr", "initial_lr")
    return [
        {key: value for key, value in group.items() if key not in others and isinstance(value, PLAIN)}
        for group in optimizer.param_groups
    ]


def _reorder(optimizer: Optimizer, state: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    before = state.get("given", given)  # older checkpoints lack it
    if before["class"] != given["class"]:
        raise BadInput(
            f"the checkpoint has the state of {before['class']}, and this run's optimizer is {given['class']}, which "
            "cannot go on with it; set model.optimizer as it was, or begin a new run."
        )
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
    changed = [
        {key: value for key, value in now.items() if then.get(key, value) != value}
        for now, then in zip(given["groups"], before["groups"], strict=True)
    ]
    groups = [
        {
            **saved,
            **new,
            "params": [position[name] for name in group["param_names"]],
            "param_names": group["param_names"],
        }
        for saved, new, group in zip(state["param_groups"], changed, optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}
