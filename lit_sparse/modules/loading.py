"""Load a base model, quantise it, draw a missing classification head, and compile it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from lit_sparse.anatomy import backbone, classification_head, decoder_layers, is_quantized_linear
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import REFUSED, due_to_files, refusal_of
from lit_sparse.modules.hollow import (
    Hollow,
    Unreadable,
    build_hollow,
    draw_units,
    drawn_values,
    dtype_in_files,
    file_values,
    initialize,
)
from lit_sparse.storage.weight_files import check_hashes

Quantization = Literal["nf4", "int8"]


def load_base(
    auto_class: Any,
    base: Any,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None,
    quantize: Quantization | None = None,
    device: torch.device | None = None,
    config_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load and return the model that `base` names.

    Args:
        auto_class: The transformers Auto class of the task.
        base: `demo`, `minilm`, a folder, a Hugging Face name, or a `config.json` (random weights).
        dtype: Dtype of all weights; `auto` is that of the files.
        attention: Attention implementation of transformers; None is its own choice for the model.
        quantize: Quantise the linear layers, except the head, to this format.
        device: Device on which to quantise, where the model then stays; the CPU if not given.
        config_options: Overrides of the model's configuration, such as the names of a classifier's classes.
        seed: Seed of the random weights of a `config.json`.

    Raises:
        BadInput: if there is no such model, or it cannot be quantised.
    """
    if not isinstance(base, str):
        raise BadInput(
            f"model.base is {base!r}; it must be demo, minilm, a folder, a Hugging Face name, or a config.json."
        )
    options: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantize is not None:
        options["quantization_config"] = quantization(base, quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    with load_errors(base, attention):
        config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=False, **(config_options or {}))
        check_sizes(base, config)
        check_files(base)
        if quantize is not None:  # given None, transformers itself skips the head of a language model
            options["quantization_config"].llm_int8_skip_modules = head_names(auto_class, config) or None
        if is_drawn(base):
            return draw_model(auto_class, config, options, seed)
        # What differs is told by check_complete: transformers' error only points to a table in the log.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = auto_class.from_pretrained(resolve(base), config=config, trust_remote_code=False, **options)
    check_complete(base, model, found)
    draw_head(model, found["missing_keys"])
    for module in model.modules():
        if is_quantized_linear(module):
            # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in place at the first evaluation, and rounds
            # their scales: later results would differ from earlier ones.
            module.support_avx512bf16_for_cpu = False
    return model


