"""LISA: which layers train, that frozen ones do not move, optimizer state, draws, and exact resuming."""

import copy
import dataclasses
import itertools
import math
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import decoder_layers
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import AdamW, parameter_groups, trainable
from lit_sparse.strategies import LISA, SMT, Updates, compose
from lit_sparse.strategies.base import ALONE, Claim, UpdateStrategy, no_probe
from lit_sparse.strategies.layer_sampling import (
    SAMPLERS,
    Cyclic,
    GradNorm,
    Outliers,
    Uniform,
    WeightNorm,
    draw_weighted,
    outlier_shares,
)
from lit_sparse.testing import TINY, contract, tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.methods import data, trainer
from tests.strategies.test_smt import loss_of, probe_of


def attached(kind="llama", dtype=torch.float32, **options):
    model = tiny_llm(kind).to(dtype)
    strategy = LISA(**{"active_layers": 1, "interval": 2, **options})
    strategy.attach(model, probe_of(model), ALONE)
    return model, strategy


def optimizer_of(model, kind=AdamW):
    return kind(parameter_groups(trainable(model)), lr=1e-2)


def train(model, strategy, optimizer, steps, seen=lambda step: None):
    """Take the steps as `Updates` does, with a strategy that is attached already."""
    updates = Updates([strategy])
    updates.follow(model)
    for step in steps:
        updates.step(step, optimizer, lambda step=step: loss_of(model, step))
        seen(step)


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def layer_parameters(model):
    return [list(layer.parameters()) for layer in decoder_layers(model)]


def outside(model):
    inside = {parameter for layer in layer_parameters(model) for parameter in layer}
    return [parameter for parameter in model.parameters() if parameter not in inside]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("options", [{}, {"state": "offload", "train_embeddings": False}, {"state": "keep"}], ids=str)
def test_keeps_the_contract(kind, options):
    contract(lambda: [LISA(active_layers=1, interval=2, **options)], kind)


# Oracles 1 and 3: over an interval the drawn layers move, all others stay to the bit; the count is the sum of parts.
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("kind", TINY)
def test_only_the_drawn_layers_move(kind, embeddings):
    model, strategy = attached(kind, train_embeddings=embeddings, interval=3)
    optimizer = optimizer_of(model)
    for interval in range(3):
        drawn, before = strategy.active, [values(layer) for layer in decoder_layers(model)]
        edge = [parameter.detach().clone() for parameter in outside(model)]
        counted = sum(p.numel() for n in drawn for p in layer_parameters(model)[n])
        counted += sum(p.numel() for p in outside(model)) if embeddings else 0
        assert sum(parameter.numel() for _, parameter in trainable(model)) == counted
        train(model, strategy, optimizer, range(3 * interval + 1, 3 * interval + 4))
        for number, (layer, old) in enumerate(zip(decoder_layers(model), before, strict=True)):
            same = [torch.equal(new, was) for new, was in zip(layer.parameters(), old, strict=True)]
            assert not any(same) if number in drawn else all(same)
        moved = [not torch.equal(new, was) for new, was in zip(outside(model), edge, strict=True)]
        assert all(moved) if embeddings else not any(moved)


# Oracle 2: with every layer drawn it is full fine-tuning, to the bit.
def test_all_layers_are_full_fine_tuning():
    model, strategy = attached(active_layers=len(layer_parameters(tiny_llm("llama"))), interval=100)
    full = tiny_llm("llama")
    train(model, strategy, optimizer_of(model), range(1, 5))
    optimizer = optimizer_of(full)
    for step in range(1, 5):
        loss_of(full, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), full.parameters(), strict=True))


