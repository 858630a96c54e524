"""What a strategy is proved with, ours or an outside one: tiny models of several architectures, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_sparse.anatomy import evaluating
from lit_sparse.optim import parameter_groups, regroup, trainable
from lit_sparse.strategies.base import UpdateStrategy, compose

TINY = ("llama", "qwen2", "gpt2")
"""The tiny models: Llama (grouped queries), Qwen2 (biases, tied head, sizes that no block divides), GPT-2 (Conv1D)."""


def tiny_llm(kind: str = "llama", seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """A random causal language model of about 50,000 weights and a vocabulary of 96, the same for the same `seed`.

    Args:
        kind: One of TINY.
        dropout: Dropout probability of its attention (and, for GPT-2, residuals).
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            attention_dropout=dropout,
            max_position_embeddings=256,
            **sizes,
            **tokens,
        )
        return LlamaForCausalLM(config)
    if kind == "qwen2":
        config = Qwen2Config(
            hidden_size=40,
            intermediate_size=72,
            attention_dropout=dropout,
            tie_word_embeddings=True,
            max_position_embeddings=256,
            **sizes,
            **tokens,
        )
        return Qwen2ForCausalLM(config)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=256,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            **tokens,
        )
        return GPT2LMHeadModel(config)
    raise ValueError(f"tiny_llm has {', '.join(TINY)}, not {kind!r}.")


def tiny_encoder(seed: int = 0, dropout: float = 0.0, classes: int = 3) -> PreTrainedModel:
    """A random BERT classifier of about 35,000 weights and a vocabulary of 96, the same for the same `seed`.

    Args:
        dropout: Dropout probability of its attention, its layers' outputs and its head.
        classes: How many it tells apart.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = classes
    return BertForSequenceClassification(config)


def assert_close(got: Tensor, reference: Tensor, factor: float = 2.0) -> None:
    """`got` is at most `factor` times as far from the fp64 `reference` as rounding `reference` to its dtype is.

    Args:
        got: Any floating dtype.
        reference: The same in fp64.
        factor: How much more error than one rounding of each element is allowed, besides a floor of sqrt(n) roundings
            that any sum of n terms may have.
    """
    rounding = (reference.to(got.dtype).double() - reference).norm() + torch.finfo(got.dtype).eps * reference.norm()
    error = (got.double() - reference).norm()
    if not error <= factor * rounding:
        raise AssertionError(f"error {error:.3e}, while one rounding to {got.dtype} is {rounding:.3e}")


def contract(make: Callable[[], Sequence[UpdateStrategy]], kind: str = "llama", steps: int = 3) -> None:
    """What every strategy that trains by autograd owes, checked in a bare loop on a tiny model.

    An untrained one leaves the model as it was (to rounding, where it rewrites the base); training moves every declared
    weight and no other, to the same values each time; the state restores it on a fresh model; and detaching keeps what
    the model computes.

    Args:
        make: Makes the strategies of one run, anew at each call.
        kind: One of TINY.
        steps: Optimizer steps of training.

    Raises:
        AssertionError: naming what was broken.
    """
    base = tiny_llm(kind)
    _leaves_an_untrained_model_alone(make, base)
    model, updates, trained = _trained(make, copy.deepcopy(base), steps)
    _moves_what_it_declares(model, base, trained)
    again, *_ = _trained(make, copy.deepcopy(base), steps)
    _same(model, again, "a second training from the same seed")
    _restores(make, model, updates, trained, copy.deepcopy(base))
    logits = _logits(model)
    for update in reversed(updates):
        update.detach(model)
    torch.testing.assert_close(
        _logits(model), logits, rtol=1e-4, atol=1e-5, msg="detaching changed what the model computes"
    )


def _leaves_an_untrained_model_alone(make: Callable[[], Sequence[UpdateStrategy]], base: PreTrainedModel) -> None:
    model = copy.deepcopy(base)
    updates = _attached(make, model)
    torch.testing.assert_close(_logits(model), _logits(base), msg="attaching changed what the model computes")
    for update in reversed(updates):
        update.detach(model)
    exact = not any(update.rewrites_base for update in updates)
    _same(model, base, "attaching and detaching", 0 if exact else 1e-6)


def _attached(make: Callable[[], Sequence[UpdateStrategy]], model: PreTrainedModel) -> list[UpdateStrategy]:
    torch.manual_seed(1)
    updates = compose(make())
    model.train()
    for update in updates:
        update.attach(model, lambda steps: (_loss(model, seed) for seed in range(steps)))
    return updates


def _trained(
    make: Callable[[], Sequence[UpdateStrategy]], model: PreTrainedModel, steps: int
) -> tuple[PreTrainedModel, list[UpdateStrategy], set[str]]:
    """The model, its strategies, and the names of what was trainable at any time."""
    updates, trained = _attached(make, model), set[str]()
    optimizer = torch.optim.AdamW(parameter_groups(trainable(model)), lr=1e-2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        trained |= {name for name, _ in trainable(model)}
        _loss(model, step, updates).backward()
        for update in updates:
            update.before_step(step, optimizer)
        optimizer.step()
        changed = [update.after_step(step, optimizer) for update in updates]
        if any(changed):
            regroup(optimizer, trainable(model))
    return model, updates, trained


def _moves_what_it_declares(model: PreTrainedModel, base: PreTrainedModel, trained: set[str]) -> None:
    before = dict(base.named_parameters())
    owners = {name.rpartition(".")[0] for name, _ in trainable(model)}  # may train part of a weight that they keep
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} is trainable, but no gradient reaches it"
            assert name not in before or not torch.equal(parameter, before[name]), f"{name} did not move"
        else:
            assert parameter.grad is None, f"{name} is frozen, but it has a gradient"
            moved = name in before and not torch.equal(parameter, before[name])
            assert not moved or name in trained or name.rpartition(".")[0] in owners, f"{name} is frozen, but it moved"


def _restores(
    make: Callable[[], Sequence[UpdateStrategy]],
    model: PreTrainedModel,
    updates: Sequence[UpdateStrategy],
    trained: set[str],
    fresh: PreTrainedModel,
) -> None:
    restored = compose(make())
    for update, old in zip(restored, updates, strict=True):
        update.restore(fresh, old.state_dict())
    names = {name for name, _ in trainable(model)}
    assert names == {name for name, _ in trainable(fresh)}, "restoring made other parameters trainable"
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if name in trained}
    fresh.load_state_dict(values, strict=False)
    assert torch.equal(_logits(fresh), _logits(model)), "a restored model computes something else"


def _same(model: PreTrainedModel, other: PreTrainedModel, what: str, tolerance: float = 0) -> None:
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys(), f"{what} gave other parameters"
    for name, parameter in model.named_parameters():
        close = torch.allclose(parameter, theirs[name], rtol=0, atol=tolerance)
        assert close, f"{what} gave another {name}"


def _batch(seed: int) -> Tensor:
    return torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))


def _loss(model: PreTrainedModel, seed: int, updates: Sequence[UpdateStrategy] = ()) -> Tensor:
    batch = {"input_ids": _batch(seed)}
    output = model(**batch)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    penalties = [p for update in updates if (p := update.penalty(batch, output)) is not None]
    return loss + torch.stack(penalties).sum() if penalties else loss


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return model(input_ids=_batch(100)).logits
