"""Follow each allocation of a computation whose large tensors are fake: what a device would hold, without holding it.

Parameters and batches are FakeTensors, so that every op on them yields shapes instead of values. Small integers, masks
and scalars stay real: code that reads them, such as indices of blocks or an attention mask, decides as it would in a
training. Where a value of a fake tensor itself is read, it is unknown: see `Trace`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import thread_time
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_sparse_profiling.ledger import untyped_storages
from lit_sparse_profiling.opcounts import bound, flops_of
from lit_sparse_profiling.traced_ops import accumulated, is_mask, name_of, written_real

aten = torch.ops.aten

SAVED, TEMPORARY = "saved for backward", "temporaries"
"""Categories of what nobody labelled: what the backward pass finds of the forward pass, and everything else."""
BOUNDARY = "backward"
"""The phase at whose start unlabelled tensors are those saved for it."""

LARGE = 2**20
"""Elements of a permutation above which it is not drawn."""
MANY = 2**40
"""Value that a real count is taken to be once an unknown one was added to it."""

Workspaces = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
"""`workspaces(op, args, kwargs, out)` returns the bytes that the device's kernel allocates and frees within the op."""


class Overdue(Exception):
    """A trace takes longer than it may."""


@dataclass(eq=False)
class Block:
    """One allocation.

    Attributes:
        size: Bytes as requested.
        op: The op that made it.
        module: Qualified name of the module in whose forward pass it was made; empty elsewhere.
        born, died: Indices into `Trace.events`; `died` is None while it is alive.
        labels: (index of an event, category, name), in order.
    """

    size: int
    op: str
    module: str
    born: int
    died: int | None = None
    labels: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """The memory at the peak of a phase: bytes in all and by category, and the largest blocks, (bytes, category, name).

    Attributes:
        event: Index of the event that reached the peak.
    """

    phase: str
    bytes: int
    event: int
    categories: Mapping[str, int]
    largest: Sequence[tuple[int, str, str]]


