"""Noise that any process can make again: a function of seed, parameter and place, and of nothing else.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    key     = (seed mod 2^32, seed / 2^32)                        seed: 64 bits, of a step and a query (`step_seed`)
    counter = (call mod 2^32, call / 2^32, parameter, stream)

gives four words of 32 bits a call. With e the row-major index of an element in its full, unsharded parameter:

    rademacher  call = e / 128, word (e / 32) mod 4, bit e mod 32:       z = 1 - 2 bit
    gaussian    call = e / 4; with u = (word / 2^9 + 1/2) / 2^23 of words (0, 1) and (2, 3), Box-Muller's
                z = sqrt(-2 ln u_a) cos(2 pi u_b), then sqrt(-2 ln u_a) sin(2 pi u_b)
    rounding    call = e / 8, word (e / 2) mod 4, half e mod 2, the lower first: 16 bits (stream ROUNDING)

So a shard, a chunk of rows or a gathered row has the noise that the whole has there. Rademacher noise is the same to
the bit on every device. Gaussian noise is evaluated in fp32, within 2e-6 of float64 and so within 4e-6 between devices.
torch's own generators give other numbers on GPUs with other numbers of multiprocessors, and on a CPU for a tensor that
is cut in two; Triton's `randn` has changed between releases.

Legend: R rows, W width, G calls of Philox.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_sparse_kernels.jit import enqueue, jit, on_cuda, tl

Kind = Literal["rademacher", "gaussian"]
DENSE, LEFT, RIGHT, ROUNDING = 0, 1, 2, 7
"""Streams: of noise for each element, of the two factors of low-rank noise, and of stochastic rounding."""
CASES = [
    # first element, elements, seed, parameter
    (0, 4096, 42, 0),
    (0, 1, 42, 7),
    (77, 1000, 7 << 32, 3),  # in the middle of a call
    (2**34 - 5, 300, 0x123456789ABCDEF0, 1),  # across 2^32 calls of four
    (12800, 5000, 2**64 - 1, 2**20),
]
"""Ranges that the tests and the benchmark share."""
PER_CALL = {"rademacher": 128, "gaussian": 4, "rounding": 8}
"""Elements that one call of Philox serves."""
BLOCK = 2048
"""Elements that one program makes."""
CHUNK = 2**20
"""Elements whose words the torch path makes at a time: fewer would cost more calls of numpy than work."""
PART = 2**17
"""Elements of noise that it has at a time, in a core's cache."""
MULTIPLIERS, WEYL, WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
ROUNDS = 10
SIGNS = 1 - 2 * (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.float32)
"""Rademacher noise of eight elements by their bits, (256, 8) fp32."""
EIGHT = np.dtype("V32")
"""Eight fp32 numbers as an item."""


