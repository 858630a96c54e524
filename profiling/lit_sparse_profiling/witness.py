"""Evidence beyond the examined step: tensors that were there before it, and memory that grows over steps."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_sparse_profiling.ledger import untyped_storages
from lit_sparse_profiling.memory import heap_in_use

PLAIN = (dict, list, tuple, set, frozenset)
PASSING = ("frame", "list_iterator", "generator", "cell", "function")
"""Types that refer to a tensor only while code runs, and hold it for nobody."""
DEPTH = 4
SAMPLES = 128
"""Samples that are kept of a run. At as many, every second one is dropped, and sampling gets half as frequent."""
FEWEST = 6
"""Samples below which growth is not judged."""


def alive(device: torch.device) -> Iterator[Tensor]:
    """Iterate over all tensors on the device that the garbage collector knows, whoever holds them."""
    for one in gc.get_objects():
        # Not isinstance: it asks proxies for their class, which may run any code.
        if issubclass(type(one), Tensor) and one.device == device:
            yield one


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storages of any tensor; none of one that has no storage, such as oneDNN's."""
    try:
        return list(untyped_storages(tensor))
    except RuntimeError:
        return []


def alive_bytes(device: torch.device) -> dict[int, int]:
    """Return bytes by address of the storages of all tensors on the device."""
    found = (storage for tensor in alive(device) for storage in storages_of(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.device == device}


def holder(tensor: Tensor) -> str:
    """Return who holds a tensor, such as "Cache.kept": the attribute of an object, or a global name."""
    return _holder(tensor, None, {id(tensor)}, DEPTH) or "an object unknown to Python's garbage collector"


def _holder(held: Any, inner: Any, seen: set[int], depth: int) -> str | None:
    """Return who holds `held`, in which `inner` is, if it is found within so many containers of containers."""
    referrers = gc.get_referrers(held)
    seen |= {id(referrers), id(sys._getframe())}
    containers = []
    for one in referrers:
        if id(one) in seen or type(one).__name__ in PASSING:
            continue
        seen.add(id(one))
        if isinstance(one, dict) and isinstance(one.get("__name__"), str):
            return f"{one['__name__']}.{_key(one, held)}"
        if isinstance(one, PLAIN):
            containers.append(one)
        else:
            names = getattr(one, "__dict__", {})
            name = _key(names, inner if names is held else held)
            return type(one).__qualname__ + (f".{name}" if name else "")
    found = (_holder(one, held, seen, depth - 1) for one in containers if depth)
    return next((name for name in found if name is not None), None)


def _key(names: Mapping[Any, Any], held: Any) -> str:
    return next((str(name) for name, value in names.items() if value is held), "")


class Growth:
    """Samples of the memory in use at the ends of the timed steps: on a GPU torch's, on a CPU the whole heap's.

    The heap, below torch's allocator, also has what numpy and other libraries take. A sample costs microseconds.

    Args:
        device: Device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps, self._stride = 0, 1
        self._samples: list[tuple[int, int]] = []

    def sample(self) -> None:
        """Note the memory in use at the end of a step."""
        self._steps += 1
        if self._steps % self._stride:
            return
        size = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else heap_in_use()
        if size is None:
            return
        self._samples.append((self._steps, size))
        if len(self._samples) >= SAMPLES:
            self._samples, self._stride = self._samples[1::2], 2 * self._stride

    def per_step(self) -> float | None:
        """Return the bytes by which memory grows in each step; 0 if it does not keep growing, None if not known.

        It keeps growing if each third of the run begins above all of the third before it.
        """
        third = len(self._samples) // 3
        if len(self._samples) < FEWEST:
            return None
        parts = [self._samples[i * third : (i + 1) * third] for i in range(3)]
        sizes = [[size for _, size in part] for part in parts]
        if not all(min(later) > max(earlier) for earlier, later in pairwise(sizes)):
            return 0.0
        steps = [statistics.fmean(step for step, _ in part) for part in parts]
        return (statistics.median(sizes[-1]) - statistics.median(sizes[0])) / (steps[-1] - steps[0])


class PlainSteps:
    """Resident memory when steps without instruments began or went on, and its peak until they stopped.

    What was resident before them is no evidence of what they take: the C allocator keeps what evaluation, or an earlier
    fit of the process, has freed.

    Attributes:
        begun: True once any of them began.
        positions: Token positions of their largest batch; None if unknown.
    """

    def __init__(self) -> None:
        self.begun = False
        self.positions: int | None = None
        self._before: int | None = None
        self._peaks: list[tuple[int, int]] = []

    def begin(self, resident: int | None) -> None:
        """Begin or go on, with so many bytes resident; None if unknown."""
        self.begun, self._before = True, resident

    def end(self, peak: int | None) -> None:
        """Stop, with this resident peak since `begin`; do nothing if they had not begun."""
        before, self._before = self._before, None
        if before is not None and peak is not None:
            self._peaks.append((before, peak))

    def highest_rise(self, needed: int) -> tuple[int | None, int | None]:
        """Return what was resident before, and the peak, where that rose most above both this and `needed` bytes."""
        return max(self._peaks, key=lambda one: one[1] - max(one[0], needed), default=(None, None))