# Oracle 5: bytes of optimizer state after every switch, by the formula; with `keep`, as elsewhere, they pile up.
def state_bytes(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embeddings", [True, False])
def test_state_is_that_of_what_trains(dtype, embeddings):
    model, strategy = attached(dtype=dtype, train_embeddings=embeddings)
    optimizer = optimizer_of(model)
    each = 8 if dtype == torch.float32 else 12  # two moments, and a master of what is kept in fewer bits

    def check(step):
        trained = [parameter for _, parameter in trainable(model)]
        assert sum(parameter.numel() for parameter in trained) == numbers(model, strategy, embeddings)
        with_state = outside(model) if embeddings else []
        with_state = with_state if step % 2 == 0 else trained  # right after a switch the new layers have none yet
        assert state_bytes(optimizer) == each * sum(parameter.numel() for parameter in with_state)

    train(model, strategy, optimizer, range(1, 41), check)


def numbers(model, strategy, embeddings):
    drawn = sum(p.numel() for n in strategy.active for p in layer_parameters(model)[n])
    return drawn + (sum(p.numel() for p in outside(model)) if embeddings else 0)


def test_kept_state_piles_up():
    model, strategy = attached(state="keep", train_embeddings=False, sampler=Cyclic("ascending"))
    optimizer = optimizer_of(model)
    train(model, strategy, optimizer, range(1, 2 * len(layer_parameters(model)) + 1))
    parked = [state for states in strategy.state_dict()["parked"].values() for state in states]
    held = state_bytes(optimizer) + sum(t.nbytes for state in parked for t in state.values() if t.ndim)
    assert held == 8 * sum(p.numel() for layer in layer_parameters(model) for p in layer)


# Oracle 9: an interval is an optimizer of its own; with `keep` the state goes on where it was.
def test_the_optimizer_restarts_each_interval():
    model, strategy = attached(train_embeddings=False, interval=3)
    alone = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    for interval in range(3):
        drawn = strategy.active
        train(model, strategy, optimizer, range(3 * interval + 1, 3 * interval + 4))
        for number, layer in enumerate(decoder_layers(alone)):
            layer.requires_grad_(number in drawn)
        fresh = optimizer_of(alone)
        for step in range(3 * interval + 1, 3 * interval + 4):
            loss_of(alone, step).backward()
            fresh.step()
            fresh.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_kept_state_continues():
    model, strategy = attached(state="keep", train_embeddings=False, interval=1, sampler=Cyclic("ascending"))
    optimizer = optimizer_of(model)
    turns = 2 * len(layer_parameters(model))
    train(model, strategy, optimizer, range(1, turns + 1))
    parked = strategy.state_dict()["parked"]
    steps = {float(state["step"]) for states in parked.values() for state in states}
    steps |= {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {2.0}


# Oracles 7 and 8: gradients are those of full fine-tuning, and nothing below the lowest active layer has a graph.
def test_gradients_are_the_dense_ones_and_the_backward_stops():
    model, strategy = attached(train_embeddings=False)
    reached = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(
            lambda _, args, out: reached.append((out if isinstance(out, torch.Tensor) else out[0]).requires_grad)
        )
    loss_of(model).backward()
    full = tiny_llm("llama")
    loss_of(full).backward()
    (drawn,) = strategy.active
    for got, wanted in zip(layer_parameters(model)[drawn], layer_parameters(full)[drawn], strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)
    assert reached == [number >= drawn for number in range(len(reached))]
    assert all(p.grad is None for n, layer in enumerate(layer_parameters(model)) if n != drawn for p in layer)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("state", ["reset", "keep", "offload"])
def test_resuming_in_the_middle_of_an_interval_changes_nothing(sampler, state):
    options = {"interval": 3, "sampler": sampler, "state": state, "warmup": 1}
    straight, strategy = attached(**options)
    optimizer = optimizer_of(straight)
    train(straight, strategy, optimizer, range(1, 9))
    weights, kept = copy.deepcopy(straight.state_dict()), copy.deepcopy((strategy.state_dict(), optimizer.state_dict()))
    train(straight, strategy, optimizer, range(9, 15))

    resumed, again = tiny_llm("llama"), LISA(active_layers=1, **options)
    again.restore(resumed, kept[0], ALONE)
    resumed.load_state_dict(weights)
    other = optimizer_of(resumed)
    other.load_state_dict(kept[1])
    train(resumed, again, other, range(9, 15))
    assert again.draws == strategy.draws
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert state_bytes(other) == state_bytes(optimizer)


def test_only_what_trains_is_in_fp32_where_the_base_is_in_bf16():
    task = CausalLM(tiny_llm("llama").bfloat16(), [LISA(active_layers=1, interval=2, sampler="cyclic")], lr=1e-2)
    task.precision = "bfloat16"
    trainer(5).fit(task, datamodule=data())
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in task.build().parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert len({layer for draw in task.updates[0].draws[:-1] for layer in draw}) > 1, "nothing was switched"


def formula(task, draw):
    """Bytes of AdamW's state of what trains: two moments in fp32, and a count of steps for each tensor."""
    layers = decoder_layers(task.build())
    parameters = [p for number in draw for p in layers[number].parameters()] + outside(task.build())
    return sum(8 * parameter.numel() + 4 for parameter in parameters)


def recorded(folder, steps, start=None, **options):
    """Return the module and the record of a fit on a tiny model; `start` is a checkpoint to resume from."""
    folder.mkdir()
    task = CausalLM(tiny_llm("llama"), [LISA(active_layers=1, interval=2, **options)], lr=1e-2)
    task.resume_from = start
    recorder = Recorder(folder, Plan(examine=False, profiled=0), samples=0)
    trainer(steps, callbacks=[recorder], num_sanity_val_steps=0).fit(task, datamodule=data(), ckpt_path=start)
    return task, RunRecord.read(folder / "record.json")


def test_the_record_has_the_state_after_every_switch_and_after_resuming(tmp_path):
    task, record = recorded(tmp_path / "a", 7)
    draws = task.updates[0].draws
    assert [(at.step, at.optimizer) for at in record.states] == [(2 * n + 1, formula(task, draws[n])) for n in range(4)]
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    resumed, record = recorded(tmp_path / "b", 10, start=last)  # in the midst of an interval
    draws = resumed.updates[0].draws
    assert [(at.step, at.optimizer) for at in record.states] == [
        (7, formula(resumed, draws[3])),
        (9, formula(resumed, draws[4])),
    ]


def test_kept_state_grows_in_the_record(tmp_path):
    _, record = recorded(tmp_path / "a", 7, state="keep", sampler=Cyclic("ascending"))
    held = [at.optimizer + at.strategy for at in record.states]
    layer = sum(8 * p.numel() + 4 for p in layer_parameters(tiny_llm("llama"))[0])
    assert [size - held[0] for size in held] == [0, layer, 2 * layer, 2 * layer]


def test_the_learning_rate_warms_up_after_each_draw():
    model, strategy = attached(interval=4, warmup=3)
    optimizer, rates = optimizer_of(model), []
    optimizer.register_step_pre_hook(lambda made, *_: rates.append(made.param_groups[0]["lr"]))
    train(model, strategy, optimizer, range(1, 9))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01] * 2)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_the_record_has_every_draw():
    model, strategy = attached(interval=2)
    train(model, strategy, optimizer_of(model), range(1, 6))
    assert strategy.describe() == {"draws": {str(1 + 2 * n): layers for n, layers in enumerate(strategy.draws[:-1])}}
    assert len(strategy.describe()["draws"]) == 3


