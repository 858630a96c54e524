"""AdaLomo: torch's Adafactor as its oracle, the fused backward pass, its state, and what it refuses."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import trainable
from lit_sparse.roles import roles_of
from lit_sparse.strategies import LISA, AdaLomo, Updates
from lit_sparse.strategies.adalomo import Factored
from lit_sparse.testing import contract, tiny_llm
from tests.strategies.test_updates import data, trainer

LR = 1e-2


def optimizer_of(weight: torch.Tensor, role: str = "matrix", decay: float = 0.0) -> Factored:
    made = Factored([{"params": [weight], "param_names": ["w"]}], LR, weight_decay=decay)
    made.roles = {weight: role}
    return made


def gradient_of(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def moved(optimizer, weight, grad) -> None:
    weight.grad = grad.clone()
    optimizer.step()


# ---- the rule


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 1), (9,)], ids=str)
def test_it_is_torch_s_adafactor(shape):
    """Fifty steps in fp64; of a matrix and of a vector, small and large gradients, small and large weights."""
    weights = [torch.nn.Parameter(gradient_of(99, *shape) * 0.02) for _ in range(2)]
    ours = optimizer_of(weights[0], "vector" if len(shape) == 1 else "matrix")
    theirs = torch.optim.Adafactor([weights[1]], lr=LR, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0)
    for number in range(50):
        grad = gradient_of(number, *shape) * 10.0 ** (number % 5 - 2)
        moved(ours, weights[0], grad)
        moved(theirs, weights[1], grad)
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


def test_it_is_its_equations():
    """Written out, with weight decay, which torch's Adafactor has otherwise."""
    weight = torch.nn.Parameter(gradient_of(99, 12, 7))
    optimizer, row, column = optimizer_of(weight, decay=0.1), 0.0, 0.0
    for number in range(1, 8):
        grad, before = gradient_of(number, 12, 7), weight.detach().clone()
        moved(optimizer, weight, grad)
        b = 1 - number**-0.8
        row = b * row + (1 - b) * grad.square().mean(1)
        column = b * column + (1 - b) * grad.square().mean(0)
        update = grad / (row / row.mean()).sqrt()[:, None] / column.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        rate = LR * max(1e-3, float(before.square().mean().sqrt()))
        torch.testing.assert_close(weight.detach(), before * (1 - rate * 0.1) - rate * update, rtol=1e-12, atol=1e-12)


def test_a_stack_of_matrices_is_one_matrix_after_the_other():
    grads = [gradient_of(n, 3, 12, 7) * torch.tensor([1.0, 100.0, 0.01])[:, None, None] for n in range(3)]
    start = gradient_of(99, 3, 12, 7)
    stack, single = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start[1].clone())
    ours, theirs = optimizer_of(stack), optimizer_of(single)
    for grad in grads:
        moved(ours, stack, grad)
        moved(theirs, single, grad[1])
        torch.testing.assert_close(stack[1], single, rtol=1e-12, atol=1e-12)


def test_a_step_without_gradient_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    moved(optimizer_of(weight), weight, torch.zeros(4, 3))
    assert torch.equal(weight.detach(), torch.ones(4, 3))


# ---- in a model


