"""Activation checkpointing: each decoder layer computes its activations again in the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

RENAMED = Version(version("transformers")) >= Version("5.18")
"""Whether transformers calls it activation checkpointing, no longer gradient checkpointing."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing: each layer recomputes its activations in the backward pass (non-reentrant)."""
    if RENAMED:
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require grad, which only reentrant checkpointing needs. Undo it: with
    # frozen lower layers the backward pass would run down to the embeddings for nothing.
    model.disable_input_require_grads()


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Checkpoint activations meanwhile, if the model can and does not anyway: less memory, a third more time."""
    on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if on or not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        yield
        return
    checkpoint_activations(model)
    try:
        yield
    finally:
        if RENAMED:
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()
