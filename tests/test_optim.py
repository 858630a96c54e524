"""Groups, regrouping, states matched by name, and AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.tiny_models import FAMILIES
from lit_sparse.blocks.grid import Blocks
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, match_by_name, parameter_groups, regroup, trainable


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def step(net, optimizer):
    net(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_biases_and_norms_are_not_decayed():
    decayed, plain = parameter_groups(trainable(model()))
    assert decayed["param_names"] == ["0.weight", "1.weight"]
    assert plain["param_names"] == ["0.bias", "1.bias", "2.weight", "2.bias"]
    assert plain["weight_decay"] == 0.0


def test_nothing_to_train_is_two_empty_groups():
    optimizer = torch.optim.AdamW(parameter_groups([]))
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 0]


def test_regroup_keeps_the_optimizer_and_drops_the_state_of_removed_parameters():
    net = model()
    optimizer = torch.optim.AdamW(parameter_groups(trainable(net)), lr=0.1)
    groups = list(optimizer.param_groups)
    step(net, optimizer)
    net[0].requires_grad_(False)
    kept = optimizer.state[net[1].weight]["exp_avg"]
    regroup(optimizer, trainable(net))
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert net[0].weight not in optimizer.state
    assert optimizer.state[net[1].weight]["exp_avg"] is kept
    before = net[0].weight.clone()
    step(net, optimizer)
    assert torch.equal(net[0].weight, before)


def test_state_is_matched_by_name_whatever_the_order():
    net, other = model(), model()
    optimizer = match_by_name(torch.optim.AdamW(parameter_groups(trainable(net)), lr=0.1))
    step(net, optimizer)
    twin = match_by_name(torch.optim.AdamW(parameter_groups(reversed(trainable(other))), lr=0.1))
    twin.load_state_dict(optimizer.state_dict())
    for (name, a), (_, b) in zip(trainable(net), trainable(other), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], twin.state[b]["exp_avg"]), name


def test_state_of_other_parameters_is_refused():
    net, other = model(), model()
    other[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(trainable(net)))
    twin = match_by_name(torch.optim.AdamW(parameter_groups(trainable(other))))
    with pytest.raises(BadInput, match=r"the first that differs is 2\.bias"):
        twin.load_state_dict(optimizer.state_dict())


# ---- AdamW

SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def descend(net, optimizer, steps, first=0):
    """Steps on data that depends on the step's number only."""
    for number in range(first, first + steps):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number)).to(net[0].weight.dtype)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_training(net, other):
    for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_adamw_is_torchs():
    net, other = model(), model()
    descend(net, AdamW(parameter_groups(trainable(net)), **SETTINGS), 5)
    descend(other, torch.optim.AdamW(parameter_groups(trainable(other)), **SETTINGS, fused=True), 5)
    assert_same_training(net, other)


@pytest.mark.parametrize("options", [{"maximize": True}, {"fused": True}, {"foreach": True}, {"betas": (0.0, 0.5)}])
def test_adamw_takes_torchs_options(options):
    net, other = model(), model()
    descend(net, AdamW(net.parameters(), **SETTINGS | options), 3)
    fused = options if "foreach" not in options else {}
    descend(other, torch.optim.AdamW(other.parameters(), **SETTINGS | fused | {"fused": True}), 3)
    assert_same_training(net, other)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_adamw_refuses_what_it_has_not(name):
    net = model()
    with pytest.raises(BadInput, match=f"{name} is set"):
        AdamW(net.parameters(), **{name: True})
    asking = torch.optim.AdamW(net.parameters()).state_dict()
    asking["param_groups"][0][name] = True
    with pytest.raises(BadInput, match=f"{name} is set"):
        AdamW(net.parameters()).load_state_dict(asking)


