"""Linear layers of whose weight single entries are trained, in place.

An entry is known by its position in the weight as it is stored, row by row: an int32, since no matrix has 2^31 entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lit_sparse.blocks.linear import InPlaceLinear, in_precision
from lit_sparse.optim import device_of, full_tensor, part_of


class EntryLinear(InPlaceLinear):
    """A frozen linear layer with trained entries, written into its weight.

    The backward pass forms the whole gradient of this one weight, keeps those of the entries, and frees it. Above a
    share of about 0.15 % of the entries that is faster than a product for each of them.

    Attributes:
        weight, bias: The original layer's own parameters, frozen; `weight` always holds the current values.
        index: Positions of the entries, (N,) int32, sorted.
        entries: Their trainable fp32 masters, (N, 1): of two dimensions, so that weight decay is that of the weight.
        observe: Called with each whole gradient of the weight, as it is stored, in the dtype of the products.
    """

    def __init__(self, linear: nn.Linear | Conv1D, index: Tensor) -> None:
        super().__init__(linear)
        self.observe: Callable[[Tensor], None] | None = None
        self.register_buffer("index", index.to(device_of(linear.weight), torch.int32), persistent=False)
        self.entries = nn.Parameter(read_entries(linear.weight, self.index))
        # Small checkpoints hold the masters only: loading must bring the weight up to date.
        self.register_load_state_dict_post_hook(lambda module, _keys: module.write())

    @torch.no_grad()
    def choose(self, index: Tensor, values: Tensor | None = None) -> None:
        """Train the entries at `index` (N,) from now on; the parameter stays the same object if N does.

        Args:
            values: Their masters, (N, 1); None takes what the weight holds.
        """
        self.index = index.to(self.index.device, torch.int32)
        if values is None:
            values = read_entries(self.get_parameter("weight"), self.index)
        if values.shape == self.entries.shape:
            self.entries.copy_(values)
        else:
            self.entries = nn.Parameter(values)

    def write(self) -> None:
        """Write the masters into the weight, cast to its dtype; of a sharded weight, into this rank's shard."""
        write_entries(self.get_parameter("weight"), self.index, self.entries)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OK, bias = in_precision(x, *self.gathered)
        if not torch.is_grad_enabled():
            return F.linear(x, weight_OK, bias)
        return _Entries.apply(x, weight_OK, bias, self.entries, self)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{tuple(self.matrix.shape)}, {len(self.index)} entries"


class _Entries(torch.autograd.Function):
    # Shapes: T tokens, O out, K in, N entries.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OK: Tensor, bias: Tensor | None, entries_N1: Tensor, layer: EntryLinear
    ) -> Tensor:
        # The weight already holds the masters' values; they are an argument so that autograd gives them gradients.
        ctx.save_for_backward(x, weight_OK)
        ctx.layer = layer
        return F.linear(x, weight_OK, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x, weight_OK), layer = ctx.saved_tensors, ctx.layer
        dy_TO, x_TK = dys[0].reshape(-1, dys[0].shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (dy_TO @ weight_OK).view(x.shape) if ctx.needs_input_grad[0] else None
        whole = x_TK.t() @ dy_TO if layer.transposed else dy_TO.t() @ x_TK  # as the weight is stored
        entries = whole.flatten().index_select(0, layer.index).to(layer.entries.dtype)[:, None]
        if layer.observe is not None:
            layer.observe(whole)
        return dx, None, None, entries, None


def read_entries(weight: Tensor, index: Tensor) -> Tensor:
    """Return the entries at `index` (N,) of `weight`, (N, 1) in fp32 (fp64 of an fp64 weight).

    A sharded weight is gathered, so that every rank must call it.
    """
    whole = full_tensor(weight.detach())
    values = whole[rows_and_columns(index.to(whole.device), whole.shape[1])]
    return values.to(torch.promote_types(weight.dtype, torch.float32))[:, None]


@torch.no_grad()
def write_entries(weight: Tensor, index: Tensor, values: Tensor) -> None:
    """Write `values` (N, 1) to the entries of `weight` at `index` (N,), cast to its dtype; into this rank's part."""
    part = part_of(weight)
    index, values = (tensor.detach().to(part.values.device) for tensor in (index, values[:, 0]))
    row, column = rows_and_columns(index, weight.shape[1])
    if isinstance(weight, DTensor):
        row, column = row - part.start[0], column - part.start[1]
        rows, columns = part.values.shape
        here = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        row, column, values = row[here], column[here], values[here]
    part.values[row, column] = values.to(part.values.dtype)


def rows_and_columns(index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each position `index` (N,) in a matrix of so many columns, (N,) int32 each."""
    row = index.div(columns, rounding_mode="floor")
    return row, index - row * columns
