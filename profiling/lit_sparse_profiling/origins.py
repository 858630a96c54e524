"""Where in the model and in the source a tensor comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

SKIPPED = tuple(str(Path(path).parent) for path in (torch.__file__, __file__))
"""Folders whose frames are no answer: torch's own, and this package's."""


class Origins:
    """Tells, while `watch` runs, the module whose forward is running and the line of code that called torch.

    Args:
        model: Modules in it have names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        self._running: list[str] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Follow the forwards of all modules in the block."""
        handles = (
            register_module_forward_pre_hook(lambda module, _: self._running.append(self._name(module))),
            register_module_forward_hook(lambda *_: self._running.pop() and None, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._running.clear()

    def _name(self, module: nn.Module) -> str:
        return self._names.get(id(module), self._running[-1] if self._running else "")

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
