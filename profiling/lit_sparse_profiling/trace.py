"""Follow each allocation of a computation whose large tensors are fake: what a device would hold, without holding it.

Parameters and batches are FakeTensors, so that every op on them yields shapes instead of values. Small integers, masks
and scalars stay real: code that reads them, such as indices of blocks or an attention mask, decides as it would in a
training. Where a value of a fake tensor itself is read, it is unknown: see `Trace`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import thread_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_sparse_profiling.fake_ops import FakeOps
from lit_sparse_profiling.ledger import untyped_storages
from lit_sparse_profiling.opcounts import bound, flops_of, has_formula
from lit_sparse_profiling.timeline import Timeline
from lit_sparse_profiling.traced_ops import accumulated, is_mask, name_of, tensors_in, written_real

aten = torch.ops.aten

LARGE = 2**20
"""Elements of a permutation above which it is not drawn."""
MANY = 2**40
"""Value that a real count is taken to be once an unknown one was added to it."""

Workspaces = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
"""`workspaces(op, args, kwargs, out)` returns the bytes that the device's kernel allocates and frees within the op."""


class Overdue(Exception):
    """A trace takes longer than it may."""


class Trace(TorchDispatchMode, Timeline):
    """Records what runs within `with trace:` as a timeline of allocations and frees.

    An op on fake tensors is fake; one on real tensors only runs. Of what is made from nothing, floats of one or more
    dimensions are fake, unless a generator draws them. The value of a fake tensor is taken to be 1 (true) where it is
    read as a number, all entries are kept where a fake mask selects, and a real tensor that a fake one is added to
    keeps its values: sizes that depend on these are bounds.

    Args:
        workspaces: Bytes that ops allocate for themselves; none by default.
        composed: Functions of other ops, by the op that runs them; its own allocations are then theirs.
        seconds: Processor time that the trace may take, from now on; None for no limit.

    Raises:
        Overdue: in the first op after these seconds that computes.

    Attributes:
        fake: The mode of the fake tensors.
        flops: Floating-point operations by phase, of torch's own formulas.
    """

    def __init__(
        self,
        workspaces: Workspaces | None = None,
        composed: Mapping[Any, Callable[..., Any]] | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__()
        Timeline.__init__(self)
        self._end = None if seconds is None else thread_time() + seconds
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops: dict[str, int] = {}
        self._ops = FakeOps(self.fake)
        self._workspaces = workspaces or (lambda *_: 0)
        self._composed = composed or {}
        self._alive: dict[int, tuple[Any, int]] = {}  # by id of a storage: weak reference, number of its block
        self._names: dict[nn.Module, str] = {}
        self._inside: list[str] = []
        self._given: frozenset[int] = frozenset()  # storages of gradients that code passes to torch.autograd.grad
        self._scattered: dict[int, int] = {}  # by id of a storage: how many entries were scattered into it

    # ---- what a caller tells

    def empty(self, like: Tensor) -> Tensor:
        """Return a fake tensor of the shape, strides and dtype of `like`, recorded as an allocation."""
        with self.fake:
            out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        self._note("load", out)
        return out

    def fake_bytes(self, size: int) -> Tensor:
        """Return a fake tensor of that many bytes, recorded as an allocation."""
        out = self._unknown((size,), torch.uint8)
        self._note("workspace", out)
        return out

    def add(self, op: str, tensors: Iterable[Tensor]) -> None:
        """Record tensors that were made outside."""
        self._note(op, list(tensors))

    def drop(self, tensor: Tensor) -> None:
        """Record that the storage of a tensor is given back while the tensor lives on, as FSDP does."""
        for storage in untyped_storages(tensor):
            known = self._alive.get(id(storage))
            if known is not None and known[0]() is storage:
                self._free(id(storage), known[1])

    def label(self, category: str, named: Iterable[tuple[str, Tensor]]) -> None:
        """Say what tensors are from now on; those that had no label before were that from the start."""
        for name, tensor in named:
            for storage in untyped_storages(tensor):
                known = self._alive.get(id(storage))
                if known is not None and known[0]() is storage:
                    self.blocks[known[1] - 1].labels.append((len(self.events), category, name))

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Within the block, note in which module's forward pass each allocation is made."""
        self._names = {module: name for name, module in model.named_modules()}
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    @contextmanager
    def noting_given_gradients(self) -> Iterator[None]:
        """Within the block, note the gradients that code passes to `torch.autograd.grad`, and keeps meanwhile."""
        plain = torch.autograd.grad

        def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **options: Any) -> Any:
            before = self._given
            self._given |= {tensor.untyped_storage()._cdata for tensor in tensors_in([grad_outputs])}
            try:
                return plain(outputs, inputs, grad_outputs, *args, **options)
            finally:
                self._given = before

        with patch.object(torch.autograd, "grad", grad):
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside.append(self._names.get(module, ""))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop()

    # ---- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own rules come first, and then its shards here
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # More than half of all calls. C++ asks where it cannot pass on an exception, and would abort the process.
            return args[0].fake_device
        kwargs = kwargs or {}
        if self._end is not None and thread_time() > self._end:
            raise Overdue
        if func in self._composed:
            with self:
                return self._composed[func](*args, **kwargs)
        if isinstance(func, OpOverload) and torch.is_inference_mode_enabled():
            with self:  # composite ops come here whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        with torch._C.DisableTorchFunction():  # from here on it is torch's own code that calls torch, not the model
            given = tensors_in([*args, *kwargs.values()])
            out = self._run(func, args, kwargs, given)
            self._count(func, args, kwargs, out)
            self._note(name_of(func), out)
            if workspace := self._workspaces(func, args, kwargs, out):
                self._pass_by(workspace, func)
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[Tensor]) -> Any:
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            return self._run_without_fakes(func, args, kwargs, given)
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype is torch.bool else 1
        if func in (aten.equal.default, aten.is_nonzero.default, aten.allclose.default):
            return True
        if func is aten.index.Tensor:
            if any(is_mask(index) for index in args[1]):
                return self._select(args[0], args[1])
            args = (args[0], [*self._places(args[1])])
        if func is aten.bincount.default:
            return self._unknown((max(kwargs.get("minlength", 0), *(args[2:] or [1])),), torch.int64)
        if func is aten.nonzero.default:
            found = self._scattered.get(id(args[0].untyped_storage()))
            return self._unknown((args[0].numel() if found is None else found, args[0].ndim))
        if func in (aten.sparse_mask.default, aten._sparse_mask_projection.default):
            return self._masked(args[0], args[1])
        if written_real(func, args):
            return (
                args[0] if args[0].is_floating_point() else args[0].fill_(MANY if args[0].dtype is torch.int64 else 1)
            )
        if func is aten.add.Tensor and (target := accumulated(args, self._given)) is not None:
            other = args[1] if target is args[0] else args[0]
            aten.add_.Tensor(target, other)
            return target
        out = self._ops(func, args, kwargs)
        if func is aten.scatter_.value or func is aten.scatter_.src:
            self._scattered[id(out.untyped_storage())] = args[2].numel()
        elif func in (aten.eq.Scalar, aten._to_copy.default) and id(args[0].untyped_storage()) in self._scattered:
            self._scattered[id(out.untyped_storage())] = self._scattered[id(args[0].untyped_storage())]
        return out

    def _run_without_fakes(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> Any:
        if func is aten.randperm.generator and args[0] > LARGE:
            return self._unknown((args[0],))
        if given or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        real = not isinstance(out, Tensor) or not out.is_floating_point() or out.ndim == 0
        return func(*args, **kwargs) if real else out

    def _places(self, indices: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """Replace real masks by what they select, as kernels do; fake tensors cannot be indexed by them."""
        for index in indices:
            if index is None or index.dtype is not torch.bool:
                yield index
            else:
                with self:
                    yield from index.nonzero().unbind(1)

    def _select(self, tensor: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
        """Return what a mask selects if it selects everything."""
        dims = sum(index.ndim for index in indices if index is not None)
        count = tensor.shape[:dims].numel()
        out = self._unknown((count, *tensor.shape[dims:]), tensor.dtype)
        # The places of the entries are alive beside the output, within the op.
        self._pass_by(count * dims * torch.int64.itemsize + out.untyped_storage().nbytes(), aten.nonzero.default)
        return out

    def _masked(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """Return the entries of a tensor at those of a sparse mask."""
        with self.fake:
            values = torch.empty(mask._values().shape, dtype=tensor.dtype)
            return torch.sparse_coo_tensor(mask._indices(), values, tensor.shape, is_coalesced=True)

    def _unknown(self, shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        with self.fake:
            return torch.empty(tuple(shape), dtype=dtype)

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if not has_formula(func):
            return
        given = bound(func, args, kwargs) if isinstance(func, OpOverload) else {}
        flops = flops_of(func, given, args, kwargs, out)
        if flops is not None:
            phase = self.marks[-1][1]
            self.flops[phase] = self.flops.get(phase, 0) + flops

    # ---- allocations

    def _note(self, op: str, out: Any) -> None:
        """Record the storages of `out` that are new."""
        for tensor in tensors_in([out]):
            if tensor.device.type == "meta":
                continue
            plain = type(tensor) is FakeTensor and tensor.layout is torch.strided
            for storage in (tensor.untyped_storage(),) if plain else untyped_storages(tensor):
                key, size = id(storage), storage.nbytes()
                known = self._alive.get(key)
                if size == 0 or (known is not None and known[0]() is storage):
                    continue
                number = self._allocate(size, op)
                reference = weakref.ref(storage, lambda _, key=key, number=number: self._free(key, number))
                self._alive[key] = (reference, number)

    def _allocate(self, size: int, op: str) -> int:
        return self.allocate(size, op, self._inside[-1] if self._inside else "")

    def _free(self, key: int, number: int) -> None:
        self.free(number)
        if key in self._alive and self._alive[key][1] == number:
            del self._alive[key]

    def _pass_by(self, size: int, func: Any) -> None:
        """Record an allocation that lives within an op."""
        self.free(self._allocate(size, f"workspace of {name_of(func)}"))
