"""Say what was alive when a fit ran out of memory, by category and by module, and what would have helped.

Weights, gradients and states are those of the ledger. What autograd saved is found by a walk over the graph, from the
tensors in the frames between the trainer and the op that failed; other tensors of these frames are alive too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lit_sparse.anatomy import decoder_layers
from lit_sparse.callbacks.prediction import amount
from lit_sparse.modules import LitSparse
from lit_sparse.planning.levers import levers
from lit_sparse_profiling.ledger import untyped_storages

WEIGHTS, FROZEN, GRADIENTS, STATE = "trained weights", "frozen weights", "gradients", "optimizer and strategy state"
SAVED, OTHERS = "saved for backward", "other tensors"
ACTED_ON = {"activations": (SAVED, OTHERS), "trained": (WEIGHTS, GRADIENTS, STATE), "frozen": (FROZEN,)}
"""Categories by the part of the memory that a lever acts on."""
PLACES = {
    "configure_model": "in loading or selection, before the first step,",
    "validation_step": "in the evaluation",
    "training_step": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer_step": "in the update",
}
"""Where a fit is, by the name of a function in the traceback; a selection has passes of its own."""
SMALL = 0.01
"""Share below which a category or a lever is not told."""
SHOWN = 6
"""Most lines of modules and of tensors."""
FORMS = (
    (r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", lambda found: found[1]),
    (r"tried to allocate (\d+) bytes", lambda found: amount(int(found[1]))),
)
"""How allocators tell what was asked for."""


def asked_for(exception: BaseException) -> str:
    """Return what an allocator was asked for, as `, asked for 2.00 GiB more`; nothing if it does not tell."""
    for pattern, told in FORMS:
        if found := re.search(pattern, str(exception)):
            return f", asked for {told(found)} more"
    return ""


class Alive(NamedTuple):
    """A tensor's storage: bytes, category, module (of a decoder layer, the layer), and name."""

    size: int
    category: str
    module: str
    name: str


def describe(exception: BaseException, module: LitSparse, optimizer: Optimizer | None, step: int) -> str:
    """Return what was alive in a fit that ran out of memory, and what would have helped, as a block of lines.

    Args:
        exception: The error, with its traceback.
        module: The module that was trained; its model may not be loaded yet.
        optimizer: Its optimizer, if there was one.
        step: The optimizer step that was under way, from 1.
    """
    found = [] if module.model is None else list(alive(exception.__traceback__, module, optimizer))
    lines = [f"out of memory {place_of(exception.__traceback__)} of step {step}{asked_for(exception)}."]
    if found:
        lines += [f"Alive then: {amount(sum(one.size for one in found))}", *listed(found, "category")]
        lines.append("By module:")
        for name in list(totals(found, "module"))[:SHOWN]:
            part = [one for one in found if one.module == name]
            kinds = ", ".join(listed(part, "category", indent=""))
            lines.append(f"  {name}: {amount(sum(one.size for one in part))} ({kinds})")
        lines.append("The largest tensors:")
        lines += [f"  {one.name}: {amount(one.size)}, {one.category}" for one in sorted(found, reverse=True)[:SHOWN]]
        if recomputes(module, exception.__traceback__):
            lines.append("What activation checkpointing keeps for the backward pass is not in these lists.")
    return "\n".join([*lines, "What would help:", *(f"  {way}" for way in helping(module, found))])


def place_of(traceback: TracebackType | None) -> str:
    """Return in which part of a step a traceback is, in words."""
    names = functions_in(traceback)
    return next((words for name, words in PLACES.items() if name in names), "outside of the passes")


def recomputes(module: LitSparse, traceback: TracebackType | None) -> bool:
    """Return true if layers may recompute their activations, as SMT has them do while it chooses blocks."""
    return module.activation_checkpointing or "configure_model" in functions_in(traceback)


