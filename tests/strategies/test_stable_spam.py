"""Stable-SPAM: nothing is clipped without spikes, a spike hardly moves, and norms of gradients follow their means."""

import pytest
import torch
from torch import nn

from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW
from lit_sparse.strategies import MomentumReset, StableSPAM, Updates
from lit_sparse.testing import tiny_llm


def optimizer_of(*shapes: tuple[int, ...]) -> AdamW:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return AdamW(
        [{"params": parameters, "param_names": [f"p{n}" for n in range(len(shapes))]}], lr=1e-2, weight_decay=0
    )


def tame(strategy: StableSPAM, optimizer: AdamW, *grads: torch.Tensor) -> list[torch.Tensor]:
    parameters = optimizer.param_groups[0]["params"]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    strategy.before_step(1, optimizer)
    return [parameter.grad for parameter in parameters]


def textbook(grads: list[torch.Tensor], a: float, b: float, c: float) -> list[torch.Tensor]:
    """The equations in fp64, one gradient after the other."""
    out, top, mean, square = [], 0.0, 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        grad = grad.double()
        top = c * top + (1 - c) * float(grad.abs().max())
        bound = top / (1 - c**t)
        if grad.abs().max() > bound:
            grad = torch.where(grad.abs() > bound, grad * bound / grad.abs().max(), grad)
        norm = float(grad.norm())
        mean, square = a * mean + (1 - a) * norm, b * square + (1 - b) * norm**2
        out.append(grad / norm * (mean / (1 - a**t)) / ((square / (1 - b**t)) ** 0.5 + 1e-8))
    return out


def test_gradients_are_those_of_the_equations():
    torch.manual_seed(0)
    grads = [torch.randn(6, 5) * (20 if n == 3 else 1) for n in range(6)]
    strategy, optimizer = StableSPAM(0.6, 0.8, 0.9), optimizer_of((6, 5))
    for grad, wanted in zip(grads, textbook(grads, 0.6, 0.8, 0.9), strict=True):
        (found,) = tame(strategy, optimizer, grad)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_spikes_and_with_equal_norms_it_is_adam():
    """Adam does not see a gradient's scale; turns of one gradient have one norm and one largest entry."""
    torch.manual_seed(0)
    first = torch.randn(8, 8)
    tamed, plain, strategy = optimizer_of((8, 8)), optimizer_of((8, 8)), StableSPAM()
    for turn in range(4):
        grad = first.rot90(turn)
        tame(strategy, tamed, grad)
        plain.param_groups[0]["params"][0].grad = grad.clone()
        tamed.step()
        plain.step()
        assert int(strategy.logged()["stable_spam_clipped"]) == 0
    ours, theirs = (one.param_groups[0]["params"][0] for one in (tamed, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_spike_of_a_million_is_no_update_of_a_million():
    """Nor does it lower the gradients of later steps, as it would if their norms were compared with its own."""
    torch.manual_seed(0)
    strategy, optimizer = StableSPAM(), optimizer_of((64, 64))
    for _ in range(200):
        tame(strategy, optimizer, torch.randn(64, 64))
    spiked = torch.randn(64, 64)
    spiked[3, 4] = 1e6
    (found,) = tame(strategy, optimizer, spiked)
    assert int(strategy.logged()["stable_spam_clipped"]) == 1
    assert found.norm() < 2
    assert strategy.state_dict()["rows"][0, 1] < 1100  # T, to which the spike is scaled: a thousandth of it
    for _ in range(3):
        (found,) = tame(strategy, optimizer, torch.randn(64, 64))
        assert 0.3 < found.norm() < 1.5


def test_zeros_stay_zeros_and_an_absent_gradient_leaves_its_means_alone():
    strategy, optimizer = StableSPAM(), optimizer_of((3, 3), (2,))
    assert not tame(strategy, optimizer, torch.zeros(3, 3), torch.ones(2))[0].any()
    before = strategy.state_dict()
    optimizer.param_groups[0]["params"][1].grad = None
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 3)
    strategy.before_step(2, optimizer)
    after = strategy.state_dict()
    assert after["names"] == before["names"] == ["p0", "p1"]
    assert torch.equal(after["rows"][1], before["rows"][1])
    assert after["rows"][0, 0] == 2
    assert after["rows"].isfinite().all()


def test_state_is_numbers_by_name_and_goes_on():
    torch.manual_seed(0)
    strategy, optimizer = StableSPAM(), optimizer_of((4, 4))
    for _ in range(3):
        tame(strategy, optimizer, torch.randn(4, 4))
    resumed, grad = StableSPAM(), torch.randn(4, 4)
    resumed.restore(nn.Module(), strategy.state_dict(), None)  # pyright: ignore[reportArgumentType]
    assert torch.equal(tame(resumed, optimizer, grad)[0], tame(strategy, optimizer, grad)[0])


def test_it_tames_what_a_reset_stacks_on():
    model = tiny_llm().train()
    updates = Updates([StableSPAM(), MomentumReset(every=2)])
    updates.attach(model)
    optimizer, norms = updates.optimizer(1e-3), []
    for step in range(1, 4):
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        updates.before_step(step, optimizer)
        norms += [p.grad.norm() for p in model.parameters()]
        optimizer.step()
        updates.after_step(step, optimizer)
        optimizer.zero_grad()
    assert all(0.3 < norm < 1.7 for norm in norms)


@pytest.mark.parametrize("field", ["norm_decay", "square_decay", "clip_decay"])
def test_a_decay_out_of_range_is_refused(field):
    with pytest.raises(BadInput, match=f"^StableSPAM: {field} is 1; it must be from 0 to below 1"):
        StableSPAM(**{field: 1})
