"""Next-token cross-entropy that never holds all the logits.

With today's vocabularies the logits outweigh everything else that a training step keeps. Here they exist one chunk of
tokens at a time: the gradient with respect to the hidden states is formed while the chunk's logits are at hand. Where
none is wanted, they exist some rows of the head at a time, so that each is read once for all tokens. torch's own
`linear_cross_entropy` (2.13) does the same with gradients, but took 3.5 to 4 times as long on a CPU with a frozen head,
and is not there in 2.11; so these functions serve all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The label of a token that no loss is taken on, as in Hugging Face's models."""
CHUNK_LOGITS = 2**24
"""Logits held at a time on a host: 64 MiB in fp32."""
CHUNK_ROWS = 128
"""Of which a chunk on a GPU is a multiple: the side of a tile of its products."""
GPU_CHUNK_LOGITS = 2**27
"""Logits held at a time on a GPU, 512 MiB in fp32: 1,024 tokens of Llama 3's vocabulary.

With the host's chunk, 130 tokens, the head is read 32 times for 4,096 tokens and its products fill no GPU.
"""
HEAD_WEIGHTS = {"cpu": 2**20, "cuda": 2**24}
"""Weights of the head that are read at a time where no gradient is wanted, each once: where a method perturbs them, as
many perturbed ones exist."""


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are held at a time; on a GPU at least 1,024."""
    if device.type != "cuda":
        return max(1, CHUNK_LOGITS // vocabulary)
    return max(1024, GPU_CHUNK_LOGITS // vocabulary // CHUNK_ROWS * CHUNK_ROWS)


class _ChunkedCrossEntropy(torch.autograd.Function):
    # Shapes: T tokens, H hidden, V vocabulary.

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        count = (labels_T != IGNORED).sum().clamp_min(1)
        loss = hidden_TH.new_zeros((), dtype=torch.float32)
        hits = torch.zeros_like(count)
        d_hidden = torch.empty_like(hidden_TH) if want_hidden else None
        d_weight = None
        d_bias = torch.zeros_like(weight_VH[:, 0], dtype=torch.float32) if want_bias else None
        for part in _parts(len(labels_T), weight_VH):
            logits, nll, target, kept = _chunk(hidden_TH[part], weight_VH, bias_V, labels_T[part])
            loss += nll.sum()
            hits += (_are_likeliest(logits, target) & kept).sum()
            if not (want_hidden or want_weight or want_bias):
                continue
            # d loss / d logits = (softmax - one_hot) / count on the kept tokens. The choice of tokens and the division
            # are left to the products' smaller sides, which saves a pass over the logits.
            logits.exp_().scatter_add_(1, target[:, None], logits.new_full((len(target), 1), -1.0))
            if d_bias is not None:
                d_bias += kept.float() @ logits
            d_logits = logits.to(weight_VH.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight_VH, out=d_hidden[part]).mul_((kept / count)[:, None])
            if want_weight:
                product_VH = d_logits.t() @ (hidden_TH[part] * kept[:, None])
                # The first chunk's is taken as it is: a pass over fp32 of the head's size costs milliseconds.
                d_weight = product_VH.float() if d_weight is None else d_weight.add_(product_VH)
        ctx.save_for_backward(d_hidden, d_weight, d_bias, count)
        ctx.weight_dtype = weight_VH.dtype
        ctx.mark_non_differentiable(hits)
        return loss / count, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_weight, d_bias, count = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype)
        d_weight = None if d_weight is None else (d_weight * (d_loss / count)).to(ctx.weight_dtype)
        d_bias = None if d_bias is None else (d_bias * (d_loss / count)).to(ctx.weight_dtype)
        return d_hidden, d_weight, d_bias, None


def _parts(tokens: int, weight_VH: Tensor) -> list[slice]:
    size = chunk_tokens(len(weight_VH), weight_VH.device)
    return [slice(start, min(start + size, tokens)) for start in range(0, max(1, tokens), size)]


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities (fp32), nll (0 where ignored), targets (0 where ignored), mask of kept tokens."""
    logits = F.linear(hidden, weight, bias).log_softmax(-1, dtype=torch.float32)
    kept = labels != IGNORED
    target = labels.clamp_min(0)
    nll = -logits.gather(1, target[:, None])[:, 0] * kept
    return logits, nll, target, kept


