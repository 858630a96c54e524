"""Where in the model and in the source a tensor comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

SKIPPED = tuple(str(Path(path).parent) for path in (torch.__file__, __file__))
"""Folders whose frames are no answer: torch's own, and this package's."""


class Origins:
    """Tells, while `watch` runs, the module whose forward is running and the line of code that called torch.

    Args:
        model: Modules in it have names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[str] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the forwards of the model's modules in the block."""
        # Not global hooks: those run a second time for a compiled module, and torch warns of it.
        handles = [
            handle
            for name, module in self._model.named_modules()
            for handle in (
                module.register_forward_pre_hook(partial(self._enter, name or type(module).__name__)),
                module.register_forward_hook(self._leave, always_call=True),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        if self._running:
            self._running.pop()

    def module(self) -> str:
        """Return the name of the module whose forward runs, or of the autograd node; "" outside of both."""
        node = torch._C._current_autograd_node()
        if self._running or node is None:
            return self._running[-1] if self._running else ""
        return f"backward of {node.name().removesuffix('0').removesuffix('Backward')}"


def line() -> str:
    """Return the line of code, outside of torch, that runs now, such as "modeling_llama.py:141 in forward"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(SKIPPED):
            return f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
