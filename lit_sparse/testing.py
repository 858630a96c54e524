"""Tools to test update strategies, also those of other packages: tiny models, comparisons, and the contract."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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

from lit_sparse.calls import evaluating
from lit_sparse.optim import match_by_name, trainable
from lit_sparse.strategies import Updates, UpdateStrategy

TINY = ("llama", "qwen2", "gpt2")
"""The tiny models: Llama (grouped queries), Qwen2 (biases, tied head, sizes no block divides), GPT-2 (Conv1D)."""


def tiny_llm(kind: str = "llama", seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """Return a random causal language model of about 50,000 weights, in fp32, with a vocabulary of 96.

    Args:
        kind: One of TINY.
        seed: Seed of the weights; sets torch's global seed.
        dropout: Dropout probability of the attention (and, for GPT-2, of residuals and embeddings).
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
    """Return a random BERT classifier of about 35,000 weights, in fp32, with a vocabulary of 96.

    Args:
        seed: Seed of the weights; sets torch's global seed.
        dropout: Dropout probability of the attention, the layers' outputs and the head.
        classes: Number of classes.
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
    """Check that the error of `got` is at most `factor` times the rounding error of its dtype.

    The rounding error is the norm of what rounding `reference` to that dtype changes, plus one machine epsilon of the
    reference's norm.

    Args:
        got: The result, in any floating dtype.
        reference: The exact result, in fp64.
        factor: Allowed error in units of the rounding error.

    Raises:
        AssertionError: if the error is larger, or not a number.
    """
    rounding = (reference.to(got.dtype).double() - reference).norm() + torch.finfo(got.dtype).eps * reference.norm()
    error = (got.double() - reference).norm()
    if not error <= factor * rounding:
        raise AssertionError(f"error {error:.3e}, while one rounding to {got.dtype} is {rounding:.3e}")


# ---- the contract


def contract(
    make: Callable[[], Sequence[UpdateStrategy]], kind: str | PreTrainedModel = "llama", steps: int = 4
) -> None:
    """Check the contract of update strategies, in a loop of `Updates` on a tiny model.

    The strategies' own optimizer and backward pass are used. Checks that:

    - attaching does not change the model's outputs (unless `base` is `moved` or `replaced`, or the model `leaves` with
      an `own_forward`);
    - training moves every trainable parameter while it is trainable, and no frozen one;
    - each strategy has an effect: training without it gives other weights, or it recorded importance;
    - training is deterministic for a seed, and a resumed training gives the same bits as a straight one;
    - detaching does not change the outputs, and gives back what `leaves` says.

    Args:
        make: Returns new strategies of one run at each call.
        kind: One of TINY, or a causal language model with a vocabulary of at least 96; it is changed.
        steps: Optimizer steps of training; more are taken if a method acts every few steps only (`cycle`).

    Raises:
        AssertionError: naming the broken clause.
    """
    base = _with_biases(tiny_llm(kind) if isinstance(kind, str) else kind)
    steps = max([steps, *(2 * update.cycle + 2 for update in make() if update.cycle is not None)])
    _check_untrained(make, base)
    run = _Run(make(), base)
    run.train(steps // 2)
    saved = run.saved()
    run.train(steps - steps // 2)
    run.check_moved()
    _check_effects(make, base, run, steps)
    again = _Run(make(), base)
    again.train(steps)
    _check_same(run.model, again.model, "a second training from the same seed")
    _check_resumed(make, base, run, saved, steps)
    _check_detached(run, base)


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the biases at random: at zero, an adapter that scales them would have no gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return model


class _Loss:
    """The loss of a batch with penalties; `of_rows` is for methods that ask for single examples' too."""

    def __init__(self, model: PreTrainedModel, updates: Updates, ids: Tensor) -> None:
        self._model, self._updates, self._ids = model, updates, ids

    def __call__(self) -> Tensor:
        return self._graded()[0]

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """Return the loss, and the mean loss of each row without penalties, (B,)."""
        loss, logits = self._graded()
        rows = zip(logits.split(1), self._ids.split(1), strict=True)
        return loss, torch.stack([next_token_cross_entropy(*row) for row in rows])

    def _graded(self) -> tuple[Tensor, Tensor]:
        batch = {"input_ids": self._ids}
        output = self._model(**batch)
        loss = next_token_cross_entropy(output.logits, self._ids)
        return self._updates.penalized(loss, batch, output), output.logits


