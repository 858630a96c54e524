"""Evidence beyond the examined step: tensors that were there before it, and memory that grows over steps."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lit_sparse_profiling.holders import holder as holder
from lit_sparse_profiling.holders import keeper, storages_of
from lit_sparse_profiling.memory import heap_in_use

SAMPLES = 128
"""Samples that are kept of a run. At as many, every second one is dropped, and sampling gets half as frequent."""
FEWEST, ENOUGH = 6, 18
"""Samples below which nothing is told of growth, and from which it may be told: before, caches are still filling."""
LASTING = 0.5
"""Least of the rises from the first third of a run to the second and from there to the last, as a share of the other: a
cache's rises get smaller, and what is made once (the files of the first logged step) rises once."""
GARBAGE = 0.75
"""Share of a rise that was garbage, above which what is left is not told from it."""


def alive(device: torch.device) -> Iterator[Tensor]:
    """Iterate over all tensors on the device that the garbage collector knows, whoever holds them."""
    for one in gc.get_objects():
        # Not isinstance: it asks proxies for their class, which may run any code.
        if issubclass(type(one), Tensor) and one.device == device:
            yield one


def alive_bytes(device: torch.device) -> dict[int, int]:
    """Return bytes by address of the storages of all tensors on the device."""
    found = (storage for tensor in alive(device) for storage in storages_of(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.device == device}


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
        self._settled, self._garbage = 0, 0.0
        self._searched, self._keeper, self._ended = 0, "", False

    def sample(self) -> None:
        """Note the memory in use at the end of a step."""
        self._steps += 1
        if self._steps % self._stride:
            return
        size = self._in_use()
        if size is None:
            return
        self._samples.append((self._steps, size))
        if len(self._samples) >= SAMPLES:
            self._samples, self._stride = self._samples[1::2], 2 * self._stride

    def _in_use(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else heap_in_use()

    def rise(self) -> float | None:
        """Return the bytes a step by which the samples rise; 0 if they do not keep rising, None if it is too early.

        They keep rising if no third of them falls below the third before it, and if each rises as much as the other.
        """
        third = len(self._samples) // 3
        if len(self._samples) < FEWEST:
            return None
        late = self._samples[-3 * third :]
        parts = [late[i * third : (i + 1) * third] for i in range(3)]
        sizes = [[size for _, size in part] for part in parts]
        if not all(min(later) >= max(earlier) for earlier, later in pairwise(sizes)):
            return 0.0
        if len(self._samples) < ENOUGH:
            return None
        rises = [later - earlier for earlier, later in pairwise(map(statistics.median, sizes))]
        if min(rises) < LASTING * max(rises):
            return 0.0
        steps = [statistics.fmean(step for step, _ in part) for part in parts]
        return sum(rises) / (steps[-1] - steps[0])

    @property
    def unsettled(self) -> bool:
        """True if the samples rise, and it is not known since the last step whether that is garbage."""
        return bool(self.rise()) and self._settled != self._steps

    def settle(self) -> None:
        """Collect garbage, and note how much of the rise it was. Call it at the end of a step, before anything else.

        Tensors and arrays in reference cycles stay until Python collects them, which it does rarely in a large program.
        """
        before = self._in_use() or 0
        gc.collect()
        span = self._samples[-1][0] - self._samples[0][0]
        self._settled, self._garbage = self._steps, max(before - (self._in_use() or 0), 0) / span

    def per_step(self) -> float | None:
        """Return the bytes by which memory grows in each step, without garbage.

        They are 0 if it does not keep growing, and None if that is not known.
        """
        if self.unsettled:
            self.settle()
        rise = self.rise()
        return rise and (rise - self._garbage if self._garbage < GARBAGE * rise else 0.0)

    def end(self) -> None:
        """Note that no step follows."""
        self._ended = True

    def keeper(self) -> str:
        """Return in what the items are that memory grew by, "" if that is not found.

        It takes about a second, so that it is searched again only after as many steps as before, since each save asks;
        and at the end.
        """
        grown = self.per_step()
        if grown and (self._ended or self._steps >= 2 * self._searched):
            self._keeper, self._searched = keeper(grown * self._steps, self._steps), self._steps
        return self._keeper if grown else ""


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
