"""How many entries of each weight are trained, and a selection of entries in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lit_sparse.blocks.selection import shares
from lit_sparse.errors import BadInput
from lit_sparse.selections import check_shapes, index_of, read_state


def counts(weights: Mapping[str, Tensor], wanted: int) -> dict[str, int]:
    """Return how many of `wanted` entries each weight gets: in proportion to its size.

    Raises:
        BadInput: if that is none, or more than there are.
    """
    names = sorted(weights)
    total = sum(weights[name].numel() for name in names)
    if not 1 <= wanted <= total:
        raise BadInput(
            f"SparseEntries: {wanted:,} entries were asked for, but the targets have {total:,}; give a "
            f"{'larger trainable_fraction' if wanted < 1 else 'smaller trainable_fraction, or more targets'}."
        )
    return dict(zip(names, shares([weights[name].numel() for name in names], wanted), strict=True))


def read_selection(path: Path, weights: Mapping[str, Tensor], strategy: str) -> dict[str, Tensor]:
    """Read a selection of entries from a run's checkpoint (.ckpt), or from a JSON file of the same form.

    The form is {"matrices": {name of the linear layer: {"index": [position, ...], "shape": [rows, columns]}}}, and the
    shape may be left out.

    Args:
        weights: The weights that may have entries, by the layer's name; only their shapes are read.
        strategy: Class name of the strategy whose state in the checkpoint is the selection.

    Raises:
        BadInput: if the file is missing or malformed, or names a weight or an entry that the model does not have.
    """
    try:
        raw = read_state(path, strategy)
        chosen = {name: index_of(entry["index"]) for name, entry in raw["matrices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadInput(
            f"SparseEntries: no choice of entries could be read from {path} ({error}); give principal, gradient, "
            "magnitude, smallest, wanda, random, or a file written by a run."
        ) from error
    check_selection(chosen, weights, str(path))
    check_shapes(raw["matrices"], weights, str(path))
    return {name: index.unique().int() for name, index in chosen.items()}


def check_selection(chosen: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse entries that the weights do not have.

    Args:
        source: What chose them, for the message.

    Raises:
        BadInput: naming the first weight that lacks an entry, or is not there; or if there is no entry at all.
    """
    for name, index in chosen.items():
        if name not in weights:
            raise BadInput(
                f"SparseEntries: {source} selects entries of {name}, which is not among the {len(weights)} target "
                "matrices; give a file of the same model and targets."
            )
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < weights[name].numel():
            raise BadInput(
                f"SparseEntries: {source} selects an entry outside the {weights[name].numel():,} of {name}; give a "
                "file of the same model."
            )
    if not sum(len(index) for index in chosen.values()):
        raise BadInput(f"SparseEntries: {source} selects no entry; give a file that names some.")
