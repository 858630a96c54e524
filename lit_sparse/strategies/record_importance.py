"""Recorders of how important each weight is, for a later run's AdaptiveRegularization: RecordImportance, RecordFisher.

Both leave their sums in the run's checkpoint, on LoRA's dense product or on trained weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers, evaluating
from lit_sparse.errors import BadInput
from lit_sparse.importance.matrices import (
    DenseGradient,
    Space,
    TrainedMatrix,
    Values,
    gradient_of,
    trained_matrices,
    watch,
)
from lit_sparse.importance.recorded import entry
from lit_sparse.optim import local_shard
from lit_sparse.ranks import all_reduce_mean
from lit_sparse.strategies.base import BaseWeights, Claim, Context, Gradients, Need, Probe, UpdateStrategy


@dataclasses.dataclass
class RecordImportance(UpdateStrategy):
    """Record in a run's checkpoint how important each weight was for it, for AdaptiveRegularization of a later run.

    The path integral of Synaptic Intelligence (arXiv 1703.04200), on LoRA's dense product, is the first phase of
    adaptive regularisation (arXiv 2501.13669): omega <- omega - G * dU at each optimizer step, with the gradient G of
    the run's loss before clipping, and the movement dU that the optimizer made.

    It trains nothing itself: put it beside PEFT's LoRA or full fine-tuning. It keeps a matrix of sums for each matrix
    recorded, in fp32 (in bf16 a sum stands still where an addend is below 2^-9 of it), and from the backward to the
    step a dense gradient of it; without LoRA, copies of what is recorded during the step, and of its start, too.
    Several ranks add up their dense gradients, a matrix each. Under FSDP2 each keeps the sums of its part of what is
    divided, and those of LoRA's products whole.

    Args:
        targets: What of the trained matrices is recorded: roles (q, k, v, ...), endings of module names, or `all`.
        space: `weights`: LoRA's dense product s B A, as if the weight itself moved; or `factors`, A and B each by
            itself, which is cheap and another objective (arXiv 2602.17559).
        every: Record each so many steps, each counted so many times.
        offload: Whether the sums lie in the host's memory.
    """

    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    space: Space = "weights"
    every: int = 1
    offload: bool = False

    claims: ClassVar[frozenset[Claim]] = frozenset({"importance"})
    base: ClassVar[BaseWeights] = "kept"
    supports_sharding: ClassVar[bool] = True
    gradients: ClassVar[Gradients] = "reads"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients", "task_gradients", "fixed_set"})

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadInput(f"RecordImportance: every is {self.every}; it must be at least 1.")
        self._matrices: list[TrainedMatrix] = []
        self._watchers: dict[str, DenseGradient] = {}
        self._sums: dict[str, Tensor] = {}
        self._start: dict[str, list[Tensor]] = {}
        self._noted: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._steps = 0

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._noted, self._steps = {}, 0
        self._find(model)
        for matrix in self._matrices:
            self._keep(matrix, matrix.moved(matrix.values()), matrix.copies())

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._find(model)
        self._steps = state["importance"]["steps"]
        for matrix in self._matrices:
            recorded = state["importance"]["matrices"][matrix.name]
            self._keep(matrix, recorded["sums"].clone(), list(recorded["start"].values()))
        self._switch()

    def _find(self, model: nn.Module) -> None:
        self._matrices = trained_matrices(model, self.targets, self.space, "RecordImportance")
        self._watchers = watch(self._matrices)
        self._switch()

    def _switch(self) -> None:
        for watcher in self._watchers.values():
            watcher.on = (self._steps + 1) % self.every == 0

    def _keep(self, matrix: TrainedMatrix, sums: Tensor, start: Values) -> None:
        device = torch.device("cpu") if self.offload else matrix.device
        self._sums[matrix.name] = matrix.share(sums).to(device)
        self._start[matrix.name] = [matrix.share(value).to(device) for value in start]

    def on_shard(self) -> None:
        for matrix in self._matrices:
            self._keep(matrix, self._sums[matrix.name], self._start[matrix.name])

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        if step % self.every:
            return
        for matrix in self._matrices:
            gradient = gradient_of(matrix, self._watchers)
            if gradient is None:  # a layer that this rank left out of its pass; the others may not have
                gradient = torch.zeros_like(self._sums[matrix.name], device=matrix.device)
            gradient = all_reduce_mean(gradient) if matrix.scale is not None else gradient
            self._noted[matrix.name] = gradient, matrix.copies(optimizer)

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        for matrix in self._matrices:
            if matrix.name not in self._noted:
                continue
            gradient, before = self._noted.pop(matrix.name)
            sums = self._sums[matrix.name]
            sums.sub_(gradient.mul_(matrix.moved(before, optimizer)).to(sums.device), alpha=self.every)
        self._steps = step
        self._switch()
        return False

    def detach(self, model: nn.Module) -> None:
        for watcher in self._watchers.values():
            watcher.remove()
        self._matrices, self._watchers = [], {}

    def state_dict(self) -> dict[str, Any]:
        entries = {m.name: entry(m, self._sums[m.name], self._start[m.name]) for m in self._matrices}
        return {"importance": {"kind": "path", "space": self.space, "steps": self._steps, "matrices": entries}}

    def describe(self) -> dict[str, Any]:
        """How many matrices and weights are recorded, by this process, and what the record takes in bytes."""
        sums = [local_shard(sums) for sums in self._sums.values()]
        return {"matrices": len(sums), "weights": sum(s.numel() for s in sums), "bytes": sum(s.nbytes for s in sums)}


@dataclasses.dataclass
class RecordFisher(UpdateStrategy):
    """Record the diagonal Fisher before the first step, for EWC in a later run: AdaptiveRegularization, anchor base.

    The empirical Fisher of EWC (arXiv 1612.00796), as the code of EWC-LoRA (arXiv 2305.10626) has it: the mean over
    samples of the squared gradient of the sample's loss, with the data's own labels and the mean over its tokens.

    Squares of a batch's mean gradient are too small by about the batch's size, so that each batch must be one sample:
    data.batch_size=1, on general text. Dropout is off meanwhile. The run itself may be of one step. The samples are
    looked at with the whole model on each device, under FSDP2 too; what was recorded lies in the host's memory then.

    Args:
        samples: How many samples are looked at, on each rank.
        targets: What of the trained matrices is recorded: roles (q, k, v, ...), endings of module names, or `all`.
        space: `weights` (LoRA's dense product) or `factors`, as RecordImportance has it.
    """

    samples: int = 1000
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    space: Space = "weights"

    claims: ClassVar[frozenset[Claim]] = frozenset({"importance"})
    base: ClassVar[BaseWeights] = "kept"
    supports_sharding: ClassVar[bool] = True
    gradients: ClassVar[Gradients] = "reads"
    needs: ClassVar[frozenset[Need]] = frozenset({"fixed_set"})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise BadInput(f"RecordFisher: samples is {self.samples}; it must be at least 1.")
        self._matrices: list[TrainedMatrix] = []
        self._sums: dict[str, Tensor] = {}
        self._start: dict[str, list[Tensor]] = {}
        self._seen = 0

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._matrices = trained_matrices(model, self.targets, self.space, "RecordFisher")
        self._start = {matrix.name: [copy.cpu() for copy in matrix.copies()] for matrix in self._matrices}
        self._sums = {matrix.name: matrix.moved(matrix.values()) for matrix in self._matrices}
        watchers, count = watch(self._matrices), 0
        with one_sample_a_batch(model), evaluating(model):
            for loss in probe(self.samples):
                loss.backward()
                self._add(watchers)
                model.zero_grad()
                count += 1
        for watcher in watchers.values():
            watcher.remove()
        self._average(count)

    def _add(self, watchers: Mapping[str, DenseGradient]) -> None:
        for matrix in self._matrices:
            gradient = gradient_of(matrix, watchers)
            sums = self._sums[matrix.name] = self._sums[matrix.name].to(matrix.device)  # to which the probe moves it
            if gradient is not None:
                sums.addcmul_(gradient, gradient)

    def _average(self, count: int) -> None:
        seen = torch.tensor(float(count), device=self._matrices[0].device)
        for matrix in self._matrices:
            self._sums[matrix.name] = self._sums[matrix.name].to(matrix.device)  # of a rank without data, too
        if dist.is_available() and dist.is_initialized():
            for tensor in (seen, *self._sums.values()):
                dist.all_reduce(tensor)
        self._seen = int(seen)
        if not self._seen:
            raise BadInput("RecordFisher was given no data to look at; give data.train some general text.")
        self._sums = {name: (sums / self._seen).cpu() for name, sums in self._sums.items()}  # no step reads them

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._matrices = trained_matrices(model, self.targets, self.space, "RecordFisher")
        self._seen, entries = state["importance"]["steps"], state["importance"]["matrices"]
        self._sums = {name: one["sums"] for name, one in entries.items()}
        self._start = {name: list(one["start"].values()) for name, one in entries.items()}

    def detach(self, model: nn.Module) -> None:
        self._matrices = []

    def state_dict(self) -> dict[str, Any]:
        entries = {m.name: entry(m, self._sums[m.name], self._start[m.name]) for m in self._matrices}
        return {"importance": {"kind": "fisher", "space": self.space, "steps": self._seen, "matrices": entries}}

    def describe(self) -> dict[str, Any]:
        """How many samples were looked at, and the mean of the Fisher."""
        total = sum(float(sums.sum()) for sums in self._sums.values())
        return {"samples": self._seen, "mean": total / max(1, sum(s.numel() for s in self._sums.values()))}


@contextmanager
def one_sample_a_batch(model: nn.Module) -> Iterator[None]:
    """A block in which a batch of more than one row, or a row of several samples, is refused.

    Raises:
        BadInput: at the forward of such a batch.
    """

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, places = args[0] if args else kwargs["hidden_states"], kwargs.get("position_ids")
        if hidden.shape[0] > 1:
            raise BadInput(
                f"RecordFisher squares the gradient of each sample, but a batch has {hidden.shape[0]}; set "
                "data.batch_size to 1."
            )
        if places is not None and int((places == 0).sum()) > 1:  # where a packed row's samples begin
            raise BadInput(
                "RecordFisher squares the gradient of each sample, but a row has several; set data.packing to false."
            )

    hook = decoder_layers(model)[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
