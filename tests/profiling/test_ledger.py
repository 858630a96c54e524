"""The ledger, against figures computed by hand."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_sparse_profiling.ledger import ledger, tensors
from lit_sparse_profiling.sections import Ledger

F32 = 4


class Net(nn.Module):
    """12 frozen and 8 trainable weights (4 x 3, 2 x 4), a buffer of 5, and a non-persistent one of 6."""

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


def test_a_storage_counts_once_in_its_first_category() -> None:
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


def test_masters_held_by_the_optimizer_only_count_as_weights() -> None:
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


def test_meta_and_fake_tensors_count_like_real_ones() -> None:
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
    """A fake process group of two, without communication; this is rank 0."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_a_sharded_tensor_counts_its_local_shard() -> None:
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
