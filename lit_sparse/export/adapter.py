"""Export a run's adapter as a folder of PEFT's, or of its method's own, and check it by loading it again."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from lit_sparse.anatomy import classification_head
from lit_sparse.calls import dummy_forward
from lit_sparse.errors import BadInput
from lit_sparse.export.card import own_loader
from lit_sparse.export.merge import check_converged, differs
from lit_sparse.modules import LitSparse
from lit_sparse.modules.hollow import release
from lit_sparse.modules.loading import load_base

LOAD_TOLERANCE = (1e-3, 1e-5)
"""Tolerated norm of the difference of logits after loading: shares of the change by training, and of the logits."""


def write_adapter(module: LitSparse, run: str, folder: Path) -> None:
    """Write the adapter of `module` such that its loader, given the base and the folder, makes what computes the same.

    PEFT's adapters are loaded by `peft.PeftModel.from_pretrained(base, folder)`, those of a method with its own
    forward pass by its `load(folder, base)`.

    The module's own weights are given up for the memory of those that are loaded again.

    Raises:
        BadInput: if it trained no adapter, diverged, or the loader would compute something else.
    """
    adapters = [update for update in module.updates if update.leaves in ("adapter", "own_forward")]
    if not adapters:
        raise BadInput(
            f"an adapter of {run} was asked for, but {module.updates.names} trained none; export it with --to hf or "
            "--to delta."
        )
    if classification_head(module.build()) and adapters[0].leaves == "adapter":
        raise BadInput(
            f"an adapter of {run} was asked for, but its head was trained too, which the adapter lacks; export it with "
            "--to hf."
        )
    check_converged(module, run)
    adapters[0].save(folder)
    trained = outputs(module, module.build())
    release(module.build())  # so that the model is never held twice
    before, after = reloaded(module, folder)
    if differs(trained, after, before, LOAD_TOLERANCE):
        way_out = (
            "export it with --to hf" if adapters[0].leaves == "adapter" else "use it through lit_sparse.runs.load_run"
        )
        raise BadInput(
            f"the adapter of {run} would not compute on its base what the run computed (its start rounded the base's "
            f"weights); {way_out}."
        )


def reloaded(module: LitSparse, folder: Path) -> tuple[Tensor, Tensor]:
    """Load the base of `module` anew; return its logits without and with the adapter in `folder`."""
    how = (module.frozen_dtype, module.attention, module.quantize)
    more = {"config_options": module.config_options, "seed": module.init_seed}
    base = load_base(module.auto_class, module.base, *how, **more)
    before = outputs(module, base)
    if (own := own_loader(module)) is not None:
        own.load(folder, base)
        return before, outputs(module, base)
    return before, outputs(module, PeftModel.from_pretrained(base, folder))


def outputs(module: LitSparse, model: nn.Module) -> Tensor:
    """Return the logits of `model` for a few dummy tokens, in fp32, computed under the autocast of `module`."""
    with torch.no_grad(), module.autocast():
        return dummy_forward(model).float()
