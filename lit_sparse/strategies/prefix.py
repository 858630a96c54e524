"""Prefix tuning: keys and values that train, before those of every row's tokens, in all layers (arXiv 2101.00190).

PEFT holds the prefix and makes a key-value cache of it (`PeftModel.get_prompt`). Its own `forward` is not used: the
cache reaches the model's decoder by a hook, so that the model is called as any other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lit_sparse.anatomy import backbone, embedded_tokens, has_values
from lit_sparse.calls import evaluating
from lit_sparse.errors import BadInput

PLACE = "prefix"
"""Name of the prefix among the model's modules."""


def language_task(model: PreTrainedModel) -> TaskType:
    """Return the task by which PEFT puts a prefix on a language model.

    Raises:
        BadInput: if the model predicts no tokens.
    """
    if model.get_output_embeddings() is None:
        raise BadInput(
            f"PrefixTuningConfig was asked for, but {type(model).__name__} predicts no tokens; use an adapter such as "
            "peft.LoraConfig."
        )
    return TaskType.CAUSAL_LM


def put_prefix(model: PreTrainedModel, wrapper: PeftModel, start: bool) -> None:
    """Put the prefix of a PEFT model before the tokens of every call of `model`, which gets it as a module.

    Args:
        start: Whether to give it the values that it starts from.

    Raises:
        BadInput: if the model gives no keys and values, or some of another shape than the prefix.
    """
    if start:
        start_from_tokens(model, wrapper)
    model.add_module(PLACE, wrapper.prompt_encoder)
    decoder = backbone(model)
    decoder.register_forward_pre_hook(partial(_prepend, wrapper), with_kwargs=True)
    decoder.register_forward_hook(_drop_cache, with_kwargs=True)


def start_from_tokens(model: PreTrainedModel, wrapper: PeftModel) -> None:
    """Start a prefix from the keys and values of random tokens, as its authors advise; a projected one stays random.

    The tokens are drawn from torch's random state.

    Raises:
        BadInput: if the model gives no keys and values, or some of another shape than the prefix.
    """
    config: Any = wrapper.active_peft_config
    weight: Tensor = wrapper.prompt_encoder[wrapper.active_adapter].embedding.weight  # pyright: ignore
    if not has_values(weight):  # of a planned training
        return
    ids = torch.randint(embedded_tokens(model), (1, config.num_virtual_tokens), device="cpu").to(model.device)
    with torch.no_grad(), evaluating(model):
        cache = getattr(backbone(model)(input_ids=ids, use_cache=True), "past_key_values", None)
    layers: list[Any] = cache.layers if isinstance(cache, Cache) else []
    pairs = [one for layer in layers for one in (layer.keys, layer.values)]
    heads = config.num_attention_heads
    wanted = (1, heads, config.num_virtual_tokens, config.token_dim // heads)
    if len(pairs) != 2 * config.num_layers or any(one is None or tuple(one.shape) != wanted for one in pairs):
        raise BadInput(
            f"PrefixTuningConfig was asked for, but {type(model).__name__} has not {2 * config.num_layers} tensors of "
            f"cached keys and values of the shape {wanted}, before which a prefix stands; use an adapter such as "
            "peft.LoraConfig."
        )
    if config.prefix_projection or config.init_weights is not None:
        return
    rows = torch.stack([one[0].transpose(0, 1) for one in pairs], dim=1)  # (tokens, 2 layers, heads, size of a head)
    with torch.no_grad():
        weight.copy_(rows.flatten(1))


def _prepend(wrapper: PeftModel, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a decoder's call with the prefix in its cache, its mask and its positions."""
    tokens: Any = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    config: Any = wrapper.active_peft_config
    size, cache = config.num_virtual_tokens, kwargs.get("past_key_values")
    mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None and places is not None and _are_packed(places):
        raise BadInput("rows are packed, and a prefix stands before the first of them only; set data.packing to false.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise BadInput(
            "the attention mask is not one number a token, into which a prefix cannot be put; give one of (rows, "
            "tokens), and for generation no static cache."
        )
    if cache is None:
        cache = wrapper.get_prompt(len(tokens))
    elif not cache.get_seq_length():  # as generation begins
        prompt: Any = wrapper.get_prompt(len(tokens))
        for number, layer in enumerate(prompt.layers):
            cache.update(layer.keys, layer.values, number)
    _check_length(module, cache.get_seq_length() + tokens.shape[1])  # pyright: ignore[reportAttributeAccessIssue]
    given = {"past_key_values": cache}
    if mask is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), size), mask], dim=1)
    if places is not None:
        given["position_ids"] = places + size
    return args, kwargs | given


def _drop_cache(_module: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Take the prefix's cache out of the output of a call without one: generation would go on from it."""
    if kwargs.get("use_cache") is False and getattr(out, "past_key_values", None) is not None:
        out.past_key_values = None


def _are_packed(places: Tensor) -> bool:
    """Return whether positions (rows, tokens) begin anew within a row; true if they have no values, as in a plan."""
    return not has_values(places) or bool((places[..., 1:] <= places[..., :-1]).any())


def _check_length(module: nn.Module, length: int) -> None:
    config: Any = module.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and 0 < most < length:
        raise BadInput(
            f"the prefix and the longest row have {length} tokens, but the model has {most} positions "
            "(max_position_embeddings); set data.max_length, or num_virtual_tokens, lower."
        )
