"""Trained blocks of fused experts: parameters (experts, out, in), or (experts, in, out), with a matrix of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from lit_sparse.blocks.grid import Blocks
from lit_sparse.blocks.linear import BlockLinear, DeltaLinear

Choice = dict[str, dict[int, Blocks]]
"""The blocks of each expert, by the name of the parameter in its module and the expert's number."""


class Part(NamedTuple):
    """The trained blocks of one expert's matrix.

    Attributes:
        name: Of the matrix, in its module: the parameter's name and the expert's number, as in `down_proj[3]`.
        tensor: The fused parameter, in which the matrix has the place `number`.
        transposed: Whether the parameter is (experts, in, out).
        blocks: Which blocks.
        master: Their trainable values, (N, h, w).
    """

    name: str
    tensor: nn.Parameter
    number: int
    transposed: bool
    blocks: Blocks
    master: nn.Parameter


class BlockExperts(nn.Module):
    """A module of fused experts with trained blocks, in place or as a difference to the unchanged base.

    The experts compute as they did, by whichever implementation transformers chose, with tensors that have a graph to
    the blocks in the place of their parameters. So the backward pass forms the gradient of a whole tensor, in its
    dtype, and reduces it to the blocks at once: one tensor at a time is held. As a difference (`delta`), the forward
    pass adds the blocks to a copy of the tensor, which lives until that tensor's backward pass, rounded to its dtype.

    Args:
        base: The module whose parameters are replaced.
        choice: The blocks to train.
        transposed: Whether a parameter is (experts, in, out), by its name.
        delta: Leave the parameters unchanged.

    Attributes:
        base: The original module. Its parameters are frozen; in place, they always hold the current block values.
        blocks: For each parameter and expert with blocks, the trainable fp32 master (N, h, w): of the blocks in place,
            of their difference to the base, which starts at zero, for `delta`; zeros past a ragged end.
    """

    def __init__(self, base: nn.Module, choice: Choice, transposed: Mapping[str, bool], delta: bool) -> None:
        super().__init__()
        self.base, self.choice, self.transposed, self.delta = base, choice, transposed, delta
        self.blocks = nn.ParameterDict()
        for name, of_experts in choice.items():
            for number, blocks in of_experts.items():
                weight = _matrix(base.get_parameter(name).detach(), number, transposed[name])
                values = blocks.read(weight)
                self.blocks[f"{name}-{number}"] = nn.Parameter(torch.zeros_like(values) if delta else values)
        # Small checkpoints hold the masters only: loading must bring the parameters up to date.
        self.register_load_state_dict_post_hook(lambda module, _keys: None if module.delta else module.write())

    def parts(self) -> Iterator[Part]:
        """Yield the trained part of each expert that has blocks."""
        for name, of_experts in self.choice.items():
            tensor, transposed = self.base.get_parameter(name), self.transposed[name]
            for number, blocks in of_experts.items():
                yield Part(f"{name}[{number}]", tensor, number, transposed, blocks, self.blocks[f"{name}-{number}"])

    def write(self) -> None:
        """Write the masters into the parameters, cast to their dtype; call it once for `delta`, after training."""
        for part in self.parts():
            weight = _matrix(part.tensor.detach(), part.number, part.transposed)
            part.blocks.write(weight, part.blocks.read(weight) + part.master if self.delta else part.master)

    def forward(self, *args: Any, **options: Any) -> Any:
        if not self.delta and not torch.is_grad_enabled():
            return self.base(*args, **options)
        return functional_call(self.base, {name: self._tensor(name) for name in self.choice}, args, options)

    def _tensor(self, name: str) -> Tensor:
        chosen = self.choice[name]
        masters = [self.blocks[f"{name}-{number}"] for number in chosen]
        return _WithBlocks.apply(self.base.get_parameter(name), chosen, self.transposed[name], self.delta, *masters)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{sum(len(part.master) for part in self.parts())} blocks{' beside the base' * self.delta}"


def _matrix(tensor: Tensor, number: int, transposed: bool) -> Tensor:
    return tensor[number].t() if transposed else tensor[number]


class _WithBlocks(torch.autograd.Function):
    # The tensor with a graph to the masters; in place it holds their values already.

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, chosen: Mapping[int, Blocks], transposed: bool, delta: bool, *masters: Tensor
    ) -> Tensor:
        ctx.chosen, ctx.transposed = chosen, transposed
        if not delta:
            return tensor.view_as(tensor)
        out = tensor.clone()
        for (number, blocks), master in zip(chosen.items(), masters, strict=True):
            weight = _matrix(out, number, transposed)
            blocks.write(weight, blocks.read(weight) + master)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grads
        parts = [blocks.read(_matrix(gradient, n, ctx.transposed)) for n, blocks in ctx.chosen.items()]
        return None, None, None, None, *parts


def chosen_blocks(model: nn.Module) -> dict[str, Blocks]:
    """Return the blocks that are trained in `model`, by name of the linear layer or expert."""
    found: dict[str, Blocks] = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear | DeltaLinear):
            found[name] = module.chosen
        elif isinstance(module, BlockExperts):
            found |= {f"{name}.{part.name}": part.blocks for part in module.parts()}
    return found
