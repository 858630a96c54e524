"""The chunked loss, against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from lit_sparse import loss as module
from lit_sparse.loss import (
    chunk_tokens,
    likeliest_tokens,
    next_token_loss,
    next_token_loss_and_hits,
    next_token_scores,
)


def example(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 12, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(31, 12, generator=generator, dtype=dtype).requires_grad_()
    offset = torch.randn(31, generator=generator, dtype=dtype).requires_grad_() if bias else None
    labels = torch.randint(0, 31, (3, 9), generator=generator)
    labels[0, :5] = labels[2, 4] = -100
    return hidden, weight, offset, labels


def plain(hidden, weight, bias, labels):
    logits = F.linear(hidden[:, :-1], weight, bias).flatten(0, 1)
    return F.cross_entropy(logits.float(), labels[:, 1:].flatten())


@pytest.mark.parametrize(("vocabulary", "tokens"), [(128_256, 1024), (49_152, 2688), (10**6, 1024)])
def test_a_chunk_on_a_gpu_fills_it_and_on_a_host_fits_the_caches(vocabulary, tokens):
    assert chunk_tokens(vocabulary, torch.device("cuda")) == tokens
    assert chunk_tokens(vocabulary, torch.device("cpu")) == 2**24 // vocabulary


@pytest.mark.parametrize("chunk", [1, 31 * 5, 2**24])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_the_plain_ones(chunk, bias, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    hidden, weight, offset, labels = example(torch.float32, bias)
    wanted = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in wanted]
    theirs = plain(exact[0], exact[1], exact[2] if bias else None, labels)
    ours = next_token_loss(hidden, weight, offset, labels)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)
    (ours * 3).backward()
    (theirs * 3).backward()
    for tensor, reference in zip(wanted, exact, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_gpu_it_is_the_plain_one_too(bias):
    given = [None if one is None else one.detach().cuda() for one in example(torch.float32, bias)]
    leaves = [one.requires_grad_() for one in given[:3] if one is not None]
    ours, theirs = next_token_loss(*given), plain(*given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_states_get_theirs():
    hidden, weight, _, labels = example(torch.float32, False)
    frozen = weight.detach()
    next_token_loss(hidden, frozen, None, labels).backward()
    (expected,) = torch.autograd.grad(plain(hidden, frozen, None, labels), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_no_label_is_no_loss_and_no_gradient():
    hidden, weight, offset, labels = example(torch.float32)
    loss = next_token_loss(hidden, weight, offset, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_no_scored_place_is_no_loss_and_no_hit():
    hidden, weight, offset, labels = example(torch.float32)
    nowhere, labels = torch.zeros(0, dtype=torch.int64), torch.full_like(labels, -100)
    loss = next_token_loss(hidden, weight, offset, labels, nowhere)
    loss.backward()
    nll, hits = next_token_scores(hidden, weight, offset, labels, nowhere)
    assert loss == 0
    assert not hidden.grad.any()
    assert nll.shape == hits.shape == (labels.shape[0], labels.shape[1] - 1)
    assert not nll.any()
    assert not hits.any()


def test_leaving_the_others_out_changes_nothing():
    hidden, weight, offset, labels = example(torch.float32)
    scored = (labels[:, 1:] != -100).flatten().nonzero()[:, 0]
    losses = []
    for places in (None, scored):
        for tensor in (hidden, weight, offset):
            tensor.grad = None
        loss = next_token_loss(hidden, weight, offset, labels, places)
        loss.backward()
        losses.append((loss.detach(), hidden.grad, weight.grad, offset.grad))
    for whole, some in zip(*losses, strict=True):
        torch.testing.assert_close(some, whole)
    for whole, some in zip(
        next_token_scores(hidden, weight, offset, labels),
        next_token_scores(hidden, weight, offset, labels, scored),
        strict=True,
    ):
        torch.testing.assert_close(some, whole)


@pytest.mark.parametrize("rows", [1, 7, 2**24])
def test_scores_are_the_tokens_losses_and_hits(rows, monkeypatch):
    monkeypatch.setitem(module.HEAD_WEIGHTS, "cpu", 12 * rows)
    hidden, weight, offset, labels = example(torch.float32)
    nll, hits = next_token_scores(hidden, weight, offset, labels)
    logits = F.linear(hidden[:, :-1], weight, offset)
    expected = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(nll, expected)
    assert torch.equal(hits, (logits.argmax(-1) == labels[:, 1:]))


@pytest.mark.parametrize("rows", [1, 7, 2**24])
def test_without_gradients_the_head_is_read_once_and_the_loss_is_the_same(rows, monkeypatch):
    monkeypatch.setitem(module.HEAD_WEIGHTS, "cpu", 12 * rows)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 31 * 5)
    hidden, weight, offset, labels = example(torch.float32)
    wanted, wanted_hits = next_token_loss_and_hits(hidden, weight, offset, labels)
    read, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b: read.append(len(w)) or linear(x, w, b))
    with torch.no_grad():
        loss, hits = next_token_loss_and_hits(hidden, weight, offset, labels)
    torch.testing.assert_close(loss, wanted.detach())
    assert hits == wanted_hits
    assert sum(read) == 31
    assert max(read) * 24 <= 31 * 5  # logits at a time


@pytest.mark.parametrize("rows", [1, 7, 2**24])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(rows, monkeypatch):
    monkeypatch.setitem(module.HEAD_WEIGHTS, "cpu", 12 * rows)
    hidden, weight = (4 * part.detach().round() for part in example(torch.float32)[:2])  # no product is rounded
    twice, flat = torch.cat([weight, weight]), hidden.flatten(0, 1)  # each logit is there twice
    assert torch.equal(likeliest_tokens(flat, twice, None), F.linear(flat, weight).argmax(-1))
    barred = torch.full((62,), -torch.inf)
    barred[50] = 0.0
    assert set(likeliest_tokens(flat, twice, barred).tolist()) == {50}
    labels = torch.full((3, 9), 50)
    assert not next_token_scores(hidden, twice, barred, labels)[0].any(), "the only token that may come is certain"


@pytest.mark.parametrize("chunk", [1, 31 * 5, 2**24])
@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_counts_the_hits(chunk, trained, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk)
    hidden, weight, offset, labels = example(torch.float32)
    likeliest = F.linear(hidden[:, :-1], weight, offset).argmax(-1)
    labels[1, 1:] = likeliest[1]  # eight hits; what the others are is chance
    expected = (likeliest == labels[:, 1:]).sum()
    scored = (labels[:, 1:] != -100).flatten().nonzero()[:, 0]
    assert expected >= 8
    for places in (None, scored):
        given = (hidden, weight, offset) if trained else (hidden.detach(), weight.detach(), offset.detach())
        assert next_token_loss_and_hits(*given, labels, places)[1] == expected


def test_bf16_is_as_close_to_fp64_as_eager_bf16():
    hidden, weight, _, labels = (
        part.bfloat16() if i < 2 else part for i, part in enumerate(example(torch.float32, True))
    )
    hidden, weight = hidden.detach().requires_grad_(), weight.detach()
    exact = hidden.detach().double().requires_grad_()
    plain(exact, weight.double(), None, labels).backward()
    eager = hidden.detach().requires_grad_()
    plain(eager, weight, None, labels).backward()
    next_token_loss(hidden, weight, None, labels).backward()
    error = (hidden.grad.double() - exact.grad).norm()
    assert error <= 2 * (eager.grad.double() - exact.grad).norm() + 1e-4
