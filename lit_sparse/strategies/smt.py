"""SMT: train selected blocks of weight matrices in place, and nothing else.

Sparse Matrix Tuning, arXiv 2405.15525. The blocks with the largest gradients on the task are selected before training.
Each has an fp32 master, which the optimizer updates and which is written into the weight after every step; the forward
pass is that of an ordinary linear layer. The backward pass computes the gradients of the selected blocks only.

Deliberate differences from the authors' code: blocks are scored by mean |gradient|, as in the paper (the code takes
|mean gradient|, in which opposite signs cancel: `score: mean_abs`; docs/studies/which-weights.md compares both);
scoring does not train (`warmup: update` does); biases are kept; the input columns saved for backward are packed copies,
shared by the layers that read the same input.

Mixtures of experts: transformers keeps the experts of a layer in one tensor, and each expert's matrix of it has its own
blocks (`targets: [gate_up, down]`, or `all`). Such a tensor computes as before, so the backward pass forms its whole
gradient and reduces it to the blocks, one tensor at a time: see `lit_sparse.blocks.experts`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import Experts, replace, weight_count
from lit_sparse.blocks.experts import BlockExperts, Choice
from lit_sparse.blocks.grid import Blocks, Size, automatic_size, check_choice, grid, read_choice
from lit_sparse.blocks.linear import BlockLinear, DeltaLinear, SharedInput
from lit_sparse.blocks.principal import principal_block_scores
from lit_sparse.blocks.selection import (
    BY_SHAPE,
    Ranking,
    Score,
    ScoreSheet,
    blocks_by_shape,
    random_scores,
    top_blocks,
    within_columns,
)
from lit_sparse.blocks.targets import OF_ATTENTION, Targets, by_layer, shape_of, trained_share
from lit_sparse.calls import shared_inputs
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, device_of
from lit_sparse.recompute import recomputing
from lit_sparse.selections import wanted
from lit_sparse.strategies.base import ALONE, Attaches, Claim, Context, Need, Probe, UpdateStrategy

WARMUP_BETAS = (0.9, 0.95)
WARMUP_CLIP = 1.0
"""Betas and gradient clipping of the authors' full fine-tuning before selection."""


