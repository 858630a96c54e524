"""Models larger than a rank: built without memory for their weights, of which each rank reads or draws its shards.

A hollow parameter has its shape, dtype and device, but one zero in memory stands for all of its entries. Strategies
that need no values (an adapter) can work on a hollow model; sharded by `Sharded`, it has memory for this rank's shards,
which `Hollow.fill` gives their values. Buffers are never hollow: the model's constructor computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lit_sparse.anatomy import classification_head, decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import local_shard, part_of

Rows = Callable[[int, int], Tensor]
"""`rows(start, stop)` returns these rows of a tensor, in host memory."""

Source = Callable[[], Iterator[tuple[str, Rows]]]
"""Yields each parameter's name in the model, with its values; the rows of one are asked for before the next."""


class Unreadable(Exception):
    """The values of a model cannot be read shard by shard; the message says why."""


class Hollow:
    """A model whose parameters are hollow, and where their values come from.

    Args:
        model: The model, as `build_hollow` returns it.
        source: Yields the values of its parameters.
    """

    def __init__(self, model: PreTrainedModel, source: Source) -> None:
        self.model, self._source = model, source
        # By module, since sharding replaces parameters, and adapters change names.
        owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
        self._owners = {name: (module, name.rpartition(".")[2]) for name, module in owners.items()}

    def of_copy(self, model: PreTrainedModel) -> Hollow:
        """Return a copy of the plain model, hollow too, that gets the same values."""
        return Hollow(model, self._source)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the base's parameters as they are now, by the names that they had in the plain model."""
        return [(name, module.get_parameter(own)) for name, (module, own) in self._owners.items()]

    @torch.no_grad()
    def fill(self) -> None:
        """Give this rank's shards their values, once the model is sharded."""
        own = dict(self.parameters())
        for name, rows in self._source():
            part = part_of(own[name])
            start = part.start[0]
            if part.values.numel():
                local_shard(own[name]).copy_(rows(start, start + len(part.values)))

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name in the plain model and its whole value, in the model's dtype, one at a time."""
        left = dict(self.parameters())
        for name, rows in self._source():
            parameter = left.pop(name)
            yield name, rows(0, len(parameter)).to(parameter.dtype)
        yield from ((name, parameter.detach()) for name, parameter in left.items())  # a drawn head


def build_hollow(auto_class: Any, config: Any, options: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model of `config` with hollow parameters on the CPU, and with its buffers.

    Args:
        options: Keyword arguments of `from_config`: dtype, attn_implementation.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _parameters_on_meta():
        model = auto_class.from_config(config, **options)
        # Buffers anew, in fp32 and rounded once, as they are when transformers loads a model: GPT-J's constructor
        # computes its positions in the dtype of the weights.
        _mark(model, set())
        model.initialize_weights()
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made.setdefault(parameter, hollow(parameter))
    return model


def hollow(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter like `parameter`, on the CPU and without memory."""
    zeros = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
    return nn.Parameter(zeros, requires_grad=parameter.requires_grad)


def release(model: nn.Module) -> None:
    """Make the parameters of `model` hollow, which frees their memory."""
    for parameter in model.parameters():
        parameter.data = hollow(parameter).data


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the context, modules put their parameters on the meta device, but compute their buffers."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain


# ---- random values


def draw_units(model: PreTrainedModel, seed: int) -> Iterator[nn.Module]:
    """Give the hollow parameters of `model` random values, one decoder layer at a time and what is outside them last.

    Yields each layer, and in the end the model, when its parameters have their values: who needs less memory makes them
    hollow again. The values are those that transformers initialises with, drawn on the CPU from `seed`: the same in
    each process. torch's own random state is not changed.
    """
    # Not torch.manual_seed: it also sets the generators of the GPUs, which fork_rng(devices=[]) does not restore.
    state = torch.Generator("cpu").manual_seed(seed).get_state()
    drawn: set[nn.Module] = set()
    for unit in [*_layers(model), model]:
        modules = set(unit.modules()) - drawn
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            initialize(model, modules)
            state = torch.get_rng_state()
        drawn |= modules
        yield unit


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return decoder_layers(model)
    except BadInput:  # which only methods that train by layer need
        return []


def initialize(model: PreTrainedModel, modules: set[nn.Module]) -> None:
    """Give the hollow parameters of these modules of `model` the values that transformers initialises them with."""
    for parameter in {p: None for module in modules for p in module.parameters(recurse=False)}:
        parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
    _mark(model, set(model.modules()) - modules)
    with torch.device("cpu"):
        model.initialize_weights()


def _mark(model: PreTrainedModel, done: set[nn.Module]) -> None:
    """Mark the modules of `model` that transformers shall not initialise, and no others; it marks them as it does."""
    for module in model.modules():
        module._is_hf_initialized = module in done  # pyright: ignore[reportArgumentType]


def drawn_values(auto_class: Any, config: Any, options: Mapping[str, Any], seed: int) -> Source:
    """Return a source of the values that `draw_units` draws, which holds one unit's at a time."""

    def values() -> Iterator[tuple[str, Rows]]:
        twin = build_hollow(auto_class, config, options)
        names = {parameter: name for name, parameter in twin.named_parameters()}
        for unit in draw_units(twin, seed):
            for parameter in unit.parameters():
                if parameter in names and not is_hollow(parameter):
                    yield names.pop(parameter), lambda start, stop, whole=parameter: whole.detach()[start:stop]
                    parameter.data = hollow(parameter).data

    return values


def is_hollow(tensor: Tensor) -> bool:
    """Return whether one entry in memory stands for several."""
    return tensor.numel() > 1 and not any(tensor.stride())


# ---- values in files


def file_values(model: PreTrainedModel, base: str) -> tuple[Source, list[str]]:
    """Return a source of the values of `model` in the safetensors files of `base`, which reads the rows asked for.

    Buffers get their values at once.

    Returns:
        The source, and the names of the parameters of a classification head that the files lack.

    Raises:
        Unreadable: if there are no such files, or their tensors are not the model's, one by one.
    """
    if model.dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        raise Unreadable("transformers keeps some of its modules in float32")
    if bare := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise Unreadable(f"{bare[0]} has no rows")
    files = tensor_files(base)
    places = {own: (files[name], name) for own, name in names_in_files(model, files).items()}
    _check_shapes(model, places)
    for name, buffer in model.named_buffers():
        if name in places:
            buffer.copy_(_read(*places[name]))

    names = [name for name, _ in model.named_parameters()]

    def values() -> Iterator[tuple[str, Rows]]:
        for name in names:
            if name in places:
                yield name, lambda start, stop, place=places[name]: _read(*place, slice(start, stop))

    return values, [name for name in names if name not in places]


def _read(file: str, name: str, rows: slice | None = None) -> Tensor:
    # Opened for each tensor: the pages of a file that were read count as the process's memory while it is mapped.
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]


def tensor_files(base: str) -> dict[str, str]:
    """Return the safetensors file of each tensor of `base`, a folder or a Hugging Face name, by the tensor's name.

    Raises:
        Unreadable: if it has none.
    """
    options = {"_raise_exceptions_for_missing_entries": False}
    single, index = (cached_file(base, name, **options) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if single is None and index is None:
        raise Unreadable("it has no safetensors files")
    files = [single] if single is not None else get_checkpoint_shard_files(base, index)[0] or []
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), str(file))
    return found