class _Run:
    """Train a copy of `base`, and check each step."""

    def __init__(self, strategies: Sequence[UpdateStrategy], base: PreTrainedModel, saved: Any = None) -> None:
        torch.manual_seed(1)
        self.model = copy.deepcopy(base).train()
        self.updates = Updates(strategies)
        if saved is None:
            self.updates.attach(self.model, lambda count, weighed=True: (self._loss(seed)() for seed in range(count)))
        else:
            self.updates.restore(self.model, saved["updates"])
            self.model.load_state_dict(saved["values"], strict=False)
        self.optimizer = match_by_name(self.updates.optimizer(1e-2))
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            torch.set_rng_state(saved["random"])
        self.done = 0 if saved is None else saved["done"]
        self.trained = {name for name, _ in trainable(self.model)}
        self._idle: dict[str, int] = {}  # steps that a trainable parameter has spent without moving
        self._anything_moved = False
        self._moved: set[str] = set()  # names of parameters that have moved since they became trainable

    def _loss(self, seed: int) -> _Loss:
        return _Loss(self.model, self.updates, _batch(seed))

    def train(self, steps: int) -> None:
        for step in range(self.done + 1, self.done + steps + 1):
            named = dict(trainable(self.model))
            self.trained |= set(named)
            written = {id(parameter) for parameter in self.updates.written()}
            before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
            self.updates.step(step, self.optimizer, self._loss(step))
            self._note(named, written, before)
        self.done += steps

    def _note(self, named: dict[str, nn.Parameter], written: set[int], before: dict[str, Tensor]) -> None:
        for name, value in self.model.named_parameters():
            moved = name in before and not torch.equal(value, before[name])
            self._anything_moved |= moved
            if name in named:
                self._moved |= {name} if moved else set()
                self._idle[name] = 0 if moved else self._idle.get(name, 0) + 1
            else:
                assert value.grad is None, f"{name} is frozen, but it has a gradient"
                assert not moved or id(value) in written, f"{name} is frozen, but step moved it"
        still = {name for name, _ in trainable(self.model)}
        for name in set(named) - still:  # it stops training here
            self._check_moved(name)
            self._idle.pop(name)
            self._moved.discard(name)

    def _check_moved(self, name: str) -> None:
        # LoRA's A has no gradient until B has moved, so a single step without movement is not a failure.
        # A mask over all tensors may leave some of them still.
        masked = any(update.gradients == "masks" for update in self.updates)
        assert masked or name in self._moved or self._idle[name] < 2, (
            f"{name} is trainable, but {self._idle[name]} steps left it"
        )

    def check_moved(self) -> None:
        """Check that the parameters that are trainable now have moved since they became trainable."""
        assert self._anything_moved, "nothing has moved"
        for name in self._idle:
            self._check_moved(name)

    def saved(self) -> dict[str, Any]:
        """Return a copy of what a checkpoint holds: trained values by name, and all states."""
        everything = any(update.base == "moved" for update in self.updates)
        named = {n: p.detach() for n, p in self.model.named_parameters() if everything or n in self.trained}
        state = {"updates": self.updates.state_dict(), "values": named, "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**state, "done": self.done, "random": torch.get_rng_state()})


def _check_untrained(make: Callable[[], Sequence[UpdateStrategy]], base: PreTrainedModel) -> None:
    run = _Run(make(), base)
    updates, moved = run.updates, any(update.base in ("moved", "replaced") for update in run.updates)
    own = any(update.leaves == "own_forward" for update in run.updates)
    if not moved and not own:
        torch.testing.assert_close(_logits(run.model), _logits(base), msg="attaching changed what the model computes")
    updates.detach(run.model)
    exact = not any(update.base == "rewritten" for update in updates)
    if own and not moved:
        _check_kept(run.model, base)
    elif not moved:
        _check_same(run.model, base, "attaching and detaching", 0 if exact else 1e-6)


def _check_effects(make: Callable[[], Sequence[UpdateStrategy]], base: PreTrainedModel, run: _Run, steps: int) -> None:
    """Check that each strategy changes the trained weights, or recorded importance."""
    for number, strategy in enumerate(make()):
        name = type(strategy).__name__
        if "importance" in strategy.claims:
            recorded = next(update for update in run.updates if type(update) is type(strategy)).state_dict()
            assert any(value.any() for value in _tensors(recorded)), f"{name} recorded nothing"
            continue
        rest = [other for n, other in enumerate(make()) if n != number]
        without = _Run(rest, base)
        without.train(steps)
        theirs = dict(without.model.named_parameters())
        ours = dict(run.model.named_parameters())
        same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
        assert not same, f"{name} has no effect: a training without it gives the same weights"


def _check_resumed(
    make: Callable[[], Sequence[UpdateStrategy]], base: PreTrainedModel, run: _Run, saved: Any, steps: int
) -> None:
    torch.manual_seed(2)  # another seed: the resumed training must not depend on it
    resumed = _Run(make(), base, saved)
    resumed.train(steps - saved["done"])
    names, theirs = {name for name, _ in trainable(run.model)}, dict(resumed.model.named_parameters())
    assert names == {name for name, _ in trainable(resumed.model)}, "a resumed training trains other parameters"
    for name, value in run.model.named_parameters():
        assert name not in run.trained or torch.equal(value, theirs[name]), f"a resumed training gave another {name}"
    assert torch.equal(_logits(run.model), _logits(resumed.model)), "a resumed model computes something else"


def _check_detached(run: _Run, base: PreTrainedModel) -> None:
    logits, plain = _logits(run.model), all(update.leaves != "own_forward" for update in run.updates)
    run.updates.detach(run.model)
    torch.testing.assert_close(
        _logits(run.model), logits, rtol=1e-4, atol=1e-5, msg="detaching changed what the model computes"
    )
    if plain:
        modules = [{name: type(module) for name, module in model.named_modules()} for model in (run.model, base)]
        assert modules[0] == modules[1], "detaching left other modules than the base has"
        hooked = [
            name for name, module in run.model.named_modules() if module._forward_hooks or module._forward_pre_hooks
        ]
        assert not hooked, f"detaching left a hook on {hooked[0]}"


def _check_same(model: PreTrainedModel, other: PreTrainedModel, what: str, tolerance: float = 0) -> None:
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys(), f"{what} gave other parameters"
    for name, parameter in model.named_parameters():
        close = torch.allclose(parameter, theirs[name], rtol=0, atol=tolerance)
        assert close, f"{what} gave another {name}"


def _check_kept(model: PreTrainedModel, base: PreTrainedModel) -> None:
    ours = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(ours[name], parameter), f"attaching gave another {name}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors nested in dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def next_token_cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, from logits (B, S, V) and ids (B, S)."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _batch(seed: int) -> Tensor:
    return torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad(), evaluating(model):
        return model(input_ids=_batch(100)).logits
