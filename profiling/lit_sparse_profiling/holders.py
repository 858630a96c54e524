"""Who holds a tensor, and in what the items are that memory grew by: asked of Python's garbage collector."""

from __future__ import annotations

import gc
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from lit_sparse_profiling.ledger import untyped_storages

UNKNOWN = "an object unknown to Python's garbage collector"
PLAIN = (dict, list, tuple, set, frozenset)
CONTAINERS = (list, dict, set, deque)
"""Types that grow."""
PASSING = ("frame", "list_iterator", "generator", "cell", "function")
"""Types that refer to a tensor only while code runs, and hold it for nobody."""
DEPTH, DEPTH_OF_ITEMS = 4, 2
FEWEST, SAMPLED = 6, 64
"""Items below which a container is not looked at, and of which at most its size is told."""
FITS = (0.5, 2.0)
"""Least and most bytes of the container that memory grew by, as fractions of the growth."""


def storages_of(tensor: Tensor) -> list[Any]:
    """Return the storages of any tensor; none of one that has no storage, such as oneDNN's."""
    try:
        return list(untyped_storages(tensor))
    except RuntimeError:
        return []


def holder(held: Any) -> str:
    """Return who holds an object, such as "Cache.kept": the attribute of another object, or a global name."""
    return _holder(held, None, {id(held)}, DEPTH) or UNKNOWN


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


def keeper(grown: float, steps: int) -> str:
    """Return which container has items of about as many bytes as memory grew by in so many steps; "" if none has.

    It names the holder of a list, dict, set or deque, and its number of items. Of the graphs that losses keep Python
    sees the losses only: if nothing else fits, it is the longest container of them.
    """
    fitting: list[tuple[float, Any]] = []
    graphs: list[tuple[int, Any]] = []
    for one in _containers():
        items = _items(one)
        if not items:  # a thread has emptied it since
            continue
        some = items[:: -(-len(items) // SAMPLED)]
        size = len(items) * statistics.fmean(_bytes(item, DEPTH_OF_ITEMS) for item in some)
        if FITS[0] * grown <= size <= FITS[1] * grown:
            fitting.append((abs(size - grown), one))
        elif 2 * len(items) >= steps and all(isinstance(item, Tensor) and item.grad_fn is not None for item in some):
            graphs.append((-len(items), one))
    found = min(fitting or graphs, key=lambda one: one[0], default=None)
    if found is None:
        return ""
    held, what = found[1], "items" if fitting else "losses with their graphs: keep loss.detach() instead"
    fitting.clear()
    graphs.clear()  # else they would be among who holds it
    by = _holder(held, None, {id(held), id(found)}, DEPTH) or _variable(held) or UNKNOWN
    return f"{by} ({len(held)} {what})"


def _containers() -> Iterator[Any]:
    """Iterate over containers of several items. Python tracks no dict of numbers and arrays: its owner knows it."""
    for one in gc.get_objects():
        if issubclass(type(one), CONTAINERS) and len(one) >= FEWEST:
            yield one
        for part in gc.get_referents(one):
            if type(part) is dict and len(part) >= FEWEST and not gc.is_tracked(part):
                yield part


def _items(container: Any) -> list[Any]:
    return list(dict.values(container) if isinstance(container, dict) else container)


def _bytes(held: Any, depth: int) -> int:
    """Return the bytes of the tensors, arrays and texts in an item of a container."""
    kind, numpy = type(held), sys.modules.get("numpy")
    if issubclass(kind, Tensor):
        return sum(storage.nbytes() for storage in storages_of(held))
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return held.nbytes
    if issubclass(kind, bytes | bytearray | str):
        return len(held)
    if not depth or issubclass(kind, type | ModuleType):
        return 0
    parts = _items(held) if issubclass(kind, (*PLAIN, deque)) else [*getattr(held, "__dict__", {}).values()]
    return sum(_bytes(part, depth - 1) for part in parts[:SAMPLED])


def _variable(held: Any) -> str:
    """Return the variable that holds an object in a function that runs now, such as "losses in train"; "" if none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") != __name__ and (name := _key(frame.f_locals, held)):
            return f"{name} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
