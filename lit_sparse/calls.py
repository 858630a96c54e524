"""Modules that a model calls, and those that read the same input: found by a forward pass over dummy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.optim import device_of


def uncalled(model: nn.Module, names: Iterable[str], compute: Callable[..., Any] | None = None) -> set[str]:
    """Return those of the linear layers `names` whose weight the model reads without calling the layer.

    Mamba's dt_proj is one. Whatever replaces such a layer would have no effect. They are those that a forward pass over
    a few dummy tokens does not call, although it calls the module that holds them; an expert that no token reaches is
    not called either.

    Args:
        compute: As for `dummy_forward`.
    """
    called: set[nn.Module] = set()
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    watched = {*parents.values(), *(model.get_submodule(name) for name in parents)}
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in watched]
    try:
        if hooks:
            dummy_forward(model, compute=compute)
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, parent in parents.items() if parent in called and model.get_submodule(name) not in called}


def shared_inputs(model: nn.Module, names: Iterable[str], compute: Callable[..., Any] | None = None) -> list[list[str]]:
    """Group the named modules by the input tensor that they read (q, k and v of a layer read one, for example).

    A forward pass over a few dummy tokens finds them, so that nothing is assumed about the model's structure.

    Args:
        compute: As for `dummy_forward`.
    """
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # holds the tensor: once freed, its id could be reused

    def watcher(name: str):
        def watch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(id(args[0]), (args[0], []))[1].append(name)

        return watch

    hooks = [model.get_submodule(name).register_forward_pre_hook(watcher(name)) for name in names]
    try:
        dummy_forward(model, "logits", compute)
    finally:
        for hook in hooks:
            hook.remove()
    groups = [group for _, group in seen.values()]
    missing = set(names) - {name for group in groups for name in group}
    return groups + [[name] for name in sorted(missing)]


def unreached(model: nn.Module, layers: Sequence[nn.Module], compute: Callable[..., Any] | None = None) -> list[int]:
    """Return the numbers of those of `layers` that text does not reach: Mllama's cross-attention needs an image.

    Args:
        compute: As for `dummy_forward`.
    """
    called: set[nn.Module] = set()
    hooks = [layer.register_forward_pre_hook(lambda layer, args: called.add(layer)) for layer in layers]
    try:
        dummy_forward(model, compute=compute)
    finally:
        for hook in hooks:
            hook.remove()
    return [number for number, layer in enumerate(layers) if layer not in called]


def dummy_forward(model: nn.Module, field: str = "logits", compute: Callable[..., Any] | None = None) -> Tensor:
    """Return a field of the output for three dummy tokens, (1, 3, ...), in evaluation mode and without a graph.

    The last token is the end of the text for an encoder-decoder model: BART and T5 classify there.

    Args:
        compute: Runs a function that uses the model, where its parameters are sharded or of several dtypes; None calls
            it.
    """
    device, config = device_of(next(model.parameters())), model.config
    last = config.eos_token_id if config.is_encoder_decoder else 3  # pyright: ignore
    inputs = {"input_ids": torch.tensor([[1, 2, last]], device=device), "use_cache": False}
    with torch.no_grad(), evaluating(model):
        return (model(**inputs) if compute is None else compute(partial(model, **inputs)))[field]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for the duration of a `with` block, then restore the mode of each module."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
