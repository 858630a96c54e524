"""Forward passes with perturbed weights, in the memory of plain ones, that never write to the weights.

Adding a perturbation in place and subtracting it again does not give the weights back: in bf16 they lose half their
norm to rounding in 20,000 steps, whatever the data. So the weights stay as they are, and every operation that reads one
gets perturbed values in its place: a large matrix some rows at a time, an embedding only the rows of the batch's tokens
(`CHUNK` elements at most). Nothing has to be restored, an exception leaves no trace, and what FSDP2 gathers is
perturbed as what one device holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from lit_sparse.anatomy import has_values
from lit_sparse.errors import BadInput

CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Elements of perturbed weights that an operation has at a time; on a CPU they stay in its cache."""


@dataclass(frozen=True)
class Place:
    """A parameter as its noise knows it.

    Attributes:
        number: Its position among the sorted names of all parameters, frozen ones too.
        shape: Of the full parameter.
    """

    number: int
    shape: torch.Size

    @property
    def width(self) -> int:
        """Elements of a row, which is everything at one index of the first dimension."""
        return self.shape[1:].numel()


Rows = slice | Tensor
"""Rows of a parameter: some that follow on each other, or indices (R,)."""
Make = Callable[[Tensor, Place, Rows], Tensor]
"""`make(weight, place, rows)` returns a new tensor: `weight`, which are these rows, perturbed."""


