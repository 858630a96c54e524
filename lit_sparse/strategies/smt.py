"""SMT: train chosen blocks of weight matrices, in place, and nothing else.

Sparse Matrix Tuning, arXiv 2405.15525. The blocks with the largest gradients on the task are found before training;
each has an fp32 master that the optimizer updates and that is written into the weight after every step, so that the
forward is an ordinary linear layer. The backward forms the gradients of the chosen blocks only.

Differences from the authors' code, each on purpose: blocks are scored by mean |gradient|, as the paper has it (theirs
takes |mean gradient|, which noise may hide: `score: mean_abs`; the README compares them), scoring does not train
(`warmup: update` does), biases are kept, and the input columns saved for the backward are packed copies, shared by the
layers that read the same input.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import matrix, replace, role, shared_inputs, target_linears, weight_count
from lit_sparse.blocks.grid import Blocks, Size, automatic_size, check_choice, grid, read_choice
from lit_sparse.blocks.linear import BlockLinear, DeltaLinear, SharedInput
from lit_sparse.blocks.selection import (
    Ranking,
    Score,
    ScoreSheet,
    diagonal_blocks,
    random_scores,
    slab_blocks,
    top_blocks,
    within_columns,
)
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW
from lit_sparse.strategies.base import Claim, Context, Need, Probe, UpdateStrategy

INPUT_SIDE = ("o", "down")
"""Roles whose slabs are bands of input columns: what is trained belongs to heads, or to channels of the MLP."""
WARMUP_BETAS = (0.9, 0.95)
WARMUP_CLIP = 1.0
"""Of the authors' full fine-tuning before the choice."""


