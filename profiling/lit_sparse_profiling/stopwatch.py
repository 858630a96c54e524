"""Seconds of the timed steps, and the tokens in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

MAX_STAMPS = 512
"""Number of time stamps after which they are read. Reading waits for the device, which must not happen every step."""


class Stopwatch:
    """Stop-watch of the steps in timed windows. On a GPU it records events, and waits for the device once per window.

    Attributes:
        seconds: Seconds of each step in the windows closed so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device, self._cuda = device, device.type == "cuda"
        self._stamps: list[Any] = []

    @property
    def running(self) -> bool:
        """True while a window is open."""
        return bool(self._stamps)

    def stamp(self) -> None:
        """Open a window, or end a step in it."""
        self._stamps.append(self._now())
        if len(self._stamps) > MAX_STAMPS:
            last = self._stamps[-1]  # it also begins the next step: no step is lost between two windows
            self.close()
            self._stamps = [last]

    def close(self) -> None:
        """Close the window at the end of the last step."""
        if self._cuda and self._stamps:
            self._stamps[-1].synchronize()
        # strict=False: n stamps are n - 1 steps.
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        self.seconds += [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]
        self._stamps = []

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # Not `event.record()`: it would use the current device's stream, and that may be another device.
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass
class Tokens:
    """Sums of tokens without and with padding.

    Counts on a device are summed there. Reading them in every step would wait for the device.
    """

    real: Tensor | int = 0
    padded: int = 0
    known: bool = True

    def add(self, counts: tuple[Tensor | int, int] | None) -> None:
        """Add the counts of a batch; None if they are unknown."""
        if counts is None:
            self.known = False
        else:
            self.real, self.padded = self.real + counts[0], self.padded + counts[1]

    @property
    def counts(self) -> tuple[Tensor | int, int] | None:
        """Both sums; None if the counts of a batch were unknown."""
        return (self.real, self.padded) if self.known else None


def count_tokens(batch: Any) -> tuple[Tensor | int, int] | None:
    """Return the tokens of a batch without and with padding; None if the batch has no key to count them by.

    The keys are `token_mask`, `attention_mask` or `input_ids`, in this order, as tensors of shape (B, S). Without a
    mask, all tokens count as real. The first number stays on its device.
    """
    if not isinstance(batch, Mapping):
        return None
    for name in ("token_mask", "attention_mask"):
        if isinstance(batch.get(name), Tensor):
            return batch[name].sum(), batch[name].numel()
    ids = batch.get("input_ids")
    return (ids.numel(), ids.numel()) if isinstance(ids, Tensor) else None
