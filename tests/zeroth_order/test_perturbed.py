"""Forward passes beside the weights: what the model computes with perturbed ones, whose own bits never change."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lit_sparse.errors import BadInput
from lit_sparse.testing import TINY, tiny_encoder, tiny_llm
from lit_sparse.zeroth_order import perturbed
from lit_sparse.zeroth_order.directions import Dense
from lit_sparse.zeroth_order.optimizer import Losses
from lit_sparse.zeroth_order.perturbed import Perturbed, places_of
from lit_sparse_kernels.philox import row_noise

EPSILON, SEED = 0.01, 7
IDS = torch.arange(3, 15).view(2, 6)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_encoder() if kind == "bert" else tiny_llm(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


def noise_of(model: nn.Module, seed: int = SEED) -> dict[str, torch.Tensor]:
    """The direction at each trainable weight, by name; numbered as the sorted names are."""
    numbers = {name: number for number, name in enumerate(sorted(name for name, _ in model.named_parameters()))}
    found = {}
    for name, p in model.named_parameters():
        rows = torch.arange(len(p) if p.ndim else 1)
        found[name] = row_noise(rows, p[0].numel() if p.ndim else 1, seed, numbers[name]).view(p.shape)
    return found


def moved(model: nn.Module, scale: float) -> nn.Module:
    """A copy with the perturbation written into its weights, as a textbook does it."""
    other = copy.deepcopy(model)
    noise = noise_of(other)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.add_(noise[name] * scale if p.requires_grad else 0.0)
    return other


def beside(model: nn.Module, scale: float = EPSILON) -> Perturbed:
    direction = Dense()
    return Perturbed(model, places_of(model), lambda w, place, rows: direction.perturb(w, place, rows, SEED, scale))


@pytest.mark.parametrize("chunk", [2**20, 100])
@pytest.mark.parametrize("kind", [*TINY, "bert"])
def test_a_perturbed_pass_computes_what_perturbed_weights_do(kind, chunk, monkeypatch):
    """With tied weights, biases, Conv1D, embeddings of several kinds, and matrices taken some rows at a time."""
    monkeypatch.setitem(perturbed.CHUNK, "cpu", chunk)
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        with beside(model) as mode:
            found = model(input_ids=IDS).logits
        wanted = moved(model, EPSILON)(input_ids=IDS).logits
        assert not torch.allclose(found, model(input_ids=IDS).logits, atol=1e-4)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert mode.read == places_of(model).keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_frozen_weights_are_not_perturbed():
    model = model_of("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    with torch.no_grad(), beside(model):
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, moved(model, EPSILON)(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)


def add_constant(weight, place, rows, scale):
    return weight + scale


def test_bf16_weights_have_their_bits_after_20000_cycles():
    """Where a perturbation is added and subtracted in place, half of them have others after one."""
    model = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    x, before, places = torch.ones(1, 8, dtype=torch.bfloat16), model.weight.detach().clone(), places_of(model)
    drifting = before.clone()
    direction, seen = Dense(), set()
    with torch.no_grad():
        for cycle in range(20_000):
            for sign in (1, -1):
                if cycle < 500:  # Philox is most of the time; then a constant stands for it
                    make = partial(direction.perturb, seed=cycle, scale=sign * 1e-3)
                else:
                    make = partial(add_constant, scale=sign * 1e-3)
                with Perturbed(model, places, make):
                    seen.add(float(model(x).sum()))
            drifting.add_(1e-3).sub_(2e-3).add_(1e-3)
    assert len(seen) > 10  # they were perturbed
    assert torch.equal(model.weight, before)
    assert not torch.equal(drifting, before)


def test_an_exception_in_a_pass_leaves_the_weights():
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError), torch.no_grad(), beside(model):
        model(input_ids=torch.full((1, 2), 10**6))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_that_the_loss_does_not_read_are_refused():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    losses = Losses(model, lambda: model["used"](torch.ones(1, 2)).sum())
    with pytest.raises(BadInput, match=r"reads nothing of 2 of the 4 weights that train, the first is idle\.weight"):
        losses.of([lambda weight, place, rows: weight])


@pytest.mark.parametrize("scale", [EPSILON, -EPSILON])
def test_the_passes_of_a_step_have_the_same_dropout(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    losses = Losses(model, lambda: model(torch.ones(1, 4)).sum())
    direction = Dense()
    with torch.no_grad():
        plain, other = losses.of([None, lambda w, p, rows: direction.perturb(w, p, rows, SEED, 0.0)])
        assert torch.equal(plain, losses.of([None])[0])
        assert torch.equal(plain, other)
        assert plain != Losses(model, lambda: model(torch.ones(1, 4)).sum()).of([None])[0]  # the next step has others


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(BadInput, match=r"the objective is a tensor of shape \(2,\), but a step compares single"):
        Losses(nn.Linear(1, 1), lambda: torch.zeros(2)).of([None])


def test_a_pass_holds_no_copy_of_a_large_weight(monkeypatch):
    """An embedding has the rows of the batch's tokens, and a matrix a chunk at a time."""
    monkeypatch.setitem(perturbed.CHUNK, "cpu", 2**10)
    model = nn.Sequential(nn.Embedding(4096, 32), nn.Linear(32, 4096, bias=False))
    largest = 0

    def make(weight, place, rows):
        nonlocal largest
        largest = max(largest, weight.numel())
        return Dense().perturb(weight, place, rows, SEED, EPSILON)

    with torch.no_grad(), Perturbed(model, places_of(model), make):
        model(torch.arange(64))
    assert largest <= 2**10


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_norm_in_bf16_is_moved_by_less_than_its_steps(kind):
    """Near 1, bf16 has steps of 2^-7; the losses beside the weights are those of fp32 weights, up to activations."""
    model = model_of(kind, torch.bfloat16)
    for name, p in model.named_parameters():
        p.requires_grad_((p.ndim == 1 and "norm" in name.lower()) or "ln_" in name)
    seen: list[torch.Tensor] = []

    def make(weight, place, rows):
        out = Dense().perturb(weight, place, rows, SEED, 1e-3)
        seen.append((out.float() - weight.float()).abs())
        return out

    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    with torch.no_grad(), Perturbed(model, places_of(model), make):
        found = model(input_ids=IDS).logits
    assert torch.cat(seen).min() > 0.9e-3
    assert found.dtype == torch.bfloat16
    with torch.no_grad(), Perturbed(model, places_of(model), lambda weight, place, rows: weight):
        assert torch.equal(model(input_ids=IDS).logits, plain)


def test_an_operation_in_place_reads_a_perturbed_weight():
    model = nn.LayerNorm(6, bias=False)
    places = places_of(model)
    with torch.no_grad(), Perturbed(model, places, lambda weight, place, rows: weight + 1) as mode:
        assert torch.equal(torch.ones(2, 6).mul_(model.weight), torch.full((2, 6), 2.0))
        model.weight.fill_(3.0)  # a weight itself is written
    assert mode.read == {"weight"}
    assert torch.equal(model.weight, torch.full((6,), 3.0))
