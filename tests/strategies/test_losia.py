"""Subnets against slices of dense gradients, dense training, brute-force importance and hand-made schedules."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lit_sparse.anatomy import linears, weight_count
from lit_sparse.entries.subnet import Importance, SubnetLinear
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, trainable
from lit_sparse.strategies import LoSiA, Updates
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, tiny_llm
from tests.strategies.test_smt import loss_of

FEW = {"trainable_fraction": 0.05}


def attached(kind="llama", dtype=torch.float32, **options):
    model = tiny_llm(kind).to(dtype).train()
    strategy = LoSiA(**{**FEW, **options})
    strategy.attach(model, no_probe, ALONE)
    return model, strategy


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SubnetLinear)}


def part(layer, weight):
    return weight[layer.rows.long()][:, layer.columns.long()]


def train(model, strategy, steps, lr=1e-2, optimizer=None, first=1, before=None):
    optimizer = optimizer or AdamW([parameter for _, parameter in trainable(model)], lr=lr, weight_decay=0.0)
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        strategy.before_step(step, optimizer)
        if before is not None:
            before(step)
        optimizer.step()
        optimizer.zero_grad()
        strategy.after_step(step, optimizer)
    return optimizer


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_slices_of_the_dense_ones(kind, dtype):
    """Of the layer that is measured and of the others, whose gradients are one small product."""
    model, strategy = attached(kind, dtype, reselect=3)
    dense = tiny_llm(kind).to(dtype).train()
    for one in (model, dense):
        loss_of(one).backward()
    measured = {name for name, layer in layers_of(model).items() if layer.observe is not None}
    assert measured == {name for name in layers_of(model) if ".0." in name}
    for name, layer in layers_of(model).items():
        whole = dense.get_submodule(name).weight.grad
        tolerance = 1e-14 if dtype is torch.float64 else 2e-2 * float(whole.abs().max())
        torch.testing.assert_close(layer.subnet.grad, part(layer, whole).to(layer.subnet), rtol=0, atol=tolerance)
        if name in measured:
            torch.testing.assert_close(strategy._measured[name].window, whole.float(), rtol=1e-2, atol=tolerance)


@pytest.mark.parametrize("kind", TINY)
def test_whole_subnets_train_as_the_dense_matrices(kind):
    """All rows and columns, which a move leaves where they are: AdamW on the matrices, with a fresh state at a move."""
    model, strategy = attached(kind, torch.float64, trainable_fraction=1e-9, reselect=2, recovery_steps=0)
    strategy.detach(model)
    strategy = LoSiA(
        reselect=2,
        recovery_steps=0,
        trainable_fraction=sum(x.weight.numel() for x in linears(model).values()) / weight_count(model) - 1e-12,
    )
    strategy.attach(model, no_probe, ALONE)
    assert all(layer.subnet.numel() == layer.weight.numel() for layer in layers_of(model).values())
    dense = tiny_llm(kind).double().train().requires_grad_(False)
    weights = {name: linear.weight.requires_grad_(True) for name, linear in linears(dense).items()}
    theirs = AdamW([*weights.values()], lr=1e-2, weight_decay=0.0)
    ours = None
    for step in range(1, 6):
        ours = train(model, strategy, 1, optimizer=ours, first=step)
        loss_of(dense, step).backward()
        theirs.step()
        theirs.zero_grad()
        if step % 2 == 0:
            for name, weight in weights.items():
                if f".{step // 2 - 1}." in name:
                    theirs.state.pop(weight)
    strategy.detach(model)
    for (name, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: n + text)


def test_only_the_subnets_change():
    base, (model, strategy) = tiny_llm(), attached(reselect=None)
    masks = {}
    for name, layer in layers_of(model).items():
        mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
        mask[layer.rows.long()[:, None], layer.columns.long()] = True
        masks[f"{name}.weight"] = mask
    train(model, strategy, 3)
    strategy.detach(model)
    for (name, value), before in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(value != before, masks.get(name, torch.zeros_like(value, dtype=torch.bool))), name


def test_the_trained_share_is_what_was_asked_for():
    model, strategy = attached(trainable_fraction=0.1)
    assert strategy.describe()["entries"] == pytest.approx(0.1 * weight_count(tiny_llm()), rel=0.03)
    for layer in layers_of(model).values():
        shares = [len(own) / n for own, n in zip((layer.rows, layer.columns), layer.weight.shape, strict=True)]
        assert shares[0] == pytest.approx(shares[1], abs=0.07)
    with pytest.raises(BadInput, match="more than the targets"):
        attached(trainable_fraction=0.99)


def test_of_the_input_its_columns_are_kept():
    def kept(model):
        sizes = {}
        with saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
            loss = loss_of(model)
        del loss
        return sum(sizes.values())

    few, most = attached(reselect=None, trainable_fraction=0.01)[0], attached(reselect=None, trainable_fraction=0.3)[0]
    tokens = 2 * 12
    lost = sum(
        len(b.inputs) - len(a.inputs) for a, b in zip(*(layers_of(m).values() for m in (few, most)), strict=True)
    )
    difference = kept(most) - kept(few)
    assert difference == pytest.approx(4 * lost * loss_tokens(few), rel=0.01), (difference, tokens)


def loss_tokens(model):
    seen = []
    handle = next(iter(layers_of(model).values())).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss_of(model)
    handle.remove()
    return seen[0][..., 0].numel()


def test_layers_take_turns_and_only_the_measured_one_moves():
    model, strategy = attached(reselect=2)
    was = {name: (layer.rows.clone(), layer.columns.clone()) for name, layer in layers_of(model).items()}
    optimizer = None
    for slot in range(4):
        optimizer = train(model, strategy, 2, optimizer=optimizer, first=2 * slot + 1)
        now = {name: (layer.rows.clone(), layer.columns.clone()) for name, layer in layers_of(model).items()}
        moved = {n for n in now if not all(torch.equal(a, b) for a, b in zip(now[n], was[n], strict=True))}
        assert moved, slot
        assert moved <= {name for name in now if f".{slot % 3}." in name}, slot
        was = now


def test_importance_is_that_of_the_formula():
    torch.manual_seed(0)
    weight, importance = torch.randn(5, 7), Importance(0.85, torch.Size((5, 7)), torch.device("cpu"))
    mean, spread = torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    for _ in range(4):
        gradients = torch.randn(2, 5, 7)
        for gradient in gradients:
            importance.add(gradient)
        importance.end_step(weight)
        change = (weight * gradients.sum(0)).double()
        now = (change - change**2 / 2).abs()
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * (now - mean).abs()
    torch.testing.assert_close(importance.mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(importance.spread.double(), spread, rtol=1e-5, atol=1e-6)
    assert not importance.window.any()


def test_the_choice_is_the_best_of_three_greedy_ones():
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        importance = Importance(0.5, torch.Size((12, 9)), torch.device("cpu"))
        importance.mean = torch.rand(12, 9, generator=generator) ** 4
        importance.spread = torch.rand(12, 9, generator=generator)
        scores = importance.mean * importance.spread
        rows, columns = importance.best(4, 3)
        assert len(rows) == 4
        assert len(columns) == 3
        top_rows, top_columns = scores.sum(1).topk(4).indices, scores.sum(0).topk(3).indices
        within_rows = scores[top_rows].sum(0).topk(3).indices
        within_columns = scores[:, top_columns].sum(1).topk(4).indices
        held = [
            scores[r][:, c].sum()
            for r, c in ((top_rows, top_columns), (top_rows, within_rows), (within_columns, top_columns))
        ]
        assert scores[rows.long()][:, columns.long()].sum() == pytest.approx(float(max(held)), rel=1e-6)


def test_a_planted_subnet_is_found():
    importance = Importance(0.85, torch.Size((20, 30)), torch.device("cpu"))
    rows, columns = torch.tensor([1, 4, 17]), torch.tensor([0, 8, 9, 28])
    for seed in range(5):
        gradient = 0.01 * torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
        gradient[rows[:, None], columns] += 1 + 0.1 * seed
        importance.add(gradient)
        importance.end_step(torch.ones(20, 30))
    found = importance.best(3, 4)
    assert torch.equal(found[0], rows.int())
    assert torch.equal(found[1], columns.int())


def test_first_updates_after_a_move_are_of_the_usual_size():
    """A fresh count of steps: Adam's first update is the rate; the authors' would be above twice that."""
    model, strategy = attached(dtype=torch.float64, reselect=2, recovery_steps=0)
    optimizer = train(model, strategy, 2)
    moved = {n: layer for n, layer in layers_of(model).items() if ".0." in n}
    before = {name: layer.subnet.detach().clone() for name, layer in moved.items()}
    train(model, strategy, 1, optimizer=optimizer, first=3)
    for name, layer in moved.items():
        largest = (layer.subnet.detach() - before[name]).abs().max()
        assert largest == pytest.approx(1e-2, rel=1e-3), name


def test_a_subnet_that_moved_recovers():
    """Its update is that of a rate that grows from 0 to the usual one."""
    full, scaled = (attached(dtype=torch.float64, reselect=4, recovery_steps=steps) for steps in (0, 4))
    optimizers = [train(*pair, 4) for pair in (full, scaled)]
    names = [name for name in layers_of(full[0]) if ".0." in name]
    for place in range(4):
        copies = [copy.deepcopy(scaled[0].state_dict()) for _ in range(1)]
        full[0].load_state_dict(copies[0])
        before = {name: layers_of(scaled[0])[name].subnet.detach().clone() for name in names}
        for pair, optimizer in zip((full, scaled), optimizers, strict=True):
            train(*pair, 1, optimizer=optimizer, first=5 + place)
        if place == 3:  # the whole update, and the next layer has moved
            break
        for name in names:
            whole = layers_of(full[0])[name].subnet.detach() - before[name]
            part_of_it = layers_of(scaled[0])[name].subnet.detach() - before[name]
            torch.testing.assert_close(part_of_it, whole * (place + 1) / 4, rtol=1e-6, atol=1e-12)


def test_entries_that_trained_once_are_kept():
    base = tiny_llm()
    updates, model = Updates([LoSiA(**FEW, reselect=1)]), tiny_llm().train()
    updates.attach(model, no_probe)
    optimizer = updates.optimizer(1e-2)
    for step in range(1, 8):
        updates.step(step, optimizer, lambda step=step: loss_of(model, step))
    (strategy,) = updates
    assert strategy.describe()["left"] > 0
    state, values = copy.deepcopy(updates.state_dict()), {n: p.detach().clone() for n, p in trainable(model)}
    again, other = Updates([LoSiA(**FEW, reselect=1)]), tiny_llm().train()
    again.restore(other, state)
    other.load_state_dict(values, strict=False)
    for one, its in ((updates, model), (again, other)):
        one.detach(its)
    for (name, value), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert sum(int((a != b).sum()) for a, b in zip(model.parameters(), base.parameters(), strict=True)) > 0


def test_a_step_that_is_skipped_leaves_no_importance():
    model, strategy = attached(reselect=3)
    loss_of(model).backward()
    (loss_of(model) * float("nan")).backward()
    strategy.skip_step()
    assert all(not importance.window.any() for importance in strategy._measured.values())


def test_micro_batches_add_up():
    one, two = attached(dtype=torch.float64, reselect=3), attached(dtype=torch.float64, reselect=3)
    (loss_of(one[0], 1) + loss_of(one[0], 2)).backward()
    for seed in (1, 2):
        (loss_of(two[0], seed) * 2).backward()
    two[1].scale_gradients(torch.tensor(0.5))
    for name, importance in one[1]._measured.items():
        torch.testing.assert_close(importance.window, two[1]._measured[name].window, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trainable_fraction": 0.0}, "trainable_fraction is 0.0"),
        ({"reselect": 0}, "reselect is 0"),
        ({"reselect": 5, "recovery_steps": 6}, "recovery_steps is 6"),
        ({"decay": 1.0}, "decay is 1.0"),
    ],
)
def test_settings_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        LoSiA(**options)


def test_a_checkpoint_of_another_model_is_refused():
    _, strategy = attached()
    state = strategy.state_dict()
    name = next(iter(state["matrices"]))
    state["matrices"][name]["places"][0] = torch.tensor([10_000])
    with pytest.raises(BadInput, match=f"rows or columns of {name}"):
        LoSiA(**FEW).restore(tiny_llm(), state, ALONE)


def test_a_slot_of_skipped_steps_moves_nothing():
    model, strategy = attached(reselect=1)
    optimizer = AdamW([parameter for _, parameter in trainable(model)], lr=1e-2)
    before = {name: (layer.rows.clone(), layer.columns.clone()) for name, layer in layers_of(model).items()}
    (loss_of(model) * float("nan")).backward()
    optimizer.zero_grad()
    strategy.skip_step()
    strategy.after_step(1, optimizer)
    for name, layer in layers_of(model).items():
        assert all(torch.equal(a, b) for a, b in zip((layer.rows, layer.columns), before[name], strict=True)), name
    assert {name for name, layer in layers_of(model).items() if layer.observe} == {n for n in before if ".1." in n}