def fitted(steps: int = 4, kind: str = "llama", lr: float = LR, beside: tuple = (), **fields):
    options = {key: fields.pop(key) for key in ("precision", "activation_checkpointing") if key in fields}
    settings = fields.pop("settings", {})
    task = CausalLM(tiny_llm(kind), [AdaLomo(**fields), *beside], lr=lr, **options)
    trainer(steps, **settings).fit(task, datamodule=data())
    return task


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fused_backward_is_an_unfused_one_bit_for_bit(kind, precision):
    options = {"kind": kind, "precision": precision, "activation_checkpointing": True}
    found = [dict(fitted(fused_backward=f, **options).build().named_parameters()) for f in (True, False)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    start = dict(tiny_llm(kind).named_parameters())
    assert all(value.grad is None for value in found[0].values())
    assert not any(torch.equal(value, start[name]) for name, value in found[0].items())


def test_one_gradient_is_there_at_a_time():
    model, updates = tiny_llm("qwen2"), Updates([AdaLomo()])
    updates.attach(model)
    optimizer, alive, plain = updates.optimizer(LR), [], Factored.step_some

    def noting(self, group, moving):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        plain(self, group, moving)

    optimizer.step_some = noting.__get__(optimizer)
    ids = torch.randint(3, 96, (2, 12))
    updates.run_backward(model(input_ids=ids, labels=ids).loss)
    assert len(alive) == len(list(model.parameters())), "a tied head counts once"
    assert max(alive) == 1


def test_hooks_follow_the_layers_that_lisa_draws():
    lisa = LISA(active_layers=1, interval=2, sampler="cyclic")
    contract(lambda: [AdaLomo(), LISA(active_layers=1, interval=2, sampler="cyclic")])
    task = fitted(6, beside=(lisa,))
    start = dict(tiny_llm().named_parameters())
    for number, layer in enumerate(decoder_layers(task.build())):
        still = [n for n, p in layer.named_parameters() if torch.equal(p, start[f"model.layers.{number}.{n}"])]
        assert not still, f"layer {number}: {still} did not move"
    hooked = {n for n, p in task.build().named_parameters() if p._post_accumulate_grad_hooks}
    assert hooked == {n for n, _ in trainable(task.build())}
    task.detach()
    assert not any(p._post_accumulate_grad_hooks for p in task.build().parameters())


def test_clipping_in_two_passes_is_clipping():
    """A norm of all gradients divides all alike, which the rule would not see: one that grows over steps does."""
    names = ("clipped", "in two passes", "free")
    ways = ({"fused_backward": False, "settings": {"gradient_clip_val": 0.5}}, {"two_pass_clip": 0.5}, {})
    found = {name: dict(fitted(**way).build().named_parameters()) for name, way in zip(names, ways, strict=True)}
    apart = 0.0
    for name, value in found["clipped"].items():
        # The two norms are summed in another order, which may round a weight of 1 to its neighbour: 2^-23.
        torch.testing.assert_close(value, found["in two passes"][name], rtol=2**-22, atol=1e-7)
        apart = max(apart, float((value - found["free"][name]).detach().abs().max()))
    assert apart > 1e-6


def test_the_state_has_the_bytes_of_the_formula():
    model, updates = tiny_llm(), Updates([AdaLomo()])
    updates.attach(model)
    optimizer, ids = updates.optimizer(LR), torch.randint(3, 96, (2, 12))
    updates.step(1, optimizer, lambda: model(input_ids=ids, labels=ids).loss)
    state = [value for own in optimizer.state.values() for value in own.values()]
    assert all(isinstance(value, torch.Tensor) for value in state)
    roles = roles_of(model)
    wanted = 4 * sum(p.numel() if roles[p] == "vector" else sum(p.shape) for p in model.parameters())
    assert sum(value.nbytes for value in state if value.ndim) == wanted == updates[0].optimizer_bytes(model)


# ---- what is refused


@pytest.fixture
def no_group_after() -> Iterator[None]:
    """Take down the process group that a refused trainer has made."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weight_decay": -1.0}, "AdaLomo: weight_decay is -1.0 and decay 0.8; weight_decay must be 0 or more"),
        ({"decay": 0.0}, "decay above 0 and at most 1"),
        ({"two_pass_clip": 1.0, "fused_backward": False}, r"AdaLomo: two_pass_clip is 1\.0 and fused_backward false"),
        ({"two_pass_clip": -1.0}, r"two_pass_clip is -1\.0 and fused_backward true; give a norm above 0"),
    ],
)
def test_values_out_of_range_are_refused(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        AdaLomo(**fields)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"accumulate_grad_batches": 2}, r"AdaLomo keeps no gradients .* remove trainer\.accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, r"AdaLomo keeps no gradients .* remove trainer\.gradient_clip_val"),
        ({"strategy": "ddp"}, "AdaLomo updates weights in the backward pass, before ddp has averaged .* one device"),
    ],
)
def test_what_a_fused_backward_cannot_honour_is_refused(settings, sentence, no_group_after):
    with pytest.raises(BadInput, match=sentence):
        fitted(1, settings=settings)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_without_it_they_are_honoured(settings):
    task = fitted(1, fused_backward=False, settings=settings)
    assert not torch.equal(task.build().lm_head.weight, tiny_llm().lm_head.weight)


def test_a_model_that_is_given_up_is_freed():
    """Hooks that refer to the optimizer would keep it, and the garbage collector does not see them."""
    model, updates = tiny_llm(), Updates([AdaLomo()])
    updates.attach(model)
    updates.optimizer(1e-3)
    gone = weakref.ref(model)
    del model, updates
    gc.collect()
    assert gone() is None
