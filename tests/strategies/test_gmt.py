"""GMT: which entries a mask keeps, that the others do not move, what it costs, and the same on several ranks."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, full_tensor, trainable
from lit_sparse.strategies import GMT, SMT, Updates
from lit_sparse.strategies.gmt import masks
from lit_sparse.testing import TINY, contract, tiny_llm
from tests.methods import module
from tests.modules.test_sharding import FULL, fit
from tests.pair import attempt, result, run_pair
from tests.strategies.test_smt import loss_of, probe_of

LR, DECAY = 0.1, 0.5


def adamw(groups, lr):
    """Weight decay that would be seen at once on weights that must not move."""
    return AdamW(groups, lr=lr, weight_decay=DECAY)


def sgd(groups, lr):
    return torch.optim.SGD(groups, lr=lr)


class Weights(nn.Module):
    """A matrix and a vector of ones, whose gradients a loss gives by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    def loss(self, matrix, vector=(1.0, 1.0)):
        return (self.matrix * torch.tensor(matrix)).sum() + (self.vector * torch.tensor(vector)).sum()


def by_hand(make=adamw, **options):
    model, updates = Weights(), Updates([GMT(**{"kept_share": 0.5, **options})])
    updates.attach(model)
    return model, updates, updates.optimizer(LR, make)


def trained(kind="llama", steps=3, dtype=torch.float32, make=adamw, seen=lambda model, optimizer: None, **options):
    """A tiny model after some steps with GMT, or without where `kept_share` is None."""
    model = tiny_llm(kind).to(dtype)
    updates = Updates([] if options.get("kept_share", 0) is None else [GMT(**options)])
    updates.attach(model)
    optimizer = updates.optimizer(1e-2, make)
    for step in range(1, steps + 1):
        updates.step(step, optimizer, lambda step=step: loss_of(model, step))
        seen(model, optimizer)
    return model


def same(model, other):
    return [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]


# ---- which entries are kept


@pytest.mark.parametrize(
    ("gradient", "share", "kept"),
    [
        ([[3.0, -1.0], [0.5, -4.0]], 0.5, [[1, 0], [0, 1]]),
        ([[2.0, -2.0], [2.0, 1.0]], 0.5, [[1, 1], [1, 0]]),  # k is 2, and one more is equal
        ([[0.0, 0.0], [0.0, 5.0]], 0.5, [[0, 0], [0, 1]]),  # a zero is none of the largest
        ([[0.0, 0.0], [0.0, 5.0]], 1.0, [[1, 1], [1, 1]]),
        ([[1.0, 2.0], [3.0, 4.0]], 0.01, [[0, 0], [0, 1]]),  # at least one
        ([[1.0, 2.0], [3.0, 4.0]], 0.0, [[0, 0], [0, 0]]),
        ([[math.inf, 1e-42], [1.0, 2.0]], 0.5, [[1, 0], [0, 1]]),
    ],
)
def test_the_largest_are_kept(gradient, share, kept):
    assert masks([torch.tensor(gradient)], share)[0].tolist() == torch.tensor(kept).bool().tolist()


