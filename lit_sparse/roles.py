"""Roles of a language model's parameters, and optimizers that have a rule for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lit_sparse.anatomy import classification_head, decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, local_shard, trainable
from lit_sparse_kernels.adamw_arguments import Rule

Role = Literal["matrix", "embed", "head", "vector"]
"""Of a parameter: a `matrix` of a decoder layer (or a stack of them, such as fused experts), `embed` for embeddings and
other matrices outside the layers, the `head`, or a `vector` (a norm, a bias, a kernel (C, 1, K) of channels)."""

Policy = Literal["layers", "layers_and_head"]
"""Which parameters are matrices: those of decoder layers, or the head's too, as a `matrix` in place of a `head`."""

ORDER: tuple[Role, ...] = ("matrix", "embed", "head", "vector")


def partition_params(model: nn.Module, policy: Policy = "layers") -> list[dict[str, Any]]:
    """Return the trainable parameters of `model` in one group for each role, in the order of `ORDER`.

    Each parameter is in one group, once, in the model's order; a tied head is an embedding. A group has `role`,
    `params` and `param_names`, and may be empty.

    Args:
        model: A Hugging Face language model or classifier; its parameters may be DTensors.
        policy: Whether the head is a matrix like those of the decoder layers. GaLore is far worse so: its perplexity at
            60M weights is 38.91 with the head and 34.88 without (arXiv 2502.07752).

    Raises:
        BadInput: if the decoder layers of `model` are not found.
    """
    roles, named = roles_of(model, policy), trainable(model)
    return [
        {
            "role": role,
            "params": [parameter for _, parameter in named if roles[parameter] == role],
            "param_names": [name for name, parameter in named if roles[parameter] == role],
        }
        for role in ORDER
    ]


def roles_of(model: nn.Module, policy: Policy = "layers") -> dict[nn.Parameter, Role]:
    """Return the role of each parameter of `model`, frozen ones too; `partition_params` says more.

    Raises:
        BadInput: if the decoder layers of `model` are not found.
    """
    inside = {parameter for layer in decoder_layers(model) for parameter in layer.parameters()}
    embedded = set(model.get_input_embeddings().parameters())  # pyright: ignore[reportCallIssue]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    heads = [output] if output is not None else [model.get_submodule(name) for name in classification_head(model)]
    head = {parameter for module in heads for parameter in module.parameters()} - embedded
    of_head: Role = "head" if policy == "layers" else "matrix"

    def role(name: str, parameter: nn.Parameter) -> Role:
        kernel = parameter.ndim > 2 and min(parameter.shape[-2:]) == 1  # Mamba and LFM2 have a filter for each channel
        if parameter.ndim < 2 or kernel or name.endswith("bias"):
            return "vector"
        return "matrix" if parameter in inside else of_head if parameter in head else "embed"

    return {parameter: role(name, parameter) for name, parameter in model.named_parameters()}


def sizes_of(model: nn.Module) -> dict[Role, int]:
    """Return the number of trainable weights of each role."""
    groups = partition_params(model)
    return {group["role"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}


class ByRole(AdamW, ABC):
    """An optimizer with a rule of its own for parameters of some roles, and AdamW for the others.

    State, masters and masks are AdamW's. Blocks of a matrix (SMT) are parameters like others, which their method writes
    into the weight after the step.

    Attributes:
        roles: The role of each parameter; a strategy sets it in `regrouped`.
        lr_factor: Learning rate of AdamW's parameters, over that of the others.
    """

    roles: Mapping[Any, Role] = {}
    lr_factor: float = 1.0

    @abstractmethod
    def takes(self, parameter: Tensor) -> bool:
        """Return whether the rule is for this parameter."""

    @abstractmethod
    def step_own(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        """Take a step of the parameters that the rule is for; they have a gradient and a state.

        The values to change are those of `exact`; the caller then writes them into the parameters.
        """

    def check(self, method: str) -> None:
        """Refuse parameters of which the rule takes none.

        Raises:
            BadInput: naming `method`.
        """
        if not any(self.takes(parameter) for group in self.param_groups for parameter in group["params"]):
            raise BadInput(
                f"{method}: none of the parameters that are trained is one that it has a rule for, and vectors take "
                f"AdamW; leave {method} out, or train matrices."
            )

    def scatter(self, *args: Any, **options: Any) -> None:
        """Write no blocks: see the class."""

    def exact(self, parameter: Tensor) -> Tensor:
        """Return the fp32 master of a parameter, which is itself where it is in fp32; a DTensor if that is one."""
        return self._state_of(parameter).get("master", parameter.detach())

    def _step_whole(self, parameters: Sequence[Tensor], rule: Rule) -> None:
        own = [parameter for parameter in parameters if self.takes(parameter)]
        rest = [parameter for parameter in parameters if not self.takes(parameter)]
        super()._step_whole(rest, replace(rule, lr=rule.lr * self.lr_factor))
        if not own:
            return
        for parameter in own:
            self._state_of(parameter)["step"] += 1
        self.step_own(own, rule)
        for parameter in own:
            if (exact := self.exact(parameter)).dtype != parameter.dtype:
                local_shard(parameter).copy_(local_shard(exact))