@dataclasses.dataclass
class SMT(UpdateStrategy):
    """Train chosen blocks of weight matrices in place (Sparse Matrix Tuning, arXiv 2405.15525).

    Args:
        blocks: How blocks are chosen: `gradient` (largest gradients on the first training batches), `random`,
            `diagonal` (one block per row and column of a grid, arXiv 2506.03230), `slab` (one contiguous band of each
            matrix, as S2FT has, arXiv 2412.06289), or a file: a run's checkpoints/last.ckpt for that run's blocks, or
            JSON of the same form.
        trainable_fraction: Share of all the model's weights to train; the blocks lie in `targets` all the same.
        num_blocks: Number of blocks instead; when given, it takes the place of trainable_fraction.
        block_size: `auto` (the largest of 256, 128, ... that divides every target matrix and leaves a choice), one
            number, or height and width. `diagonal` derives its own from the fraction.
        targets: Which linear layers may be trained: roles (q, k, v, qkv, o, gate, up, gate_up, down), endings of
            module names, or `all`.
        score: What makes a gradient large: `abs_mean` (mean of |g| over the block), `mean_abs` (|mean of g|, as the
            authors' code has it), or `l2`.
        ranking: Blocks compete over all matrices (`global`, the paper's) or within each (`per_matrix`).
        kept_columns: Share of each input's block columns that blocks may lie in, those of the largest scores; fewer
            columns are fewer activations kept for the backward. None is all of them.
        selection_batches: Training batches whose gradients are scored.
        warmup: Whether weights move meanwhile: `score_only` (they do not), or `update`, full fine-tuning for so many
            steps as the authors' code has it. The checkpoint then holds all weights, as those that are frozen after
            it have moved too.
        warmup_lr: Learning rate of that full fine-tuning.
        mode: `in_place` writes the trained blocks into the weights; `delta` keeps them beside a base that is not
            touched (a quantised one, or one that others use), for an extra cost that is the trained share.
        seed: Seed of `random` blocks, and of where slabs lie.
    """

    blocks: str = "gradient"
    trainable_fraction: float = 0.0084
    num_blocks: int | None = None
    block_size: int | tuple[int, int] | str = "auto"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["q", "k", "v", "qkv"])
    score: Score = "abs_mean"
    ranking: Ranking = "global"
    kept_columns: float | None = None
    selection_batches: int = 8
    warmup: Literal["score_only", "update"] = "score_only"
    warmup_lr: float = 9.65e-6
    mode: Literal["in_place", "delta"] = "in_place"
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
        if self.kept_columns is not None and not (0 < self.kept_columns <= 1 and self.blocks in ("gradient", "random")):
            raise BadInput(
                f"SMT: kept_columns is {self.kept_columns} with blocks {self.blocks!r}; it must lie above 0 and at "
                "most at 1, and goes with gradient and random blocks only."
            )
        if self.warmup == "update" and (self.blocks != "gradient" or self.mode == "delta"):
            raise BadInput(
                f"SMT: warmup update trains all weights to choose gradient blocks in place; it does not go with blocks "
                f"{self.blocks!r} and mode {self.mode}. Use warmup score_only."
            )
        self._swapped: dict[str, tuple[nn.Module, BlockLinear | DeltaLinear]] = {}
        self._groups: list[SharedInput] = []
        self._share: dict[str, dict[str, float]] = {}

    @property
    def base(self) -> Literal["kept", "trained", "moved"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "moved" if self.warmup == "update" else "kept" if self.mode == "delta" else "trained"

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A graph, in place: the forward pass reads the weights, into which the trained blocks are written later."""
        return frozenset({"graph"} if self.mode == "in_place" else ())

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        targets = target_linears(model, self.targets)
        model.requires_grad_(False)
        self._swap(model, self._choose(model, targets, probe))

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        choice = {name: Blocks((entry["size"][0], entry["size"][1]), entry["index"]) for name, entry in state.items()}
        matrices = {name: shaped(linear) for name, linear in target_linears(model, self.targets).items()}
        check_choice(choice, matrices, "the checkpoint")
        model.requires_grad_(False)
        self._swap(model, choice)

    def regrouped(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, AdamW):  # which writes the weights in the pass that moves the masters
            for linear in self._in_place:
                optimizer.scatter(linear.blocks, linear.weight, linear.chosen.index, linear.transposed)

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        for linear in self._in_place:
            if not (isinstance(optimizer, AdamW) and optimizer.scatters(linear.blocks)):
                linear.write()
        return False

    @property
    def _in_place(self) -> list[BlockLinear]:
        return [linear for _, linear in self._swapped.values() if isinstance(linear, BlockLinear)]

    def written(self) -> Iterator[nn.Parameter]:
        for linear in self._in_place:
            yield linear.get_parameter("weight")

    def detach(self, model: nn.Module) -> None:
        for name, (original, linear) in self._swapped.items():
            linear.write()
            replace(model, name, original)
        self._swapped.clear()

    def state_dict(self) -> dict[str, Any]:
        return {name: {"size": list(blocks.size), "index": blocks.index} for name, blocks in self.choice.items()}

    def describe(self) -> dict[str, Any]:
        total = sum(group.available for group in self._groups)
        return {"share": self._share, "kept_columns": [sum(len(g.columns) for g in self._groups), total]}

    @property
    def choice(self) -> dict[str, Blocks]:
        """The blocks in training, by name of the linear layer."""
        return {name: linear.chosen for name, (_, linear) in self._swapped.items()}

    # ---- the choice

    def _choose(self, model: nn.Module, targets: dict[str, nn.Linear | Conv1D], probe: Probe) -> dict[str, Blocks]:
        matrices = {name: shaped(linear) for name, linear in targets.items()}
        weights = self.trainable_fraction * weight_count(model)
        if self.blocks == "diagonal":
            return diagonal_blocks(matrices, weights)
        if self.blocks == "slab":
            return slab_blocks(matrices, [name for name in matrices if role(name) in INPUT_SIDE], weights, self.seed)
        if self.blocks not in ("gradient", "random"):
            return read_choice(Path(self.blocks), matrices, type(self).__name__)
        size = self._size(model, matrices)
        grids = {name: grid(weight, size) for name, weight in matrices.items()}
        scores = (
            random_scores(grids, self.seed)
            if self.blocks == "random"
            else self._scores(model, targets, matrices, size, probe)
        )
        if self.kept_columns is not None:
            scores = within_columns(scores, shared_inputs(model, scores), self.kept_columns)
        available = sum(int(values.isfinite().sum()) for values in scores.values())
        return top_blocks(scores, size, self._count(model, size, available), self.ranking)

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
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Linear | Conv1D],
        matrices: Mapping[str, Tensor],
        size: Size,
        probe: Probe,
    ) -> dict[str, Tensor]:
        self._count(model, size, sum(math.prod(grid(weight, size)) for weight in matrices.values()))  # before the work
        sheet = ScoreSheet(matrices, size, self.score, next(model.parameters()).device)
        try:
            if self.warmup == "update":
                self._full_steps(model, targets, sheet, probe)
            elif self.mode == "delta":
                self._frozen_losses(model, targets, sheet, probe)
            else:
                self._losses(targets, sheet, probe)
        finally:
            scores = sheet.close()
            model.requires_grad_(False)
        return scores

    def _losses(self, targets: Mapping[str, nn.Linear | Conv1D], sheet: ScoreSheet, probe: Probe) -> None:
        for name, linear in targets.items():
            linear.get_parameter("weight").requires_grad_(True)
            sheet.watch_weight(name, linear.get_parameter("weight"), isinstance(linear, Conv1D), keep=False)
        for loss in probe(self.selection_batches):
            loss.backward()

    def _frozen_losses(
        self, model: nn.Module, targets: Mapping[str, nn.Linear | Conv1D], sheet: ScoreSheet, probe: Probe
    ) -> None:
        """Scores of weights that can have no gradient: from each layer's input and its output's gradient."""
        for name, linear in targets.items():
            sheet.watch_layer(name, linear)
        first = model.get_input_embeddings().register_forward_hook(  # pyright: ignore[reportCallIssue]
            lambda module, args, output: output.detach().requires_grad_()  # where the graph begins
        )
        try:
            for loss in probe(self.selection_batches):
                loss.backward()
        finally:
            first.remove()

    def _full_steps(
        self, model: nn.Module, targets: Mapping[str, nn.Linear | Conv1D], sheet: ScoreSheet, probe: Probe
    ) -> None:
        """Full fine-tuning whose unclipped gradients are scored (the authors' warm-up)."""
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise BadInput(
                "SMT: warmup update trains all weights, which only float32 ones bear; set model.precision to float32, "
                "or warmup to score_only."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise BadInput("SMT: warmup update works on one process only; set warmup to score_only.")
        model.requires_grad_(True)
        for name, linear in targets.items():
            sheet.watch_weight(name, linear.get_parameter("weight"), isinstance(linear, Conv1D), keep=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.warmup_lr, betas=WARMUP_BETAS, weight_decay=0)
        for loss in probe(self.selection_batches):
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), WARMUP_CLIP)
            optimizer.step()
            optimizer.zero_grad()

    # ---- the swap

    def _swap(self, model: nn.Module, choice: Mapping[str, Blocks]) -> None:
        shapes = {name: shaped(model.get_submodule(name)) for name in choice}
        self._groups, self._share = [], trained_share(choice, shapes)
        for group in shared_inputs(model, choice):
            for width in sorted({choice[name].size[1] for name in group}):
                names = [name for name in group if choice[name].size[1] == width]
                shared = SharedInput([choice[name] for name in names], shapes[names[0]].shape[1])
                self._groups.append(shared)
                for name in names:
                    self._swap_one(model, name, choice[name], shared)

    def _swap_one(self, model: nn.Module, name: str, blocks: Blocks, shared: SharedInput) -> None:
        original = model.get_submodule(name)
        linear = (
            BlockLinear(original, blocks, shared)  # pyright: ignore[reportArgumentType]
            if self.mode == "in_place"
            else DeltaLinear(original, tuple(shaped(original).shape), blocks, shared)  # pyright: ignore
        )
        replace(model, name, linear)
        self._swapped[name] = original, linear


def shaped(linear: nn.Module) -> Tensor:
    """A tensor without storage of the layer's shape as (out, in): a quantised weight itself has another."""
    if isinstance(linear, nn.Linear):
        return torch.empty(linear.out_features, linear.in_features, device="meta")
    return matrix(linear).to("meta")  # pyright: ignore[reportArgumentType]


def trained_share(choice: Mapping[str, Blocks], shapes: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Trained share of each matrix, by number of its layer, then by its role: where blocks were chosen."""
    out: dict[str, dict[str, float]] = {}
    for name, blocks in choice.items():
        number = re.search(r"\.(\d+)\.", name)
        layer = out.setdefault(number[1] if number else "", {})
        layer[role(name)] = blocks.numel(shapes[name]) / shapes[name].numel()
    return out