def test_a_global_threshold_looks_at_all_tensors():
    gradients = [torch.tensor([[4.0, -3.0]]), torch.tensor([[2.0, 1.0]])]
    assert [mask.tolist() for mask in masks(gradients, 0.5, "global")] == [[[True, True]], [[False, False]]]
    assert [mask.tolist() for mask in masks(gradients, 0.5)] == [[[True, False]], [[True, False]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.003, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("spread", [0.1, 5.0])  # of the logarithm: few exponents, or nearly all that there are
def test_a_mask_is_topk_and_its_ties(dtype, share, spread):
    noise = torch.Generator().manual_seed(0)
    gradient = torch.randn(60, 50, generator=noise) * (spread * torch.randn(60, 50, generator=noise)).exp()
    gradient = gradient.to(dtype)
    largest = gradient.abs().flatten().float().topk(round(share * 3000)).values
    mask = masks([gradient], share)[0]
    assert torch.equal(mask, gradient.abs() >= largest[-1])
    ties = int((gradient.abs() == largest[-1]).sum() - (largest == largest[-1]).sum())
    assert mask.sum() == len(largest) + ties
    assert dtype == torch.float32 or (share, spread) != (0.2, 0.1) or ties > 0, "bf16 is meant to have ties"
    parts = gradient.split([7, 53])
    assert torch.equal(torch.cat(masks(parts, share, "global")), mask)


# ---- what moves


def test_masked_entries_and_their_moments_do_not_move():
    """AdamW's first step is lr in the gradient's direction, beside lr * decay of the weight."""
    model, updates, optimizer = by_hand()
    updates.step(1, optimizer, lambda: model.loss([[3.0, -1.0], [0.5, -4.0]]))
    assert model.matrix.tolist() == [[pytest.approx(0.85), 1.0], [1.0, pytest.approx(1.05)]]
    assert model.vector.tolist() == pytest.approx([0.9, 0.9])  # no mask, and no decay
    state = optimizer.state[model.matrix]
    assert state["exp_avg"].tolist() == [[pytest.approx(0.3), 0.0], [0.0, pytest.approx(-0.4)]]
    before = model.matrix.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    updates.step(2, optimizer, lambda: model.loss([[0.0, 1.0], [0.5, 0.1]]))
    for now, was in zip((model.matrix, state["exp_avg"], state["exp_avg_sq"]), before, strict=True):
        assert torch.equal(now[:, 0][:1], was[:, 0][:1])
        assert torch.equal(now[1, 1], was[1, 1])
    # m / (1 - b1^2) over the root of v / (1 - b2^2), of one gradient in two steps: 0.1 / 0.19 / (0.001 / 0.001999)^0.5
    late = 1 - LR * DECAY - LR * (0.1 / 0.19) / math.sqrt(0.001 / 0.001999)
    assert model.matrix[0, 1].item() == pytest.approx(late) == pytest.approx(0.87559, abs=1e-5)
    assert optimizer.state[model.matrix]["step"] == 2


def test_a_masked_gradient_alone_freezes_nothing_under_adamw():
    model, updates, optimizer = by_hand(mode="grad_mask")
    updates.step(1, optimizer, lambda: model.loss([[3.0, -1.0], [0.5, -4.0]]))
    assert type(optimizer) is AdamW
    assert model.matrix.tolist() == [pytest.approx([0.85, 0.95]), pytest.approx([0.95, 1.05])]  # decay
    before = model.matrix.detach().clone()
    updates.step(2, optimizer, lambda: model.loss([[0.0, 1.0], [0.5, 0.1]]))
    momentum = LR * (0.27 / 0.19) / math.sqrt(0.009 * 0.999 / 0.001999)
    assert model.matrix[0, 0].item() == pytest.approx(float(before[0, 0]) * (1 - LR * DECAY) - momentum)


def test_a_masked_gradient_under_sgd_is_the_papers_equation():
    model, updates, optimizer = by_hand(sgd, mode="grad_mask")
    updates.step(1, optimizer, lambda: model.loss([[3.0, -1.0], [0.5, -4.0]]))
    assert model.matrix.tolist() == [[pytest.approx(0.7), 1.0], [1.0, pytest.approx(1.4)]]
    assert model.vector.tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["per_tensor", "global"])
@pytest.mark.parametrize("kind", TINY)
def test_no_masked_entry_of_a_model_moves(kind, scope, dtype):
    model, updates = tiny_llm(kind).to(dtype), Updates([GMT(scope=scope)])
    updates.attach(model)
    optimizer = updates.optimizer(1e-2, adamw)
    for step in range(1, 4):
        loss_of(model, step).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in trainable(model) if parameter.ndim > 1}
        kept = dict(zip(gradients, masks(list(gradients.values()), 0.2, scope), strict=True))
        before = {name: values_of(parameter, optimizer) for name, parameter in trainable(model)}
        updates.before_step(step, optimizer)
        optimizer.step()
        updates.after_step(step, optimizer)
        for name, parameter in trainable(model):
            for now, was in zip(values_of(parameter, optimizer), before[name], strict=False):
                moved = now != was
                assert not (moved & ~kept[name]).any() if name in kept else moved.any(), name
            moved = values_of(parameter, optimizer)[-1] != 0
            assert name not in kept or moved[kept[name]].all(), name  # the second moment
        optimizer.zero_grad()


def values_of(parameter, optimizer):
    state = {name: value.clone() for name, value in optimizer.state.get(parameter, {}).items() if name != "step"}
    kept = [state[name] for name in ("master", "exp_avg", "exp_avg_sq") if name in state]
    return [parameter.detach().clone(), *kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["per_tensor", "global"])
def test_a_mask_of_all_is_full_fine_tuning(scope, dtype):
    full = trained(dtype=dtype, kept_share=None)
    assert all(same(trained(dtype=dtype, kept_share=1, scope=scope), full))
    assert all(same(trained(dtype=dtype, kept_share=1, scope=scope, mode="grad_mask"), full))
    assert not any(same(trained(dtype=dtype, scope=scope), full)[:1])


def test_a_mask_of_none_trains_vectors_alone():
    base, model = tiny_llm("qwen2"), trained("qwen2", kept_share=0)
    assert same(model, base) == [parameter.ndim > 1 for parameter in base.parameters()]


