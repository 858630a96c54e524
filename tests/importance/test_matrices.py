"""Dense gradients of LoRA's product agree with autograd, and displacements with the product's."""

from itertools import product

import pytest
import torch
from peft import LoraConfig

from lit_sparse.anatomy import linears
from lit_sparse.errors import BadInput
from lit_sparse.importance.matrices import displacement, gradient_of, trained_matrices, watch
from lit_sparse.recompute import checkpoint_activations
from lit_sparse.strategies import PEFT
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, tiny_llm
from tests.strategies.test_smt import loss_of

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def adapted(kind="llama", moved=True, **settings):
    """Return a tiny model in training mode with LoRA (with B not zero if `moved`), and its products."""
    model = tiny_llm(kind)
    PEFT(LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings})).attach(
        model, no_probe, ALONE
    )
    if moved:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    return model.train(), trained_matrices(model, ["all"], "weights", "A test")


def gradients(model, matrices, seeds=(0,), autocast=False):
    watchers = watch(matrices)
    for seed in seeds:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, seed) / len(seeds)
        loss.backward()
    return {m.name: gradient_of(m, watchers) for m in matrices}


@pytest.mark.parametrize("kind", TINY)
def test_the_dense_gradient_is_that_of_a_dense_weight(kind):
    """For an adapter that is still zero, it is the gradient of the base's weight, up to the order of fp32 sums."""
    model, matrices = adapted(kind, moved=False)
    plain = tiny_llm(kind).train()
    loss_of(plain, 0).backward()
    found = gradients(model, matrices)
    assert found.keys() == linears(plain).keys()
    for name, linear in linears(plain).items():
        expected = linear.weight.grad.t() if kind == "gpt2" else linear.weight.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("dropout", "recomputed", "autocast", "seeds"),
    [(0.0, False, False, (0,)), (0.3, False, False, (0, 1)), (0.3, True, False, (0, 1)), (0.3, True, True, (0, 1))],
)
def test_the_factors_gradients_follow_from_it(dropout, recomputed, autocast, seeds):
    """dB = s G A^T and dA = s B^T G hold with dropout, accumulation, activation checkpointing and bf16 autocast."""
    model, matrices = adapted(lora_dropout=dropout)
    if recomputed:
        checkpoint_activations(model)
    found = gradients(model, matrices, seeds, autocast)
    tolerance = 2e-2 if autocast else 1e-5  # bf16 rounds each product to 2^-9 of it; fp32 sums in another order
    for one in matrices:
        (a, b), parameters = one.values(), list(one.parameters.values())
        assert one.scale == 3
        expected = one.scale * b.t() @ found[one.name], one.scale * found[one.name] @ a.t()
        for got, parameter in zip(expected, parameters, strict=True):
            error = (got - parameter.grad).norm() / parameter.grad.norm()
            assert error < tolerance, (one.name, float(error))


def test_watching_changes_no_bit_and_keeps_no_further_activation():
    kept = {}
    for watched, autocast in product((False, True), (False, True)):
        model, matrices = adapted(lora_dropout=0.3)
        watchers = watch(matrices) if watched else {}
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, 0)
            loss.backward()
        grads = [p.grad.clone() for _, p in model.named_parameters() if p.grad is not None]
        kept[watched, autocast] = sum(size for _, size in storages.values()), grads
        for watcher in watchers.values():
            watcher.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for autocast in (False, True):
        assert kept[True, autocast][0] == kept[False, autocast][0]
        assert all(torch.equal(a, b) for a, b in zip(kept[True, autocast][1], kept[False, autocast][1], strict=True))


def test_a_watcher_that_is_off_sums_nothing_and_no_evaluation_does():
    model, matrices = adapted()
    watchers = watch(matrices)
    with torch.no_grad():
        loss_of(model, 0)
    for watcher in watchers.values():
        watcher.on = False
    loss_of(model, 0).backward()
    assert [gradient_of(one, watchers) for one in matrices] == [None] * len(matrices)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo's own look at it
def test_a_compiled_model_is_watched_too():
    (model, matrices), (plain, theirs) = (adapted(target_modules=r".*1\.self_attn\.q_proj") for _ in range(2))
    wanted = gradients(plain, theirs)
    model.base_model.compile(backend="eager")
    for name, got in gradients(model, matrices).items():
        torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-7)


def test_a_displacement_is_exact_where_nothing_moved():
    torch.manual_seed(0)
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    assert not displacement((a, b), (a.clone(), b.clone()), 3.0).any()
    a1, b1 = a + 1e-3 * torch.randn_like(a), b + 1e-3 * torch.randn_like(b)
    exact = 3.0 * (b1.double() @ a1.double() - b.double() @ a.double())
    torch.testing.assert_close(
        displacement((a, b), (a1, b1), 3.0).double(), exact, rtol=0, atol=2e-3 * float(exact.std())
    )


def test_targets_and_spaces():
    model, matrices = adapted("qwen2")
    assert len(matrices) == 21
    assert all(one.scale == 3.0 for one in matrices)
    some = trained_matrices(model, ["q", "layers.2.mlp.up_proj"], "weights", "A test")
    assert [one.name.rpartition(".")[2] for one in some] == ["q_proj", "q_proj", "q_proj", "up_proj"]
    factors = trained_matrices(model, ["v"], "factors", "A test")
    assert [one.name.partition("lora_")[2] for one in factors] == ["A.default.weight", "B.default.weight"] * 3
    biased = tiny_llm("qwen2")
    PEFT(LoraConfig(r=4, target_modules="all-linear", bias="all")).attach(biased, no_probe, ALONE)
    named = [one.name.rpartition(".")[2] for one in trained_matrices(biased, ["q"], "weights", "A test")]
    assert sorted(named) == ["bias"] * 3 + ["q_proj"] * 3
    plain = tiny_llm("gpt2")
    assert len(trained_matrices(plain, ["qkv"], "weights", "A test")) == 6  # weights and biases
    assert len(trained_matrices(plain, ["all"], "weights", "A test")) == len(list(plain.parameters()))
    with pytest.raises(BadInput, match=r"A test: nothing that is trained is among the targets \['gate'\]; give"):
        trained_matrices(plain, ["gate"], "weights", "A test")


def test_dora_is_no_product():
    model = tiny_llm()
    PEFT(LoraConfig(r=4, target_modules="all-linear", use_dora=True)).attach(model, no_probe, ALONE)
    with pytest.raises(
        BadInput, match=r"A test: model\.layers\.0\.self_attn\.q_proj has .*whose update is no plain product"
    ):
        trained_matrices(model, ["all"], "weights", "A test")
    assert len(trained_matrices(model, ["all"], "factors", "A test")) == 63
