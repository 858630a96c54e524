"""Linear layers of whose weight some rows times some columns are trained, in place (LoSiA, arXiv 2507.04487).

Rows and columns are those of the weight as it is stored. Their product is a dense matrix, so that its gradient is one
product of small dense matrices, and only the input's columns that it reads are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import has_values
from lit_sparse.blocks.linear import InPlaceLinear, in_precision
from lit_sparse.entries.scores import top_entries
from lit_sparse.optim import device_of, full_tensor, part_of
from lit_sparse.ranks import all_reduce_mean, of_first_rank


class SubnetLinear(InPlaceLinear):
    """A frozen linear layer of which a subnet, some rows times some columns, is trained and written into its weight.

    Attributes:
        weight, bias: The original layer's own parameters, frozen; `weight` always holds the current values.
        rows, columns: Those of the weight as it is stored, (R,) and (C,) int32, sorted.
        subnet: Their trainable fp32 master, (R, C).
        observe: Called with each whole gradient of the weight, as it is stored, in the dtype of the products; while it
            is set, the whole input is kept for the backward pass.
    """

    def __init__(self, linear: nn.Linear | Conv1D, rows: Tensor, columns: Tensor) -> None:
        super().__init__(linear)
        self.observe: Callable[[Tensor], None] | None = None
        for name, places in (("rows", rows), ("columns", columns)):
            self.register_buffer(name, places.to(device_of(linear.weight), torch.int32), persistent=False)
        self.subnet = nn.Parameter(self._read())
        # Small checkpoints hold the masters only: loading must bring the weight up to date.
        self.register_load_state_dict_post_hook(lambda module, _keys: module.write())

    @property
    def outputs(self) -> Tensor:
        """The layer's outputs that the subnet reaches."""
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> Tensor:
        """The layer's inputs that the subnet reads."""
        return self.rows if self.transposed else self.columns

    @property
    def positions(self) -> Tensor:
        """Positions of the subnet's entries in the weight, row by row: (R * C,) int32, sorted."""
        return (self.rows[:, None] * self.get_parameter("weight").shape[1] + self.columns).flatten()

    def _read(self) -> Tensor:
        whole = full_tensor(self.get_parameter("weight").detach())
        return whole[self.rows[:, None], self.columns].to(torch.promote_types(whole.dtype, torch.float32))

    @torch.no_grad()
    def choose(self, rows: Tensor, columns: Tensor) -> None:
        """Train another subnet of the same size from now on, from what the weight holds. All ranks must call it."""
        self.rows, self.columns = rows.to(self.rows), columns.to(self.columns)
        self.subnet.copy_(self._read())

    @torch.no_grad()
    def write(self) -> None:
        """Write the master into the weight, cast to its dtype; of a sharded weight, into this rank's shard."""
        weight = self.get_parameter("weight")
        part = part_of(weight).values
        rows, columns, values = (t.detach().to(part.device) for t in (self.rows, self.columns, self.subnet))
        if isinstance(weight, DTensor):
            rows, columns = (own - start for own, start in zip((rows, columns), part_of(weight).start, strict=True))
            here, there = ((own >= 0) & (own < side) for own, side in zip((rows, columns), part.shape, strict=True))
            rows, columns, values = rows[here], columns[there], values[here][:, there]
        part[rows[:, None], columns] = values.to(part.dtype)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_OI, bias = in_precision(x, *self.gathered)
        if not torch.is_grad_enabled():
            return F.linear(x, weight_OI, bias)
        return _Subnet.apply(x, weight_OI, bias, self.subnet, self)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        return f"{tuple(self.matrix.shape)}, {len(self.outputs)} outputs of {len(self.inputs)} inputs trained"