class Trace(TorchDispatchMode):
    """Records allocations and frees of everything that runs within `with trace:`.

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
        events: For each allocation the block's number from 1, for each free the negative number.
        blocks: The blocks, by number less one.
        marks: (index of the first event, name) of each phase, in order.
        flops: Floating-point operations by phase, of torch's own formulas.
    """

    def __init__(
        self,
        workspaces: Workspaces | None = None,
        composed: Mapping[Any, Callable[..., Any]] | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__()
        self._end = None if seconds is None else thread_time() + seconds
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.events: list[int] = []
        self.blocks: list[Block] = []
        self.marks: list[tuple[int, str]] = [(0, "loading")]
        self.flops: dict[str, int] = {}
        self._workspaces = workspaces or (lambda *_: 0)
        self._composed = composed or {}
        self._alive: dict[int, tuple[Any, int]] = {}  # by id of a storage: weak reference, number of its block
        self._names: dict[nn.Module, str] = {}
        self._inside: list[str] = []
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

    def phase(self, name: str) -> None:
        """Begin the phase `name`."""
        self.marks.append((len(self.events), name))

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

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside.append(self._names.get(module, ""))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop()

    @property
    def now(self) -> tuple[int, int]:
        """The number of events and of phases so far, for `repeat`."""
        return len(self.events), len(self.marks)

    def repeat(self, since: tuple[int, int]) -> None:
        """Append what happened after `since` once more: what lived and died within, in its phases.

        The same step again allocates and frees the same, beside what the first one left.
        """
        (start, first), end, numbers = since, len(self.events), dict[int, int]()
        marks = self.marks[first:]
        for index in range(start, end):
            while marks and marks[0][0] <= index:
                self.phase(marks.pop(0)[1])
            block, number = self.blocks[abs(self.events[index]) - 1], abs(self.events[index])
            if block.born < start or block.died is None:
                continue
            shift = len(self.events) - index
            if self.events[index] > 0:
                labels = [(at + shift, category, name) for at, category, name in block.labels]
                self.blocks.append(Block(block.size, block.op, block.module, len(self.events), labels=labels))
                numbers[number] = len(self.blocks)
                self.events.append(numbers[number])
            else:
                self.blocks[numbers[number] - 1].died = len(self.events)
                self.events.append(-numbers[number])

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
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
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
        if func is aten.add.Tensor and (target := accumulated(args)) is not None:
            other = args[1] if target is args[0] else args[0]
            aten.add_.Tensor(target, other)
            return target
        out = func(*args, **kwargs)
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
        given = bound(func, args, kwargs) if isinstance(func, OpOverload) else {}
        flops = flops_of(func, given, args, kwargs, out)
        if flops is not None:
            phase = self.marks[-1][1]
            self.flops[phase] = self.flops.get(phase, 0) + flops

    # ---- allocations

    def _note(self, op: str, out: Any) -> None:
        """Record the storages of `out` that are new."""
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            for storage in untyped_storages(tensor):
                key, size = id(storage), storage.nbytes()
                known = self._alive.get(key)
                if size == 0 or (known is not None and known[0]() is storage):
                    continue
                number = self._allocate(size, op)
                reference = weakref.ref(storage, lambda _, key=key, number=number: self._free(key, number))
                self._alive[key] = (reference, number)

    def _allocate(self, size: int, op: str) -> int:
        self.blocks.append(Block(size, op, self._inside[-1] if self._inside else "", len(self.events)))
        self.events.append(len(self.blocks))
        return len(self.blocks)

    def _free(self, key: int, number: int) -> None:
        block = self.blocks[number - 1]
        if block.died is None:
            block.died = len(self.events)
            self.events.append(-number)
        if key in self._alive and self._alive[key][1] == number:
            del self._alive[key]

    def _pass_by(self, size: int, func: Any) -> None:
        """Record an allocation that lives within an op."""
        number = self._allocate(size, f"workspace of {name_of(func)}")
        self.blocks[number - 1].died = len(self.events)
        self.events.append(-number)

    # ---- results

    def levels(self) -> list[int]:
        """Return the bytes allocated after each event."""
        out, level = [], 0
        for event in self.events:
            level += self.blocks[event - 1].size if event > 0 else -self.blocks[-event - 1].size
            out.append(level)
        return out

    def category(self, block: Block, event: int) -> tuple[str, str]:
        """Return category and name of a block that is alive after the event of that index."""
        named = f"{block.module}: {block.op}" if block.module else block.op
        if block.labels:
            before = [label for label in block.labels if label[0] <= event + 1]
            _, category, name = (before or block.labels[:1])[-1]
            return category, name
        saved = any(
            block.born < start and (block.died is None or block.died >= start) and start <= event + 1
            for start, phase in self.marks
            if phase == BOUNDARY
        )
        crosses = next((start for start, phase in self.marks if phase == BOUNDARY and start > block.born), None)
        ahead = crosses is not None and (block.died is None or block.died >= crosses)
        return (SAVED if saved or ahead else TEMPORARY), named

    def alive(self, event: int) -> list[Block]:
        """Return the blocks that are alive after the event of that index."""
        return [b for b in self.blocks if b.born <= event and (b.died is None or b.died > event)]

    def moment(self, phase: str, event: int, largest: int = 20) -> Moment:
        """Return what is alive after the event of that index."""
        found = [(block.size, *self.category(block, event)) for block in self.alive(event)]
        categories: dict[str, int] = {}
        for size, category, _ in found:
            categories[category] = categories.get(category, 0) + size
        return Moment(phase, sum(categories.values()), event, categories, sorted(found, reverse=True)[:largest])

    def peaks(self) -> dict[str, Moment]:
        """Return the highest moment of each phase, by name."""
        levels = self.levels()
        best: dict[str, tuple[int, int]] = {}
        ends = [start for start, _ in self.marks[1:]] + [len(self.events)]
        for (start, phase), end in zip(self.marks, ends, strict=True):
            first = max(start - 1, 0)  # the level that the phase begins with counts
            for event in range(first, end):
                if phase not in best or levels[event] > best[phase][0]:
                    best[phase] = levels[event], event
        return {phase: self.moment(phase, event) for phase, (_, event) in best.items()}