def splitmix64(value: int) -> int:
    """Return the next number of SplitMix64 (Steele et al., OOPSLA 2014): 64 bits mixed."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def step_seed(master: int, step: int, query: int = 0) -> int:
    """Return the seed of a step and a query of it (below 2^20), 64 bits."""
    return splitmix64(splitmix64(master % 2**64) ^ (step << 20 | query))


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int], rounds: int = ROUNDS) -> tuple[Any, Any, Any, Any]:
    """Return Philox4x32's four words.

    Args:
        counter: Four words each, ints or int64 tensors that broadcast, of 0 to 2^32 - 1.
        key: Two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, and their shift keeps the sign, so the low word is cut out where it is read.
        low, high = c2 * MULTIPLIERS[1], c0 * MULTIPLIERS[0]
        c0, c1 = ((low >> 32) ^ c1 ^ k0) & WORD, low
        c2, c3 = ((high >> 32) ^ c3 ^ k1) & WORD, high
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def reference(first: int, count: int, seed: int, param: int, stream: int = DENSE, kind: Kind = "rademacher") -> Tensor:
    """The definition, an element at a time, in float64. Returns (count,)."""
    found = []
    for e in range(first, first + count):
        call, lane = divmod(e, PER_CALL[kind])
        words = philox((call % 2**32, call >> 32, param, stream), (seed % 2**32, seed >> 32))
        if kind == "rademacher":
            found.append(1.0 - 2.0 * (words[lane // 32] >> lane % 32 & 1))
            continue
        radius, turn = (((words[lane // 2 * 2 + n] >> 9) + 0.5) * 2.0**-23 for n in (0, 1))
        found.append(math.sqrt(-2 * math.log(radius)) * (math.cos, math.sin)[lane % 2](2 * math.pi * turn))
    return torch.tensor(found, dtype=torch.float64)


# ---- Triton


@jit
def words_of(seed, call, param, stream, G: tl.constexpr):
    # The four words of G calls, (4 G,) in the order of the elements that they serve.
    zero = tl.zeros([G], tl.uint32)
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + param.to(tl.uint32), zero + stream)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [G * 4])


@jit
def unit(words):
    return ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23: exact


@jit
def turned(u):
    # Cosine and sine of 2 pi u for u in (0, 1), by their series within an eighth of a turn. tl.cos and tl.sin keep a
    # path for large angles, whose local memory would count for every program.
    quarter = tl.floor(4.0 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586
    s = x * x
    sine = x * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 + s * (-1 / 3628800)))))
    q = quarter.to(tl.int32) & 3
    a, b = tl.where((q & 1) == 0, cosine, sine), tl.where((q & 1) == 0, sine, cosine)
    return tl.where((q == 1) | (q == 2), -a, a), tl.where(q >= 2, -b, b)


@jit
def noise_block(seed, base, param, stream, RADEMACHER: tl.constexpr, BLOCK: tl.constexpr):
    # Noise of the elements base to base + BLOCK, fp32; base is a multiple of 128.
    if RADEMACHER:
        words = words_of(seed, base // 128 + tl.arange(0, BLOCK // 128), param, stream, BLOCK // 128)
        bits = (words[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
        return tl.reshape(1.0 - 2.0 * bits.to(tl.float32), [BLOCK])
    words = words_of(seed, base // 4 + tl.arange(0, BLOCK // 4), param, stream, BLOCK // 4)
    a, b = tl.split(tl.reshape(unit(words), [BLOCK // 2, 2]))
    radius = tl.sqrt_rn(-2.0 * tl.log(a))
    cosine, sine = turned(b)
    return tl.reshape(tl.join(radius * cosine, radius * sine), [BLOCK])


@jit
def rounding_block(seed, base, param, BLOCK: tl.constexpr):
    # 16 bits for each element, int32.
    words = words_of(seed, base // 8 + tl.arange(0, BLOCK // 8), param, 7, BLOCK // 8)
    halves = (words[:, None] >> (16 * tl.arange(0, 2)).to(tl.uint32)[None, :]) & 0xFFFF
    return tl.reshape(halves.to(tl.int32), [BLOCK])


@jit(do_not_specialize=["seed", "param", "width", "pieces"])
def _noise_kernel(
    out, firsts, seed, param, width, pieces, STREAM: tl.constexpr, RADEMACHER: tl.constexpr, BLOCK: tl.constexpr
):
    # A program makes a block of one row; a row's blocks begin at a multiple of 128 of the parameter's elements.
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    first = tl.load(firsts + row)
    base = first // 128 * 128 + piece.to(tl.int64) * BLOCK
    at = base + tl.arange(0, BLOCK) - first
    z = noise_block(seed, base, tl.zeros([], tl.int32) + param, STREAM, RADEMACHER, BLOCK)
    tl.store(out + row.to(tl.int64) * width + at, z, mask=(at >= 0) & (at < width))


def launch(
    firsts_R: Tensor, width: int, seed: int, param: int, stream: int = DENSE, kind: Kind = "rademacher"
) -> Tensor:
    """The kernel's noise of rows that begin at the elements `firsts_R`, (R, W) fp32."""
    out_RW = firsts_R.new_empty(len(firsts_R), width, dtype=torch.float32)
    pieces = -(-(width + 127) // BLOCK)
    enqueue(
        _noise_kernel,
        (len(firsts_R) * pieces,),
        firsts_R.device,
        out_RW,
        firsts_R,
        signed(seed),
        param,
        width,
        pieces,
        STREAM=stream,
        RADEMACHER=kind == "rademacher",
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out_RW


def signed(seed: int) -> int:
    """Return the 64 bits of a seed as a signed number, as kernels and int64 tensors take it."""
    return seed - 2**64 if seed >= 2**63 else seed


# ---- torch


def _word(value: int) -> np.ndarray:
    return np.array(value, np.uint64)  # numpy takes an array without dimensions in half the time of a scalar


_LOW, _HALF, _BY_C0, _BY_C2 = map(_word, (WORD, 32, *MULTIPLIERS))


@lru_cache(maxsize=4)
def _keys(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the two words of each round's key."""
    k0, k1 = seed % 2**32, seed >> 32
    return [(_word((k0 + n * WEYL[0]) & WORD), _word((k1 + n * WEYL[1]) & WORD)) for n in range(ROUNDS)]


def words_in_numpy(calls: np.ndarray, seed: int, param: int, stream: int) -> np.ndarray:
    """Return `philox`'s words of calls, uint64 (...), as uint32 (..., 4).

    numpy's operations take a third of the time of torch's for a small tensor, of which a model has many, and each
    writes into an array that is there, since the 100 operations of a call are bound by memory.
    """
    c0, c1, c2, c3 = calls & _LOW, calls >> _HALF, np.full_like(calls, param), np.full_like(calls, stream)
    low, high = np.empty_like(c0), np.empty_like(c0)
    for k0, k1 in _keys(seed):
        np.multiply(c2, _BY_C2, low)
        np.multiply(c0, _BY_C0, high)
        for odd, key, product, even in ((c1, k0, low, c2), (c3, k1, high, c0)):
            np.right_shift(product, _HALF, even)
            np.bitwise_xor(even, odd, even)
            np.bitwise_xor(even, key, even)
            np.bitwise_and(even, _LOW, even)
        c0, c1, c2, c3, low, high = c2, low, c0, high, c1, c3
    found = np.empty((*calls.shape, 4), np.uint32)
    for number, words in enumerate((c0, c1, c2, c3)):
        found[..., number] = words  # the low 32 bits
    return found


def words_on_host(calls: Tensor, seed: int, param: int, stream: int) -> Tensor:
    """Return the words of calls (...), int64 (..., 4)."""
    if calls.device.type != "cpu":
        return torch.stack(philox((calls & WORD, calls >> 32, param, stream), (seed % 2**32, seed >> 32)), -1)
    return torch.from_numpy(words_in_numpy(calls.numpy().view(np.uint64), seed, param, stream).astype(np.int64))


def signs_on_host(calls: Tensor, seed: int, param: int, stream: int, scale: float = 1.0) -> Tensor:
    """Return scale times the Rademacher noise of calls (..., G): fp32 (..., 128 G); exact for any fp32 `scale`.

    On a CPU the signs of eight elements are looked up at a time. numpy copies items of 32 bytes faster than it or torch
    shifts and masks eight numbers, and twice as fast as torch copies rows.
    """
    if calls.device.type != "cpu":
        words = words_on_host(calls, seed, param, stream).unsqueeze(-1)
        signs = torch.from_numpy(SIGNS) * torch.tensor(scale)
        return signs.to(calls.device)[words >> torch.arange(0, 32, 8, device=calls.device) & 0xFF].flatten(-4)
    octets = _octets(words_in_numpy(calls.numpy().view(np.uint64), seed, param, stream))
    found = _signs(scale).take(octets, mode="clip")  # which checks no index
    return torch.from_numpy(found.view(np.float32)).flatten(-2)


@lru_cache(maxsize=16)
def _signs(scale: float) -> np.ndarray:
    """Return scale times SIGNS, a row as an item, (256,)."""
    return (SIGNS * np.float32(scale)).view(EIGHT)[:, 0]


def _octets(words: np.ndarray) -> np.ndarray:
    """Return the octets of words (..., 4), uint8 (..., 16), the lowest first."""
    return words.astype("<u4", copy=False).view(np.uint8)


def gaussians_on_host(calls: Tensor, seed: int, param: int, stream: int) -> Tensor:
    """Return the Gaussian noise of calls (..., G): fp32 (..., 4 G)."""
    units = (words_on_host(calls, seed, param, stream) >> 9).float().add_(0.5).mul_(2.0**-23)
    radius = units[..., 0::2].log().mul_(-2).sqrt_()
    angle = units[..., 1::2] * (2 * math.pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-3)


def rounding_on_host(first: int, count: int, seed: int, param: int, device: torch.device) -> Tensor:
    """Return 16 bits for each element of a range, int32 (count,)."""
    calls = torch.arange(first // 8, -(-(first + count) // 8), device=device)
    words = words_on_host(calls, seed, param, ROUNDING)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).to(torch.int32)
    return halves.flatten()[first % 8 : first % 8 + count]


def range_on_host(
    first: int,
    count: int,
    seed: int,
    param: int,
    stream: int,
    kind: Kind,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return scale times the noise of a range of elements, fp32 (count,)."""
    per = PER_CALL[kind]
    calls = torch.arange(first // per, -(-(first + count) // per), device=device)
    if kind == "rademacher":
        noise = signs_on_host(calls, seed, param, stream, scale)
    else:
        noise = gaussians_on_host(calls, seed, param, stream)
        noise = noise if scale == 1 else noise.mul_(scale)
    return noise[first % per : first % per + count]


def parts_on_host(
    first: int,
    count: int,
    terms: Sequence[tuple[int, float]],
    param: int,
    stream: int,
    kind: Kind,
    device: torch.device,
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Yield parts of a range of elements that follow on each other, of at most PART: where one lies, and its noises.

    Those are of each term, a seed and a factor, in turn: fp32, as long as the part, each until the next is asked for.
    A new tensor of the size of a matrix costs a CPU more, in pages that the system has to clear, than the noise in it.
    """
    if kind == "rademacher" and device.type == "cpu":
        for start in range(0, count, CHUNK):
            some = range(start, min(start + CHUNK, count))
            yield from _signs_in_parts(first, some, terms, param, stream)
        return
    for start in range(0, count, PART):
        size = min(PART, count - start)
        made = (range_on_host(first + start, size, seed, param, stream, kind, scale, device) for seed, scale in terms)
        yield slice(start, start + size), made


def _signs_in_parts(
    first: int, some: range, terms: Sequence[tuple[int, float]], param: int, stream: int
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Yield the parts of `some` elements of a range that begins at `first`; their words are made at once."""
    begin = first + some.start
    calls = np.arange(begin // 128, -(-(first + some.stop) // 128), dtype=np.uint64)
    octets_of = (_octets(words_in_numpy(calls, seed, param, stream)).reshape(-1) for seed, _ in terms)
    found = [(each[begin % 128 // 8 :], _signs(term[1])) for each, term in zip(octets_of, terms, strict=True)]
    lead = begin % 8
    room = np.empty((lead + min(PART, len(some)) + 7) // 8, EIGHT)
    noise = torch.from_numpy(room.view(np.float32))
    for start in range(0, len(some), PART):
        stop = min(start + PART, len(some))
        octets = slice(start // 8, -(-(lead + stop) // 8))
        signs = _in_turn(found, octets, room, noise[lead : lead + stop - start])
        yield slice(some.start + start, some.start + stop), signs


def _in_turn(
    found: Sequence[tuple[np.ndarray, np.ndarray]], octets: slice, room: np.ndarray, noise: Tensor
) -> Iterator[Tensor]:
    """Yield `noise`, which is in `room`, with the signs of each term's octets."""
    for all_octets, signs in found:
        signs.take(all_octets[octets], out=room[: octets.stop - octets.start], mode="clip")  # which checks no index
        yield noise


def on_host(firsts_R: Tensor, width: int, seed: int, param: int, stream: int, kind: Kind) -> Tensor:
    """The same by torch: the calls that each row meets, cut where it begins."""
    per = PER_CALL[kind]
    calls_RG = (firsts_R // per)[:, None] + torch.arange((width + per - 2) // per + 1, device=firsts_R.device)
    if kind == "rademacher":
        noise = signs_on_host(calls_RG, seed, param, stream)
    else:
        noise = gaussians_on_host(calls_RG, seed, param, stream)
    if width % per == 0:  # then rows begin where calls do
        return noise[:, :width]
    return noise.gather(1, (firsts_R % per)[:, None] + torch.arange(width, device=firsts_R.device))


def row_noise(
    rows_R: Tensor, width: int, seed: int, param: int, stream: int = DENSE, kind: Kind = "rademacher"
) -> Tensor:
    """Return the noise of rows of a matrix with `width` columns.

    Args:
        rows_R: Indices of rows in the full matrix, int64 (R,); in any order, also several times.
        seed: 64 bits, as `step_seed` gives them.
        param: Number of the parameter, below 2^32.
        stream: Which of the streams of numbers that a parameter has.

    Returns:
        (R, W) fp32 on the device of `rows_R`.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
    """
    if on_cuda(rows_R):
        return launch(rows_R * width, width, seed, param, stream, kind)
    if not rows_R.numel():
        return torch.empty(0, width)
    return on_host(rows_R * width, width, seed, param, stream, kind)
