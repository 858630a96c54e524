"""Optimizer plumbing that strategies and the host share; no update rule lives here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import BadInput

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters of `model` with their names, in the model's order, tied ones once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_groups(named: NamedParameters) -> list[dict[str, Any]]:
    """Two groups for an optimizer: with weight decay, and without (biases, norms: fewer than two dimensions).

    A group may be empty, which the dict form allows, so that both are there whatever is trained later.
    """
    named = list(named)
    decayed, plain = [(n, p) for n, p in named if p.ndim >= 2], [(n, p) for n, p in named if p.ndim < 2]
    return [_group(decayed), {**_group(plain), "weight_decay": 0.0}]


def _group(named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {"params": [parameter for _, parameter in named], "param_names": [name for name, _ in named]}


def regroup(optimizer: Optimizer, named: NamedParameters) -> None:
    """Make `optimizer` train exactly `named`, in that order; who leaves loses its state."""
    for group, wanted in zip(optimizer.param_groups, parameter_groups(named), strict=True):
        group["params"], group["param_names"] = wanted["params"], wanted["param_names"]
    kept = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    drop_state(optimizer, [parameter for parameter in optimizer.state if parameter not in kept])


def drop_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Forget the optimizer's state of `parameters`, and their gradients."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def match_by_name(optimizer: Optimizer) -> Optimizer:
    """Let `optimizer` load a state by the names of parameters instead of by their positions.

    Loading raises:
        BadInput: if the state is of other parameters than the optimizer has.
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
        odd = sorted(set(wanted) ^ set(position))
        raise BadInput(
            f"the checkpoint's optimizer state is of {len(position)} parameters, the model trains "
            f"{len(wanted)}; first that "
            f"differs: {odd[0]}. Resume with the configuration of the run that wrote it."
        )
    groups = [
        {**saved, "params": [position[name] for name in group["param_names"]], "param_names": group["param_names"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}
