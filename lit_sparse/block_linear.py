"""Linear layers with trained blocks: in place, or as a difference to a base that is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import matrix
from lit_sparse.blocks import Blocks, Size
from lit_sparse_kernels.block_delta import block_delta, block_delta_input_grad
from lit_sparse_kernels.block_grad import block_grad
from lit_sparse_kernels.pack_columns import pack_columns, unpack_columns


class SharedColumns:
    """The input columns that some linear layers with one input need together, packed once a forward pass."""

    def __init__(self, users: Sequence[Blocks], inputs: int) -> None:
        self.width = users[0].size[1]
        self.available = -(-inputs // self.width)
        self.columns = torch.cat([blocks.index[:, 1] for blocks in users]).unique()
        self._users = len(users)
        self._left = 0
        self._input: Tensor | None = None
        self._packed: Tensor | None = None

    def places(self, blocks: Blocks) -> Tensor:
        """The blocks as (row, place of the column among the packed ones)."""
        return torch.stack(
            [blocks.index[:, 0], torch.searchsorted(self.columns, blocks.index[:, 1].contiguous())], dim=1
        )

    def pack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The packed columns of `x` (..., K), (tokens, columns x width) in `dtype`; one copy for all users of `x`."""
        if self._input is not x:
            self.columns = self.columns.to(x.device)
            self._packed = pack_columns(x.detach().reshape(-1, x.shape[-1]), self.columns, self.width).to(dtype)
            self._input, self._left = x, self._users
        packed = self._packed
        self._left -= 1
        if not self._left:  # the last user has it: autograd alone keeps it from here on
            self._input = self._packed = None
        assert packed is not None
        return packed


class BlockLinear(nn.Module):
    """A frozen linear layer with trained blocks.

    Attributes:
        weight, bias: The original layer's own parameters, frozen; `weight` always holds the blocks' present values.
        blocks: Trainable fp32 master of the blocks, (N, h, w); zeros past a ragged end.
    """

    def __init__(self, linear: nn.Linear | Conv1D, chosen: Blocks, shared: SharedColumns) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.transposed = isinstance(linear, Conv1D)
        self.chosen, self.shared = chosen, shared
        self.places = shared.places(chosen)
        self.blocks = nn.Parameter(chosen.read(self.matrix.detach()))
        self.register_load_state_dict_post_hook(lambda module, _keys: module.write())

    @property
    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.t() if self.transposed else self.weight

    def write(self) -> None:
        """Write the master into the weight, cast to its dtype."""
        self.chosen.write(self.matrix, self.blocks)

    @torch.compiler.disable  # what q, k and v share between their calls is state that cannot be traced
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, bias, given = self.matrix, self.bias, x
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        packed = self.shared.pack(given, x.dtype)  # of the very tensor that the others are given too
        return _BlockLinear.apply(x, weight, bias, self.blocks, packed, self.places, self.chosen.size)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{tuple(self.matrix.shape)}, {len(self.places)} blocks of {self.chosen.size}"


class _BlockLinear(torch.autograd.Function):
    # Shapes: T tokens, O out, K in, P packed in, N blocks of h x w.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OK: Tensor,
        bias_O: Tensor | None,
        _master_Nhw: Tensor,
        packed_TP: Tensor,
        places_N2: Tensor,
        size: Size,
    ) -> Tensor:
        # The weight already holds the master's values; the master is an argument so that autograd gives it a gradient.
        ctx.save_for_backward(packed_TP, weight_OK)
        ctx.places, ctx.size = places_N2, size
        return F.linear(x, weight_OK, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed_TP, weight_OK = ctx.saved_tensors
        dx = dy @ weight_OK if ctx.needs_input_grad[0] else None
        d_master = None
        if ctx.needs_input_grad[3]:
            d_master = block_grad([dy.reshape(-1, dy.shape[-1])], packed_TP, first_layer(ctx.places), ctx.size)
        return dx, None, None, d_master, None, None, None


class DeltaLinear(nn.Module):
    """A linear layer of any kind (a quantised one, say), to whose output trained blocks add their part.

    Attributes:
        base: The original layer, untouched.
        blocks: Trainable fp32 difference of the blocks to the base's, (N, h, w), zero at first.
    """

    def __init__(self, linear: nn.Module, shape: tuple[int, int], chosen: Blocks, shared: SharedColumns) -> None:
        super().__init__()
        self.base, self.shape = linear, shape
        self.chosen, self.shared = chosen, shared
        self.places = shared.places(chosen)
        weight = next(linear.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        self.blocks = nn.Parameter(torch.zeros(len(chosen.index), *chosen.size, dtype=dtype, device=weight.device))

    def write(self) -> None:
        """Add the difference to the base's weight, in fp32, rounded once to its dtype. For the end of training."""
        weight = matrix(self.base)  # pyright: ignore[reportArgumentType]
        self.chosen.write(weight, self.chosen.read(weight.detach()) + self.blocks)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = self.base(x)
        packed, shared, size = self.shared.pack(x, out.dtype), self.shared, self.chosen.size
        return _AddBlocks.apply(out, x.to(out.dtype), self.blocks, packed, shared.columns, self.places, size)  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.shape}, {len(self.places)} blocks of {self.chosen.size} beside the base"


class _AddBlocks(torch.autograd.Function):
    # Shapes: T tokens, O out, K in, P packed in, N blocks of h x w.

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        delta_Nhw: Tensor,
        packed_TP: Tensor,
        columns_C: Tensor,
        places_N2: Tensor,
        size: Size,
    ) -> Tensor:
        delta_Nhw = delta_Nhw.to(y.dtype)
        ctx.save_for_backward(packed_TP, delta_Nhw, columns_C)
        ctx.places, ctx.size, ctx.inputs = places_N2, size, x.shape
        return block_delta(y.reshape(-1, y.shape[-1]), packed_TP, delta_Nhw, places_N2).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed_TP, delta_Nhw, columns_C = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        dx = d_delta = None
        if ctx.needs_input_grad[1]:
            d_packed = block_delta_input_grad(dy_TO, delta_Nhw, ctx.places, packed_TP.shape[1])
            dx = unpack_columns(d_packed, columns_C, ctx.size[1], ctx.inputs[-1]).view(ctx.inputs)
        if ctx.needs_input_grad[2]:
            d_delta = block_grad([dy_TO], packed_TP, first_layer(ctx.places), ctx.size)
        return dy, dx, d_delta, None, None, None, None


def first_layer(places_N2: Tensor) -> Tensor:
    return torch.nn.functional.pad(places_N2, (1, 0))
