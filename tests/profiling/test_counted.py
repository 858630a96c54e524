"""What a step holds, against formulas and against the allocator's own account."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lit_sparse_profiling.counted import Counter

F32 = 4
CPU = torch.device("cpu")


class Net(nn.Module):
    """A weight, and a buffer that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("passing", torch.ones(6), persistent=False)


def linear_net() -> nn.Sequential:
    """Saves for backward: the batch of 3 and the 4 after the sigmoid; of the weights, 2 x 4 (not counted)."""
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))


ROWS = 5
SAVED = ROWS * (3 + 4) * F32


def test_saved_bytes_are_those_of_the_formula() -> None:
    net = linear_net()
    with Counter(net) as saved:
        loss = net(torch.ones(ROWS, 3)).sum()
    assert (saved.saved, saved.saved_peak) == (SAVED, SAVED)
    loss.backward()
    assert (saved.saved, saved.saved_peak) == (0, SAVED)


def test_frozen_layers_save_no_input() -> None:
    net = linear_net()
    net[0].requires_grad_(False)
    with Counter(net) as saved:
        loss = net(torch.ones(ROWS, 3)).sum()
    assert saved.saved_peak == ROWS * 4 * F32
    del loss
    assert saved.saved == 0


def test_weights_and_buffers_do_not_count_but_other_tensors_do() -> None:
    net = Net()
    x = torch.ones(6, requires_grad=True)
    with Counter(net) as saved:
        kept = (x * net.get_buffer("passing")).sum()
        assert saved.saved_peak == 0
        (x * torch.ones(6)).sum()
    assert saved.saved_peak == 6 * F32
    assert kept.requires_grad


def test_gradients_are_the_same_while_counting() -> None:
    torch.manual_seed(0)
    net, x = linear_net(), torch.randn(ROWS, 3)
    net(x).square().sum().backward()
    plain = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with Counter(net):
        net(x).square().sum().backward()
    counted = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(plain) == 4
    assert all(map(torch.equal, plain, counted))


def test_batches_one_after_the_other_do_not_add_up() -> None:
    net = linear_net()
    with Counter(net) as saved:
        for _ in range(3):
            net(torch.ones(ROWS, 3)).sum().backward()
    assert (saved.saved, saved.saved_peak) == (0, SAVED)


def test_batches_held_together_add_up() -> None:
    net = linear_net()
    with Counter(net) as saved:
        losses = [net(torch.ones(ROWS, 3)).sum() for _ in range(3)]
    assert saved.saved == saved.saved_peak == 3 * SAVED
    assert len(losses) == 3


def test_a_view_saved_twice_keeps_its_whole_storage_once() -> None:
    x = torch.ones(4, requires_grad=True)
    big = torch.ones(1000)
    with Counter(nn.Module(), device=CPU) as saved:
        loss = (x * big[:4]).sum() + (x * big[4:8]).sum()
    assert saved.saved_peak == 1000 * F32
    loss.backward()
    assert saved.saved == 0


def test_an_address_used_again_is_another_storage() -> None:
    x = torch.ones(1000, requires_grad=True)
    addresses = set()
    with Counter(nn.Module(), device=CPU) as saved:
        for _ in range(10):  # freed in each round, and mostly laid at the same address in the next
            other = torch.ones(1000)
            addresses.add(other.data_ptr())
            (x * other).sum()
            del other
        assert saved.saved == 0
        held = [(x * torch.ones(1000)).sum() for _ in range(10)]
    assert len(addresses) < 10
    assert saved.saved == saved.saved_peak == 10 * 1000 * F32
    assert len(held) == 10


def test_checkpointing_saves_inputs_only() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 8)) for _ in range(3))

    def loss(recompute: bool) -> Tensor:
        x = torch.ones(ROWS, 8)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x.sum()

    def peak(recompute: bool) -> int:
        with Counter(layers) as saved:
            loss(recompute).backward()
        return saved.saved_peak

    assert peak(recompute=False) == 3 * ROWS * (8 + 64) * F32
    assert peak(recompute=True) == 3 * ROWS * 8 * F32


def test_fake_tensors_save_as_much_as_real_ones() -> None:
    with FakeTensorMode():
        net = linear_net()
        with Counter(net) as saved:
            net(torch.ones(ROWS, 3)).sum().backward()
    assert (saved.saved, saved.saved_peak) == (0, SAVED)