def functions_in(traceback: TracebackType | None) -> set[str]:
    """Return the names of the functions in a traceback."""
    names: set[str] = set()
    while traceback is not None:
        names.add(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names


def listed(found: Sequence[Alive], key: Literal["category", "module"], indent: str = "  ") -> list[str]:
    """Return the bytes of tensors by category or module as text, without shares that are negligible."""
    least = SMALL * sum(one.size for one in found)
    return [f"{indent}{name}: {amount(size)}" for name, size in totals(found, key).items() if size >= least]


def totals(found: Iterable[Alive], key: Literal["category", "module"]) -> dict[str, int]:
    """Return the bytes of tensors by category or module, largest first."""
    sums: dict[str, int] = {}
    for one in found:
        name = getattr(one, key)
        sums[name] = sums.get(name, 0) + one.size
    return dict(sorted(sums.items(), key=lambda part: -part[1]))


def helping(module: LitSparse, found: Sequence[Alive]) -> list[str]:
    """Return what would help, that which acts on the most bytes first."""
    sums = totals(found, "category")
    trainer = module._trainer
    rows = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    accepted = levers(module, rows, getattr(trainer, "accumulate_grad_batches", 1), module.to_shard)
    ways = [(sum(sums.get(name, 0) for name in ACTED_ON[one.acts_on]), one) for one in accepted]
    ways = sorted(ways, key=lambda way: -way[0])
    least = SMALL * sum(sums.values())
    told = [
        f"{one.options}: {one.effect}" + (f" (acts on {amount(size)})" if size else "")
        for size, one in ways
        if size >= least
    ]
    return [*told, "lit-sparse plan predicts the memory of each method and batch before it is trained."]


# ---- what is alive


def alive(traceback: TracebackType | None, module: LitSparse, optimizer: Optimizer | None) -> Iterator[Alive]:
    """Yield every storage that is alive, as far as it can be found, each once."""
    model = module.build()
    layers = layer_names(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    owners: dict[int, str] = {}  # by id of a weight's storage: its module
    seen: set[int] = set()

    def one_of(tensor: Any, category: str, place: str, name: str) -> Iterator[Alive]:
        for storage in untyped_storages(tensor) if isinstance(tensor, Tensor) else ():
            if storage.nbytes() and storage.data_ptr() not in seen and storage.device.type != "meta":
                seen.add(storage.data_ptr())
                yield Alive(storage.nbytes(), category, place, name)

    for parameter, name in names.items():
        place = grouped(name.rpartition(".")[0], layers)
        owners |= {storage.data_ptr(): place for storage in untyped_storages(parameter)}
        yield from one_of(parameter, WEIGHTS if parameter.requires_grad else FROZEN, place, named(name, parameter))
        yield from one_of(parameter.grad, GRADIENTS, place, f"gradient of {name}")
        for key, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
            for leaf in tree_leaves(value):
                yield from one_of(leaf, STATE, place, f"{key} of {name}")
    for update in module.updates:
        for leaf in tree_leaves(update.held()):
            yield from one_of(leaf, STATE, type(update).__name__, type(update).__name__)
    found = list(in_frames(traceback, model))
    if not recomputes(module, traceback):  # which would recompute what is asked for
        for tensor, place, name in saved(found, owners, layers):
            yield from one_of(tensor, SAVED, place, named(name, tensor))
    for tensor, place in found:
        yield from one_of(tensor, OTHERS, grouped(place, layers), named(f"made in {place or 'the step'}", tensor))


def named(name: str, tensor: Tensor) -> str:
    """Return a name with the shape and dtype of its tensor."""
    return f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the decoder layers of a model."""
    layers = set(decoder_layers(model))
    return [name for name, part in model.named_modules() if part in layers]


def grouped(name: str, layers: Sequence[str]) -> str:
    """Return the decoder layer that a module is in, or else the module."""
    return next((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), name) or "elsewhere"


def in_frames(traceback: TracebackType | None, model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield the tensors in the frames of a traceback, each with the module whose forward pass the frame is in."""
    modules = {part: name for name, part in model.named_modules()}
    place = ""
    while traceback is not None:
        variables = dict(traceback.tb_frame.f_locals)
        if isinstance(inside := variables.get("self"), nn.Module) and inside in modules:
            place = modules[inside]
        for value in variables.values():
            plain = isinstance(value, Tensor | list | tuple | dict)
            for leaf in tree_leaves(value) if plain else ():
                if isinstance(leaf, Tensor):
                    yield leaf, place
        traceback = traceback.tb_next


def saved(
    found: Sequence[tuple[Tensor, str]], owners: dict[int, str], layers: Sequence[str]
) -> Iterator[tuple[Tensor, str, str]]:
    """Yield what the graphs behind some tensors saved for the backward pass, with its module and the op's name.

    An op whose weight is known is in its module; others are in that of the op that reads their result.
    """
    ahead = [(tensor.grad_fn, grouped(place, layers)) for tensor, place in found if tensor.grad_fn is not None]
    visited: set[Any] = set()
    while ahead:
        node, place = ahead.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        tensors = list(saved_by(node))
        known = [owners[t.untyped_storage().data_ptr()] for t in tensors if t.untyped_storage().data_ptr() in owners]
        place = known[0] if known else place
        for tensor in tensors:
            yield tensor, place, f"saved by {type(node).__name__.removesuffix('0')}"
        ahead += [(following, place) for following, _ in node.next_functions]


def saved_by(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that a node of a graph has saved; none if the backward pass has freed them."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in names or ["saved_tensors"]:
        try:
            value = getattr(node, name, None)
        except RuntimeError:  # freed
            continue
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided)