# Oracle 6: how often each layer is drawn.


def frequencies(sampler, layers, count, draws=10_000):
    found = [0] * len(layers)
    for number in range(draws):
        for layer in sampler.draw(layers, count, 0, number):
            found[layer] += 1
    return [times / draws for times in found]


def inclusion(weights, count):
    """Return the probability of each index to be among `count` drawn one after the other, by enumeration."""
    total = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, sum(weights)
        for index in order:
            probability *= weights[index] / left
            left -= weights[index]
        for index in order:
            total[index] += probability
    return total


def assert_frequencies(found, wanted, draws=10_000):
    for got, share in zip(found, wanted, strict=True):
        assert abs(got - share) <= 4 * math.sqrt(share * (1 - share) / draws) + 1e-12


@pytest.mark.parametrize("count", [1, 2, 5])
def test_uniform_draws_are_uniform(count):
    layers = [torch.nn.Linear(2, 2)] * 6
    assert_frequencies(frequencies(Uniform(), layers, count), [count / 6] * 6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weighted_draws_have_the_exact_inclusion_probabilities(count):
    weights = [0.05, 0.3, 0.1, 0.25, 0.3]
    found = [0] * 5
    for number in range(10_000):
        for index in draw_weighted(weights, count, 7, number):
            found[index] += 1
    assert_frequencies([times / 10_000 for times in found], inclusion(weights, count))


@pytest.mark.parametrize("count", [1, 2])
def test_larger_weights_are_drawn_more_often(count):
    layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(4)]
    for size, layer in zip((1.0, 2.0, 3.0, 4.0), layers, strict=True):
        torch.nn.init.constant_(layer.weight, size)
    assert_frequencies(frequencies(WeightNorm(), layers, count), inclusion([0.1, 0.2, 0.3, 0.4], count))


@pytest.mark.parametrize(("temperature", "exploration"), [(1.0, 0.1), (2.0, 0.0), (0.5, 1.0)])
def test_larger_gradients_are_drawn_more_often(temperature, exploration):
    sampler, scores = GradNorm(temperature=temperature, exploration=exploration), [4.0, 1.0, 9.0]
    sampler.observe(dict(enumerate(scores)))
    powers = [score ** (1 / temperature) for score in scores]
    shares = [(1 - exploration) * power / sum(powers) + exploration / 3 for power in powers]
    assert_frequencies(frequencies(sampler, [None] * 3, 2), inclusion(shares, 2))


