"""SMT: train chosen blocks of weight matrices, in place, and nothing else.

Sparse Matrix Tuning, arXiv 2405.15525. The blocks with the largest gradients on the task are found before training;
each has an fp32 master that the optimizer updates and that is written into the weight after every step, so that the
forward is an ordinary linear layer. The backward forms the gradients of the chosen blocks only.

Differences from the authors' code, each on purpose: blocks are scored by mean |gradient| (theirs takes |mean gradient|,
which ranks noise), scoring does not train, biases are kept, and the input columns saved for the backward are packed
copies, shared by the layers that read the same input.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import matrix, replace, shared_inputs, target_linears, weight_count
from lit_sparse.blocks import (
    Blocks,
    Ranking,
    Score,
    ScoreSheet,
    Size,
    automatic_size,
    diagonal_blocks,
    grid,
    random_blocks,
    read_choice,
    top_blocks,
)
from lit_sparse.errors import BadInput
from lit_sparse.strategies.base import Claim, Probe, UpdateStrategy
from lit_sparse_kernels.block_grad import block_grad
from lit_sparse_kernels.pack_columns import pack_columns


@dataclasses.dataclass
class SMT(UpdateStrategy):
    """Train chosen blocks of weight matrices in place (Sparse Matrix Tuning, arXiv 2405.15525).

    Args:
        blocks: How blocks are chosen: `gradient` (largest gradients on the first training batches), `random`,
            `diagonal` (one block per row and column of a grid, arXiv 2506.03230), or a file: a run's
            checkpoints/last.ckpt for that run's blocks, or JSON of the same form.
        trainable_fraction: Share of all the model's weights to train; the blocks lie in `targets` all the same.
        num_blocks: Number of blocks instead; when given, it takes the place of trainable_fraction.
        block_size: `auto` (the largest of 256, 128, ... that divides every target matrix and leaves a choice), one
            number, or height and width. `diagonal` derives its own from the fraction.
        targets: Which linear layers may be trained: roles (q, k, v, qkv, o, gate, up, gate_up, down), endings of
            module names, or `all`.
        score: What makes a gradient large: `abs_mean` (mean of |g| over the block), `mean_abs` (|mean of g|, as the
            authors' code has it), or `l2`.
        ranking: Blocks compete over all matrices (`global`, the paper's) or within each (`per_matrix`).
        selection_batches: Training batches whose gradients are scored; no weight moves meanwhile.
        seed: Seed of `random` blocks.
    """

    blocks: str = "gradient"
    trainable_fraction: float = 0.0084
    num_blocks: int | None = None
    block_size: int | tuple[int, int] | str = "auto"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q", "k", "v", "qkv"])
    score: Score = "abs_mean"
    ranking: Ranking = "global"
    selection_batches: int = 8
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})

    def __post_init__(self) -> None:
        if not 0 < self.trainable_fraction <= 1:
            raise BadInput(
                f"SMT: trainable_fraction is {self.trainable_fraction}; it must lie above 0 and at most at 1."
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise BadInput(f"SMT: num_blocks is {self.num_blocks}; it must be at least 1.")
        if self.selection_batches < 1:
            raise BadInput(f"SMT: selection_batches is {self.selection_batches}; it must be at least 1.")
        numbers = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        if self.block_size != "auto" and not all(isinstance(number, int) and number > 0 for number in numbers):
            raise BadInput(
                f"SMT: block_size is {self.block_size!r}; it must be auto, a whole number, or a height and a width."
            )
        self._swapped: dict[str, tuple[nn.Linear | Conv1D, BlockLinear]] = {}

    def attach(self, model: nn.Module, probe: Probe) -> None:
        targets = target_linears(model, self.targets)
        model.requires_grad_(False)
        self._swap(model, self._choose(model, targets, probe))

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        model.requires_grad_(False)
        self._swap(
            model, {name: Blocks((entry["size"][0], entry["size"][1]), entry["index"]) for name, entry in state.items()}
        )

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        for _, linear in self._swapped.values():
            linear.write()
        return False

    def detach(self, model: nn.Module) -> None:
        for name, (original, linear) in self._swapped.items():
            linear.write()
            replace(model, name, original)
        self._swapped.clear()

    def state_dict(self) -> dict[str, Any]:
        return {name: {"size": list(blocks.size), "index": blocks.index} for name, blocks in self.choice.items()}

    @property
    def choice(self) -> dict[str, Blocks]:
        """The blocks in training, by name of the linear layer."""
        return {name: linear.chosen for name, (_, linear) in self._swapped.items()}

    def _choose(self, model: nn.Module, targets: dict[str, nn.Linear | Conv1D], probe: Probe) -> dict[str, Blocks]:
        matrices = {name: matrix(linear) for name, linear in targets.items()}
        if self.blocks == "diagonal":
            return diagonal_blocks(matrices, self.trainable_fraction * weight_count(model))
        if self.blocks not in ("gradient", "random"):
            return read_choice(Path(self.blocks), matrices)
        size = self._size(model, matrices)
        grids = {name: grid(weight, size) for name, weight in matrices.items()}
        count = self._count(model, size, sum(rows * columns for rows, columns in grids.values()))
        if self.blocks == "random":
            return random_blocks(grids, size, count, self.ranking, self.seed)
        return top_blocks(self._scores(model, targets, size, probe), size, count, self.ranking)

    def _size(self, model: nn.Module, matrices: Mapping[str, Tensor]) -> Size:
        if isinstance(self.block_size, str):
            weights = math.inf if self.num_blocks else self.trainable_fraction * weight_count(model)
            return automatic_size(matrices, weights)
        size = (self.block_size, self.block_size) if isinstance(self.block_size, int) else self.block_size
        for name, weight in matrices.items():
            if size[0] > weight.shape[0] and size[1] > weight.shape[1]:
                shape = " x ".join(map(str, weight.shape))
                raise BadInput(
                    f"SMT: a block of {size[0]} x {size[1]} is larger than {name} ({shape}) on both sides; give "
                    f"a smaller block_size, or auto."
                )
        return size

    def _count(self, model: nn.Module, size: Size, available: int) -> int:
        wanted = self.num_blocks or int(self.trainable_fraction * weight_count(model) / (size[0] * size[1]))
        if wanted < 1:
            raise BadInput(
                f"SMT: {self.trainable_fraction:.3%} of the weights is less than one block of {size[0]} x "
                f"{size[1]}; give a larger trainable_fraction or a smaller block_size."
            )
        if wanted > available:
            raise BadInput(
                f"SMT: {wanted} blocks were asked for, but the targets {self.targets} have {available} of "
                f"{size[0]} x {size[1]}; give a smaller trainable_fraction or num_blocks, or more targets."
            )
        return wanted

    def _scores(
        self, model: nn.Module, targets: Mapping[str, nn.Linear | Conv1D], size: Size, probe: Probe
    ) -> dict[str, Tensor]:
        weights = {
            name: (linear.get_parameter("weight"), isinstance(linear, Conv1D)) for name, linear in targets.items()
        }
        for weight, _ in weights.values():
            weight.requires_grad_(True)
        sheet = ScoreSheet(weights, size, self.score)
        try:
            for loss in probe(self.selection_batches):
                loss.backward()
        finally:
            scores = sheet.close()
            for weight, _ in weights.values():
                weight.requires_grad_(False)
        return scores

    def _swap(self, model: nn.Module, choice: Mapping[str, Blocks]) -> None:
        for group in shared_inputs(model, choice):
            for width in sorted({choice[name].size[1] for name in group}):
                names = [name for name in group if choice[name].size[1] == width]
                shared = SharedColumns([choice[name] for name in names])
                for name in names:
                    self._swap_one(model, name, choice[name], shared)

    def _swap_one(self, model: nn.Module, name: str, blocks: Blocks, shared: "SharedColumns") -> None:
        original = model.get_submodule(name)
        assert isinstance(original, nn.Linear | Conv1D)
        linear = BlockLinear(original, blocks, shared)
        replace(model, name, linear)
        self._swapped[name] = original, linear


class SharedColumns:
    """The input columns that some linear layers with one input need together, packed once a forward pass."""

    def __init__(self, users: Sequence[Blocks]) -> None:
        self.width = users[0].size[1]
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

    def pack(self, x: Tensor) -> Tensor:
        """The packed columns of `x` (..., K), (tokens, columns x width); one copy for all users of a tensor."""
        if self._input is not x:
            self.columns = self.columns.to(x.device)
            self._packed = pack_columns(x.detach().reshape(-1, x.shape[-1]), self.columns, self.width)
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
        weight, bias = self.matrix, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        return _BlockLinear.apply(x, weight, bias, self.blocks, self.shared.pack(x), self.places, self.chosen.size)  # pyright: ignore

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
            d_master = block_grad(dy.reshape(-1, dy.shape[-1]), packed_TP, ctx.places, ctx.size)
        return dx, None, None, d_master, None, None, None