def load_hollow(
    auto_class: Any,
    base: str,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None,
    config_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Hollow | str:
    """Return the model that `base` names without its weights, which are then read or drawn part by part.

    The arguments are those of `load_base`, and so are the weights.

    Returns:
        The model, or why its weights can only be read whole, to end a sentence.

    Raises:
        BadInput: if there is no such model.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with load_errors(base, attention):
        config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=False, **(config_options or {}))
        check_sizes(base, config)
        check_files(base)
        try:
            options["dtype"] = (config.dtype or dtype_in_files(resolve(base))) if dtype == "auto" else dtype
            model = build_hollow(auto_class, config, options)
            if is_drawn(base):
                return Hollow(model, drawn_values(auto_class, config, options, seed))
            source, missing = file_values(model, resolve(base))
        except Unreadable as reason:
            return str(reason)
        if cached_file(resolve(base), GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(resolve(base))
    if missing:
        owners = {model.get_submodule(name.rpartition(".")[0]) for name in missing}
        with torch.random.fork_rng(devices=[]):
            initialize(model, owners)
        draw_head(model, missing)
    return Hollow(model, source)


def check_files(base: str) -> None:
    """Check the files of `base` whose hashes are known: an export's, and those that the Hub's cache has by now.

    Raises:
        BadInput: naming the first that is damaged.
    """
    place = resolve(base)
    if not Path(place).exists():  # a name on the Hub
        place = cached_file(place, CONFIG_NAME, _raise_exceptions_for_missing_entries=False) or place
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    if not is_drawn(base) and folder.is_dir():
        check_hashes(folder)


@contextmanager
def load_errors(base: str, attention: str | None = None) -> Iterator[None]:
    """Convert errors of transformers while it reads the files of `base` into one sentence.

    Args:
        attention: The attention implementation that was asked for, if one was.

    Raises:
        BadInput: with the first line of the error, and the way out if it is about the attention implementation.
    """
    try:
        yield
    except ImportError as error:
        if attention is None:
            raise
        raise BadInput(_reason(base, error, attention)) from error
    except Exception as error:  # what transformers and torch meet in malformed files is of any class
        if isinstance(error, BadInput) or not due_to_files(error):
            raise
        of_attention = isinstance(error, ValueError) and not isinstance(error, StrictDataclassError)
        raise BadInput(_reason(base, error, attention if of_attention else None)) from error


def _reason(base: str, error: Exception, attention: str | None) -> str:
    reason = refusal_of(error)
    if "trust_remote_code" in str(error):
        return (
            f"{base!r} needs code that it brings along, which lit_sparse does not run; give a model of a family that "
            "transformers itself has."
        )
    if isinstance(error, SafetensorError):
        return f"the weights of {base!r} are damaged ({reason}); bring the model again."
    if not isinstance(error, (*REFUSED, ImportError, UnpicklingError)):
        return f"no model can be made of the files of {base!r} ({reason}); correct its config.json, or bring it again."
    if attention is None:
        return f"no model could be loaded from {base!r}: {reason}"
    return (
        f"no model could be loaded from {base!r} with model.attention {attention}: {reason.rstrip('.')}; leave it out "
        "for transformers' own choice, or give --model.attention eager."
    )


LEAST = {"hidden_size": 1, "num_hidden_layers": 1, "vocab_size": 2}
"""Sizes that a model's configuration must give, with the least of each; families name them differently."""


def check_sizes(base: str, config: PreTrainedConfig) -> None:
    """Refuse a configuration whose sizes make no model, on which torch would fail later or not at all.

    Raises:
        BadInput: naming the sizes.
    """
    text = config.get_text_config()
    sizes = {size: getattr(text, size, None) for size in (*LEAST, "num_attention_heads", "num_key_value_heads")}
    if below := [
        f"{size} {value} (at least {LEAST[size]})"
        for size, value in sizes.items()
        if size in LEAST and isinstance(value, int) and value < LEAST[size]
    ]:
        raise BadInput(f"the configuration of {base} has {' and '.join(below)}; correct it, or bring the model again.")
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise BadInput(
            f"the configuration of {base} has num_attention_heads {heads} and num_key_value_heads {shared}, which must "
            "divide it; correct it, or bring the model again."
        )


SHOWN = 3
"""Most names of weights in a message."""


def check_complete(base: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuse files that lack weights of `model`, which transformers draws, or have them in another shape.

    A classification head may be missing: it is drawn.

    Args:
        found: What transformers tells of the loading (`output_loading_info`): names, without tied weights and those
            that the model's class says may be missing; and names with two shapes.

    Raises:
        BadInput: naming the first weights, and how many there are.
    """
    if other := sorted(found["mismatched_keys"]):
        name, there, wanted = other[0]
        more = f" ({len(other)} weights differ)" if len(other) > 1 else ""
        raise BadInput(
            f"the files of {base!r} have {name} in the shape {tuple(there)}, but its config.json asks for "
            f"{tuple(wanted)}{more}; correct the config.json, or bring the model again."
        )
    heads = tuple(f"{name}." for name in classification_head(model))
    own = {name for name, _ in model.named_parameters()}  # buffers are computed
    if lost := sorted(name for name in found["missing_keys"] if name in own and not name.startswith(heads)):
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise BadInput(
            f"the files of {base!r} lack {len(lost)} of the weights that its config.json asks for: "
            f"{', '.join(lost[:SHOWN])}{more}; correct the config.json, or bring the model again."
        )


def trained_classes(base: Any) -> list[str]:
    """Return the class names of the classification head of `base`, in the order of its outputs; [] without a head.

    Args:
        base: As for `load_base`, or a loaded model. A `config.json` has no weights, so no head.

    Raises:
        BadInput: if there is no such model.
    """
    if isinstance(base, PreTrainedModel):
        return names_of_classes(base.config)
    if not isinstance(base, str) or is_drawn(base):
        return []
    with load_errors(base):
        config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=False)
    headed = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return names_of_classes(config) if headed else []


def names_of_classes(config: PreTrainedConfig) -> list[str]:
    """Return the class names in `config`, sorted by class number."""
    return [name for _, name in sorted((config.id2label or {}).items())]


def draw_model(auto_class: Any, config: PreTrainedConfig, options: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """Return a model with random weights, drawn on the CPU from `seed`: the same at each call and on every device."""
    model = build_hollow(auto_class, config, options)
    for _ in draw_units(model, seed):
        pass
    return model


def is_drawn(base: Any) -> bool:
    """Return true if `base` is a `config.json`, whose model has random weights."""
    return isinstance(base, str) and base.endswith(".json")


def draw_head(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Draw the matrices of a classification head that the files lack, from a fixed seed and in fp32.

    They are the same in every run and dtype, so the head can count as a part of the base. Biases and norms keep the
    constants that transformers initializes them with.
    """
    generator, deviation = torch.Generator("cpu").manual_seed(0), getattr(model.config, "initializer_range", 0.02)
    heads = tuple(f"{name}." for name in classification_head(model))
    for name in sorted(name for name in missing if name.startswith(heads)):
        parameter = model.get_parameter(name)
        if parameter.ndim >= 2:
            # The device is explicit: Lightning builds models with the GPU as default device, and torch refuses to draw
            # there from a generator of the CPU.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * deviation)


def head_names(auto_class: Any, config: Any) -> list[str]:
    """Return the module names of a classification head; [] for models of other tasks."""
    with torch.device("meta"):
        return classification_head(auto_class.from_config(config))


def quantization(base: str, quantize: Quantization, dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig:
    """Return the bitsandbytes configuration that quantises `base` and computes in `dtype`.

    Raises:
        BadInput: if bitsandbytes is missing, or the base has no weights yet.
    """
    if find_spec("bitsandbytes") is None:
        raise BadInput(
            f"model.quantize is {quantize}, which needs bitsandbytes, and that is not installed; install it with "
            "pip install 'lit-sparse[quant]', or leave model.quantize out."
        )
    if is_drawn(base):
        raise BadInput(
            f"model.quantize is {quantize}, but {base} is a bare configuration, whose random weights cannot be "
            "quantised; give a model with weights, or leave model.quantize out."
        )
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
    )


def compile_model(model: PreTrainedModel, by_layer: bool) -> None:
    """Compile the model as one graph; `by_layer` where the trainable set changes.

    A graph depends on which of its weights train. Of a whole model there are as many as there are sets, and the
    compiler gives up after eight; of a layer there are two, which all layers share.
    """
    for region in decoder_layers(model) if by_layer else [backbone(model)]:
        region.compile()
