"""Getting a base model ready: loading it, and having it recompute activations."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from packaging.version import Version
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from lit_sparse.anatomy import classification_head, is_quantized_linear
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput

Quantization = Literal["nf4", "int8"]


def load_base(
    auto_class: Any,
    base: Any,
    dtype: torch.dtype | Literal["auto"],
    attention: str,
    quantize: Quantization | None = None,
    device: torch.device | None = None,
    config_options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model that `base` names, its weights in `dtype`.

    Args:
        auto_class: The transformers Auto class of the task.
        base: `demo`, `minilm`, a folder, a Hugging Face name, or a `config.json` (random weights, the same each time).
        dtype: Of all weights; `auto` is the type of the files.
        attention: Attention implementation of transformers.
        quantize: What the linear layers but the head are quantised to.
        device: Where that is done, and the quantised model is then; the CPU when not given.
        config_options: What of the model's configuration is to be otherwise, such as a classifier's classes.

    Raises:
        BadInput: if there is no such model, or it cannot be quantised.
    """
    if not isinstance(base, str):
        raise BadInput(
            f"model.base is {base!r}; it must be demo, minilm, a folder, a Hugging Face name, or a config.json."
        )
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantize is not None:
        options["quantization_config"] = quantization(base, quantize, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    with reading(base):
        config = AutoConfig.from_pretrained(resolve(base), **(config_options or {}))
        if quantize is not None:  # None skipped: transformers finds a language model's head
            options["quantization_config"].llm_int8_skip_modules = head_of(auto_class, config) or None
        if base.endswith(".json"):
            return draw_model(auto_class, config, options)
        model, found = auto_class.from_pretrained(resolve(base), config=config, output_loading_info=True, **options)
    draw_head(model, found["missing_keys"])
    for module in model.modules():
        if is_quantized_linear(module):
            # On some CPUs bitsandbytes would repack 4 bits for the first evaluation, in place, and round their scales.
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def reading(base: str) -> Iterator[None]:
    """A block that reads files of `base`: what is wrong with them is told in a sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"no model could be loaded from {base!r}: {reason}") from error


def trained_classes(base: Any) -> list[str]:
    """Names of the classes that the head of `base` tells apart, by its outputs; none where it comes without a head.

    Args:
        base: As for `load_base`, or a loaded model; a `config.json` has no head, as it has no weights.

    Raises:
        BadInput: if there is no such model.
    """
    if isinstance(base, PreTrainedModel):
        return names_of_classes(base.config)
    if not isinstance(base, str) or base.endswith(".json"):
        return []
    with reading(base):
        config = AutoConfig.from_pretrained(resolve(base))
    headed = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return names_of_classes(config) if headed else []


def names_of_classes(config: PreTrainedConfig) -> list[str]:
    """The classes of `config` by their numbers."""
    return [name for _, name in sorted((config.id2label or {}).items())]


def draw_model(auto_class: Any, config: PreTrainedConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """A model with random weights, the same each time and on every device: they are drawn on the CPU."""
    # Not by torch.manual_seed, which sets the generators of the GPUs too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        return auto_class.from_config(config, **options)


def draw_head(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Draw a classifier's matrices that the files lack from one seed and in fp32: the same in each run and dtype.

    Their biases and norms are where transformers starts them, which draws nothing.
    """
    generator, deviation = torch.Generator("cpu").manual_seed(0), getattr(model.config, "initializer_range", 0.02)
    heads = tuple(f"{name}." for name in classification_head(model))
    for name in sorted(name for name in missing if name.startswith(heads)):
        parameter = model.get_parameter(name)
        if parameter.ndim >= 2:
            # Lightning builds models with the GPU as the default device, of which a generator of the CPU cannot draw.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * deviation)


def head_of(auto_class: Any, config: Any) -> list[str]:
    """Names of a classifier's parts that are the task's own, and trained; none for other models."""
    with torch.device("meta"):
        return classification_head(auto_class.from_config(config))


def quantization(base: str, quantize: Quantization, dtype: torch.dtype | Literal["auto"]) -> BitsAndBytesConfig:
    """How bitsandbytes is to quantise `base`, and to compute in `dtype`.

    Raises:
        BadInput: if bitsandbytes is missing, or the base has no weights yet.
    """
    if find_spec("bitsandbytes") is None:
        raise BadInput(
            f"model.quantize is {quantize}, which needs bitsandbytes, and that is not installed; install it with "
            "pip install 'lit-sparse[quant]', or leave model.quantize out."
        )
    if base.endswith(".json"):
        raise BadInput(
            f"model.quantize is {quantize}, but {base} is a bare configuration, whose random weights are not quantised "
            "as they are made; give a model with weights, or leave model.quantize out."
        )
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else dtype,
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each layer of `model` recompute its activations in the backward, without reentrant autograd."""
    if Version(version("transformers")) >= Version("5.18"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers makes the embeddings' output require grad, which only reentrant checkpointing needs.
    model.disable_input_require_grads()