@pytest.mark.parametrize("kind", TINY)
def test_embeddings_may_train_without_a_mask(kind):
    strategy, model = GMT(mask_embeddings=False), tiny_llm(kind)
    updates = Updates([strategy])
    updates.attach(model)
    updates.optimizer(1e-2)
    inside = [p for layer in decoder_layers(model) for p in layer.parameters() if p.ndim > 1]
    masked, everything = sum(p.numel() for p in inside), sum(p.numel() for p in model.parameters())  # tied ones once
    assert strategy.describe() == {"masked_weights": masked, "dense_weights": everything - masked}
    full, masked_too = trained(kind, 1, kept_share=None), trained(kind, 1)
    edge, of_full, of_masked = (
        one.get_input_embeddings().weight for one in (trained(kind, 1, mask_embeddings=False), full, masked_too)
    )
    assert torch.equal(edge, of_full)
    assert not torch.equal(edge, of_masked)


# ---- accumulation, clipping, resuming, logging, costs


def test_the_mask_is_of_the_accumulated_gradient():
    """Of micro-batches' gradients (4, 0), (-4, 3) only the sum is looked at."""
    model, updates, optimizer = by_hand(sgd, mode="grad_mask")
    (model.loss([[4.0, 0.0], [1.0, 1.0]]) / 2).backward()
    (model.loss([[-4.0, 3.0], [1.0, 2.0]]) / 2).backward()
    updates.before_step(1, optimizer)
    optimizer.step()
    assert model.matrix.tolist() == [[1.0, pytest.approx(0.85)], [1.0, pytest.approx(0.85)]]


def test_clipping_sees_the_norm_of_what_is_kept():
    model, updates, optimizer = by_hand()
    model.loss([[3.0, -1.0], [0.5, -4.0]], (0.0, 0.0)).backward()
    updates.before_step(1, optimizer)
    assert isinstance(optimizer, AdamW)
    optimizer.clip_norm(2.0)
    assert float(optimizer.grad_scale) == pytest.approx(5 / 2)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    "options",
    [{"scope": "global", "kept_share": 0.9}, {"mode": "grad_mask"}, {"kept_share": 0.01, "mask_embeddings": False}],
    ids=str,  # a global share of 0.2 leaves whole matrices as they are, which the contract takes for a mistake
)
def test_keeps_the_contract(kind, options):
    contract(lambda: [GMT(**options)], kind)


def test_a_resumed_run_needs_the_optimizers_state_alone():
    saved = {}

    def save(model, optimizer):
        saved.setdefault("model", copy.deepcopy(model.state_dict()))
        saved.setdefault("optimizer", copy.deepcopy(optimizer.state_dict()))

    straight, resumed, updates = trained(steps=3, seen=save), tiny_llm("llama"), Updates([GMT()])
    updates.restore(resumed, [{"class": "GMT", "state": GMT().state_dict()}])
    resumed.load_state_dict(saved["model"])
    optimizer = updates.optimizer(1e-2, adamw)
    optimizer.load_state_dict(saved["optimizer"])
    for step in (2, 3):
        updates.step(step, optimizer, lambda step=step: loss_of(resumed, step))
    assert GMT().state_dict() == {}
    assert all(same(straight, resumed))


def test_the_log_has_the_share_and_its_energy():
    model, updates, optimizer = by_hand()
    model.loss([[3.0, -1.0], [3.0, -3.0]]).backward()
    logged = {name: float(value) for name, value in updates.before_step(1, optimizer).items()}
    assert logged == {"gmt_kept_share": 0.75, "gmt_kept_energy": pytest.approx(27 / 28)}


def test_it_costs_what_full_fine_tuning_does_and_a_byte_a_weight_within_the_step():
    seen = []
    for share in (None, 0.2):
        trained(steps=1, kept_share=share, seen=lambda _, optimizer: seen.append(optimizer))
    full, masked = ({k: v.nbytes for state in o.state.values() for k, v in state.items()} for o in seen)
    assert full == masked
    assert seen[1].masks == {}
    model, updates, optimizer = by_hand()
    model.loss([[3.0, -1.0], [0.5, -4.0]]).backward()
    updates.before_step(1, optimizer)
    assert [(id(p), mask.nbytes) for p, mask in optimizer.masks.items()] == [(id(model.matrix), 4)]


# ---- beside others


def test_masked_entries_of_blocks_stay_in_the_weight_too():
    """SMT's blocks, which AdamW writes into the weight within its step, where nobody could put them back."""
    model = tiny_llm("llama")
    smt = SMT(trainable_fraction=0.05, block_size=8, blocks="random")
    updates = Updates([smt, GMT(kept_share=0.2)])
    updates.attach(model, probe_of(model))
    optimizer = updates.optimizer(1e-2, adamw)
    base = dict(tiny_llm("llama").named_parameters())
    updates.step(1, optimizer, lambda: loss_of(model))
    with torch.no_grad():
        for name, blocks in smt.choice.items():
            weight, was = model.get_parameter(f"{name}.weight"), base[f"{name}.weight"]
            moved = blocks.read(weight) != blocks.read(was)
            assert moved.sum() == (weight != was).sum() == round(0.2 * moved.numel())