@pytest.mark.parametrize("classes", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_states_of_adamw_and_torchs_are_exchanged(classes):
    nets = straight, net, other = model(), model(), model()
    made = [
        kind(parameter_groups(trainable(n)), **SETTINGS, fused=True)
        for kind, n in zip((AdamW, *classes), nets, strict=True)
    ]
    descend(straight, made[0], 5)
    descend(net, made[1], 3)
    other.load_state_dict(net.state_dict())
    made[2].load_state_dict(copy.deepcopy(made[1].state_dict()))
    descend(other, made[2], 2, first=3)
    assert_same_training(other, straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_resumes_as_if_it_had_not_stopped(dtype, tmp_path):
    straight, net, other = model().to(dtype), model().to(dtype), model().to(dtype)
    descend(straight, AdamW(parameter_groups(trainable(straight)), **SETTINGS), 5)
    optimizer = match_by_name(AdamW(parameter_groups(trainable(net)), **SETTINGS))
    descend(net, optimizer, 3)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved")
    other.load_state_dict(saved["model"])
    resumed = match_by_name(AdamW(parameter_groups(reversed(trainable(other))), **SETTINGS))
    resumed.load_state_dict(saved["optimizer"])
    descend(other, resumed, 2, first=3)
    assert_same_training(other, straight)


def test_the_state_of_a_bf16_parameter_is_fp32_also_when_loaded():
    net, other = model().bfloat16(), model().bfloat16()
    optimizer, twin = AdamW(net.parameters(), **SETTINGS), AdamW(other.parameters(), **SETTINGS)
    descend(net, optimizer, 2)
    twin.load_state_dict(optimizer.state_dict())
    for parameter, same in zip(net.parameters(), other.parameters(), strict=True):
        state, loaded = optimizer.state[parameter], twin.state[same]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "master"}
        for name, value in state.items():
            assert value.dtype == loaded[name].dtype == torch.float32
            assert torch.equal(value, loaded[name])
        assert torch.equal(parameter, state["master"].bfloat16())


def test_a_bf16_parameter_takes_up_a_state_of_torchs():
    net, other = model().bfloat16(), model().bfloat16()
    theirs, ours = torch.optim.AdamW(net.parameters(), **SETTINGS), AdamW(other.parameters(), **SETTINGS)
    descend(net, theirs, 2)
    other.load_state_dict(net.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(state["exp_avg"].dtype == torch.float32 for state in ours.state.values())
    descend(other, ours, 1, first=2)
    for parameter in other.parameters():
        assert torch.equal(parameter, ours.state[parameter]["master"].bfloat16())


def test_an_fp32_parameter_keeps_no_master_of_a_bf16_run():
    net, other = model().bfloat16(), model()
    optimizer, twin = AdamW(net.parameters()), AdamW(other.parameters())
    descend(net, optimizer, 1)
    twin.load_state_dict(optimizer.state_dict())
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in twin.state.values())


def test_a_master_keeps_updates_that_bf16_loses():
    ends = {}
    for kind in (AdamW, torch.optim.AdamW):
        parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = kind([parameter], lr=1e-4, weight_decay=0.0)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends[kind] = parameter.detach().float()
    # Each step is lr, to eps: 100 of them make 0.01, which bf16 (steps of 2^-8 below 1) rounds to the nearest.
    assert torch.equal(ends[AdamW], torch.full((4,), 0.99).bfloat16().float())
    assert torch.equal(ends[torch.optim.AdamW], torch.ones(4))


def test_who_has_no_gradient_is_left_alone():
    net = model()
    optimizer = AdamW(parameter_groups(trainable(net)), **SETTINGS)
    before = net[0].weight.clone()
    net[1:](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert set(optimizer.state) == {net[1].weight, net[1].bias, net[2].weight, net[2].bias}


def test_who_joins_later_has_steps_of_its_own():
    net, other = model(), model()
    for n, kind in ((net, AdamW), (other, torch.optim.AdamW)):
        optimizer = kind(parameter_groups(trainable(n)[2:]), **SETTINGS, fused=True)
        n[0].requires_grad_(False)
        descend(n, optimizer, 2)
        n[0].requires_grad_(True)
        regroup(optimizer, trainable(n))
        descend(n, optimizer, 2)
    assert_same_training(net, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_scale_divides_gradients(dtype):
    net, other = model().to(dtype), model().to(dtype)
    optimizers = [AdamW(n.parameters(), **SETTINGS) for n in (net, other)]
    optimizers[0].grad_scale = torch.tensor(4.0)
    for n, factor in ((net, 4.0), (other, 1.0)):  # a power of two, so that the division is exact
        for number, parameter in enumerate(n.parameters()):
            parameter.grad = torch.full_like(parameter, 0.25 + number) * factor
    for optimizer in optimizers:
        optimizer.step()
    assert_same_training(net, other)
    del optimizers[0].grad_scale
    assert optimizers[0].grad_scale is None


def test_a_gradient_may_have_other_strides():
    parameter, same = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    parameter.grad, same.grad = torch.arange(12.0).view(4, 3).t(), torch.arange(12.0).view(4, 3).t().contiguous()
    for p in (parameter, same):
        AdamW([p], lr=0.1, eps=10.0).step()
    assert torch.equal(parameter, same)


def test_a_scaler_skips_steps_that_overflow():
    net = model()
    optimizer = AdamW(net.parameters(), **SETTINGS, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = net[0].weight.clone()
    (scaler.scale(net(torch.ones(2, 3)).square().sum()) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net[0].weight, before)
    assert not optimizer.state


def test_step_returns_the_closures_loss_and_calls_hooks():
    net, called = model(), []
    optimizer = AdamW(net.parameters())
    optimizer.register_step_post_hook(lambda *_: called.append(1))

    def closure():
        loss = net(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert called == [1]


INDEX = torch.tensor([[1, 0], [2, 2]])  # of 3 x 3 blocks of 2 x 2, the last ones ragged


def blocks_and_weight(transposed, dtype):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 5).to(dtype), requires_grad=False)
    return nn.Parameter(Blocks((2, 2), INDEX).read(weight.t() if transposed else weight)), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_scatter_keeps_the_weight_equal_to_its_master(transposed, dtype):
    blocks, weight = blocks_and_weight(transposed, dtype)
    twin = nn.Parameter(blocks.detach().clone())
    expected = weight.detach().clone()
    optimizer, usual = AdamW([blocks], **SETTINGS), torch.optim.AdamW([twin], **SETTINGS, fused=True)
    optimizer.scatter(blocks, weight, INDEX, transposed)
    for _ in range(3):
        grad = torch.randn_like(blocks)
        grad[1, 1:], grad[1, :, 1:] = 0, 0  # past the edge
        blocks.grad, twin.grad = grad, grad.clone()
        optimizer.step()
        usual.step()
    assert torch.equal(blocks, twin)
    Blocks((2, 2), INDEX).write(expected.t() if transposed else expected, twin)
    assert torch.equal(weight, expected)


def test_scatter_is_skipped_without_a_gradient_and_survives_moves_and_copies():
    blocks, weight = blocks_and_weight(False, torch.float32)
    optimizer = AdamW([blocks], **SETTINGS)
    optimizer.scatter(blocks, weight, INDEX)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state
    weight.data = weight.data.clone()  # what moving a module does
    twin, twin_blocks, twin_weight = copy.deepcopy((optimizer, blocks, weight))
    twin_blocks.grad = torch.ones_like(blocks)
    twin.step()
    assert torch.equal(weight, before)
    assert torch.equal(twin_weight[2:4, :2], twin_blocks[0])
    blocks.grad = torch.ones_like(blocks)
    optimizer.step()
    assert torch.equal(weight, twin_weight)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
        rank=0,
        world_size=1,
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_parameters_move_as_full_ones(mesh, dtype):
    whole = [nn.Parameter(p.detach().to(dtype)) for p in model().parameters()]
    divided = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    optimizers = AdamW(whole, **SETTINGS), AdamW(divided, **SETTINGS)
    for step in range(2):
        for p, d in zip(whole, divided, strict=True):
            p.grad = torch.full_like(p, 1.0 + step)
            d.grad = distribute_tensor(p.grad.clone(), mesh, [Replicate()])
        for optimizer in optimizers:
            optimizer.step()
    for p, d in zip(whole, divided, strict=True):
        assert torch.equal(p, d.full_tensor())
        assert all(isinstance(value, DTensor) for name, value in optimizers[1].state[d].items() if name != "step")


def test_sharded_blocks_are_refused(mesh):
    blocks, weight = blocks_and_weight(False, torch.float32)
    divided = nn.Parameter(distribute_tensor(blocks.detach(), mesh, [Shard(0)]))
    divided.grad = torch.ones_like(divided)
    optimizer = AdamW([divided])
    optimizer.scatter(divided, weight, INDEX)
    with pytest.raises(BadInput, match="divided among ranks"):
        optimizer.step()


def test_biases_of_fused_experts_do_not_decay():
    """They have a dimension of experts, so that their number of dimensions does not tell them from matrices."""
    named = list(FAMILIES["gpt-oss"].tiny().named_parameters())
    decayed, plain = parameter_groups(named)
    two = {name for name, parameter in named if parameter.ndim == 2 and name.endswith("bias")}
    assert len(two) == 6
    assert two <= set(plain["param_names"])
    assert any(name.endswith("experts.down_proj") for name in decayed["param_names"])
    assert not any(name.endswith("bias") for name in decayed["param_names"])
