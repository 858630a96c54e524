"""Merge what a run trained into its base, in fp32, and find the parameters that changed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.anatomy import is_quantized, weight_matrix
from lit_sparse.blocks.experts import chosen_blocks
from lit_sparse.blocks.grid import Blocks
from lit_sparse.calls import dummy_forward
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import Change, ChangedBlocks, ChangedEntries, ChangedParameter, Delta, owner_of
from lit_sparse.modules import LitSparse
from lit_sparse.modules.hollow import Hollow
from lit_sparse.modules.loading import load_base, load_hollow
from lit_sparse.optim import trainable
from lit_sparse.runs import open_run, restore_run
from lit_sparse.strategies import UpdateStrategy

MERGE_TOLERANCE = (1e-2, 1e-5)
"""Tolerated norm of the difference of logits after merging: shares of the change by training, and of the logits.

Rounding stays below both."""

PART = 2**18
"""Weights of which the error of a cast is measured at a time: it takes a few copies of them, some in fp64."""
FEW = 0.5
"""Share of a parameter's entries below which they take less room with their positions than the whole does."""
NOTABLE_LOSS = 0.1
"""If a cast loses more than this share of the change (RMS), the message advises float32."""


class Base:
    """The parameters of a run's base as its files have them, one at a time: the model is never held twice.

    Args:
        module: The run's module.

    Attributes:
        dtype: That of the base's files.
        names: Names of the parameters; tied ones appear once.
    """

    def __init__(self, module: LitSparse) -> None:
        # A bare configuration draws random weights, which are the run's only in the run's dtype.
        dtype = module.frozen_dtype if module.is_drawn else "auto"
        how, seed = (module.auto_class, module.base), module.init_seed
        found = load_hollow(*how, dtype, module.attention, module.config_options, seed)
        if isinstance(found, str):
            rank_zero_info(f"The base is loaded whole, beside the merged model: {found}.")
            options = {"config_options": module.config_options, "seed": seed}
            found = Hollow(load_base(*how, dtype, module.attention, **options), lambda: iter(()))
        self._hollow, self.dtype = found, found.model.dtype
        self.names = frozenset(name for name, _ in found.model.named_parameters())
        self._tied: dict[nn.Parameter, list[str]] = {}
        for name, parameter in found.model.named_parameters(remove_duplicate=False):
            self._tied.setdefault(parameter, []).append(name)

    @property
    def all_names(self) -> set[str]:
        """All names of the parameters, those of tied ones too."""
        return {name for names in self._tied.values() for name in names}

    def values(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield each parameter's names, of which tied ones have several, and its value."""
        parameters = dict(self._hollow.parameters())
        for name, value in self._hollow.values():
            yield self._tied[parameters[name]], value


@dataclass(frozen=True, eq=False)
class Merge:
    """A run's model, merged in fp32, and its base.

    Attributes:
        run: Name of the run.
        module: The run's module, with its strategies detached.
        model: Its plain model, in fp32.
        base: The base's parameters, in the dtype of its files.
        choice: SMT's blocks by name of the linear layer or expert; empty without SMT.
        config: The run's configuration.
    """

    run: str
    module: LitSparse
    model: PreTrainedModel
    base: Base
    choice: Mapping[str, Blocks]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, run: Path, scale: float = 1.0) -> "Merge":
        """Merge the run in the folder `run`, rewound to `scale`.

        Raises:
            BadInput: if it cannot be loaded, or what it trained cannot be merged.
        """
        module, config, checkpoint = open_run(run)
        if is_quantized(module.build()):
            adapter = any(update.leaves == "adapter" for update in module.updates)
            raise BadInput(
                f"{run.resolve().name} was trained on a base quantised to {module.quantize}, into which it cannot be "
                "merged without rounding away what it trained; "
                + ("export it with --to adapter." if adapter else "use it through lit_sparse.runs.load_run.")
            )
        adapts = any(update.leaves == "adapter" for update in module.updates)
        before = dummy_forward(module.build()) if adapts else None
        restore_run(module, checkpoint, run)
        check_mergeable(module, run.resolve().name)
        choice = chosen_blocks(module.build())
        merge = cls(run.resolve().name, module, merged(module, before), Base(module), choice, config)
        if scale != 1:
            merge._rewind(scale)
        return merge

    def _rewind(self, scale: float) -> None:
        """Scale what training changed: each weight becomes the base's plus `scale` times its change.

        Bit for bit the run's at 1, and the base's at 0.
        """
        for _, before, after in self.changes():
            after.copy_(torch.lerp(before, after, scale))

    @property
    def updates(self) -> list[str]:
        """Names of the strategies that the run trained with."""
        return [type(update).__name__ for update in self.module.updates]

    def changes(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield each parameter that differs from the base's: its name, and its values before and after, both fp32.

        Raises:
            BadInput: if the model has a parameter that the base lacks.
        """
        own = dict(self.model.named_parameters())
        for name in own.keys() - self.base.all_names:
            raise BadInput(f"{self.run} left the model with a parameter {name} that its base lacks; use load_run.")
        for names, value in self.base.values():
            # Rounded as the run loaded the base: what its precision lost is no change by training.
            before = value.to(self.module.frozen_dtype).float()
            for name in names:
                if name in own and not torch.equal(before, own[name]):
                    yield name, before, own[name].detach()

    def delta(self) -> Delta:
        """Return what the run changed of its base.

        Raises:
            BadInput: if the merged model has other parameters than the base (a head that is no longer tied).
        """
        names = {name for name, _ in self.model.named_parameters()}
        if odd := names ^ self.base.names:
            raise BadInput(
                f"{self.run} left the model with other parameters than its base has ({min(odd)}), which "
                "a delta cannot hold; export it with --to hf."
            )
        changes = tuple(one for change in self.changes() for one in self._split(*change))
        return Delta(self.module.base, self.module.base_fingerprint, tuple(self.updates), changes)

    def _split(self, name: str, before: Tensor, after: Tensor) -> Sequence[Change]:
        """Return the trained blocks if nothing else in the parameter changed, a few entries, or the whole of it."""
        changes = [self._blocks(matrix) for matrix in self.choice if owner_of(matrix) == name]
        parameter, trained = self.model.get_parameter(name), self.model.get_parameter(name).data
        parameter.data = before.clone()
        for change in changes:
            change.write(change.target(self.model), change.values)
        whole, parameter.data = torch.equal(parameter.data, after), trained
        if whole:
            return changes
        if int((before != after).sum()) < FEW * after.numel():
            return [ChangedEntries.between(name, before, after)]
        return [ChangedParameter(name, after)]

    def _blocks(self, matrix: str) -> ChangedBlocks:
        weight, blocks = weight_matrix(self.model, matrix), self.choice[matrix]
        assert weight is not None, f"{matrix} has trained blocks, but is gone"
        return ChangedBlocks(matrix, blocks, blocks.read(weight.detach()))


def check_mergeable(module: LitSparse, run: str) -> None:
    """Reject a run that cannot become a plain model, or that diverged.

    Raises:
        BadInput: naming the strategy, or the parameter that is not finite.
    """
    for update in module.updates:
        if update.leaves == "own_forward":
            saves = type(update).save is not UpdateStrategy.save
            raise BadInput(
                f"{run} was trained with {type(update).__name__}, whose model has a forward of its own that neither a "
                f"Hugging Face folder nor a delta can hold; {'export it with --to adapter, or ' * saves}use it through "
                "lit_sparse.runs.load_run."
            )
    check_converged(module, run)


def check_converged(module: LitSparse, run: str) -> None:
    """Reject a run that diverged.

    Raises:
        BadInput: naming the parameter that is not finite.
    """
    for name, parameter in trainable(module):
        if not parameter.isfinite().all():
            raise BadInput(f"{run} diverged: {name} is not finite; train it anew with a lower model.lr.")


def merged(module: LitSparse, base: Tensor | None) -> PreTrainedModel:
    """Detach the strategies of `module`; return its model in fp32.

    Args:
        base: Logits of the base for the dummy tokens, if the run trained an adapter.

    Raises:
        BadInput: if merging an adapter would change what the model computes (one on a tied head, for example).
    """
    model = module.build().float()  # before merging, so that the merge itself does not round
    if base is None:
        return module.detach()
    before = dummy_forward(model)
    after = dummy_forward(module.detach())
    if differs(before, after, base.float()):
        raise BadInput(
            f"what {module.updates.names} trained cannot be merged into {module.base} without changing its outputs "
            "(are tied weights among what was adapted?); train other modules."
        )
    return model


def differs(trained: Tensor, again: Tensor, base: Tensor, tolerance: tuple[float, float] = MERGE_TOLERANCE) -> bool:
    """Return true if the logits `again` differ from `trained` by more than rounding.

    `tolerance` is in shares of the change by training, `trained` - `base`, and of the logits.
    """
    change, whole = (trained - base).norm(), trained.norm()
    return not (again - trained).norm() <= tolerance[0] * change + tolerance[1] * whole


@dataclass(frozen=True)
class CastError:
    """The error of casting merged fp32 weights, over the weights that differ from the base's.

    Attributes:
        dtype: The dtype cast to.
        weights: Number of weights that differ from the base's.
        largest: Largest absolute error.
        of_weights: RMS error over RMS of the weights.
        of_change: RMS error over RMS of the change that training made.
        undone: Share of the changed weights that are back at the base's value.
    """

    dtype: str
    weights: int
    largest: float
    of_weights: float
    of_change: float
    undone: float

    def sentence(self) -> str:
        """Describe the error in a sentence."""
        merged = f"Merged in float32, cast to {self.dtype}"
        if not self.weights:
            return f"{merged}: no weight differs from the base's."
        if not self.largest:
            return f"{merged}: {self.weights:,} weights changed; the cast loses nothing of them."
        advice = " Give --dtype float32 to keep the change whole." if self.of_change > NOTABLE_LOSS else ""
        return (
            f"{merged}: {self.weights:,} weights changed; the cast errs by at most {self.largest:.2g} "
            f"({self.of_weights:.2%} of the weights, RMS), which is {self.of_change:.2%} of their change, and "
            f"{self.undone:.2%} of them are back at the base's value.{advice}"
        )


def cast_error(changes: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> CastError:
    """Measure the error of casting to `dtype`, given pairs of fp32 tensors before and after training."""
    count, undone, largest = 0, 0, 0.0
    squares = torch.zeros(3, dtype=torch.float64)  # of the errors, the weights, the changes
    parts = (pair for change in changes for pair in zip(*(one.flatten().split(PART) for one in change), strict=True))
    for before, after in parts:
        moved = before != after
        if not moved.any():
            continue
        was, now = before[moved], after[moved]
        error = now.to(dtype).float() - now
        squares += torch.stack([x.double().square().sum() for x in (error, now, now - was)])
        count, undone = count + now.numel(), undone + int((now.to(dtype) == was.to(dtype)).sum())
        largest = max(largest, error.abs().max().item())
    of_weights, of_change = (squares[0] / squares[1:].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()
    return CastError(str(dtype).removeprefix("torch."), count, largest, of_weights, of_change, undone / max(1, count))
