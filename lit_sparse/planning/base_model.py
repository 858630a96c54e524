"""The base model of a plan: its configuration read and checked, its weights fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lit_sparse.anatomy import weights_in
from lit_sparse.calls import dummy_forward
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.hollow import Hollow
from lit_sparse.modules.loading import LEAST, check_sizes, load_errors
from lit_sparse.planning import pretended, quantized
from lit_sparse.planning.device_choices import Device
from lit_sparse_profiling.trace import Trace

VIEWS = {
    "device",
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "slice",
    "alias",
    "detach",
    "unsqueeze",
    "squeeze",
}
"""Ops that a plain head may use beside its product."""
PRODUCTS = {"mm", "addmm", "bmm", "linear"}


def load(module: LitSparse, trace: Trace, device: Device, sharded: bool) -> None:
    """Give `module` its base model with fake weights.

    A model to be sharded has memory for its shards only; on a CPU only if no strategy has to see it whole before.
    """
    model = meta_model(module)
    if module.quantize is not None:
        quantized.quantize_shapes(model, module.quantize, module.frozen_dtype)
        quantized.pack(model, module.frozen_dtype, trace)
    hollow = sharded and (device == "cuda" or pretended.fits_hollow(module))
    shape = pretended.hollow_like if hollow else Tensor.detach
    made: dict[Tensor, Tensor] = {}
    for part in model.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and not isinstance(value, FakeTensor):
                if value not in made:
                    made[value] = nn.Parameter(trace.empty(shape(value)), requires_grad=value.requires_grad)
                part._parameters[name] = made[value]  # pyright: ignore[reportArgumentType]
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = made.setdefault(value, trace.empty(value))
    module.model = model
    module._hollow = Hollow(model, lambda: iter(())) if sharded and pretended.fits_hollow(module) else None
    module.base_parameters = sum(weights_in(parameter) for parameter in model.parameters())
    if isinstance(module, CausalLM):
        module._head_is_plain = head_is_plain(model)


def meta_model(module: LitSparse) -> PreTrainedModel:
    """Return the base of `module` on the meta device.

    Raises:
        BadInput: if there is no such base, or its configuration lacks sizes.
    """
    if not isinstance(module.base, str):
        raise BadInput(f"model.base is {module.base!r}; it must be a name, a folder, or a config.json.")
    with load_errors(module.base):
        config = AutoConfig.from_pretrained(resolve(module.base), trust_remote_code=False, **module.config_options)
        _check_given(module.base, config)
        with torch.device("meta"):
            return module.auto_class.from_config(
                config, dtype=module.frozen_dtype, attn_implementation=module.attention
            )


def _check_given(base: str, config: PreTrainedConfig) -> None:
    """Refuse a configuration that leaves sizes to the defaults of its family, or whose sizes make no model.

    Raises:
        BadInput: naming the sizes.
    """
    given, _ = PreTrainedConfig.get_config_dict(resolve(base))
    names = {name for part in (given, *given.values()) if isinstance(part, dict) for name in part}
    missing = [size for size in LEAST if not {size, config.attribute_map.get(size)} & names]
    if missing:
        raise BadInput(
            f"the configuration of {base} gives no {' and no '.join(missing)}, so that its memory cannot be predicted; "
            "add them, or give another model."
        )
    check_sizes(base, config)


class _Ops(TorchDispatchMode):
    """Lists the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def head_is_plain(model: PreTrainedModel) -> bool:
    """Return whether logits are one product of the last hidden states with the head, judged by the ops that run."""
    if model.get_output_embeddings() is None:
        return False
    whole, base = _Ops(), _Ops()
    with whole:
        dummy_forward(model)
    with base:
        dummy_forward(model.base_model, "last_hidden_state")
    added = [name for name in whole.names[len(base.names) :] if name not in VIEWS]
    return len(added) == 1 and added[0] in PRODUCTS