def test_a_running_mean_of_gradients():
    sampler = GradNorm(memory=0.75)
    sampler.observe({0: 4.0, 1: 2.0})
    sampler.observe({1: 10.0})
    assert sampler.scores == {0: 4.0, 1: 4.0}


def test_the_probe_measures_each_layers_gradient():
    model, strategy = attached(sampler=GradNorm(probe_batches=3))
    full, squares = tiny_llm("llama"), torch.zeros(len(layer_parameters(model)))
    for seed in range(3):
        loss_of(full, seed).backward()
        for number, layer in enumerate(layer_parameters(full)):
            squares[number] += sum(p.grad.square().sum() for p in layer) / sum(p.numel() for p in layer) / 3
        full.zero_grad()
    assert strategy.state_dict()["sampler"]["scores"] == pytest.approx(squares.sqrt().tolist(), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_cyclic_draws_give_each_layer_its_turn(order, count):
    layers = [None] * 6
    drawn = [Cyclic(order).draw(layers, count, 3, number) for number in range(6 // count)]
    assert sorted(itertools.chain.from_iterable(drawn)) == list(range(6))
    if order == "ascending":
        assert drawn[0] == list(range(count))


@pytest.mark.parametrize("total", [3, 5, 7])
def test_cyclic_draws_are_of_different_layers_whatever_their_number(total):
    for number in range(200):
        assert len(set(Cyclic().draw([None] * total, 2, 0, number))) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"active_layers": 0}, "LISA: active_layers is 0; it must be at least 1"),
        ({"interval": 0}, "LISA: interval is 0; it must be at least 1"),
        ({"warmup": -1}, "LISA: warmup is -1; it must be at least 0"),
        (
            {"sampler": "best"},
            "the sampler 'best' was asked for; choose one of uniform, cyclic, weight_norm, grad_norm",
        ),
    ],
)
def test_invalid_settings_are_refused(options, sentence):
    with pytest.raises(BadInput, match=sentence):
        LISA(**options)


def test_more_layers_than_there_are_are_refused():
    with pytest.raises(BadInput, match=r"LISA: 99 active layers were asked for, but the model has \d"):
        attached(active_layers=99)


def test_a_probe_without_data_is_refused():
    with pytest.raises(BadInput, match="4 training batches are needed before training"):
        LISA(active_layers=1, sampler="grad_norm").attach(tiny_llm("llama"), no_probe, ALONE)


def test_a_model_without_layers_is_refused():
    with pytest.raises(BadInput, match="the layers of Linear were not found"):
        LISA().attach(torch.nn.Linear(2, 2), no_probe, ALONE)


@dataclasses.dataclass
class Pull(UpdateStrategy):
    """A penalty on all weights: their squares."""

    weight: float = 1.0

    def attach(self, model, probe, context):
        self.model = model

    def penalty(self, batch, output):
        return self.weight * torch.stack([p.square().sum() for p in self.model.parameters() if p.requires_grad]).sum()


@dataclasses.dataclass
class OwnOptimizer(UpdateStrategy):
    """Insists on an optimizer, as GaLore-like and zeroth-order methods do."""

    claims: ClassVar[frozenset[Claim]] = frozenset({"optimizer"})

    def optimizer(self, groups, lr):
        return torch.optim.RMSprop(groups, lr=lr)


def fitted(*others, sampler="cyclic"):
    task = CausalLM(tiny_llm("llama"), [LISA(active_layers=1, interval=1, sampler=sampler), *others], lr=1e-2)
    trainer(4).fit(task, datamodule=data())
    return task


def test_works_with_penalties():
    pulled, plain = fitted(Pull(10.0)), fitted(Pull(0.0))
    assert pulled.updates[0].draws == plain.updates[0].draws
    norms = [torch.stack([p.detach().norm() for p in task.build().parameters()]) for task in (pulled, plain)]
    assert norms[0].sum() < norms[1].sum()