def _are_likeliest(logits: Tensor, target: Tensor) -> Tensor:
    """Return whether each target is the likeliest token, (T,) bool."""
    if logits.is_cuda:
        return logits.argmax(-1) == target
    # argmax takes ten times as long as amax on a CPU. They differ in ties, which fp32 hardly has.
    return logits.gather(1, target[:, None])[:, 0] == logits.amax(-1)


# ---- without gradients

LEAST = torch.finfo(torch.float32).min
"""A logit below all others, but those that are -inf."""


def _logits_by_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield the first of some rows of the head, and their logits (T, rows) in fp32."""
    (vocabulary, width), device = weight.shape, weight.device
    held = chunk_tokens(vocabulary, device) * vocabulary
    step = max(1, min(held // max(1, len(hidden)), HEAD_WEIGHTS.get(device.type, HEAD_WEIGHTS["cuda"]) // width))
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        yield start, F.linear(hidden, weight[rows], None if bias is None else bias[rows]).float()


def _none_yet(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logits and the likeliest tokens of no rows, (T,) each."""
    best = hidden.new_full((len(hidden),), LEAST, dtype=torch.float32)
    return best, torch.zeros_like(best, dtype=torch.int64)


def _best_of(best: Tensor, likeliest: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the rows from `start` on, whose logits (T, rows) are given; of equals the first is likeliest."""
    highest, at = logits.max(-1)
    return torch.maximum(best, highest), torch.where(highest > best, at + start, likeliest)


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return nll (T,) fp32, 0 where ignored, and whether each label was the likeliest token, (T,) bool."""
    best, likeliest = _none_yet(hidden)
    total, own = torch.zeros_like(best), torch.zeros_like(best)
    for start, logits in _logits_by_rows(hidden, weight, bias):
        place = labels - start
        inside = (place >= 0) & (place < logits.shape[1])
        own = torch.where(inside, logits.gather(1, torch.where(inside, place, 0)[:, None])[:, 0], own)
        before = best
        best, likeliest = _best_of(best, likeliest, start, logits)
        total = total * (before - best).exp() + logits.sub_(best[:, None]).exp_().sum(-1)
    kept = labels != IGNORED
    return torch.where(kept, best + total.log() - own, 0.0), (likeliest == labels) & kept


def _flat(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden, labels = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if scored is not None:
        hidden, labels = hidden.index_select(0, scored), labels.index_select(0, scored)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, weight, bias, labels


def next_token_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy (nats per labelled token) of predicting each token from the hidden state before it.

    Args:
        hidden: Last hidden states, (B, S, H).
        weight: Output embedding, (V, H).
        bias: Its bias (V,), or None.
        labels: (B, S) int64, -100 where a token is not scored.
        scored: Places (N,) of the labelled tokens in the flattened (B, S-1) predictions, where they are known: no
            logits are formed for the others, which changes nothing else.

    Returns:
        fp32 scalar with a graph; 0 where no token is labelled.
    """
    return next_token_loss_and_hits(hidden, weight, bias, labels, scored)[0]


def next_token_loss_and_hits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same loss, and the number of labelled tokens that were the likeliest of all, an int64 scalar."""
    flat = _flat(hidden, weight, bias, labels, scored)
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(*flat)  # pyright: ignore[reportReturnType]
    nll, hits = _scores(*flat)
    return nll.sum() / (flat[-1] != IGNORED).sum().clamp_min(1), hits.sum()


@torch.no_grad()
def next_token_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token results of the same prediction, for evaluation.

    Returns:
        nll (B, S-1) fp32 with 0 where no label, and hits (B, S-1) bool: whether the label was the likeliest token.
    """
    shape = (labels.shape[0], labels.shape[1] - 1)
    hidden, weight, bias, labels = _flat(hidden, weight, bias, labels, scored)
    nll, hits = _scores(hidden, weight, bias, labels)
    return _placed(nll, scored, shape), _placed(hits, scored, shape)


@torch.no_grad()
def likeliest_tokens(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return the token with the largest logit for each hidden state, (T,) int64."""
    best, likeliest = _none_yet(hidden_TH)
    for start, logits in _logits_by_rows(hidden_TH, weight_VH, bias_V):
        best, likeliest = _best_of(best, likeliest, start, logits)
    return likeliest


def _placed(values: Tensor, scored: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if scored is None:
        return values.view(shape)
    return values.new_zeros(shape[0] * shape[1]).index_copy_(0, scored, values).view(shape)
