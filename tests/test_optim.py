"""Groups, regrouping, and states matched by name."""

import pytest
import torch
from torch import nn

from lit_sparse.errors import BadInput
from lit_sparse.optim import match_by_name, parameter_groups, regroup, trainable


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


def test_regroup_keeps_the_object_and_forgets_who_leaves():
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
    with pytest.raises(BadInput, match=r"first that differs: 2\.bias"):
        twin.load_state_dict(optimizer.state_dict())
