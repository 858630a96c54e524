"""From a GGUF file of a Llama model to a Hugging Face folder. Enough for the embedded demo model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

import math
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from lit_sparse.errors import BadInput

Array = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32
BLOCK = 32
"""Weights that share one scale, in every quantised type read here."""


class Cursor:
    """A position in the file's bytes that moves forward as values are read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def number(self, fmt: str) -> Any:
        """One number of the `struct` format `fmt`."""
        (value,) = struct.unpack_from(fmt, self.data, self.offset)
        self.offset += struct.calcsize(fmt)
        return value

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        start = self.offset + 8
        self.offset = start + self.number("<Q")
        return self.data[start : self.offset].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value of the type with the number `kind`: a scalar, a string or a list."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, length = self.number("<I"), self.number("<Q")
            return [self.value(of) for _ in range(length)]
        return self.number(SCALARS[kind])


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its shape in torch's order, the number of its type and its offset in the data section."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def f32(raw: Bytes) -> Array:
    """Plain 32-bit floats."""
    return raw.view(np.float32)


def q4_1(raw: Bytes) -> Array:
    """Blocks of a half scale d, a half minimum m, and 16 bytes: 32 values d * nibble + m, low nibbles first."""
    blocks = raw.reshape(-1, 20)
    scale, minimum = half(blocks[:, 0:2]), half(blocks[:, 2:4])
    return np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) * scale + minimum


def q8_0(raw: Bytes) -> Array:
    """Blocks of a half scale d and 32 signed bytes: 32 values d * byte."""
    blocks = raw.reshape(-1, 34)
    return blocks[:, 2:].view(np.int8) * half(blocks[:, 0:2])


def half(raw: Bytes) -> Array:
    """The 16-bit floats in `raw`, widened to 32 bits."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


TYPES: dict[int, tuple[int, int, Callable[[Bytes], Array]]] = {
    0: (1, 4, f32),
    3: (BLOCK, 20, q4_1),
    8: (BLOCK, 34, q8_0),
}
"""Type number: weights a block, bytes a block, and what turns bytes into weights."""


class Gguf:
    """A GGUF file in memory.

    Args:
        data: The bytes of the whole file.

    Raises:
        BadInput: `data` is not GGUF, or not of version 3.
    """

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4) != (3,):
            raise BadInput("This is no GGUF file of version 3; fetch it anew.")
        self.data = data
        cursor = Cursor(data)
        cursor.offset = 8
        tensors, keys = cursor.number("<Q"), cursor.number("<Q")
        self.metadata: dict[str, Any] = dict(self._pair(cursor) for _ in range(keys))
        self.entries: dict[str, Entry] = dict(self._entry(cursor) for _ in range(tensors))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        self.start = math.ceil(cursor.offset / alignment) * alignment

    @staticmethod
    def _pair(cursor: Cursor) -> tuple[str, Any]:
        key = cursor.string()
        return key, cursor.value(cursor.number("<I"))

    @staticmethod
    def _entry(cursor: Cursor) -> tuple[str, Entry]:
        name = cursor.string()
        dimensions = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
        return name, Entry(tuple(reversed(dimensions)), cursor.number("<I"), cursor.number("<Q"))

    def array(self, name: str) -> Array:
        """The tensor `name`, dequantised to 32-bit floats.

        Raises:
            BadInput: its type is none of F32, Q4_1 and Q8_0.
        """
        entry = self.entries[name]
        if entry.kind not in TYPES:
            raise BadInput(f"Tensor {name} has GGUF type {entry.kind}; only F32 (0), Q4_1 (3) and Q8_0 (8) are read.")
        weights, size, decode = TYPES[entry.kind]
        count = math.prod(entry.shape) // weights * size
        raw = np.frombuffer(self.data, np.uint8, count, self.start + entry.offset)
        return np.ascontiguousarray(decode(raw).reshape(entry.shape), dtype=np.float32)


def write_hugging_face(data: bytes, folder: Path) -> None:
    """Writes config, weights, tokenizer and generation config of the Llama model in `data` into `folder`.

    Raises:
        BadInput: `data` is no GGUF file, or holds a type that is not read.
    """
    gguf = Gguf(data)
    config = llama_config(gguf.metadata)
    config.save_pretrained(folder)
    # float32: the sums d * q + m of half floats are exact in it, and bfloat16 would round most of them.
    save_file(dict(llama_weights(gguf, config)), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner alone can read it
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    llama_tokenizer(gguf.metadata).save_pretrained(folder)


def llama_config(metadata: Mapping[str, Any]) -> LlamaConfig:
    """The `LlamaConfig` that the GGUF metadata describe."""
    sizes = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["embedding_length"],
        intermediate_size=sizes["feed_forward_length"],
        num_hidden_layers=sizes["block_count"],
        num_attention_heads=sizes["attention.head_count"],
        num_key_value_heads=sizes["attention.head_count_kv"],
        max_position_embeddings=sizes["context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.eos_token_id"],
    )


LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def llama_weights(gguf: Gguf, config: LlamaConfig) -> Iterator[tuple[str, Array]]:
    """Hugging Face names and arrays of all weights."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in gguf.entries:
        if name in OUTSIDE:
            yield OUTSIDE[name], gguf.array(name)
            continue
        _, layer, part, _ = name.split(".")
        weight = gguf.array(name)
        yield f"model.layers.{layer}.{LAYER[part]}.weight", unpermuted(weight, heads[part]) if part in heads else weight


def unpermuted(weight: Array, heads: int) -> Array:
    """A query or key matrix (heads * head_dim, hidden) with its rows in Hugging Face's order.

    Rotary embeddings turn pairs of rows, which GGUF keeps side by side and Hugging Face in two halves of each head.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def llama_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer. Every digit is a token of its own, as in SmolLM2's: GGUF does not record that."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {"bos_token": "bos", "eos_token": "eos", "pad_token": "eos", "unk_token": "unknown"}
    named = {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=metadata["tokenizer.chat_template"],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
