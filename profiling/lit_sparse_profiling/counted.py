"""The memory of a training step, counted storage by storage while it runs.

A dispatch mode sees the outputs of every operation, and finalizers see storages die. No category is "the rest". What an
allocator's peak has beyond this count was allocated inside operations, where no hook sees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lit_sparse_profiling.holders import holder, storages_of
from lit_sparse_profiling.ledger import categories, tensors, untyped_storages
from lit_sparse_profiling.origins import Origins, line
from lit_sparse_profiling.sections import Held, Large, Ledger, Level
from lit_sparse_profiling.witness import alive

SAVED, TEMPORARY, BATCH, GRADIENTS, BEFORE = "saved", "temporaries", "batch", "gradients", "before"
LARGE = 2**14
"""Bytes from which a storage may be told among the largest."""
HELD_FLOOR = 2**20
"""Bytes from which a storage is sought among those from before the step: finding its holder takes time."""
KEPT = 10
"""Number of the largest tensors that are told."""
HELD = 3
"""Number of the largest tensors that a step leaves behind whose holders are sought."""
LEVELS = 100
"""Moments of a step that are told."""
UNNAMED_PHASE = "course"
"""The phase of a step until the caller sets another. It is written into records: its value cannot change."""
Sizes = dict[str, int]


@dataclass
class _Block:
    """A live storage: its bytes, its permanent category if it has one, and the number of saved tensors in it.

    Of a large one, `course` has its categories by the counter's clock, None once it is dead. One from before the step
    has its `address`.
    """

    size: int
    category: str | None
    saves: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    module: str = ""
    line: str = ""
    address: int = 0
    course: list[tuple[int, str | None, int]] = field(default_factory=list)

    @property
    def counted_as(self) -> str:
        """The category in which the block counts now."""
        return self.category or (SAVED if self.saves else TEMPORARY)


class _Saved:
    """A tensor saved for backward. Its blocks count as saved for as long as autograd keeps this object."""

    def __init__(self, tensor: Tensor, counter: Counter) -> None:
        # Detached: a node that saves its own output would otherwise keep itself alive through it, if
        # backward is never called.
        self.tensor, self.counter, self.blocks = tensor.detach(), counter, counter.blocks(tensor)
        for block in self.blocks:
            counter.update(block, saves=block.saves + 1)

    def __del__(self) -> None:
        for block in self.blocks:
            self.counter.update(block, saves=block.saves - 1)


def _count_freed(counter: weakref.ref[Counter], block: _Block) -> None:
    # By a weak reference: the finalizers of the weights would keep the counter, and it the model, for ever.
    found = counter()
    if found is not None:
        found._count(block, -1)


class Counter(TorchDispatchMode):
    """Counter of the live bytes of a training step: `with Counter(model, optimizer, state, batch): step()`.

    Do not time such a step. A model under torch.compile runs eagerly in it: the counts are those of eager execution.

    Args:
        model: Its parameters, gradients and buffers are categories.
        optimizer: Its state is a category.
        strategy_state: Tensors nested in dicts and lists, a category.
        batch: Likewise.
        device: Only storages on this device count; by default, that of the first parameter.

    Attributes:
        now: Live bytes by category.
        peak: Live bytes by category when their sum was highest.
        phase: Phase of the step; the caller sets it.
        peak_phase: Phase of the peak.
        saved_peak: Highest number of bytes saved for backward.
        start: Live bytes when the block began.
        held_by: Bytes of tensors that were there before the block and are in no category, by who holds them.
        on_free: Called with the address of each storage from before the block that is freed in it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        strategy_state: Any = None,
        batch: Any = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.device = device or next(model.parameters()).device
        self.phase = self.peak_phase = UNNAMED_PHASE
        self.now: Sizes = {}
        self.peak: Sizes = {}
        self.saved_peak = 0
        self.held_by: dict[str, int] = {}
        self.on_free: Callable[[int], None] = lambda address: None
        self._entered = False
        self.start = self._total = self._peak_total = 0
        self._blocks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._clock = self._peak_clock = 0
        self._large: list[_Block] = []
        self._began = 0.0
        self._first: Sizes = {}
        self._changes: list[tuple[float, str, str, int]] = []
        self._origins, self._watching = Origins(model), ExitStack()
        self._name_weights(model)
        for category, members in {**categories(model, optimizer, strategy_state), BATCH: tensors(batch)}.items():
            for tensor in members:
                self.blocks(tensor, category)
        self._weights = [p for group in (optimizer.param_groups if optimizer else []) for p in group["params"]]
        self._weights += [p for p in model.parameters() if p.requires_grad]

    def _name_weights(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            category = "trainable" if parameter.requires_grad else "frozen"
            for block in self.blocks(parameter, category):
                block.module = block.module or name

    def add_others(self) -> None:
        """Count all other tensors that are alive on the device, and find out who holds them.

        Of many small ones the holders of a few are sought. If they are less than `HELD_FLOOR` together, none counts.
        """
        small: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        for tensor in alive(self.device):
            for storage in storages_of(tensor):
                if storage.device != self.device or storage in self._blocks or not storage.nbytes():
                    continue
                if storage.nbytes() < HELD_FLOOR:
                    small[id(storage)] = storage, tensor
                else:
                    self._hold(storage, tensor, f"held by {holder(tensor)}")
        if sum(storage.nbytes() for storage, _ in small.values()) >= HELD_FLOOR:
            largest = sorted(small.values(), key=lambda one: -one[0].nbytes())
            names = dict.fromkeys(holder(tensor) for _, tensor in largest[:HELD])
            for storage, tensor in largest:
                self._hold(storage, tensor, f"in {len(small)} small tensors, some held by {' and '.join(names)}")

    def _hold(self, storage: torch.UntypedStorage, tensor: Tensor, by: str) -> None:
        if storage not in self._blocks:
            self._block(storage, BEFORE, tensor).line = by
            self.held_by[by] = self.held_by.get(by, 0) + storage.nbytes()

    # ---- the step

    def __enter__(self) -> Counter:
        super().__enter__()
        self._entered = True
        # Not in the constructor: a strategy's state may be copies that die with the constructor's arguments.
        self.start = self._total
        self._began, self._first = perf_counter(), dict(self.now)
        self._changes.clear()
        self._watching.enter_context(self._origins.watch())
        self._patch_resize()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, self), lambda saved: saved.tensor)
        self._hooks.__enter__()
        # Post-accumulate hooks: a plain tensor hook runs before the gradient is in `grad`, and never under FSDP2.
        self._handles = [
            p.register_post_accumulate_grad_hook(self._on_gradient) for p in set(self._weights) if p.requires_grad
        ]
        return self

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._hooks.__exit__(*raised)
        torch.UntypedStorage.resize_ = self._plain_resize
        self._watching.close()
        self.on_free = lambda address: None
        super().__exit__(*raised)

    def _patch_resize(self) -> None:
        """Wrap `UntypedStorage.resize_`: FSDP frees gathered weights by it, and it dispatches no operation."""
        plain = self._plain_resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            if storage.device == self.device:
                self._on_resize(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue] - named otherwise

    def _on_resize(self, storage: torch.UntypedStorage) -> None:
        """Count the storage's new size. It counts as temporary from now on: its owner frees it, whoever saved it."""
        block = self._block(storage, TEMPORARY)
        self._adjust(block, -block.size)
        block.size, block.category = storage.nbytes(), block.category or TEMPORARY
        self._adjust(block, block.size)
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.blocks(leaf)
        return out

    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # the hook of a fused optimizer may have consumed it already
            for block in self.blocks(parameter.grad):
                self.update(block, category=block.category or GRADIENTS)

    def addresses(self) -> Iterator[int]:
        """Iterate over the addresses of the live storages."""
        return (storage.data_ptr() for storage in self._blocks)

    # ---- the count

    def blocks(self, tensor: Tensor, category: str | None = None) -> list[_Block]:
        """Return the blocks of the tensor's storages on the device. Storages not seen before start to count."""
        if tensor.device != self.device:
            return []
        return [self._block(storage, category, tensor) for storage in untyped_storages(tensor)]

    def _block(self, storage: torch.UntypedStorage, category: str | None, tensor: Tensor | None = None) -> _Block:
        if storage in self._blocks:
            return self._blocks[storage]
        known = not self._entered and storage.device.type == "cpu"
        block = self._blocks[storage] = _Block(storage.nbytes(), category, address=storage.data_ptr() if known else 0)
        if block.size >= LARGE:
            self._describe(block, tensor)
        # No finalizer at exit: thousands of them would run while the interpreter's modules are already torn down.
        weakref.finalize(storage, _count_freed, weakref.ref(self), block).atexit = False
        self._count(block, 1)
        return block

    def _describe(self, block: _Block, tensor: Tensor | None) -> None:
        self._large.append(block)
        if tensor is not None:
            block.shape, block.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if block.category is None:
            block.module, block.line = self._origins.module(), line()

    def update(self, block: _Block, **fields: Any) -> None:
        """Set fields of a block, and move its bytes to its new category. A dead block has no bytes to move."""
        alive = block.size > 0
        self._adjust(block, -block.size)
        for name, value in fields.items():
            setattr(block, name, value)
        self._adjust(block, block.size if alive else 0)

    def _count(self, block: _Block, sign: int) -> None:
        self._adjust(block, sign * block.size)
        if sign < 0:
            block.size = 0
            if block.address:
                self.on_free(block.address)
        else:
            self._note_peak()

    def _note_peak(self) -> None:
        if self._total > self._peak_total:
            self._peak_total, self.peak, self.peak_phase = self._total, dict(self.now), self.phase
            self._peak_clock = self._clock

    def _adjust(self, block: _Block, size: int) -> None:
        self._total += size
        self.now[block.counted_as] = self.now.get(block.counted_as, 0) + size
        self._changes.append((perf_counter(), self.phase, block.counted_as, size))
        self.saved_peak = max(self.saved_peak, self.saved)
        self._clock += 1
        if block.size >= LARGE:
            block.course.append((self._clock, block.counted_as if size > 0 else None, block.size))

    @property
    def saved(self) -> int:
        """Bytes saved for backward now, without those in another category."""
        return self.now.get(SAVED, 0)

    def at_peak(self) -> Held:
        """Return the live bytes at the peak, by category."""
        ledger = Ledger(**{name: self.peak.get(name, 0) for name in Ledger.__dataclass_fields__})
        rest = {name: self.peak.get(name, 0) for name in (BATCH, SAVED, TEMPORARY, BEFORE)}
        return Held(ledger=ledger, phase=self.peak_phase, **rest)

    def largest(self) -> list[Large]:
        """Return the largest tensors alive at the peak."""
        found: list[Large] = []
        for block in self._large:
            _, category, size = next(
                (one for one in reversed(block.course) if one[0] <= self._peak_clock), (0, None, 0)
            )
            if category is not None:
                found.append(Large(size, category, list(block.shape), block.dtype, block.module, block.line))
        return sorted(found, key=lambda one: -one.bytes)[:KEPT]

    def levels(self) -> list[Level]:
        """Return what was alive over the step: its beginning, then the highest moment of each equal part of it."""
        if not self._changes:
            return []
        now, total = dict(self._first), sum(self._first.values())
        span = max(self._changes[-1][0] - self._began, 1e-9)
        highest: dict[int, tuple[int, Level]] = {-1: (total, Level(0.0, self._changes[0][1], dict(now)))}
        for when, phase, category, size in self._changes:
            now[category], total = now.get(category, 0) + size, total + size
            part = min(int((when - self._began) / span * LEVELS), LEVELS - 1)
            if part not in highest or total > highest[part][0]:
                highest[part] = total, Level(round(when - self._began, 6), phase, dict(now))
        return [level for _, level in highest.values()]

    def left(self) -> list[Large]:
        """Return the largest storages that the step made, that are alive still and in no category, with who holds them.

        Call it after the step.
        """
        found: dict[int, tuple[Tensor, _Block]] = {}
        for tensor in alive(self.device):
            for storage in storages_of(tensor):
                block = self._blocks.get(storage)
                if block is not None and block.size and block.category is None:
                    found.setdefault(id(block), (tensor, block))
        largest = sorted(found.values(), key=lambda one: -one[1].size)[:HELD]  # a search takes a third of a second
        return [self._with_holder(tensor, block) for tensor, block in largest]

    @staticmethod
    def _with_holder(tensor: Tensor, block: _Block) -> Large:
        by = "a graph of autograd" if block.saves else holder(tensor)
        where = f"{block.line}, held by {by}".removeprefix(", ")
        return Large(block.size, block.counted_as, list(block.shape), block.dtype, block.module, where)
