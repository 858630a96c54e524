"""Seconds of the timed steps, and the tokens in them."""

from __future__ import annotations

import math
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

    def read(self) -> tuple[int, int] | None:
        """Return both sums as numbers; None if they are unknown or no counts, such as a NaN. Waits for the device."""
        real = float(self.real)
        if not self.known or not math.isfinite(real) or not 0 <= real <= self.padded:
            return None
        return int(real), int(self.padded)


class Pace:
    """Tokens per second since it was last asked, pauses left out. It does not wait for a device."""

    def __init__(self) -> None:
        self._tokens, self._begun = Tokens(), perf_counter()
        self._paused: float | None = None

    def add(self, counts: tuple[Tensor | int, int] | None) -> None:
        """Add the counts of a batch, without and with padding; None if they are unknown."""
        self._tokens.add(counts)

    def pause(self) -> None:
        """Stop the clock; do nothing if it has stopped."""
        self._paused = self._paused or perf_counter()

    def resume(self) -> None:
        """Start the clock again; do nothing if it runs."""
        if self._paused is not None:
            self._begun, self._paused = self._begun + perf_counter() - self._paused, None

    def lap(self) -> Tensor | float | None:
        """Return tokens without padding per second, on the device that counts them, and begin anew; None if unknown."""
        now, counts = perf_counter(), self._tokens.counts
        seconds, self._begun, self._tokens = now - self._begun, now, Tokens()
        return None if counts is None or seconds <= 0 else counts[0] / seconds


NO_TOKENS = (
    "Tokens are unknown: a batch has no token_mask, attention_mask or input_ids to count them by, or its mask is not 1 "
    "for each token and 0 for padding in the shape of the input_ids (segment numbers, an additive or a 4-D mask); add "
    "such a token_mask to the batch, or give the counts to the step."
)
"""The note of a record without tokens."""


def count_tokens(batch: Any) -> tuple[Tensor | int, int] | None:
    """Return the tokens of a batch without and with padding; None if the batch has no key to count them by.

    The keys are `token_mask`, `attention_mask` or `input_ids`, in this order, as tensors of shape (B, S) or (T,). A
    mask must be 1 for tokens and 0 for padding, and have the shape of the `input_ids` if there are any; one that is
    not is no count of tokens, and nothing else is taken in its place. Without a mask, all tokens count as real.

    The first number stays on its device, where it is NaN if a mask turns out to have other values. A list or tuple of
    such batches, the micro-batches that a step accumulates, has the sums of them.
    """
    if isinstance(batch, list | tuple) and batch and all(isinstance(part, Mapping) for part in batch):
        tokens = Tokens()
        for part in batch:
            tokens.add(count_tokens(part))
        return tokens.counts
    if not isinstance(batch, Mapping):
        return None
    mask = _counted_by(batch)
    if mask is None:
        return None
    if mask is batch.get("input_ids"):
        return mask.numel(), mask.numel()
    real = mask.sum() if mask.dtype is torch.bool else judged(mask)
    if mask.device.type == "cpu":
        return None if math.isnan(float(real)) else (int(real), mask.numel())
    return real, mask.numel()


def count_positions(batch: Any) -> int | None:
    """Return the token positions of a batch, padding included; None if it has no key to count them by.

    Of a list or tuple of batches, the micro-batches that a step accumulates, return those of the largest, which decides
    the step's peak of memory.
    """
    if isinstance(batch, list | tuple) and batch and all(isinstance(part, Mapping) for part in batch):
        return largest(*map(count_positions, batch))
    counted = _counted_by(batch) if isinstance(batch, Mapping) else None
    return None if counted is None else counted.numel()


def largest(*positions: int | None) -> int | None:
    """Return the largest of these numbers; None if one is unknown."""
    known = [one for one in positions if one is not None]
    return max(known) if len(known) == len(positions) else None


def _counted_by(batch: Mapping[Any, Any]) -> Tensor | None:
    """Return the tensor with an entry for each token position of a batch: its mask, or without one its ids."""
    ids = batch.get("input_ids")
    ids = ids if isinstance(ids, Tensor) else None
    mask = next((batch[name] for name in ("token_mask", "attention_mask") if batch.get(name) is not None), None)
    if mask is None:
        return ids
    fits = isinstance(mask, Tensor) and mask.layout is torch.strided and (mask.dim() <= 2 or ids is not None)
    if not fits or mask.is_complex() or (ids is not None and mask.shape != ids.shape):
        return None
    return mask


def judged(mask: Tensor) -> Tensor:
    """Return the tokens of a mask of ones and zeros, on its device; NaN if it has other values."""
    values = mask.detach().to(torch.float64)  # which every type can be, unlike be summed
    real, valid = values.sum(), (values * values == values).all()
    if mask.is_floating_point():
        valid &= real > 0  # zeros only: an additive mask that rules nothing out
    return torch.where(valid, real, math.nan)