def dtype_in_files(base: str) -> torch.dtype:
    """Return the dtype of the first tensor of floating-point numbers in the files of `base`, as `tensor_files` has it.

    Raises:
        Unreadable: if there is none.
    """
    for name, file in tensor_files(base).items():
        with safe_open(file, "pt") as opened:
            part = opened.get_slice(name)
            dtype = part[:0].dtype if part.get_shape() else opened.get_tensor(name).dtype
        if dtype.is_floating_point:
            return dtype
    raise Unreadable("it has no weights")


def names_in_files(model: PreTrainedModel, found: Mapping[str, Any]) -> dict[str, str]:
    """Return the name in the files of each parameter and buffer of `model`, by its own name; tied ones appear once.

    Files of a bare model lack the prefix of one with a head, and the other way round.

    Raises:
        Unreadable: if the files lack a parameter, or transformers converts what they have while it loads them.
    """
    _check_unconverted(model, found)
    tied: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(tensor, []).append(name)
    first = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    names: dict[str, str] = {}
    for group in tied.values():
        own = next(name for name in group if name in first)
        there = [stored for name in group for stored in _spellings(name, model.base_model_prefix) if stored in found]
        if there:
            names[own] = there[0]
    heads = tuple(f"{name}." for name in classification_head(model))
    lacking = [name for name, _ in model.named_parameters() if name not in names]
    if odd := [name for name in lacking if not name.startswith(heads)]:
        raise Unreadable(f"its files have no {odd[0]}")
    return names


def _check_unconverted(model: PreTrainedModel, names: Iterable[str]) -> None:
    transforms = get_model_conversion_mapping(model)
    for name in names:
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(name)
            if renamed != name or (pattern is not None and isinstance(transform, WeightConverter)):
                raise Unreadable(f"transformers converts {name} of its files while it loads them")


def _spellings(name: str, prefix: str) -> list[str]:
    return [name, name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"]


def _check_shapes(model: PreTrainedModel, places: Mapping[str, tuple[str, str]]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for own, (file, name) in places.items():
        with safe_open(file, "pt") as opened:
            shape = opened.get_slice(name).get_shape()
        if tuple(shape) != tuple(tensors[own].shape):
            raise Unreadable(f"{name} in its files is {tuple(shape)}, and in the model {tuple(tensors[own].shape)}")
