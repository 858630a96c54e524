"""The dtypes of a run: fp32 for what trains, and what the frozen rest computes in."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Precision = Literal["auto", "float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HALF = (torch.bfloat16, torch.float16)


class Masters:
    """Upcasts what trains to fp32, where updates at a small learning rate are not lost to rounding."""

    def __init__(self) -> None:
        self._dtypes: dict[nn.Parameter, torch.dtype] = {}

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return parameter in self._dtypes

    def upcast(self, model: nn.Module) -> None:
        """Upcast the trainable parameters of `model`; those that are frozen again get their dtype back."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in HALF:
                self._dtypes[parameter] = parameter.dtype
                parameter.data = parameter.data.float()
            elif not parameter.requires_grad and parameter in self._dtypes:
                parameter.data = parameter.data.to(self._dtypes.pop(parameter))

    def restore(self) -> None:
        """Give every parameter its own dtype back."""
        for parameter, dtype in self._dtypes.items():
            parameter.data = parameter.data.to(dtype)
        self._dtypes.clear()


def cast_norm_inputs(model: nn.Module) -> list[RemovableHandle]:
    """Let each LayerNorm cast its input to its own dtype where that is of less precision; return the hooks.

    With embeddings that train in fp32 the hidden states are fp32, in which torch computes a LayerNorm with bf16 weights
    on a GPU, through autocast, but not on a CPU.
    """

    def cast(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        weight, x = norm.weight, args[0]
        narrower = isinstance(weight, Tensor) and weight.dtype in HALF and x.dtype not in HALF
        return (x.to(weight.dtype), *args[1:]) if narrower and x.device.type == "cpu" else None  # pyright: ignore

    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    return [norm.register_forward_pre_hook(cast) for norm in norms]
