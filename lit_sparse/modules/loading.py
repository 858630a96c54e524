"""Getting a base model ready: loading it, and having it recompute activations."""

from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from transformers import AutoConfig, PreTrainedModel

from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput


def load_base(auto_class: Any, base: Any, dtype: torch.dtype | Literal["auto"], attention: str) -> PreTrainedModel:
    """The model that `base` names, its weights in `dtype`.

    Args:
        auto_class: The transformers Auto class of the task.
        base: `demo`, a folder, a Hugging Face name, or a `config.json` (random weights, the same each time).
        dtype: Of all weights; `auto` is the type of the files.
        attention: Attention implementation of transformers.

    Raises:
        BadInput: if there is no such model.
    """
    if not isinstance(base, str):
        raise BadInput(f"model.base is {base!r}; it must be demo, a folder, a Hugging Face name, or a config.json.")
    options = {"dtype": dtype, "attn_implementation": attention}
    try:
        if base.endswith(".json"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return auto_class.from_config(AutoConfig.from_pretrained(base), **options)
        return auto_class.from_pretrained(resolve(base), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model could be loaded from {base!r}: {reason}") from error


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each layer of `model` recompute its activations in the backward, without reentrant autograd."""
    if Version(version("transformers")) >= Version("5.18"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require grad, which only reentrant checkpointing needs.
    model.disable_input_require_grads()
