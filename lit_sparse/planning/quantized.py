"""A base in 4 bits for a plan: bitsandbytes' own layers, whose packed weights and scales are fake tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lit_sparse.anatomy import classification_head, is_quantized_linear
from lit_sparse.modules.loading import Quantization, quantization
from lit_sparse_profiling.trace import Trace

BLOCK, OUTER = 64, 256
"""Weights that share a scale, and scales that share one of their own."""
PACKED = ("compress_statistics", "quant_type", "blocksize", "quant_storage", "bnb_quantized")
"""Attributes of bitsandbytes' parameters that other libraries read."""


def quantize_shapes(model: PreTrainedModel, kind: Quantization, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model on the meta device by quantised ones, as transformers does on loading.

    Raises:
        BadInput: if bitsandbytes is missing.
    """
    config = quantization("", kind, dtype)
    config.llm_int8_skip_modules = classification_head(model) or None
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})


def pack(model: nn.Module, dtype: torch.dtype, trace: Trace) -> None:
    """Give the quantised layers of `model` packed weights with their scales, all fake."""
    for name, layer in model.named_modules():
        if is_quantized_linear(layer):
            layer.weight = packed(layer, dtype, trace)
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
            trace.label(
                "frozen weights", [(f"{name}.weight", tensor) for tensor in (layer.weight, *scales_of(layer.weight))]
            )


def packed(layer: nn.Module, dtype: torch.dtype, trace: Trace) -> nn.Parameter:
    """Return the weight of a quantised layer in 4 bits: two weights a byte, and scales in two levels."""
    from bitsandbytes.functional import QuantState  # pyright: ignore[reportMissingImports] - an extra

    meta = layer.weight
    assert isinstance(meta, Tensor)
    count = meta.numel()
    blocks = math.ceil(count / BLOCK)

    def made(size: int, kind: torch.dtype) -> Tensor:
        return trace.empty(torch.empty(size, dtype=kind, device="meta"))

    outer = QuantState(
        made(math.ceil(blocks / OUTER), torch.float32),
        blocksize=OUTER,
        code=made(256, torch.float32),
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=made(blocks, torch.uint8),
        shape=meta.shape,
        code=made(16, torch.float32),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=made(1, torch.float32).squeeze(),
        state2=outer,
    )
    out = nn.Parameter(made(math.ceil(count / 2), torch.uint8).unsqueeze(1), requires_grad=False)
    for name in PACKED:
        setattr(out, name, getattr(meta, name))
    out.quant_state = state  # pyright: ignore[reportAttributeAccessIssue]
    return out


def scales_of(weight: Tensor) -> Iterator[Tensor]:
    """Iterate over the tensors that unpack a packed weight."""
    state: Any = weight.quant_state  # pyright: ignore[reportAttributeAccessIssue]
    yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def composed() -> Mapping[Any, Callable[..., Any]]:
    """Return what bitsandbytes' ops do with more than a few tokens: they unpack a whole weight, and multiply."""
    ops = torch.ops.bitsandbytes
    return {ops.gemm_4bit.default: _multiply}


def _multiply(
    a: Tensor,
    b: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, OUTER, torch.float32) + absmax_offset
    return F.linear(a, ops.dequantize_4bit(b, absmax, blocksize, quant_type, shape, a.dtype), bias)
