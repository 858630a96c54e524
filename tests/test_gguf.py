"""Reading GGUF: a small file is written here, byte by byte, and read back."""

import struct

import numpy as np
import pytest

from lit_sparse.errors import BadInput
from lit_sparse.gguf import Gguf, unpermuted


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(metadata: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    """A file of version 3; shapes are given in torch's order."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata)
    section = b""
    for name, shape, kind, raw in tensors:
        sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += string(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, len(section))
        section += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + section


def halves(*values: float) -> bytes:
    return np.array(values, np.float16).tobytes()


def test_metadata_of_every_kind():
    pairs = [
        string("count") + struct.pack("<II", 4, 7),
        string("theta") + struct.pack("<If", 6, 0.5),
        string("name") + struct.pack("<I", 8) + string("größe"),
        string("words") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b c"),
        string("flag") + struct.pack("<I?", 7, True),
    ]
    assert Gguf(gguf(pairs, [])).metadata == {
        "count": 7,
        "theta": 0.5,
        "name": "größe",
        "words": ["a", "b c"],
        "flag": True,
    }


def test_tensors_of_every_kind():
    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    nibbles = np.arange(64) % 16  # two blocks: 32 weights each, the first half in the low nibbles
    blocks = nibbles.reshape(2, 2, 16)
    q4 = b"".join(
        halves(scale, low) + (block[0] | block[1] << 4).astype(np.uint8).tobytes()
        for scale, low, block in zip((0.5, 0.25), (-4, 1), blocks, strict=True)
    )
    signed = np.arange(-16, 16, dtype=np.int8)
    file = Gguf(
        gguf(
            [],
            [("a", (2, 3), 0, plain.tobytes()), ("b", (2, 32), 3, q4), ("c", (32,), 8, halves(2) + signed.tobytes())],
        )
    )
    np.testing.assert_array_equal(file.array("a"), plain)
    expected = nibbles.reshape(2, 32) * np.array([[0.5], [0.25]]) + np.array([[-4], [1]])
    np.testing.assert_array_equal(file.array("b"), expected)
    np.testing.assert_array_equal(file.array("c"), 2.0 * signed)
    assert {file.array(name).dtype for name in "abc"} == {np.dtype(np.float32)}


def test_files_that_will_not_do():
    with pytest.raises(BadInput, match="no GGUF file of version 3"):
        Gguf(b"PK\x03\x04" + b"\0" * 40)
    with pytest.raises(BadInput, match="no GGUF file of version 3"):
        Gguf(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
    with pytest.raises(BadInput, match="Tensor a has GGUF type 12"):
        Gguf(gguf([], [("a", (32,), 12, b"\0" * 32)])).array("a")


def test_rotary_rows_are_put_back():
    weight = np.arange(24, dtype=np.float32).reshape(12, 2)  # 2 heads of 6 rows: 3 pairs
    # what the converter to GGUF does to Hugging Face's order
    permuted = weight.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)
    assert not np.array_equal(permuted, weight)
    np.testing.assert_array_equal(unpermuted(permuted, 2), weight)
