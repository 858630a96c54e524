"""Recorders of each weight's importance, for AdaptiveRegularization in a later run: RecordImportance, RecordFisher.

Both store their sums in the run's checkpoint, for LoRA's dense products or for trained weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.calls import evaluating
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
from lit_sparse.strategies.base import Attaches, BaseWeights, Claim, Context, Gradients, Need, Probe, UpdateStrategy


@dataclasses.dataclass
class RecordImportance(UpdateStrategy):
    """Record each weight's importance in the checkpoint, for AdaptiveRegularization in a later run.

    First phase of adaptive regularisation (arXiv 2501.13669): the path integral of Synaptic Intelligence
    (arXiv 1703.04200) on LoRA's dense product. At each optimizer step omega <- omega - G * dU, with the gradient G of
    the run's loss before clipping and the displacement dU by the optimizer.

    The strategy trains nothing itself: stack it on PEFT's LoRA or full fine-tuning. Memory, for each recorded matrix: a
    dense fp32 matrix of sums (a bf16 sum ignores terms below 2^-9 of it), and a dense gradient from the backward pass
    to the optimizer step. Without LoRA also a copy of the start, and a copy during the step.

    Ranks average their dense gradients of products, one collective per matrix. Under FSDP2 the sums of sharded weights
    are sharded too, and those of LoRA's products are full on every rank.

    Args:
        targets: Trained matrices to record: roles (q, k, v, ...), endings of module names, or `all`.
        space: `weights` records LoRA's dense product s B A, as if the weight itself moved. `factors` records A and B
            each by itself: cheaper, and another objective (arXiv 2602.17559).
        every: Record every `every`-th step, multiplied by `every`.
        offload: Keep the sums in host memory.
    """

    targets: list[str] = dataclasses.field(default_factory=lambda: ["all"])
    space: Space = "weights"
    every: int = 1
    offload: bool = False

    claims: ClassVar[frozenset[Claim]] = frozenset({"importance"})
    base: ClassVar[BaseWeights] = "kept"
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"
    gradients: ClassVar[Gradients] = "reads"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients", "task_gradients", "fixed_set"})

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadInput(f"RecordImportance: every is {self.every}; it must be at least 1.")
        self._matrices: list[TrainedMatrix] = []
        self._watchers: dict[str, DenseGradient] = {}
        self._sums: dict[str, Tensor] = {}
        self._start: dict[str, list[Tensor]] = {}
        self._pending: dict[str, tuple[Tensor, list[Tensor]]] = {}  # gradient and values before the step
        self._steps = 0

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._pending, self._steps = {}, 0
        self._find(model)
        for matrix in self._matrices:
            self._store(matrix, matrix.displacement_from(matrix.values()), matrix.copies())  # a displacement of zero

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._find(model)
        self._steps = state["importance"]["steps"]
        for matrix in self._matrices:
            recorded = state["importance"]["matrices"][matrix.name]
            self._store(matrix, recorded["sums"].clone(), list(recorded["start"].values()))
        self._switch_watchers()

    def _find(self, model: nn.Module) -> None:
        self._matrices = trained_matrices(model, self.targets, self.space, "RecordImportance")
        self._watchers = watch(self._matrices)
        self._switch_watchers()

    def _switch_watchers(self) -> None:
        """Sum dense gradients only in the steps that are recorded: each costs a product in the backward pass."""
        for watcher in self._watchers.values():
            watcher.on = (self._steps + 1) % self.every == 0

    def _store(self, matrix: TrainedMatrix, sums: Tensor, start: Values) -> None:
        device = torch.device("cpu") if self.offload else matrix.device
        self._sums[matrix.name] = matrix.shard(sums).to(device)
        self._start[matrix.name] = [matrix.shard(value).to(device) for value in start]

    def on_shard(self) -> None:
        for matrix in self._matrices:
            self._store(matrix, self._sums[matrix.name], self._start[matrix.name])

    def scale_gradients(self, factor: Tensor) -> None:
        for watcher in self._watchers.values():
            if watcher.total is not None:
                watcher.total.mul_(factor)

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        if step % self.every:
            return
        for matrix in self._matrices:
            gradient = gradient_of(matrix, self._watchers)
            if gradient is None:  # this rank skipped the layer; others may not have, and averaging is a collective
                gradient = torch.zeros_like(self._sums[matrix.name], device=matrix.device)
            # DDP and FSDP2 have averaged the gradients of parameters; those of products are this rank's own.
            gradient = all_reduce_mean(gradient) if matrix.scale is not None else gradient
            self._pending[matrix.name] = gradient, matrix.copies(optimizer)

    def skip_step(self) -> None:
        for watcher in self._watchers.values():
            watcher.total = None

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        for matrix in self._matrices:
            if matrix.name not in self._pending:
                continue
            gradient, before = self._pending.pop(matrix.name)
            sums = self._sums[matrix.name]
            sums.sub_(gradient.mul_(matrix.displacement_from(before, optimizer)).to(sums.device), alpha=self.every)
        self._steps = step
        self._switch_watchers()
        return False

    def detach(self, model: nn.Module) -> None:
        for watcher in self._watchers.values():
            watcher.remove()
        self._matrices, self._watchers = [], {}

    def state_dict(self) -> dict[str, Any]:
        entries = {m.name: entry(m, self._sums[m.name], self._start[m.name]) for m in self._matrices}
        return {"importance": {"kind": "path", "space": self.space, "steps": self._steps, "matrices": entries}}

    def describe(self) -> dict[str, Any]:
        """Return the number of matrices and weights recorded on this rank, and the bytes of their sums."""
        sums = [local_shard(sums) for sums in self._sums.values()]
        return {"matrices": len(sums), "weights": sum(s.numel() for s in sums), "bytes": sum(s.nbytes for s in sums)}


@dataclasses.dataclass
class RecordFisher(UpdateStrategy):
    """Record the diagonal Fisher before the first step, for EWC in a later run (AdaptiveRegularization, anchor: base).

    The empirical Fisher of EWC (arXiv 1612.00796), as in the code of EWC-LoRA (arXiv 2305.10626): the mean over samples
    of the squared gradient of the sample's loss, which is the mean over its tokens, with the data's own labels.

    Every batch must be one sample (data.batch_size=1): the square of a batch's mean gradient is too small by about the
    batch size. Dropout is off while recording. The run itself may have a single step. Each rank holds the full model
    while recording, under FSDP2 too, whose averaged gradients would be of no single sample; beside SMT it holds its
    shards, since the blocks are whole on every rank. The recorded matrices are then kept in host memory.

    Args:
        samples: Number of samples on each rank.
        targets: Trained matrices to record: roles (q, k, v, ...), endings of module names, or `all`.
        space: `weights` (LoRA's dense product) or `factors`, as for RecordImportance.
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
        self._sums = {matrix.name: matrix.displacement_from(matrix.values()) for matrix in self._matrices}
        watchers, count = watch(self._matrices), 0
        with single_samples(model), evaluating(model):
            for loss in probe(self.samples, weighed=False):
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
            sums = self._sums[matrix.name] = self._sums[matrix.name].to(matrix.device)  # the probe moves the model
            if gradient is not None:
                sums.addcmul_(gradient, gradient)

    def _average(self, count: int) -> None:
        seen = torch.tensor(float(count), device=self._matrices[0].device)
        for matrix in self._matrices:
            self._sums[matrix.name] = self._sums[matrix.name].to(matrix.device)  # also on a rank without data
        if dist.is_available() and dist.is_initialized():  # a sum, not a mean: ranks may have other numbers of samples
            for tensor in (seen, *self._sums.values()):
                dist.all_reduce(tensor)
        self._seen = int(seen)
        if not self._seen:
            raise BadInput("RecordFisher got no training data; set data.train to some general text.")
        self._sums = {name: (sums / self._seen).cpu() for name, sums in self._sums.items()}  # not used in training

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
        """Return the number of samples, and the mean of the Fisher over all recorded weights."""
        total = sum(float(sums.sum()) for sums in self._sums.values())
        return {"samples": self._seen, "mean": total / max(1, sum(s.numel() for s in self._sums.values()))}


@contextmanager
def single_samples(model: nn.Module) -> Iterator[None]:
    """Within the context, refuse batches of several rows, and packed rows.

    The check hooks the first decoder layer: the probe gives losses only, not the batches that they come from.

    Raises:
        BadInput: in the forward pass of such a batch.
    """

    def check(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden, places = args[0] if args else kwargs["hidden_states"], kwargs.get("position_ids")
        if hidden.shape[0] > 1:
            raise BadInput(
                f"RecordFisher squares the gradient of each sample, but a batch has {hidden.shape[0]}; set "
                "data.batch_size to 1."
            )
        if places is not None and int((places == 0).sum()) > 1:  # positions restart at 0 with each packed sample
            raise BadInput(
                "RecordFisher squares the gradient of each sample, but a row packs several; set data.packing to false."
            )

    hook = decoder_layers(model)[0].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
