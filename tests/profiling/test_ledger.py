"""The ledger and the bytes saved for backward, against figures worked out by hand."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lit_sparse_profiling.ledger import ledger, saved_for_backward, tensors
from lit_sparse_profiling.record import Ledger

F32 = 4


class Net(nn.Module):
    """12 frozen and 8 trained weights (4 x 3, 2 x 4), a buffer of 5, and one of 6 that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False).requires_grad_(False)
        self.second = nn.Linear(4, 2, bias=False)
        self.register_buffer("kept", torch.zeros(5))
        self.register_buffer("passing", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_every_category_to_the_byte() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    step(net, optimizer)
    state = {"index": torch.zeros(7, dtype=torch.int64), "rest": [torch.zeros(2), (torch.zeros(1), "text", 3, None)]}
    found = ledger(net, optimizer, state)
    moments, step_counter = 2 * 8 * F32, F32
    assert found == Ledger(
        trainable=8 * F32,
        frozen=12 * F32,
        buffers=11 * F32,
        gradients=8 * F32,
        optimizer=moments + step_counter,
        strategy=7 * 8 + 3 * F32,
    )
    assert found.total == (8 + 12 + 11 + 8 + 16 + 1 + 3) * F32 + 56


def test_before_the_first_step_there_is_no_gradient_and_no_state() -> None:
    net = Net()
    found = ledger(net, torch.optim.AdamW(net.parameters()))
    assert (found.gradients, found.optimizer) == (0, 0)
    assert ledger(net) == found


def test_a_storage_counts_once_and_where_it_is_met_first() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters())
    step(net, optimizer)
    optimizer.state[net.second.weight]["copy"] = net.kept
    optimizer.state[net.second.weight]["own"] = own = torch.zeros(9)
    assert net.second.weight.grad is not None
    state = [net.first.weight.data, net.second.weight[0], net.second.weight.grad, own[:2], net.passing]
    assert ledger(net, optimizer, state) == Ledger(
        trainable=8 * F32, frozen=12 * F32, buffers=11 * F32, gradients=8 * F32, optimizer=9 * F32
    )


def test_tied_weights_count_once_and_a_view_counts_its_whole_storage() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    assert ledger(net) == Ledger(trainable=40 * F32)
    assert ledger(nn.Module(), strategy_state=torch.zeros(100)[:1]) == Ledger(strategy=100 * F32)


def test_a_trained_view_makes_its_storage_trainable() -> None:
    net = nn.Module()
    net.whole = nn.Parameter(torch.zeros(100), requires_grad=False)
    net.block = nn.Parameter(net.whole.data[:10])
    assert ledger(net) == Ledger(trainable=100 * F32)


def test_masters_that_only_the_optimizer_knows_are_weights() -> None:
    master = nn.Parameter(torch.zeros(6))
    master.grad = torch.zeros(6)
    optimizer = torch.optim.SGD([master], lr=torch.tensor(0.1))
    found = ledger(nn.Module(), optimizer)
    assert found == Ledger(trainable=6 * F32, gradients=6 * F32, optimizer=F32)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_sparse_tensors_count_their_indices_and_values() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2, 3])).sum().backward()
    assert ledger(table).gradients == 3 * 8 + 3 * 4 * F32
    starts, places, values = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2)
    for kind in (torch.sparse_csr_tensor, torch.sparse_csc_tensor):
        compressed = kind(starts, places, values, (2, 2), check_invariants=True)
        assert ledger(nn.Module(), strategy_state=compressed) == Ledger(strategy=(3 + 2) * 8 + 2 * F32)


def test_meta_and_fake_tensors_count_what_they_would_take() -> None:
    real = ledger(Net())
    with torch.device("meta"):
        assert ledger(Net()) == real
    with FakeTensorMode():
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters())
        step(net, optimizer)
        state = net.second.weight.detach()
        found = ledger(net, optimizer, state)
    assert found == Ledger(8 * F32, 12 * F32, 11 * F32, 8 * F32, (2 * 8 + 1) * F32, 0)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two in which nothing is sent: this is rank 0."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_a_distributed_tensor_counts_its_local_shard() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    net = nn.Module()
    net.weight = nn.Parameter(distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)]))
    net.weight.grad = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)])
    assert ledger(net) == Ledger(trainable=16 * F32, gradients=16 * F32)