def check_model(model: nn.Module, method: str) -> None:
    """Refuse a model that cannot be trained by forward passes with perturbed weights.

    Raises:
        BadInput: if weights are in fp16, or a part of it is compiled.
    """
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves:
        raise BadInput(
            f"{method}: {halves[0]} is in float16, whose range loses updates and overflows without a scaler of losses; "
            "load the base in bfloat16 or float32."
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise BadInput(
            f"{method}: model.compile is set, but a compiled graph hides which weights it reads, and they would not be "
            "perturbed; leave model.compile out."
        )


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return the places of the trainable parameters, by name, in the model's order."""
    numbers = {name: number for number, name in enumerate(sorted(name for name, _ in model.named_parameters()))}
    return {name: Place(numbers[name], p.shape) for name, p in model.named_parameters() if p.requires_grad}


class Perturbed(TorchFunctionMode):
    """Within this context, operations see the weights in `places` as `make` perturbs them.

    It sees every operation that Python calls on a parameter. Compiled graphs hide theirs from it: do not compile.

    Args:
        model: The model.
        places: Of the weights that are perturbed, by name.
        make: How.
        known: Names of the parameters that were met, which several may share: it takes a walk through the model.

    Attributes:
        read: Names of the weights that were read.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Place],
        make: Make,
        known: dict[Tensor, str | None] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._places, self._make = model, places, make
        self._known: dict[Tensor, str | None] = {} if known is None else known
        self.read: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.apply(func, args, kwargs) if self.perturbs(func, args, kwargs) else func(*args, **kwargs)

    def perturbs(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call reads a weight that is perturbed."""
        if not any(True for _ in _not_plain(args, kwargs)) or _reads_nothing(func):
            return False
        read = args[1:] if _writes_first(func) else args
        return any(self._is_perturbed(value) for value in _not_plain(read, kwargs))

    def apply(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what a call gives with perturbed weights."""
        if func.__name__ in CASTS and (same := func(*args, **kwargs)) is args[0]:
            return same  # a cast to the dtype that it has; what reads it later comes by here
        rule = RULES.get(func)
        out = rule(self, *args, **kwargs) if rule is not None else None
        if out is None:
            out = func(*self._perturb_all(args), **{key: self._perturb_all(value) for key, value in kwargs.items()})
        return out

    def _is_perturbed(self, tensor: Tensor) -> bool:
        if not isinstance(tensor, nn.Parameter) or isinstance(tensor, DTensor):
            return False
        if tensor not in self._known:
            # FSDP2 puts gathered parameters in a unit's modules while it computes, so the names are looked up then.
            for name, parameter in self._model.named_parameters():
                if not isinstance(parameter, DTensor):
                    self._known[parameter] = name if name in self._places else None
            self._known.setdefault(tensor, None)
        return self._known[tensor] is not None

    def place(self, weight: Any) -> Place | None:
        """Return the place of a weight that is perturbed, and note that it is read; None for any other value."""
        if (name := self.name(weight)) is None:
            return None
        self.read.add(name)
        return self._places[name]

    def name(self, value: Any) -> str | None:
        """Return the name of a weight that is perturbed; None for any other value."""
        return self._known[value] if isinstance(value, Tensor) and self._is_perturbed(value) else None

    def rows(self, weight: Tensor, place: Place, rows: Rows) -> Tensor:
        """Return rows of a weight, perturbed."""
        taken = weight.detach()[rows]
        return self._make(taken if taken.is_contiguous() else taken.contiguous(), place, rows)

    def whole(self, value: Any) -> Any:
        """Return a weight perturbed; any other value as it is."""
        place = self.place(value)
        return value if place is None else self.rows(value, place, slice(0, _length(value)))

    def _perturb_all(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._perturb_all(item) for item in value)
        return self.whole(value)


def _reads_nothing(func: Any) -> bool:
    """Return whether a function asks for a shape or the like, which sees no perturbation."""
    name = func.__name__
    return func not in READS if name == "__get__" else name in METADATA


def _writes_first(func: Any) -> bool:
    """Return whether a function writes to its first argument, of which it gets no perturbed copy then."""
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")


READS = [getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real")]
METADATA = {
    *("size", "dim", "numel", "nelement", "stride", "is_contiguous", "element_size", "untyped_storage", "data_ptr"),
    *("storage_offset", "is_floating_point", "is_complex", "is_inference", "get_device", "register_hook", "is_shared"),
    *("__len__", "__hash__", "__repr__", "__format__", "__setstate__", "__set__", "type", "empty_like", "zeros_like"),
    *("new_empty", "new_zeros", "ones_like", "is_same_size", "has_names", "is_tensor", "result_type", "promote_types"),
}
CASTS = {"to", "contiguous", "float", "double", "bfloat16", "half", "type_as"}


def _not_plain(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield tensors of a subclass, as parameters are: most operations have none, and a pass has thousands of them."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor:
            continue
        if kind in (list, tuple):
            yield from _not_plain(value, {})
        elif isinstance(value, Tensor):
            yield value


def _length(weight: Tensor) -> int:
    return weight.shape[0] if weight.ndim else 1


# ---- large weights


def _chunk(weight: Tensor) -> int:
    return CHUNK.get(weight.device.type, CHUNK["cuda"])


def _chunks(weight: Tensor) -> list[slice] | None:
    """Return the rows of a large weight in chunks; None for a small one."""
    most = _chunk(weight)
    if weight.numel() <= most:
        return None
    step, rows = max(1, most // (weight.numel() // weight.shape[0])), weight.shape[0]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _linear(mode: Perturbed, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    chunks = _chunks(weight)
    if chunks is None or (place := mode.place(weight)) is None:
        return None
    bias, out = mode.whole(bias), None
    for rows in chunks:
        part = F.linear(x, mode.rows(weight, place, rows), None if bias is None else bias[rows])
        if out is None:
            out = part.new_empty(*part.shape[:-1], weight.shape[0])
        out[..., rows] = part
    return out


def _addmm(mode: Perturbed, bias: Tensor, x: Tensor, weight: Tensor, **options: Any) -> Tensor | None:
    chunks = _chunks(weight)
    if chunks is None or options or (place := mode.place(weight)) is None:
        return None
    out = mode.whole(bias)
    for rows in chunks:
        out = torch.addmm(out, x[:, rows], mode.rows(weight, place, rows))
    return out


def _embedding(
    mode: Perturbed, ids: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    chunks = _chunks(weight)
    if chunks is None or max_norm is not None or (place := mode.place(weight)) is None:
        return None
    flat, out = ids.flatten(), weight.new_empty(ids.numel(), place.width)
    step = max(1, _chunk(weight) // place.width)
    for start in range(0, len(flat), step):
        out[start : start + step] = mode.rows(weight, place, flat[start : start + step])
    return out.view(*ids.shape, place.width)


def _item(mode: Perturbed, weight: Tensor, index: Any) -> Tensor | None:
    """Perturb only what is taken of the first dimension, as one expert of those in a tensor."""
    if isinstance(index, Tensor) and index.ndim == 0 and index.dtype == torch.int64 and has_values(index):
        index = int(index)  # transformers' loops over experts
    place = mode.place(weight) if isinstance(index, int | slice) else None
    if place is None:
        return None
    start, stop, step = (index if isinstance(index, slice) else slice(index, index + 1 or None)).indices(len(weight))
    if step != 1:
        return None
    found = mode.rows(weight, place, slice(start, stop))
    return found if isinstance(index, slice) else found[0]


# ---- norms


def _in_fp32(mode: Perturbed, weight: Any) -> Tensor | None:
    """Return a bf16 vector perturbed in fp32; None for any other value.

    A norm's weights are near 1, where bf16 has steps of 2^-7: of a perturbation of 1e-3, four in five would be lost.
    """
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.dtype != torch.bfloat16:
        return None
    place = mode.place(weight)
    return None if place is None else mode.rows(weight.detach().float(), place, slice(0, len(weight)))


def _mul(mode: Perturbed, one: Any, other: Any) -> Tensor | None:
    first = _in_fp32(mode, one)
    fine, x = (first, other) if first is not None else (_in_fp32(mode, other), one)
    if fine is None or mode.name(x) is not None:
        return None
    return (fine * x).to(torch.result_type(one, other))


def _layer_norm(
    mode: Perturbed, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    fine = _in_fp32(mode, weight)
    if fine is None:
        return None
    dtype = F.layer_norm(x[:0], shape, weight, bias, eps).dtype  # autocast may make it fp32
    offset = _in_fp32(mode, bias) if mode.name(bias) is not None else None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, fine, offset, eps).to(dtype)


def _float(mode: Perturbed, weight: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return _in_fp32(mode, weight)


def _to(mode: Perturbed, weight: Tensor, *args: Any, **options: Any) -> Tensor | None:
    wanted = (*args, *options.values())
    return _in_fp32(mode, weight) if len(wanted) == 1 and wanted[0] is torch.float32 else None


RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    Tensor.__getitem__: _item,
    Tensor.__mul__: _mul,
    Tensor.mul: _mul,
    torch.mul: _mul,
    F.layer_norm: _layer_norm,
    Tensor.float: _float,
    Tensor.to: _to,
}
"""Operations that read a large weight by its rows, or a norm's in fp32; None leaves it to perturb the whole."""
