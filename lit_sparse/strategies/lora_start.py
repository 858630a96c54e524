"""LoRA that starts as a part of the base's weights, of which the base keeps the rest (PiSSA, OLoRA)."""

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lit_sparse.errors import BadInput

ADAPTER = "default"
"""PEFT's default name of an adapter; a model has one here."""

Factors = dict[str, Tensor]
"""LoRA's factors of one layer: `A` (r, in) and `B` (out, r)."""


def lora_layers(wrapper: PeftModel) -> dict[str, Any]:
    """Return the modules with LoRA's factors, except embeddings, by their names in PEFT's files."""
    return {
        name: module
        for name, module in wrapper.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


def split(layer: Any, config: PeftConfig) -> Factors:
    """Initialise `layer`'s adapter from its weight (PiSSA, OLoRA), subtract it there, and return the factors.

    Runs PEFT's own initialisation for the factors, one layer at a time, but not for the remainder: that is computed
    from the factors as they are stored, so that `subtract` on resuming gives the same bits.

    Raises:
        BadInput: for OLoRA on a Conv1D: PEFT ignores that its weight is transposed; and for fused experts.
    """
    base, how = layer.get_base_layer(), str(config.init_lora_weights)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(layer, ParamWrapper):
        raise BadInput(
            f"init_lora_weights {how} was asked for on {layer.parameter_name} of {type(base).__name__}, whose matrices "
            "PEFT adapts together and cannot split; give the names of linear layers as target_modules, such as "
            "[q_proj, v_proj], or set init_lora_weights to true."
        )
    if how.lower() == "olora" and isinstance(base, Conv1D):
        raise BadInput(
            "init_lora_weights olora was asked for on a Conv1D, whose weight is transposed, which PEFT ignores; set it "
            "to pissa."
        )
    before = base.weight.detach().clone()
    with torch.no_grad():
        layer.olora_init(ADAPTER) if how.lower() == "olora" else layer.pissa_init(ADAPTER, how)
    base.weight.data = before
    factors = {"A": layer.lora_A[ADAPTER].weight.detach().clone(), "B": layer.lora_B[ADAPTER].weight.detach().clone()}
    subtract(layer, factors)
    return factors


def subtract(layer: Any, factors: Factors) -> None:
    """Give `layer`'s adapter `factors`, and subtract their product s B A from the weight, in fp32, rounded once."""
    weight = layer.get_base_layer().weight
    layer.lora_A[ADAPTER].weight.data.copy_(factors["A"])
    layer.lora_B[ADAPTER].weight.data.copy_(factors["B"])
    part = layer.scaling[ADAPTER] * (factors["B"].float() @ factors["A"].float())
    weight.data = (weight.detach().float() - (part.t() if layer.fan_in_fan_out else part)).to(weight.dtype)


def as_difference(config: PeftConfig) -> PeftConfig:
    """Return the configuration of a plain LoRA of twice the rank with the same scale; changes `config` in place.

    The scale is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA, so lora_alpha grows by 2 or sqrt(2).
    """
    assert isinstance(config, LoraConfig)
    scale = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, scale * config.lora_alpha  # pyright: ignore
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: scale * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config