def test_tensors_are_found_however_deep() -> None:
    a, b, c = torch.zeros(3)
    assert [t is not None for t in tensors({"a": [a, ({1: b}, 2)], "c": c, "d": "text"})] == [True] * 3
    assert list(tensors(None)) == []


def linear_net() -> nn.Sequential:
    """Saves for backward: the batch of 3 and the 4 after the sigmoid; of the weights, 2 x 4 (not counted)."""
    return nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))


ROWS = 5
SAVED = ROWS * (3 + 4) * F32


def test_saved_bytes_are_those_of_the_formula() -> None:
    net = linear_net()
    with saved_for_backward(net) as saved:
        loss = net(torch.ones(ROWS, 3)).sum()
    assert (saved.now, saved.peak) == (SAVED, SAVED)
    loss.backward()
    assert (saved.now, saved.peak) == (0, SAVED)


def test_frozen_layers_save_no_input() -> None:
    net = linear_net()
    net[0].requires_grad_(False)
    with saved_for_backward(net) as saved:
        loss = net(torch.ones(ROWS, 3)).sum()
    assert saved.peak == ROWS * 4 * F32
    del loss
    assert saved.now == 0


def test_weights_and_buffers_do_not_count_but_other_tensors_do() -> None:
    net = Net()
    x = torch.ones(6, requires_grad=True)
    with saved_for_backward(net) as saved:
        kept = (x * net.get_buffer("passing")).sum()
        assert saved.peak == 0
        (x * torch.ones(6)).sum()
    assert saved.peak == 6 * F32
    assert kept.requires_grad


def test_gradients_are_the_same_while_counting() -> None:
    torch.manual_seed(0)
    net, x = linear_net(), torch.randn(ROWS, 3)
    net(x).square().sum().backward()
    plain = [p.grad for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    with saved_for_backward(net):
        net(x).square().sum().backward()
    counted = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(plain) == 4
    assert all(map(torch.equal, plain, counted))


def test_batches_one_after_the_other_do_not_add_up() -> None:
    net = linear_net()
    with saved_for_backward(net) as saved:
        for _ in range(3):
            net(torch.ones(ROWS, 3)).sum().backward()
    assert (saved.now, saved.peak) == (0, SAVED)


def test_batches_held_together_add_up() -> None:
    net = linear_net()
    with saved_for_backward(net) as saved:
        losses = [net(torch.ones(ROWS, 3)).sum() for _ in range(3)]
    assert saved.now == saved.peak == 3 * SAVED
    assert len(losses) == 3


def test_a_view_saved_twice_keeps_its_whole_storage_once() -> None:
    x = torch.ones(4, requires_grad=True)
    big = torch.ones(1000)
    with saved_for_backward(nn.Module()) as saved:
        loss = (x * big[:4]).sum() + (x * big[4:8]).sum()
    assert saved.peak == 1000 * F32
    loss.backward()
    assert saved.now == 0


def test_an_address_used_again_is_another_storage() -> None:
    x = torch.ones(1000, requires_grad=True)
    addresses = set()
    with saved_for_backward(nn.Module()) as saved:
        for _ in range(10):  # freed in each round, and mostly laid at the same address in the next
            other = torch.ones(1000)
            addresses.add(other.data_ptr())
            (x * other).sum()
            del other
        assert saved.now == 0
        held = [(x * torch.ones(1000)).sum() for _ in range(10)]
    assert len(addresses) < 10
    assert saved.now == saved.peak == 10 * 1000 * F32
    assert len(held) == 10


def test_checkpointing_saves_inputs_only() -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 8)) for _ in range(3))

    def loss(recompute: bool) -> Tensor:
        x = torch.ones(ROWS, 8)
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x.sum()

    def peak(recompute: bool) -> int:
        with saved_for_backward(layers) as saved:
            loss(recompute).backward()
        return saved.peak

    assert peak(recompute=False) == 3 * ROWS * (8 + 64) * F32
    assert peak(recompute=True) == 3 * ROWS * 8 * F32


def test_fake_tensors_save_as_much_as_real_ones() -> None:
    with FakeTensorMode():
        net = linear_net()
        with saved_for_backward(net) as saved:
            net(torch.ones(ROWS, 3)).sum().backward()
    assert (saved.now, saved.peak) == (0, SAVED)
