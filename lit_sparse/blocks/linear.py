"""Linear layers with trained blocks: in place, or as a difference added to an unchanged base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import matrix
from lit_sparse.blocks.grid import Blocks, Size
from lit_sparse.optim import device_of
from lit_sparse_kernels.block_delta import block_delta, block_delta_input_grad
from lit_sparse_kernels.block_grad import block_grad
from lit_sparse_kernels.pack_columns import pack_columns, unpack_columns


class SharedInput:
    """Compute the layers with trained blocks that read the same input together, in the first one that is called.

    So the input's columns are packed and saved once, and one autograd node has all outputs: its backward computes the
    gradients of all blocks in one product, and accumulates the layers' input gradients in place.

    Args:
        users: Blocks of each layer, in the order in which the layers join.
        inputs: Size of the input's last dimension, K.

    Attributes:
        members: The layers, in the order in which they joined.
        columns: Block columns of the input that the members' blocks read, sorted.
        available: Number of block columns of the input.
        places: Each member's blocks as (row, position of the column among the packed ones), int32 (N, 2).
        alike: For each block size, the members that have it, and all their blocks as (position of the member in that
            list, row, position of the column), int32 (N, 3).
    """

    def __init__(self, users: Sequence[Blocks], inputs: int) -> None:
        self.width = users[0].size[1]
        self.available = -(-inputs // self.width)
        self.columns = torch.cat([blocks.index[:, 1] for blocks in users]).unique()
        self.places = [self._places(blocks) for blocks in users]
        self.sizes = [blocks.size for blocks in users]
        self.alike = [self._alike(size) for size in dict.fromkeys(self.sizes)]
        self.members: list[BlockLinear | DeltaLinear] = []
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def _places(self, blocks: Blocks) -> Tensor:
        places = torch.searchsorted(self.columns, blocks.index[:, 1].contiguous())
        return torch.stack([blocks.index[:, 0], places.int()], dim=1)

    def _alike(self, size: Size) -> tuple[list[int], Tensor]:
        members = [number for number, other in enumerate(self.sizes) if other == size]
        return members, torch.cat([pad(self.places[m], (1, 0), value=n) for n, m in enumerate(members)])

    def join(self, member: BlockLinear | DeltaLinear) -> int:
        """Add a layer, in the order of `users`, and return its number."""
        self.members.append(member)
        return len(self.members) - 1

    def output(self, member: int, x: Tensor) -> Tensor:
        """Return the output of a member for `x` (..., K); the first call with this `x` computes those of all members.

        Tensors are compared by identity, which holds for the q, k and v (or gate and up) of a transformers layer.
        """
        if self._input is not x or member not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self.members[0].outputs(x)))
        output = self._outputs.pop(member)
        if not self._outputs:  # all members have theirs: keep no activation alive
            self._input = None
        return output

    def pack(self, x: Tensor) -> Tensor:
        """Return copies of the needed columns of `x` (..., K), (tokens, columns * width)."""
        if self.columns.device != x.device:
            with torch.inference_mode(False):  # the first pass may be a validation: autograd refuses inference tensors
                self.columns = self.columns.to(x.device)
                self.places = [places.to(x.device) for places in self.places]
                self.alike = [(members, placed.to(x.device)) for members, placed in self.alike]
        return pack_columns(x.detach().reshape(-1, x.shape[-1]), self.columns, self.width)

    def gradients(self, dys_TO: Sequence[Tensor], packed_TP: Tensor) -> list[Tensor]:
        """Return the gradient (N, h, w) of each member's blocks.

        Args:
            dys_TO: Gradient of each member's output, (tokens, out).
            packed_TP: The packed input columns, (tokens, columns * width).
        """
        found: dict[int, Tensor] = {}
        for members, placed in self.alike:
            gradients = block_grad([dys_TO[m] for m in members], packed_TP, placed, self.sizes[members[0]])
            found |= zip(members, gradients.split([len(self.places[m]) for m in members]), strict=True)
        return [found[member] for member in range(len(dys_TO))]


class InPlaceLinear(nn.Module):
    """A frozen linear layer, parts of whose weight are trained elsewhere and written into it.

    Attributes:
        weight, bias: The original layer's own parameters, frozen.
        transposed: Whether the weight is stored as (in, out), as GPT-2's Conv1D does.
    """

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._original = (linear,)  # in a tuple, since it is no submodule
        self.transposed = isinstance(linear, Conv1D)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def gathered(self) -> tuple[Tensor, Tensor | None]:
        """The weight as (out, in) and the bias, as the forward pass reads them.

        Sharded ones are gathered by FSDP2, for the layer that it was given: the original one.
        """
        if not isinstance(self.weight, DTensor):
            return self.matrix, self.bias
        (linear,) = self._original
        return matrix(linear), linear.bias


class BlockLinear(InPlaceLinear):
    """A frozen linear layer with trained blocks, written into its weight.

    Attributes:
        weight, bias: The original layer's own parameters, frozen; `weight` always holds the current block values.
        blocks: Trainable fp32 master of the blocks, (N, h, w); zeros past a ragged end.
    """

    def __init__(self, linear: nn.Linear | Conv1D, chosen: Blocks, shared: SharedInput) -> None:
        super().__init__(linear)
        self.chosen, self.shared = chosen, shared
        self.number = shared.join(self)
        self.blocks = nn.Parameter(chosen.read(matrix(linear).detach()))
        # Small checkpoints hold the masters only: loading must bring the weight up to date.
        self.register_load_state_dict_post_hook(lambda module, _keys: module.write())

    def write(self) -> None:
        """Write the master into the weight, cast to its dtype; of a sharded weight, into this rank's shard."""
        self.chosen.write(self.matrix, self.blocks)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            return self.shared.output(self.number, x)
        return F.linear(*in_precision(x, *self.gathered))

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of all layers that share the input, in the order of `members`."""
        shared = self.shared
        members: list[BlockLinear] = shared.members  # pyright: ignore[reportAssignmentType] - alike in a group
        matrices, biases = zip(*(member.gathered for member in members), strict=True)
        x, *linears = in_precision(x, *matrices, *biases)
        masters = [member.blocks for member in members]
        return _SharedBlocks.apply(x, shared.pack(x), shared, *linears, *masters)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{tuple(self.matrix.shape)}, {len(self.blocks)} blocks of {self.chosen.size}"


def in_precision(x: Tensor, *tensors: Tensor | None) -> Any:
    """Return all tensors in the dtype of autocast if it is on, else unchanged.

    Explicit, since the backward passes below run outside autocast: the saved tensors must have that dtype already.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x, *tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in (x, *tensors)]


