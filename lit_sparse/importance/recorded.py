"""Importance of each weight for the data of an earlier run: read from its checkpoint, checked, and combined.

Synaptic Intelligence's path integral (arXiv 1703.04200) as arXiv 2501.13669 uses it, and the diagonal Fisher of EWC
(arXiv 1612.00796).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_sparse.checkpoints import run_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.importance.matrices import Space, TrainedMatrix, Values, displacement

Kind = Literal["path", "fisher"]
Weighting = Literal["mean_softmax", "softmax", "none"]
Unit = Literal["matrix", "decoder_layer"]


@dataclass(frozen=True, eq=False)
class Recorded:
    """The record of one matrix.

    Attributes:
        sums: (out, in) fp32: the path integral, or the mean of squared gradients.
        start, end: Values of the matrix before and after the run.
        scale, base: As in `TrainedMatrix`.
    """

    sums: Tensor
    start: Values
    end: Values
    scale: float | None
    base: str

    @property
    def displacement(self) -> Tensor:
        """The displacement over the whole run, (out, in)."""
        return displacement(self.start, self.end, self.scale)


def entry(matrix: TrainedMatrix, sums: Tensor, start: Values) -> dict[str, Any]:
    """Return the state of one matrix for a checkpoint, which holds its final values already."""
    return {
        "sums": sums,
        "start": dict(zip(matrix.parameters, start, strict=True)),
        "scale": matrix.scale,
        "base": matrix.base,
    }


def read_recorded(path: str) -> tuple[Kind, Space, dict[str, Recorded]]:
    """Read what the run at `path` (its folder, or a checkpoint) recorded: kind, space, and records by matrix name.

    Raises:
        BadInput: if there is no such run, it recorded nothing, or its numbers are not finite.
    """
    checkpoint = run_checkpoint(path)
    states = [update["state"] for update in checkpoint["lit_sparse"]["updates"]]
    records = [state["importance"] for state in states if isinstance(state, Mapping) and "importance" in state]
    if not records:
        raise BadInput(
            f"importance {path} is a run without RecordImportance or RecordFisher among its updates; make one with "
            "record_importance.yaml on general text."
        )
    kind, steps, entries = (records[-1][key] for key in ("kind", "steps", "matrices"))
    if not steps:
        raise BadInput(f"importance {path} saw no data: its run recorded 0 steps; train it on general text.")
    found = {name: _recorded(one, checkpoint["state_dict"]) for name, one in entries.items()}
    for name, one in found.items():
        if not one.sums.isfinite().all():
            raise BadInput(f"importance {path} is not finite at {name}: its run diverged; lower model.lr.")
    return kind, records[-1]["space"], found


def _recorded(one: Mapping[str, Any], values: Mapping[str, Tensor]) -> Recorded:
    end = [values[f"model.{name}"].to(start) for name, start in one["start"].items()]
    return Recorded(one["sums"], list(one["start"].values()), end, one["scale"], one["base"])


def check_fits(path: str, recorded: Mapping[str, Recorded], matrices: Sequence[TrainedMatrix]) -> None:
    """Reject importance recorded for other matrices than those trained here, or on another base.

    Raises:
        BadInput: naming the first that differs.
    """
    ours = {matrix.name: matrix for matrix in matrices}
    if odd := sorted(ours.keys() ^ recorded.keys()):
        raise BadInput(
            f"importance {path} has {len(recorded)} matrices, this run regularises {len(ours)}, and they differ in "
            f"{odd[0]}; train and target the same ones in both runs."
        )
    for name, matrix in ours.items():
        shapes, theirs = ([tuple(v.shape) for v in values] for values in (matrix.values(), recorded[name].end))
        if shapes != theirs or matrix.scale != recorded[name].scale:
            raise BadInput(
                f"importance {path} has {name} with shapes {theirs} and scale {recorded[name].scale}, this run has "
                f"{shapes} and {matrix.scale}; give both the same model and the same adapter."
            )
        if matrix.base != recorded[name].base:
            raise BadInput(
                f"importance {path} was recorded on another base than this run's: {name} differs; give the base of "
                "the run that recorded it."
            )


def check_compatible(
    path: str,
    recorded: Mapping[str, Recorded],
    kind: tuple[Kind, Space],
    before: Iterable[str],
    theirs: tuple[Kind, Space],
) -> None:
    """Reject importance whose matrices, kind or space differ from those of the runs `before` it.

    Raises:
        BadInput: naming the first that differs.
    """
    (kind_here, space), (kind_there, its) = kind, theirs
    if kind_here != kind_there:
        raise BadInput(
            f"importance {path} is of the kind {kind_here}, the runs before it are not, and they have no scale in "
            "common; give runs that all have RecordImportance, or all RecordFisher."
        )
    odd = sorted(recorded.keys() ^ set(before))
    if odd or space != its:
        what = f"differs from the runs before it in {odd[0]}" if odd else f"is in the space {space}, others in {its}"
        raise BadInput(
            f"importance {path} {what}, but importances add up matrix by matrix; record the same matrices in the same "
            "space in all of them, or name one run."
        )


def check_start(path: str, matrices: Sequence[TrainedMatrix], anchors: Mapping[str, Values]) -> None:
    """Reject a start that is not at the anchor, compared in bf16.

    Raises:
        BadInput: naming the first matrix that differs.
    """
    if (name := first_difference(matrices, anchors)) is not None:
        raise BadInput(
            f"the anchor is the end of {path}, but this run starts at other values ({name}); start there "
            f"(PEFT's start_from: {path}, or for trained weights its export as model.base), or set anchor to base."
        )


def check_base(path: str, matrices: Sequence[TrainedMatrix], recorded: Mapping[str, Recorded]) -> None:
    """Reject trained tensors that are neither where the run at `path` began nor where it ended.

    A product is known to belong to this base by the hash of the weight that it is added to. A plain tensor has no such
    hash, so that its values are compared.

    Raises:
        BadInput: naming the first that differs.
    """
    tensors = [matrix for matrix in matrices if matrix.scale is None]
    at_end = first_difference(tensors, {name: one.end for name, one in recorded.items()}) is None
    odd = first_difference(tensors, {name: one.start for name, one in recorded.items()})
    if odd is not None and not at_end:
        raise BadInput(
            f"importance {path} is of another base than this run's, or of another adapter's start: {odd} is neither "
            "what that run began with nor what it ended with; give the base and the seed of that run, or its end."
        )


def first_difference(matrices: Sequence[TrainedMatrix], values: Mapping[str, Values]) -> str | None:
    """Return the name of the first of `matrices` whose values differ from `values` in bf16; None if none does."""
    for matrix in matrices:
        pairs = zip(matrix.values(), values[matrix.name], strict=True)
        if not all(torch.equal(now.to("cpu", torch.bfloat16), then.to("cpu", torch.bfloat16)) for now, then in pairs):
            return matrix.name
    return None


# ---- formulas


def path_importance(omega: Tensor, moved: Tensor, xi: float, relative: bool, clamp: bool) -> Tensor:
    """Return omega / (moved^2 + xi) of one matrix, (out, in); 0 where moved^2 and xi are both 0.

    Args:
        omega: The path integral.
        moved: The displacement over the run.
        xi: Damping.
        relative: Give xi in units of the mean of moved^2.
        clamp: Set negative omega to 0.
    """
    squares = moved.square()
    damping = xi * squares.mean() if relative else xi
    importance = (omega.clamp(min=0) if clamp else omega) / (squares + damping)
    return torch.where(squares + damping > 0, importance, 0)  # a weight may have gone away and come back


def layer_coefficients(norms: Mapping[str, float], weighting: Weighting, temperature: float) -> dict[str, float]:
    """Return a coefficient for each layer, computed from the norm of its importance.

    `softmax` is the paper's: a softmax of the norms, which adds up to 1. `mean_softmax` divides the norms by their mean
    and by the temperature first, and has a mean of 1. Raw norms depend on the damping, and either saturate the softmax
    (one layer gets everything) or leave it uniform.
    """
    if weighting == "none":
        return dict.fromkeys(norms, 1.0)
    values = torch.tensor(list(norms.values()), dtype=torch.float64)
    if weighting == "softmax":
        return dict(zip(norms, values.softmax(0).tolist(), strict=True))
    mean = values.mean()
    shares = (values / (temperature * mean) if mean > 0 else values).softmax(0) * len(norms)
    return dict(zip(norms, shares.tolist(), strict=True))


def layer_of(name: str, unit: Unit) -> str:
    """Return the unit of the matrix `name`: itself, or its decoder layer (the name up to the first number)."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match and unit == "decoder_layer" else name