@dataclasses.dataclass
class SMT(UpdateStrategy):
    """Train selected blocks of weight matrices in place (Sparse Matrix Tuning, arXiv 2405.15525).

    Args:
        blocks: How blocks are selected: `gradient` (largest gradients on the first training batches), `random`,
            `diagonal` (one block per row and column of a grid, arXiv 2506.03230), `slab` (one contiguous band of each
            matrix), `coupled` (heads of attention and channels of MLPs in all their matrices, drawn from `seed`: S2FT,
            arXiv 2412.06289), or a file: that of `lit-sparse select`, or a run's checkpoints/last.ckpt.
        trainable_fraction: Share of all weights of the model to train. All blocks lie in `targets`.
        num_blocks: Blocks to train, not trainable_fraction. It is for gradient and random blocks.
        block_size: `auto` (the largest of 256, 128, ..., 8 that divides every target matrix and gives at least 16
            blocks), one number, or height and width. `diagonal`, `slab` and `coupled` have their own.
        targets: Linear layers and fused experts to choose from: roles (q, k, v, qkv, o, gate, up, gate_up, down),
            endings of names, `all`, or `auto` (v, up, down). If experts are fused, `auto` is q, k, v; both with qkv.
        score: Score of a block with gradient g: `abs_mean` (mean of |g|), `mean_abs` (|mean of g|, as in the authors'
            code), or `l2` (root of the sum of g^2). `principal` needs no data: the mean magnitude of the matrix's best
            low-rank approximation (LIFT's blocks, arXiv 2506.00772; it is for block sizes of 4 to 16, ranked per
            matrix).
        ranking: Rank blocks over all matrices (`global`, the paper's) or within each (`per_matrix`).
        kept_columns: Share of each input's block columns in which blocks may lie, those with the largest scores. Fewer
            columns save fewer activations for backward. Null allows all, as do the matrices of fused experts, of whose
            inputs no columns are packed.
        selection_batches: Training batches that are scored.
        warmup: `score_only` keeps all weights fixed during selection. `update` runs full fine-tuning meanwhile, one
            step per batch, as the authors' code does; checkpoints then hold all weights, since those frozen afterwards
            have changed too.
        warmup_lr: Learning rate of that full fine-tuning.
        mode: `in_place` writes the trained blocks into the weights. `delta` keeps them separately and leaves the base
            unchanged (quantised, or shared), at an extra cost in compute of the trained share; for fused experts, of a
            copy of their tensor in each forward pass. Weight decay then pulls the difference to 0, and so the weights
            back to the base's; in place it pulls the weights themselves to 0.
        dropout: Dropout of what blocks read, for `mode: delta` (DiaBlo takes 0.05). What the base reads stays whole.
        seed: Seed of `random` and `coupled` blocks and of the positions of slabs.
    """

    blocks: str = "gradient"
    trainable_fraction: float = 0.0084
    num_blocks: int | None = None
    block_size: int | tuple[int, int] | str = "auto"
    targets: list[str] = dataclasses.field(default_factory=lambda: list(OF_ATTENTION))
    score: Score | Literal["principal"] = "abs_mean"
    ranking: Ranking = "global"
    kept_columns: float | None = None
    selection_batches: int = 8
    warmup: Literal["score_only", "update"] = "score_only"
    warmup_lr: float = 9.65e-6
    mode: Literal["in_place", "delta"] = "in_place"
    dropout: float = 0.0
    seed: int = 0

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    attaches_to: ClassVar[Attaches] = "shards"
    selects: ClassVar[str] = "blocks"
    unsharded_reason: ClassVar[str] = "warmup: update trains all weights on one rank; set warmup to score_only"

    def __post_init__(self) -> None:
        if not 0 < self.trainable_fraction <= 1:
            raise BadInput(f"SMT: trainable_fraction is {self.trainable_fraction}; it must be above 0 and at most 1.")
        if self.num_blocks is not None and (self.num_blocks < 1 or self.blocks not in ("gradient", "random")):
            raise BadInput(
                f"SMT: num_blocks is {self.num_blocks} with blocks {self.blocks!r}; it must be at least 1, and works "
                "with gradient and random blocks only, since others have a number of their own."
            )
        if self.selection_batches < 1:
            raise BadInput(f"SMT: selection_batches is {self.selection_batches}; it must be at least 1.")
        numbers = self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)
        if self.block_size != "auto" and not all(isinstance(number, int) and number > 0 for number in numbers):
            raise BadInput(
                f"SMT: block_size is {self.block_size!r}; it must be auto, a whole number, or a height and a width."
            )
        if self.kept_columns is not None and not (0 < self.kept_columns <= 1 and self.blocks in ("gradient", "random")):
            raise BadInput(
                f"SMT: kept_columns is {self.kept_columns} with blocks {self.blocks!r}; it must be above 0 and at most "
                "1, and works with gradient and random blocks only."
            )
        if not 0 <= self.dropout < 1 or (self.dropout and self.mode == "in_place"):
            raise BadInput(
                f"SMT: dropout is {self.dropout} with mode {self.mode}; it must be at least 0 and below 1, and works "
                "with mode delta only, since trained blocks in place are not computed apart."
            )
        scored = self.blocks == "gradient" and self.score != "principal"
        if self.warmup == "update" and (not scored or self.mode == "delta"):
            raise BadInput(
                f"SMT: warmup update trains all weights to select gradient blocks in place; it does not work with "
                f"blocks {self.blocks!r}, score {self.score} and mode {self.mode}. Use warmup score_only."
            )
        self._swapped: dict[str, tuple[nn.Module, BlockLinear | DeltaLinear]] = {}
        self._fused: dict[str, tuple[nn.Module, BlockExperts]] = {}
        self._groups: list[SharedInput] = []
        self._share: dict[str, dict[str, float]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._compute = ALONE.compute

    @property
    def base(self) -> Literal["kept", "trained", "moved"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "moved" if self.warmup == "update" else "kept" if self.mode == "delta" else "trained"

    @property
    def needs(self) -> frozenset[Need]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A graph, if in place: without one the forward pass reads the weights, which get the blocks only later."""
        return frozenset({"graph"} if self.mode == "in_place" else ())

    @property
    def supports_sharding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.warmup == "score_only"

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._compute = context.compute
        targets = Targets.of(model, self.targets, self._compute)
        if self.dropout and targets.fused:
            raise BadInput(
                f"SMT: dropout is {self.dropout}, but fused experts, such as {min(targets.fused)}, compute with whole "
                "tensors, of which no block's input can be dropped; set dropout to 0, or give targets without them."
            )
        model.requires_grad_(False)
        self._swap(model, self._select(model, targets, probe), targets)

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._compute = context.compute
        choice = {name: Blocks((entry["size"][0], entry["size"][1]), entry["index"]) for name, entry in state.items()}
        # What was chosen stays, whatever the targets are by now: those of smt.yaml have changed once.
        targets = Targets.of(model, sorted({name.partition("[")[0] for name in choice}), self._compute)
        check_choice(choice, targets.shapes, "the checkpoint")
        model.requires_grad_(False)
        self._swap(model, choice, targets)

    def regrouped(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, AdamW):  # writes the weights in the same pass over memory that updates the masters
            for linear in self._in_place:
                if isinstance(linear.weight, DTensor):  # written by `after_step`: each rank its own rows
                    continue
                optimizer.scatter(linear.blocks, linear.weight, linear.chosen.index, linear.transposed)
            for fused in self._fused_in_place:
                for part in fused.parts():
                    optimizer.scatter(part.master, part.tensor, part.blocks.index, part.transposed, part.number)

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        wrote = optimizer.wrote if isinstance(optimizer, AdamW) else lambda master: False
        for linear in self._in_place:
            if not wrote(linear.blocks):
                linear.write()
        for fused in self._fused_in_place:
            if not all(wrote(part.master) for part in fused.parts()):
                fused.write()
        return False

    @property
    def _in_place(self) -> list[BlockLinear]:
        return [linear for _, linear in self._swapped.values() if isinstance(linear, BlockLinear)]

    @property
    def _fused_in_place(self) -> list[BlockExperts]:
        return [fused for _, fused in self._fused.values() if not fused.delta]

    def written(self) -> Iterator[nn.Parameter]:
        for linear in self._in_place:
            yield linear.get_parameter("weight")
        for fused in self._fused_in_place:
            yield from {part.tensor: None for part in fused.parts()}

    def detach(self, model: nn.Module) -> None:
        for name, (original, linear) in self._swapped.items():
            linear.write()
            replace(model, name, original)
        for name, (original, fused) in self._fused.items():
            fused.write()
            replace(model, name, original)
        self._swapped.clear()
        self._fused.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"size": list(blocks.size), "index": blocks.index, "shape": self._shapes[name]}
            for name, blocks in self.choice.items()
        }

    def describe(self) -> dict[str, Any]:
        """Return the trained share of each matrix, and the number of packed input columns [kept, available]."""
        total = sum(group.available for group in self._groups)
        return {"share": self._share, "kept_columns": [sum(len(g.columns) for g in self._groups), total]}

    @property
    def choice(self) -> dict[str, Blocks]:
        """The blocks that are trained, by name of the linear layer or expert."""
        linears = {name: linear.chosen for name, (_, linear) in self._swapped.items()}
        fused = {f"{n}.{part.name}": part.blocks for n, (_, fused) in self._fused.items() for part in fused.parts()}
        return linears | fused

    # ---- selection

    def _select(self, model: nn.Module, targets: Targets, probe: Probe) -> dict[str, Blocks]:
        matrices = targets.shapes
        if self.blocks in BY_SHAPE:
            there = sum(matrix.numel() for matrix in matrices.values())
            weights = wanted("SMT", self.trainable_fraction, weight_count(model), there, targets.chosen_by)
            return blocks_by_shape(self.blocks, matrices, weights, self.seed, model.config)
        if self.blocks not in ("gradient", "random"):
            return read_choice(Path(self.blocks), matrices, type(self).__name__)
        size = self._size(model, matrices)
        grids = {name: grid(weight, size) for name, weight in matrices.items()}
        scores = (
            random_scores(grids, self.seed)
            if self.blocks == "random"
            else self._score(model, targets, matrices, size, probe)
        )
        if self.kept_columns is not None:
            groups = by_layer(model, shared_inputs(model, targets.linears, self._compute))
            scores = within_columns(scores, list(groups), self.kept_columns)
        available = sum(int(values.isfinite().sum()) for values in scores.values())
        return top_blocks(scores, size, self._count(model, targets, size, available), self.ranking)

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

    def _count(self, model: nn.Module, targets: Targets, size: Size, available: int) -> int:
        count = self.num_blocks or int(self.trainable_fraction * weight_count(model) / (size[0] * size[1]))
        if count < 1:
            raise BadInput(
                f"SMT: {self.trainable_fraction:.3%} of the weights is less than one block of {size[0]} x "
                f"{size[1]}; give a larger trainable_fraction or a smaller block_size."
            )
        if count > available:
            raise BadInput(
                f"SMT: {count} blocks were asked for, but the targets {list(targets.chosen_by)} have {available} of "
                f"{size[0]} x {size[1]}; give a smaller trainable_fraction or num_blocks, or more targets."
            )
        return count

    def _score(
        self, model: nn.Module, targets: Targets, matrices: Mapping[str, Tensor], size: Size, probe: Probe
    ) -> dict[str, Tensor]:
        available = sum(math.prod(grid(weight, size)) for weight in matrices.values())
        self._count(model, targets, size, available)  # refuse before the work
        if self.score == "principal":
            trained = self.num_blocks * math.prod(size) if self.num_blocks else None
            return principal_block_scores(targets, size, trained or self.trainable_fraction * weight_count(model))
        sheet = ScoreSheet(matrices, size, self.score, device_of(next(model.parameters())))
        try:
            with recomputing(model):  # the steps keep fewer activations, and these few batches shall need no more
                if self.warmup == "update":
                    self._fine_tune(model, targets, sheet, probe)
                elif self.mode == "delta" and not any(isinstance(weight, DTensor) for weight in model.parameters()):
                    self._score_outputs(model, targets, sheet, probe)
                else:
                    self._score_weights(targets, sheet, probe)
        finally:  # hooks that stay after an error would go on adding, and hold the gradients' graph
            scores = sheet.close()
            model.requires_grad_(False)
        return scores

    def _score_weights(self, targets: Targets, sheet: ScoreSheet, probe: Probe) -> None:
        """Score the gradients of the target weights, each freed as soon as it is scored.

        Under FSDP2 they are averaged over ranks and sharded: each rank scores its part of the mean gradient.
        """
        targets.watch(sheet, keep=False)
        for loss in probe(self.selection_batches):
            loss.backward()

    def _score_outputs(self, model: nn.Module, targets: Targets, sheet: ScoreSheet, probe: Probe) -> None:
        """Score weights that cannot have a gradient (quantised), from each layer's input and its output's gradient."""
        for name, linear in targets.linears.items():
            sheet.watch_layer(name, linear)
        targets.watch_fused(sheet, keep=False)  # which are never quantised
        # Start the graph at the embeddings, since all weights are frozen; an encoder-decoder model has them twice.
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        hooks = [t.register_forward_hook(lambda module, args, y: y.detach().requires_grad_()) for t in tables]
        try:
            for loss in probe(self.selection_batches):
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _fine_tune(self, model: nn.Module, targets: Targets, sheet: ScoreSheet, probe: Probe) -> None:
        """Score the unclipped gradients of a full fine-tuning (the authors' warm-up); AdamW, one step per batch."""
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise BadInput(
                "SMT: warmup update trains all weights in place, which needs float32; set model.precision to float32, "
                "or warmup to score_only."
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise BadInput("SMT: warmup update works on one rank only; set warmup to score_only.")
        model.requires_grad_(True)
        targets.watch(sheet, keep=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.warmup_lr, betas=WARMUP_BETAS, weight_decay=0)
        for loss in probe(self.selection_batches, weighed=False):  # each is a step of its own
            loss.backward()  # the hooks score here, before clipping
            nn.utils.clip_grad_norm_(model.parameters(), WARMUP_CLIP)
            optimizer.step()
            optimizer.zero_grad()

    # ---- the swap

    def _swap(self, model: nn.Module, choice: Mapping[str, Blocks], targets: Targets) -> None:
        shapes = targets.shapes
        self._groups, self._share = [], trained_share(choice, shapes)
        self._shapes = {name: list(shapes[name].shape) for name in choice}
        self._swap_fused(model, choice, targets.fused)
        linears = [name for name in choice if name in targets.linears]
        for group in by_layer(model, shared_inputs(model, linears, self._compute)):
            # Packed columns have one width, so layers with other block widths (diagonal, slabs) get their own copy.
            for width in sorted({choice[name].size[1] for name in group}):
                names = [name for name in group if choice[name].size[1] == width]
                shared = SharedInput([choice[name] for name in names], shapes[names[0]].shape[1])
                self._groups.append(shared)
                for name in names:
                    self._swap_one(model, name, choice[name], shared)

    def _swap_fused(self, model: nn.Module, choice: Mapping[str, Blocks], fused: Mapping[str, Experts]) -> None:
        chosen: dict[str, Choice] = {}  # by module
        for name, tensor in fused.items():
            module, _, own = name.rpartition(".")
            numbered = {n: choice.get(f"{name}[{n}]") for n in range(len(tensor.parameter))}
            if present := {n: blocks for n, blocks in numbered.items() if blocks is not None}:
                chosen.setdefault(module, {})[own] = present
        for name, of_module in chosen.items():
            original = model.get_submodule(name)
            transposed = {own: fused[f"{name}.{own}"].transposed for own in of_module}
            made = BlockExperts(original, of_module, transposed, self.mode == "delta")
            replace(model, name, made)
            self._fused[name] = original, made

    def _swap_one(self, model: nn.Module, name: str, blocks: Blocks, shared: SharedInput) -> None:
        original = model.get_submodule(name)
        linear = (
            BlockLinear(original, blocks, shared)  # pyright: ignore[reportArgumentType]
            if self.mode == "in_place"
            else DeltaLinear(original, tuple(shape_of(original).shape), blocks, shared, self.dropout)  # pyright: ignore
        )
        replace(model, name, linear)
        self._swapped[name] = original, linear
