"""What makes a training take less memory: the options that its methods accept, each with what it acts on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from lit_sparse.modules import LitSparse
from lit_sparse.strategies.updates import Updates

CHECKPOINTING, ONE_ROW, BFLOAT16 = (
    "--model.activation_checkpointing=true",
    "--data.batch_size=1",
    "--model.precision=bfloat16",
)
NF4, SHARDED = "--model.quantize=nf4", "--trainer.strategy=fsdp2"
FEWER = "a method that trains less, such as lora.yaml or smt.yaml"


class Lever(NamedTuple):
    """Options of `fit`, ready to copy, what they do, and the part of the memory that they act on."""

    options: str
    effect: str
    acts_on: Literal["activations", "trained", "frozen"]


def levers(module: LitSparse, rows: int | None, accumulate: int, sharded: bool) -> Iterator[Lever]:
    """Yield what would make the training of `module` take less, without what its methods refuse or already do.

    Args:
        module: The module, whose model need not be loaded.
        rows: Rows of a batch; None if that is not known.
        accumulate: Batches of an optimizer step.
        sharded: Whether the model is sharded over ranks (FSDP2).
    """
    if module.updates.checkpointable and not module.activation_checkpointing:
        yield Lever(CHECKPOINTING, "layers keep their inputs alone", "activations")
    if rows != 1 and (options := smaller_batches(module.updates, rows, accumulate)):
        yield Lever(options, "less is computed at once", "activations")
    yield Lever(FEWER, "fewer gradients and less state", "trained")
    if module.updates.quantizable and module.quantize is None and not sharded:
        yield Lever(NF4, "the frozen linear layers in 4 bits a weight, through bitsandbytes", "frozen")
    if module.frozen_dtype == torch.float32 and module.quantize is None:
        yield Lever(BFLOAT16, "half of the frozen weights and activations", "frozen")


def smaller_batches(updates: Updates, rows: int | None, accumulate: int) -> str:
    """Return the options that take a batch row by row, in steps as large as before if the methods accumulate."""
    if updates.backward == "none":
        return "" if updates.rows_at_once == 1 else "--model.updates.micro_batch=1"
    if updates.backward == "fused":  # each backward pass is a step
        return ONE_ROW
    return f"{ONE_ROW} --trainer.accumulate_grad_batches={'ROWS' if rows is None else rows * accumulate}"