class _SharedBlocks(torch.autograd.Function):
    # Shapes: T tokens, O out, K in, P packed in, N blocks of h x w; O differs from layer to layer.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed_TP: Tensor, shared: SharedInput, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        # Weights, biases, masters. The weights already hold the masters' values; the masters are arguments so that
        # autograd gives them gradients.
        layers = len(tensors) // 3
        weights, biases = tensors[:layers], tensors[layers : 2 * layers]
        ctx.save_for_backward(packed_TP, *weights)  # not x: only the packed columns stay alive until the backward pass
        ctx.shared = shared
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))  # pyright: ignore

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed_TP, *weights = ctx.saved_tensors
        dys_TO = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, masters = None, [None] * len(dys)
        if ctx.needs_input_grad[0]:
            dx_TK = dys_TO[0] @ weights[0]  # accumulated in place: autograd would hold one (T, K) for each layer
            for dy_TO, weight_OK in zip(dys_TO[1:], weights[1:], strict=True):
                dx_TK.addmm_(dy_TO, weight_OK)
            dx = dx_TK.view(*dys[0].shape[:-1], -1)
        if any(ctx.needs_input_grad[3:]):
            masters = ctx.shared.gradients(dys_TO, packed_TP)
        return dx, None, None, *[None] * (2 * len(dys)), *masters