def test_a_share_outside_of_0_and_1_is_refused():
    with pytest.raises(BadInput, match=r"GMT: kept_share is 1\.5; it must be between 0 and 1"):
        GMT(kept_share=1.5)


def test_vectors_alone_are_refused():
    model = tiny_llm("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim < 2)
    with pytest.raises(BadInput, match="GMT: there is no matrix to mask among what is trained"):
        Updates([GMT()]).attach(model)


def test_an_optimizer_that_would_move_masked_weights_is_refused():
    updates = Updates([GMT()])
    updates.attach(tiny_llm("llama"))
    with pytest.raises(BadInput, match=r"the optimizer is torch\.optim\.adamw\.AdamW; set model.optimizer to lit_sp"):
        updates.optimizer(1e-2, torch.optim.AdamW)


# ---- two processes


SHAPES = [(5, 7), (1, 9), (8, 2)]  # a shard more than the other, none at all, as many


def gradients():
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise).round(decimals=1) for shape in SHAPES]  # with ties


def work(folder: Path, rank: int) -> None:
    # Its own meeting point: Lightning's group, after it, would find this one's addresses at the same port.
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for scope in ("per_tensor", "global"):
        attempt(folder, rank, scope, lambda scope=scope: sharded_masks(scope))
        attempt(folder, rank, f"mixed {scope}", lambda scope=scope: sharded_masks(scope, whole=2))
    for dtype in ("float32", "bfloat16"):
        attempt(folder, rank, dtype, lambda dtype=dtype: stepped(getattr(torch, dtype), True))
    torch.distributed.destroy_process_group()
    attempt(folder, rank, "ddp", lambda: by_ddp(folder))


def sharded_masks(scope, whole=0):
    """Return this rank's masks where all gradients are sharded but the first `whole` ones."""
    mesh = init_device_mesh("cpu", (2,))
    shards = [distribute_tensor(gradient, mesh, [Shard(0)]) for gradient in gradients()[whole:]]
    return [mask.flatten().tolist() for mask in masks([*gradients()[:whole], *shards], 0.3, scope)]


def stepped(dtype, sharded):
    """Return parameters with the gradients above after two steps, and what is logged."""
    mesh = init_device_mesh("cpu", (2,)) if sharded else None
    place = (lambda value: distribute_tensor(value, mesh, [Shard(0)])) if sharded else (lambda value: value)
    parameters = [nn.Parameter(place(torch.ones(shape, dtype=dtype))) for shape in SHAPES]
    strategy, optimizer = GMT(kept_share=0.3), AdamW(parameters, lr=LR, weight_decay=DECAY)
    for step in (1, 2):
        for parameter, gradient in zip(parameters, gradients(), strict=True):
            parameter.grad = place((gradient + step).to(dtype))
        strategy.before_step(step, optimizer)
        optimizer.step()
        strategy.after_step(step, optimizer)
    logged = {name: float(value) for name, value in strategy.logged().items()}
    return [[full_tensor(parameter).tolist() for parameter in parameters], logged]


def by_ddp(folder):
    made = module("gmt", folder / "llama", **FULL)
    fit(made, False, strategy="ddp", devices=2)
    return [float(parameter.detach().double().sum()) for parameter in made.build().parameters()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny_llm("llama").save_pretrained(folder / "llama")
    run_pair(work, folder)
    return folder


@pytest.mark.parametrize("scope", ["per_tensor", "global"])
def test_shards_have_the_masks_of_the_whole(scope, pair):
    shards = [result(pair, scope, rank) for rank in (0, 1)]
    wanted = [mask.flatten().tolist() for mask in masks(gradients(), 0.3, scope)]
    assert [first + second for first, second in zip(*shards, strict=True)] == wanted


@pytest.mark.parametrize("scope", ["per_tensor", "global"])
def test_gradients_that_are_whole_beside_shards_have_their_own_masks(scope, pair):
    first, second = (result(pair, f"mixed {scope}", rank) for rank in (0, 1))
    wanted = [mask.flatten().tolist() for mask in masks(gradients(), 0.3, scope)]
    assert first[:2] == second[:2] == wanted[:2]
    assert first[2] + second[2] == wanted[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_shards_is_that_of_the_whole(dtype, pair):
    weights, logged = stepped(getattr(torch, dtype), False)
    for rank in (0, 1):
        assert result(pair, dtype, rank) == [weights, pytest.approx(logged)]


def test_ddp_trains_the_same_entries_on_all_ranks(pair):
    assert result(pair, "ddp", 0) == result(pair, "ddp", 1)
