"""Write folders that transformers 4 reads as transformers 5 does: old keys beside new, a tokenizer class of both.

transformers 5 reads the keys of 4, but writes only its own, which 4 ignores without a warning: it would compute with
its default rope_theta, for example. vLLM, llama.cpp's converter and other readers of config.json took up the new keys
at different times, and know the old ones.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

OLDEST = "4.57"
"""The oldest transformers for which the folders are tested."""

READ_BY_OLDEST = frozenset(
    """
    albert arcee aria_text bamba bart bert bert-generation big_bird biogpt bitnet blenderbot blenderbot-small
    bloom camembert codegen cohere cohere2 convbert ctrl data2vec-text deberta deberta-v2 deepseek_v3 diffllama
    distilbert doge electra ernie ernie4_5 ernie4_5_moe esm exaone4 falcon falcon_h1 falcon_mamba flaubert
    flex_olmo fnet gemma gemma2 gemma3_text glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe ibert jetmoe lfm2 llama llama4_text longformer mamba marian mbart megatron-bert minimax
    ministral mistral mixtral mobilebert modernbert mpnet mpt mra mvp nystromformer olmo olmo2 olmo3 olmoe
    openai-gpt opt pegasus persimmon phi phi3 phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next rembert
    roberta roberta-prelayernorm roformer rwkv seed_oss smollm3 stablelm starcoder2 t5 vaultgemma xglm xlm
    xlm-roberta xlm-roberta-xl xlnet yoso
    """.split()  # noqa: SIM905 - a list of 110 lines says no more
)
"""Model types whose tiny random models give the same logits in the oldest version, loaded from our folders."""

ROPE_NAMES = (
    "rope_theta",
    "rope_local_base_freq",  # Gemma-3's sliding layers
    "global_rope_theta",  # ModernBERT
    "local_rope_theta",
    "rotary_emb_base",  # GPT-NeoX
    "partial_rotary_factor",
    "rotary_pct",  # GPT-NeoX
)
"""Names in transformers 4 of what transformers 5 keeps in `rope_parameters`."""

TYPE_AND_FACTORS = {
    "chameleon": ("factor",),
    "fuyu": ("factor",),
    "hunyuan_v1_dense": ("factor", "alpha"),
    "hunyuan_v1_moe": ("factor", "alpha"),
    "olmo": ("factor",),
    "olmo2": ("factor",),
    "phi3": ("short_factor", "long_factor"),
    "phi4_multimodal": ("short_factor", "long_factor"),
}
"""Model types for which transformers 4 accepts `type` and nothing but these keys in `rope_scaling`."""

RENAMED = ("num_experts", "bos_index", "eos_index", "pad_index")
"""Keys that some classes of transformers 4 read and that transformers 5 turned into aliases: Qwen3-MoE's, XLM's."""

OLD_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
HYBRIDS = ("granitemoehybrid", "zamba", "zamba2")
"""Model types for which transformers 4 knows layers by the old names only. transformers 5 knows both."""

OF_LOADING = ("backend", "is_local", "local_files_only")
"""Keys that transformers 5 writes into tokenizer_config.json and that describe how the tokenizer was loaded."""

# ---- config.json


def add_old_keys(folder: Path, config: PreTrainedConfig) -> None:
    """Add to config.json in `folder`, as transformers 5 wrote it for `config`, the keys that transformers 4 reads."""
    path = folder / "config.json"
    document = readable_by_both(config, json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def readable_by_both(config: PreTrainedConfig, document: dict[str, Any]) -> dict[str, Any]:
    """Return `document`, the JSON form of `config`, with the keys of transformers 4 too, in sub-configurations also."""
    parts = {
        key: readable_by_both(part, value)
        for key, value in document.items()
        if isinstance(value, dict) and isinstance(part := getattr(config, key, None), PreTrainedConfig)
    }
    if isinstance(document.get("dtype"), str):
        parts["torch_dtype"] = document["dtype"]
    return document | parts | old_rope(config) | old_layers(config, document) | old_names(config, document)


def old_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary embeddings of `config` by their names in transformers 4; {} if it has none there."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    values = ((name, value_at(rope, place)) for name in ROPE_NAMES if (place := place_of(type(config), name)))
    found = {name: value for name, value in values if value is not None}
    if found and accepts(type(config), "rope_scaling"):
        found["rope_scaling"] = old_scaling(config.model_type, rope.get("full_attention") or rope)
    return found


@cache
def place_of(kind: type[PreTrainedConfig], name: str) -> tuple[str, ...]:
    """Return the path in `rope_parameters` to which transformers 5 moves the old key `name`; () if it does not.

    The classes differ in that, so that the class itself is asked, by giving it an odd value. It gets a `rope_scaling`
    too, since some have a default that would come before the value.
    """
    odd = 0.375 if name in ("partial_rotary_factor", "rotary_pct") else 12345.0
    probe = kind(**{name: odd, "rope_scaling": {"rope_type": "default"}})
    return next((place for place, value in leaves(probe.rope_parameters or {}) if value == odd), ())


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of each leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def value_at(tree: Any, place: tuple[str, ...]) -> Any:
    """Return the value at a path in nested dicts; None if there is none."""
    for key in place:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


@cache
def accepts(kind: type[PreTrainedConfig], name: str) -> bool:
    """Return true if the class takes up the old key `name`; one that it does not know becomes an attribute."""
    given: dict[str, Any] = {name: None}
    return name not in vars(kind(**given))


def old_scaling(model_type: str, rope: dict[str, Any]) -> dict[str, Any] | None:
    """Return `rope_scaling` as transformers 4 wants it; None, which it also wants, if nothing is scaled."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default" and scaling.keys() <= {"rope_type", "type"}:
        return None
    if model_type in TYPE_AND_FACTORS:
        return {"type": kind, **{key: scaling[key] for key in TYPE_AND_FACTORS[model_type] if key in scaling}}
    return scaling