class _Subnet(torch.autograd.Function):
    # Shapes: T tokens, O out, I in, o and i those of the subnet, R rows and C columns as the weight is stored.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias: Tensor | None, subnet_RC: Tensor, layer: SubnetLinear
    ) -> Tensor:
        # The weight already holds the master's values; it is an argument so that autograd gives it a gradient.
        x_TI = x.detach().reshape(-1, x.shape[-1])
        ctx.whole, ctx.layer, ctx.shape = layer.observe is not None, layer, x.shape
        ctx.save_for_backward(x_TI if ctx.whole else x_TI.index_select(1, layer.inputs), weight_OI)
        return F.linear(x, weight_OI, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept, weight_OI), layer = ctx.saved_tensors, ctx.layer
        dy_TO = dys[0].reshape(-1, dys[0].shape[-1])
        dx = (dy_TO @ weight_OI).view(ctx.shape) if ctx.needs_input_grad[0] else None
        if ctx.whole:
            whole = kept.t() @ dy_TO if layer.transposed else dy_TO.t() @ kept  # as the weight is stored
            subnet_RC = whole.index_select(0, layer.rows).index_select(1, layer.columns)
            if layer.observe is not None:
                layer.observe(whole)
        else:
            dy_To = dy_TO.index_select(1, layer.outputs)
            subnet_RC = kept.t() @ dy_To if layer.transposed else dy_To.t() @ kept
        return dx, None, None, subnet_RC.to(layer.subnet.dtype), None


class Importance:
    """How much each entry of a weight matters to the loss, averaged over steps (LoSiA, arXiv 2507.04487).

    Of a step's gradient g and the weight w it is |w g - (w g)^2 / 2|, the second-order estimate of what removing the
    entry does. Kept are its moving average, and that of its distance from the average; both begin at zero.

    Args:
        decay: Share of the averages that a step keeps.
        shape: The weight's shape, (m, n).
        device: Where the averages are kept.

    Attributes:
        mean, spread: The two averages, (m, n) fp32.
        steps: Steps that they are of.
        window: The gradient of the current step, likewise.
    """

    def __init__(self, decay: float, shape: torch.Size, device: torch.device) -> None:
        self.decay, self.steps = decay, 0
        self.mean, self.spread, self.window = (torch.zeros(shape, device=device) for _ in range(3))

    def add(self, gradient: Tensor) -> None:
        """Add the gradient (m, n) of one batch, of this rank."""
        self.window += gradient

    def end_step(self, weight: Tensor) -> None:
        """Take what was added as the gradient of one step at `weight` (m, n), which may be sharded.

        Every rank must call it, in the same order of weights.
        """
        change = all_reduce_mean(self.window).mul_(full_tensor(weight.detach()))
        now = change.sub_(change.square().div_(2)).abs_()
        self.mean.lerp_(now, 1 - self.decay)
        self.spread.lerp_(now.sub_(self.mean).abs_(), 1 - self.decay)
        self.window.zero_()
        self.steps += 1

    def best(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return so many rows and columns whose subnet holds much of mean * spread, int32, sorted; alike on all ranks.

        The best of three greedy choices: both sides by their sums; the rows so, and the columns by their sums within
        those; and the other way round.
        """
        scores = self.mean * self.spread
        of_rows, of_columns = top_entries(scores.sum(1), rows), top_entries(scores.sum(0), columns)
        within_rows = top_entries(scores.index_select(0, of_rows).sum(0), columns)
        within_columns = top_entries(scores.index_select(1, of_columns).sum(1), rows)
        choices = [(of_rows, of_columns), (of_rows, within_rows), (within_columns, of_columns)]
        held = torch.stack([scores.index_select(0, r).index_select(1, c).sum() for r, c in choices])
        best = choices[int(held.argmax())] if has_values(held) else choices[0]
        return of_first_rank(best[0]), of_first_rank(best[1])

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps, which `load` takes."""
        return {"mean": self.mean, "spread": self.spread, "steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict` of another."""
        self.steps = state["steps"]
        self.mean.copy_(state["mean"])
        self.spread.copy_(state["spread"])
