"""What speed is made of: seconds of the steps, and the tokens that they worked through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

MAX_STAMPS = 512
"""Time stamps kept before they are read: reading them waits for the device, once."""


class Stopwatch:
    """Seconds of each step of the timed windows. On a GPU by events; the device is waited for once a window."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device, self._cuda = device, device.type == "cuda"
        self._stamps: list[Any] = []

    @property
    def running(self) -> bool:
        """Whether a window is open."""
        return bool(self._stamps)

    def stamp(self) -> None:
        """Open a window, or end a step in it."""
        self._stamps.append(self._now())
        if len(self._stamps) > MAX_STAMPS:
            last = self._stamps[-1]
            self.close()
            self._stamps = [last]

    def close(self) -> None:
        """End the window with the step that ended last."""
        if self._cuda and self._stamps:
            self._stamps[-1].synchronize()
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        self.seconds += [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]
        self._stamps = []

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # which need not be the current device's
        return event


@dataclass
class Tokens:
    """Tokens without and with padding; those on a device are added up there, and read when all is over."""

    real: Tensor | int = 0
    padded: int = 0
    known: bool = True

    def add(self, counts: tuple[Tensor | int, int] | None) -> None:
        """Add those of a batch; None if it does not tell."""
        if counts is None:
            self.known = False
        else:
            self.real, self.padded = self.real + counts[0], self.padded + counts[1]

    @property
    def counts(self) -> tuple[Tensor | int, int] | None:
        """Both sums; None if some batch did not tell."""
        return (self.real, self.padded) if self.known else None


def count_tokens(batch: Any) -> tuple[Tensor | int, int] | None:
    """Tokens of a batch without and with padding, from its `token_mask`, `attention_mask` or `input_ids`, if any."""
    if not isinstance(batch, Mapping):
        return None
    for name in ("token_mask", "attention_mask"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].sum(), batch[name].numel()
    ids = batch.get("input_ids")
    return (ids.numel(), ids.numel()) if isinstance(ids, Tensor) else None