def old_layers(config: PreTrainedConfig, document: dict[str, Any]) -> dict[str, Any]:
    """Return the kinds of layers as transformers 4 names or counts them; {} where it reads the new form."""
    if config.model_type in HYBRIDS:
        keys = [key for key in ("layer_types", "layers_block_type") if document.get(key)]
        return {key: [OLD_LAYER_TYPES.get(layer, layer) for layer in document[key]] for key in keys}
    if config.model_type == "modernbert" and document.get("layer_types"):
        full = [index for index, kind in enumerate(document["layer_types"]) if kind == "full_attention"]
        return {"global_attn_every_n_layers": full[1] if len(full) > 1 else len(document["layer_types"])}
    return {}


def old_names(config: PreTrainedConfig, document: dict[str, Any]) -> dict[str, Any]:
    """Return what else transformers 4 reads by another name, or in another form."""
    renamed = {name: type(config).attribute_map.get(name) for name in RENAMED}
    found: dict[str, Any] = {name: document[key] for name, key in renamed.items() if key in document}
    if isinstance(limits := document.get("time_step_limit"), list):  # transformers 5 writes {"__float__": "Infinity"}
        largest = torch.finfo(torch.float32).max
        found["time_step_limit"] = [largest if isinstance(limit, dict) else limit for limit in limits]
    return found


# ---- the tokenizer


def make_loadable(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rewrite tokenizer_config.json in `folder`, as transformers 5 wrote it for `tokenizer`, so that 4 reads it too.

    Both versions read PreTrainedTokenizerFast and take tokenizer.json as it is; some classes of 4 that have a name of
    their own change it.
    """
    path = folder / "tokenizer_config.json"
    document = {
        key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in OF_LOADING
    }
    if (folder / "tokenizer.json").is_file():
        document["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Else transformers 4 also returns token_type_ids, which decoders refuse.
    document["model_input_names"] = list(tokenizer.model_input_names)
    document |= old_special_tokens(document)
    if tokenizer.chat_template:
        document["chat_template"] = old_template(tokenizer.chat_template)
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def old_special_tokens(document: dict[str, Any]) -> dict[str, Any]:
    """Return the additional special tokens by their old name; transformers 4 wants names under the new one."""
    extra = document.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        return {"additional_special_tokens": extra}
    return {} if extra is None else {"extra_special_tokens": extra}


def old_template(template: str | dict[str, str]) -> str | list[dict[str, str]]:
    """Return a chat template, or several by name, as tokenizer_config.json holds them."""
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def copy_sentencepiece(base: str, folder: Path) -> None:
    """Copy the tokenizer.model of `base` into `folder`, if it has one: llama.cpp's converter asks for it."""
    found = cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    if found is not None and not (folder / "tokenizer.model").exists():
        shutil.copyfile(found, folder / "tokenizer.model")