def test_works_with_a_strategys_own_optimizer():
    task = fitted(OwnOptimizer())
    (optimizer,) = task.trainer.optimizers
    assert type(getattr(optimizer, "optimizer", optimizer)) is torch.optim.RMSprop
    base = dict(tiny_llm("llama").named_parameters())
    layers = {layer for draw in task.updates[0].draws[:4] for layer in draw}
    assert len(layers) > 1, "nothing was switched"
    for number, layer in enumerate(decoder_layers(task.build())):
        moved = [not torch.equal(p, base[f"model.layers.{number}.{name}"]) for name, p in layer.named_parameters()]
        assert all(moved) if number in layers else not any(moved)


def test_a_second_trainable_set_is_refused():
    with pytest.raises(BadInput, match="LISA and SMT cannot be combined: both take over the model's trainable"):
        compose([LISA(), SMT()])


def test_a_layer_that_text_does_not_reach_is_not_drawn():
    """Mllama's cross-attention waits for an image; the layer would take the turn of one that trains."""
    given = {"text_config": FAMILIES["Mllama"].sizes["text_config"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mllama", **given))
    with pytest.raises(BadInput, match="LISA: decoder layer 1 of MllamaForCausalLM takes no part in a forward pass"):
        LISA(active_layers=1).attach(model, no_probe, ALONE)


def test_both_stacks_of_an_encoder_decoder_take_turns():
    model, strategy = FAMILIES["BART"].tiny(), LISA(active_layers=1, sampler="cyclic", interval=1)
    strategy.attach(model, no_probe, ALONE)
    stacks = set()
    for step in range(1, 6):
        trains = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and ".layers." in name}
        assert len(trains) == 1
        stacks |= trains
        strategy.after_step(step, torch.optim.SGD(model.parameters()))
    assert stacks == {"encoder", "decoder"}


def outlying(kind="llama"):
    """A tiny model, one layer of which has a large entry on an input that is large, and its losses."""
    model = tiny_llm(kind)
    with torch.no_grad():
        decoder_layers(model)[1].mlp.down_proj.weight[:, 3] = 5.0
    ids = torch.arange(3, 27).view(2, 12)
    return model, lambda steps=2: (model(input_ids=ids, labels=ids).loss for _ in range(steps))


def test_outliers_are_counted_by_weights_times_inputs():
    model, losses = outlying()
    shares = outlier_shares(decoder_layers(model), losses(), 13.0)
    assert max(shares, key=shares.__getitem__) == 1
    inputs = {}
    down = decoder_layers(model)[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0].detach().flatten(0, 1)))
    next(losses())
    hook.remove()
    scores = down.weight.detach().abs() * inputs["x"].norm(dim=0)
    whole = shares[1] * 7  # of seven matrices
    others = outlier_shares([layer for n, layer in enumerate(decoder_layers(model)) if n != 1], losses(), 13.0)
    assert whole >= float((scores > 13 * scores.mean()).float().mean()) > 0
    assert all(share < shares[1] for share in others.values())
    assert set(outlier_shares(decoder_layers(model), losses(), 0.0).values()) == {1.0}  # all layers are alike at 0


def test_layers_with_outliers_are_drawn_more_often():
    model, losses = outlying()
    strategy = LISA(active_layers=1, interval=1, sampler="outliers")
    strategy.attach(model, losses, ALONE)
    draws = [strategy._draw(number)[0] for number in range(300)]
    shares = strategy._sampler.shares
    wanted = shares[1] / sum(shares.values())
    assert abs(draws.count(1) / 300 - wanted) < 4 * (wanted * (1 - wanted) / 300) ** 0.5 + 1e-9


def test_bad_outlier_settings_are_refused():
    for options in ({"threshold": -1.0}, {"probe_batches": 0}):
        with pytest.raises(BadInput, match="threshold must be at least 0"):
            Outliers(**options)


@pytest.mark.parametrize(
    ("train_embeddings", "sharded", "wanted"),
    [(True, False, ["last"]), (True, True, ["last"]), (False, False, ["first"]), (False, True, ["first", "last"])],
)
def test_its_costliest_draws_are_at_the_ends_of_the_model(train_embeddings, sharded, wanted):
    """Whatever the sampler draws: it only measures, as it does in a training."""
    model = tiny_llm("llama")
    layers = {"first": 0, "last": len(decoder_layers(model)) - 1}
    own = LISA(active_layers=1, train_embeddings=train_embeddings, sampler="grad_norm")
    ways = Updates([own]).costliest(sharded)
    for (strategy,), name in zip(ways, wanted, strict=True):
        strategy.attach(model, probe_of(model), ALONE)
        assert strategy.draws == [[layers[name]]] * 2
        assert strategy.needs == {"gradients"}
    assert own.draws == []
