"""AdamW on many tensors at once, against torch.optim.AdamW."""

import re

import pytest
import torch

from lit_sparse_kernels import master_adamw as op
from lit_sparse_kernels.master_adamw import CASES, Item, Rule, launch, master_adamw, reference

RULE = Rule(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
STEPS = 4


def guarded(values, offset=16):
    """The values as a view into a longer memory full of NaN, which begins `offset` elements in."""
    memory = torch.full((offset + values.numel() + 16,), torch.nan, dtype=values.dtype)
    view = memory[offset : offset + values.numel()].view(values.shape)
    return view.copy_(values)


def is_guarded(tensor):
    memory = tensor.new_empty(0).set_(tensor.untyped_storage())
    return int(memory.isnan().sum()) == len(memory) - tensor.numel() and not tensor.isnan().any()


def items(sizes, weight_dtype, grad_dtype, offset=16, steps=None):
    """Tensors as they are after some steps: moments are not zero."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    made = []
    for number, size in enumerate(sizes):
        weight = guarded(draw(size).to(weight_dtype), offset)
        master = weight if weight_dtype in (torch.float32, torch.float64) else guarded(weight.float(), offset)
        grad, m = guarded(draw(size).to(grad_dtype), offset), guarded(draw(size).to(master.dtype), offset)
        v = guarded(draw(size).square().to(master.dtype), offset)
        made.append(Item(weight, grad, master, m, v, steps[number] if steps else 3))
    return made


def torch_optimizer(item, rule, dtype):
    """torch's AdamW with the item's state, all in `dtype`."""
    parameter = torch.nn.Parameter(item.master.to(dtype, copy=True))
    optimizer = torch.optim.AdamW(
        [parameter], rule.lr, rule.betas, rule.eps, rule.weight_decay, maximize=rule.maximize, foreach=False
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(float(item.step - 1)),
        "exp_avg": item.exp_avg.to(dtype, copy=True),
        "exp_avg_sq": item.exp_avg_sq.to(dtype, copy=True),
    }
    return parameter, optimizer


def by_torch(item, rule, scale, dtype, steps=STEPS):
    """Master, exp_avg and exp_avg_sq after some steps with one gradient."""
    parameter, optimizer = torch_optimizer(item, rule, dtype)
    for _ in range(steps):
        parameter.grad = item.grad.to(dtype) / (1 if scale is None else scale.to(dtype))
        optimizer.step()
    state = optimizer.state[parameter]
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def rounded(master, dtype, interpreted):
    """The master in the weight's dtype; Triton's interpreter cuts bf16 off where a GPU rounds to nearest."""
    if interpreted and dtype == torch.bfloat16:
        return (master.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()
    return master.to(dtype)


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def run(update, given, rule, scale, steps=STEPS):
    for step in range(steps):
        update([item._replace(step=item.step + step) for item in given], rule, scale)


def public(given, rule, scale):
    master_adamw(*(list(column) for column in zip(*given, strict=True)), rule, scale)


def assert_is_adamw(update, given, rule=RULE, scale=None):
    """Off by at most twice what torch's AdamW is in fp32, and two roundings a step of the largest value on the way."""
    exact = [by_torch(item, rule, scale, torch.float64) for item in given]
    eager = [by_torch(item, rule, scale, torch.float32) for item in given]
    grads, starts = [item.grad.clone() for item in given], [[t.clone() for t in item.moved()[2:]] for item in given]
    run(update, given, rule, scale)
    for item, wanted, usual, start, grad in zip(given, exact, eager, starts, grads, strict=True):
        for got, right, rough, old in zip(item.moved()[2:], wanted, usual, start, strict=True):
            floor = STEPS * 2**-23 * max(largest(right), largest(old))
            assert largest(got - right) <= 2 * largest(rough - right) + floor
        assert torch.equal(item.weight, rounded(item.master, item.weight.dtype, interpreted=update is launch))
        assert all(map(is_guarded, item.moved()))
        if update is launch:
            assert torch.equal(item.grad, grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_adamw(case):
    assert_is_adamw(public, items(*case))


@pytest.mark.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_adamw(case, poisoned):
    assert_is_adamw(launch, items(*case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_does_adamw(case):
    def update(given, rule, scale):
        there = [Item(*(tensor.cuda() for tensor in item.moved()), item.step) for item in given]
        there = [
            new._replace(master=new.weight) if old.master is old.weight else new
            for new, old in zip(there, given, strict=True)
        ]
        public(there, rule, None if scale is None else scale.cuda())
        for old, new in zip(given, there, strict=True):
            for mine, its in zip(old.moved(), new.moved(), strict=True):
                mine.copy_(its)

    assert_is_adamw(update, items(*case), scale=torch.tensor(3.0))


OPTIONS = {
    "scaled": (RULE, torch.tensor(3.0)),
    "maximized": (Rule(lr=0.01, betas=(0.8, 0.95), maximize=True), torch.tensor([0.7])),
    "plain": (Rule(lr=0.01, weight_decay=0.0), None),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_follows_the_rule(option):
    for case in ([(33,)], torch.float32, torch.bfloat16), ([(32,)], torch.bfloat16, torch.bfloat16):
        assert_is_adamw_with_one_gradient(public, items(*case), *OPTIONS[option])


@pytest.mark.interpreted
@pytest.mark.parametrize("option", OPTIONS)
def test_the_kernel_follows_the_rule(option, poisoned):
    given = items([(33,), (32,)], torch.bfloat16, torch.bfloat16) + items([(31,)], torch.float32, torch.bfloat16)
    assert_is_adamw(launch, given, *OPTIONS[option])


def assert_is_adamw_with_one_gradient(update, given, rule, scale):
    # A cast gradient is not divided in place, so that every step of the comparison sees the same one.
    assert all(item.grad.dtype != item.master.dtype for item in given)
    assert_is_adamw(update, given, rule, scale)


@pytest.mark.interpreted
def test_the_kernel_takes_steps_that_differ(poisoned):
    given = items([(33,), (32,), (1,), (48,)], torch.bfloat16, torch.float32, steps=[1, 7, 1000, 2])
    assert_is_adamw(launch, given)


def test_takes_steps_that_differ():
    assert_is_adamw(public, items([(33,), (32,)], torch.bfloat16, torch.float32, steps=[1, 7]))


@pytest.mark.interpreted
@pytest.mark.parametrize("offset", [1, 4, 7])
def test_the_kernel_takes_views_at_any_address(offset, poisoned):
    given = items([(64,), (48, 16)], torch.bfloat16, torch.float32, offset)
    assert not any(map(op._aligned, given)), "the views are aligned, so that this tests nothing"
    assert_is_adamw(launch, given)


@pytest.mark.interpreted
def test_the_kernel_takes_any_mix_in_few_launches(poisoned, monkeypatch):
    noted, launched = [], op._launch
    monkeypatch.setattr(
        op, "_launch", lambda given, *rest, **named: (noted.append(len(given)), launched(given, *rest, **named))
    )
    given = items([(32,), (64, 2)], torch.bfloat16, torch.bfloat16)
    given += items([(32,), (5,)], torch.float32, torch.float32) + items([(16,), (0,)], torch.bfloat16, torch.bfloat16)
    run(launch, given, RULE, None, steps=1)
    assert noted == [3, 1, 1]
    assert_is_adamw(launch, given)


@pytest.mark.interpreted
def test_the_kernel_reads_memory_in_its_own_order(poisoned):
    (given,) = items([(48, 32)], torch.bfloat16, torch.bfloat16)
    transposed = Item(*(tensor.t() for tensor in given.moved()), given.step)
    wanted = reference(transposed, RULE)
    launch([transposed], RULE)
    torch.testing.assert_close(transposed.master, wanted[1])
    assert torch.equal(given.weight, rounded(given.master, torch.bfloat16, interpreted=True))


@pytest.mark.interpreted
def test_the_kernel_counts_as_a_change(poisoned):
    (given,) = items([(32,)], torch.bfloat16, torch.bfloat16)
    before = given.weight._version, given.master._version
    launch([given], RULE)
    assert (given.weight._version, given.master._version) == (before[0] + 1, before[1] + 1)


def test_the_reference_is_torchs():
    (given,) = items([(31,)], torch.float64, torch.float64)
    for scale in (None, torch.tensor(3.0)):
        _, *got = reference(given, RULE, scale)
        torch.testing.assert_close(got, list(by_torch(given, RULE, scale, torch.float64, 1)), rtol=1e-12, atol=1e-12)


def test_double_is_exact_to_rounding():
    (given,) = items([(31,)], torch.float64, torch.float64)
    wanted = reference(given, RULE, torch.tensor(3.0))
    public([given], RULE, torch.tensor(3.0))
    torch.testing.assert_close(given.master, wanted[1], rtol=1e-12, atol=1e-12)


def test_what_is_no_gradient_of_the_master_dtype_is_left_as_it_is():
    (given,) = items([(31,)], torch.bfloat16, torch.bfloat16)
    before = given.grad.clone()
    public([given], RULE, torch.tensor(3.0))
    assert torch.equal(given.grad, before)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"weights": [torch.zeros(4, dtype=torch.int32)]}, "weights[0] is torch.int32; expected torch.float32 or"),
        ({"grads": [torch.zeros(5)]}, "grads[0] has shape (5,); expected (4,)"),
        ({"grads": []}, "grads has 0 entries; expected 1, as weights has"),
        ({"grads": [torch.zeros(4, device="meta")]}, "grads[0] is on meta; expected cpu"),
        ({"grads": [torch.zeros(8)[::2]]}, "grads[0] has strides (2,); expected (1,)"),
        ({"grads": [torch.zeros(4).to_sparse()]}, "grads[0] is torch.sparse_coo; expected a dense tensor"),
        ({"masters": [torch.zeros(4).half()]}, "masters[0] is torch.float16; expected torch.float32"),
        ({"weights": [torch.zeros(4)]}, "masters[0] is a second tensor of torch.float32; expected the weight itself"),
        ({"exp_avgs": [torch.zeros(4).bfloat16()]}, "exp_avgs[0] is torch.bfloat16; expected torch.float32"),
        ({"exp_avg_sqs": [torch.zeros(4).double()]}, "exp_avg_sqs[0] is torch.float64; expected torch.float32"),
        ({"steps": [0]}, "steps[0] is 0; expected 1 or more"),
        ({"grad_scale": torch.ones(2)}, "grad_scale is torch.float32 of shape (2,); expected one torch.float32 number"),
        ({"grad_scale": torch.tensor(2)}, "grad_scale is torch.int64 of shape (); expected one torch.float32 number"),
    ],
)
def test_refuses_in_a_sentence(changed, expected):
    given = {"weights": [torch.zeros(4).bfloat16()], "steps": [1], "rule": RULE}
    given |= {name: [torch.zeros(4)] for name in ("grads", "masters", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(ValueError, match=re.escape(expected)):
        master_adamw(**given | changed)


def test_refuses_weights_with_gaps():
    tensors = [torch.zeros(4, 8)[:, :4] for _ in range(4)]
    with pytest.raises(ValueError, match="without gaps or overlap"):
        master_adamw([tensors[0]], [tensors[1]], [tensors[0]], [tensors[2]], [tensors[3]], [1], RULE)