class DeltaLinear(nn.Module):
    """A linear layer of any kind, quantised for example, whose output is the base's plus that of trained blocks.

    Attributes:
        base: The original layer, unchanged.
        blocks: Trainable fp32 difference to the base's blocks, (N, h, w); starts at zero.
        dropout: Probability with which a value that the blocks read is 0 in training; the base reads all.
    """

    def __init__(
        self, linear: nn.Module, shape: tuple[int, int], chosen: Blocks, shared: SharedInput, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base, self.shape, self.dropout = linear, shape, dropout
        self.chosen, self.shared = chosen, shared
        self.number = shared.join(self)
        weight = next(linear.parameters())
        # A quantised weight is packed into integers, of which no floating dtype can be derived.
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        self.blocks = nn.Parameter(torch.zeros(len(chosen.index), *chosen.size, dtype=dtype, device=device_of(weight)))

    @property
    def weight(self) -> nn.Parameter:
        """The base's own weight, whose device and dtype some models ask for."""
        return self.base.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's own bias, which is part of its output already."""
        return self.base._parameters.get("bias")

    def write(self) -> None:
        """Add the difference to the base's weight, in fp32, rounded once to its dtype. Call it once, after training."""
        weight = matrix(self.base)  # pyright: ignore[reportArgumentType]
        self.chosen.write(weight, self.chosen.read(weight.detach()) + self.blocks)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.shared.output(self.number, x)

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of all layers that share the input, in the order of `members`."""
        shared, members = self.shared, self.shared.members
        bases = [member.base(x) for member in members]  # pyright: ignore[reportCallIssue]
        x = x.to(bases[0].dtype)
        packed_TP, factor_TP = shared.pack(x), None
        if self.dropout and self.training:  # of the columns that are read, alike for all members
            factor_TP = F.dropout(torch.ones_like(packed_TP), self.dropout)
            packed_TP = packed_TP * factor_TP
        masters = [member.blocks for member in members]
        return _AddBlocks.apply(x, packed_TP, factor_TP, shared, *bases, *masters)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.shape}, {len(self.blocks)} blocks of {self.chosen.size} beside the base"


class _AddBlocks(torch.autograd.Function):
    # Shapes: T tokens, O out, K in, P packed in, N blocks of h x w; O differs from layer to layer.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed_TP: Tensor, factor_TP: Tensor | None, shared: SharedInput, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        # The bases' outputs, then the blocks. The packed columns are multiplied by the factor, of dropout, already.
        ys, deltas = tensors[: len(tensors) // 2], [delta.to(x.dtype) for delta in tensors[len(tensors) // 2 :]]
        ctx.save_for_backward(packed_TP, factor_TP, *deltas)
        ctx.shared, ctx.inputs = shared, x.shape
        parts = zip(ys, deltas, shared.places, strict=True)
        flat = ((y.reshape(-1, y.shape[-1]), y, delta, places) for y, delta, places in parts)
        # Not view: autograd forbids to change a view that a Function returns in place, as Falcon does.
        shaped = torch.ops.aten._unsafe_view.default
        return tuple(shaped(block_delta(y_TO, packed_TP, delta, places), y.shape) for y_TO, y, delta, places in flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed_TP, factor_TP, *deltas = ctx.saved_tensors
        shared: SharedInput = ctx.shared
        dys_TO = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, d_deltas = None, [None] * len(dys)
        if ctx.needs_input_grad[0]:
            parts = zip(dys_TO, deltas, shared.places, strict=True)
            d_packed = sum(block_delta_input_grad(*part, packed_TP.shape[1]) for part in parts)
            d_packed = d_packed if factor_TP is None else d_packed * factor_TP
            dx = unpack_columns(d_packed, shared.columns, shared.width, ctx.inputs[-1]).view(ctx.inputs)  # pyright: ignore
        if any(ctx.needs_input_grad[4 + len(dys) :]):
            d_deltas = shared.gradients(dys_TO, packed_TP)
        return dx, None, None, None, *dys, *d_deltas
