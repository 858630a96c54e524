"""Ops on fake tensors, whose results are remembered by the shapes of their arguments.

The layers of a model run the same ops on the same shapes. torch's fake tensors have a cache for that; building its keys
takes most of the time of a trace, and it leaves out `_unsafe_view`, which ends every linear layer. Here a key has only
what tells plain fake tensors apart, and what is not plain is left to torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CONSTANTS = {int, float, bool, str, type(None), torch.dtype, torch.layout, torch.device, torch.memory_format}
"""Types of the arguments, beside tensors and lists, that a key may have."""
TAGS = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of ops that are not remembered: they change the shape of an argument, or read values."""


class Made(NamedTuple):
    """An output that is a new tensor: in new memory, or `viewed`, in that of the only tensor among the arguments."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int | torch.SymInt
    device: torch.device
    viewed: bool


class Given(NamedTuple):
    """An output that is an argument: of the tensors among them, that of this number."""

    number: int


class Outputs(NamedTuple):
    """What an op returned: its only output if `kind` is None, else a list or tuple of that type."""

    kind: type | None
    parts: list[Any]


class FakeOps:
    """Runs ops with fake tensors among their arguments; called in a dispatch mode, without torch functions.

    Args:
        mode: The mode of the fake tensors.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Any, Outputs | None] = {}  # None: not to be remembered

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run `func`, or make what it returned for such arguments before."""
        tensors: list[FakeTensor] = []
        key: list[Any] = [func]
        plain = is_plain(func) and not torch.is_inference_mode_enabled()
        if not (plain and self._add(args, key, tensors) and self._add([*kwargs.items()], key, tensors)):
            return func(*args, **kwargs)
        whole = tuple(key)
        if whole not in self._known:
            out = func(*args, **kwargs)
            self._known[whole] = self._outputs(out, tensors)
            return out
        known = self._known[whole]
        if known is None:
            return func(*args, **kwargs)
        made = [self._make(part, tensors) for part in known.parts]
        return made[0] if known.kind is None else known.kind(made)

    def _outputs(self, out: Any, tensors: Sequence[FakeTensor]) -> Outputs | None:
        """Return how to make the outputs of an op again; None if they are not plain."""
        kind = type(out) if type(out) in (list, tuple) else None
        outputs = [out] if kind is None else out
        parts = [self._part(output, tensors) for output in outputs]
        pairs = [(part, output) for part, output in zip(parts, outputs, strict=True) if type(part) is Made]
        new = [output.untyped_storage()._cdata for part, output in pairs if not part.viewed]
        return None if NotImplemented in parts or len(set(new)) < len(new) else Outputs(kind, parts)

    def _part(self, output: Any, tensors: Sequence[FakeTensor]) -> Any:
        """Return an output as it is made again: a constant, `Given`, or `Made`; NotImplemented if it is not plain."""
        if type(output) in CONSTANTS:
            return output
        if type(output) is not FakeTensor or output.requires_grad or not self._is_dense(output):
            return NotImplemented
        given = next((number for number, tensor in enumerate(tensors) if tensor is output), None)
        if given is not None:
            return Given(given)
        viewed = output.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in tensors}
        if viewed and len(tensors) > 1:  # another call may have them in other memory
            return NotImplemented
        shape, stride, offset = output.shape, output.stride(), output.storage_offset()
        made = Made(shape, stride, output.dtype, offset, output.fake_device, viewed)
        again = self._make(made, tensors)
        keys = torch._C._dispatch_key_set(again) == torch._C._dispatch_key_set(output)
        size = again.untyped_storage().nbytes() == output.untyped_storage().nbytes()
        return made if keys and size else NotImplemented

    def _make(self, part: Any, tensors: Sequence[FakeTensor]) -> Any:
        kind = type(part)
        if kind is Given:
            return tensors[part.number]
        if kind is not Made:
            return part
        bare = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
        if part.viewed:
            bare.set_(tensors[0].untyped_storage(), part.offset, part.shape, part.stride)  # pyright: ignore
        return FakeTensor(self._mode, bare, part.device)

    def _add(self, values: Sequence[Any], key: list[Any], tensors: list[FakeTensor]) -> bool:
        """Append values to a key, and the tensors among them to `tensors`; return whether all of them are plain."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor and self._is_dense(value):
                tensors.append(value)
                key += (value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device)
            elif kind in CONSTANTS:
                key += (kind, value)
            elif kind is list or kind is tuple:
                key += (kind, len(value))
                if not self._add(value, key, tensors):
                    return False
            else:
                return False
        return True

    def _is_dense(self, tensor: FakeTensor) -> bool:
        """Return whether shape, strides, dtype and device are all that there is to a tensor."""
        ours = tensor.fake_mode is self._mode and tensor.constant is None
        return ours and tensor.layout is torch.strided and not tensor.dtype.is_complex


@cache
def is_plain(func: Any) -> bool:
    """Return whether the results of an op depend on the shapes and the constants among its arguments alone."""
    return isinstance(func, OpOverload) and func.namespace == "aten" and not TAGS & set(func.tags)
