"""The count of a step's memory, against formulas and against the allocator's figures."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from lit_sparse_profiling.allocator import measure_allocations
from lit_sparse_profiling.counted import TEMPORARY, Counter
from lit_sparse_profiling.sections import Held, Ledger

F32 = 4
CPU = torch.device("cpu")


class Net(nn.Module):
    """A weight, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("passing", torch.ones(6), persistent=False)


def linear_net() -> nn.Sequential:
    """Network that saves the batch (3) and the sigmoid's output (4) for backward; 2 x 4 saved weights do not count."""
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


def test_the_course_of_a_step_begins_with_what_is_there_and_reaches_its_peak() -> None:
    net = linear_net()
    held = torch.ones(1000)
    with Counter(net) as counter:
        counter.phase = "forward"
        loss = net(torch.ones(ROWS, 3)).sum()
        counter.phase = "backward"
        loss.backward()
        large = held * 2  # the highest moment is not the last
        del large
    levels = counter.levels()
    totals = [sum(level.held.values()) for level in levels]
    assert totals[0] == counter.start
    assert max(totals) == sum(counter.peak.values()) > totals[0]
    assert levels[0].held == {"trainable": (3 * 4 + 4 + 4 * 2 + 2) * F32}
    assert max(level.held.get("saved", 0) for level in levels) == SAVED
    assert levels[-1].held["gradients"] == levels[0].held["trainable"]
    assert {level.phase for level in levels} >= {"forward", "backward"}
    times = [level.seconds for level in levels]
    assert times == sorted(times)
    assert 2 < len(levels) <= 101


def test_frozen_layers_save_no_input() -> None:
    net = linear_net()
    net[0].requires_grad_(False)
    with Counter(net) as saved:
        loss = net(torch.ones(ROWS, 3)).sum()
    assert saved.saved_peak == ROWS * 4 * F32
    del loss
    assert saved.saved == 0


def test_weights_and_buffers_are_not_counted_as_saved() -> None:
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


def test_consecutive_batches_do_not_add_up() -> None:
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
    addresses, again = set(), False
    with Counter(nn.Module(), device=CPU) as saved:
        for _ in range(10_000):  # freed in each round, and laid at an earlier address sooner or later
            other = torch.ones(1000)
            again = other.data_ptr() in addresses
            addresses.add(other.data_ptr())
            (x * other).sum()
            del other
            if again:
                break
        assert saved.saved == 0
        held = [(x * torch.ones(1000)).sum() for _ in range(10)]
    assert again
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


def test_storage_freed_by_resizing_is_not_counted() -> None:
    x, weight = torch.ones(1000, requires_grad=True), torch.ones(1000)
    storage = weight.untyped_storage()
    storage.resize_(0)
    with Counter(nn.Module(), device=CPU) as counter:
        storage.resize_(1000 * F32)
        loss = (x * weight).sum()
        assert (counter.now[TEMPORARY], counter.saved) == (1000 * F32 + F32, 0)
        storage.resize_(0)
        assert counter.now[TEMPORARY] == F32
        storage.resize_(1000 * F32)
        loss.backward()
    assert counter.saved_peak == 0
    storage.resize_(0)
    assert counter.now[TEMPORARY] >= 1000 * F32, "what happens after the block is not counted"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_weights_that_fsdp_gathers_are_not_saved(mesh: DeviceMesh) -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(3)))
    for unit in (*net, net):
        fully_shard(unit, mesh=mesh)
    net(torch.ones(ROWS, 64)).sum().backward()  # what weights are gathered into is kept from the first step on
    with Counter(net) as counter:
        loss = net(torch.ones(ROWS, 64)).sum()
        assert counter.saved == (1 + 3) * ROWS * 64 * F32  # the batch, and what follows the sigmoids
        loss.backward()
    assert counter.saved_peak == (1 + 3) * ROWS * 64 * F32
    weights = (64 * 64 + 64) * F32
    assert counter.peak[TEMPORARY] >= weights, "gathered weights are there for a while"


# ---- a whole step

WEIGHTS = 3 * 4 + 4 + 4 * 2 + 2
MANY = 1000


def train(net: nn.Module, optimizer: Optimizer, x: Tensor, counter: Counter | None = None) -> None:
    """Run one step, and tell the counter its phases."""

    def tell(phase: str) -> None:
        if counter is not None:
            counter.phase = phase

    tell("forward")
    loss = net(x).sum()
    tell("backward")
    loss.backward()
    tell("optimizer step")
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_step_with_large_activations_peaks_in_backward() -> None:
    """At the peak: the batch, the sigmoid's saved output, the gradients of its output and input, loss and seed, and the
    second layer's gradients."""
    net, x = linear_net(), torch.ones(MANY, 3)
    optimizer, state = AdamW(net.parameters()), {"index": [torch.ones(7)]}
    train(net, optimizer, x)
    with Counter(net, optimizer, state, {"ids": x}) as counter:
        train(net, optimizer, x, counter)
    moments = (2 * WEIGHTS + 4) * F32  # and AdamW's own count of steps, one for each of four parameters
    ledger = Ledger(WEIGHTS * F32, gradients=(4 * 2 + 2) * F32, optimizer=moments, strategy=7 * F32)
    temporaries = (2 * MANY * 4 + 2) * F32
    assert counter.at_peak() == Held(ledger, MANY * 3 * F32, MANY * 4 * F32, temporaries, "backward")


def test_a_step_with_large_weights_peaks_in_the_optimizer_step() -> None:
    """At the peak: all gradients, two temporaries of AdamW of the largest weight's size, and the loss."""
    net, x = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)), torch.ones(2, 64)
    net.append(nn.Linear(32, 1).requires_grad_(False))
    optimizer = AdamW([p for p in net.parameters() if p.requires_grad], foreach=False)
    train(net, optimizer, x)
    with Counter(net, optimizer, batch=x) as counter:
        train(net, optimizer, x, counter)
    trained = (64 * 128 + 128 + 128 * 32 + 32) * F32
    ledger = Ledger(trained, frozen=33 * F32, gradients=trained, optimizer=2 * trained + 4 * F32)
    assert counter.at_peak() == Held(ledger, x.nbytes, 0, (2 * 64 * 128 + 1) * F32, "optimizer step")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sizes", [(3, 4, 2), (64, 128, 32)])
@pytest.mark.parametrize("rows", [2, MANY])
def test_the_count_is_the_allocators_peak_to_the_byte(momentum: float, sizes: tuple[int, int, int], rows: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2]))
    x, optimizer = torch.randn(rows, sizes[0]), SGD(net.parameters(), 0.1, momentum=momentum)
    train(net, optimizer, x)
    with measure_allocations(CPU) as allocator, Counter(net, optimizer, batch=x) as counter:
        train(net, optimizer, x)
    assert counter.at_peak().total - counter.start == allocator.requested > 0
    assert allocator.left == 0
    assert sum(counter.now.values()) == counter.start


def test_a_step_without_phases_peaks_in_the_unnamed_phase() -> None:
    with Counter(linear_net()) as counter:
        torch.ones(ROWS)
    assert counter.at_peak().phase == "course"


def test_gradients_are_counted_until_they_are_freed() -> None:
    net = linear_net()
    with Counter(net) as counter:
        net(torch.ones(ROWS, 3)).sum().backward()
        assert counter.now["gradients"] == WEIGHTS * F32
        net.zero_grad()
        assert counter.now["gradients"] == 0


def test_a_gradient_consumed_by_an_earlier_hook_is_not_counted() -> None:
    net = linear_net()

    def take(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(take)
    with Counter(net) as counter:
        net(torch.ones(ROWS, 3)).sum().backward()
    assert counter.now.get("gradients", 0) == counter.peak.get("gradients", 0) == 0


@pytest.mark.usefixtures("no_collection")
def test_a_graph_without_backward_is_freed_with_its_output() -> None:
    """A sigmoid's node saves its own output; it must be freed without the garbage collector."""
    net = linear_net()
    with Counter(net) as counter:
        out = net(torch.ones(ROWS, 3)).sigmoid()
        node, before = weakref.ref(out), counter.saved
        del out
        assert node() is None
        assert (before, counter.saved) == (SAVED + ROWS * 2 * F32, 0)
        assert sum(counter.now.values()) == counter.start


def test_counting_ends_with_the_block() -> None:
    net = linear_net()
    with Counter(net) as counter:
        pass
    train(net, SGD(net.parameters(), 0.1), torch.ones(MANY, 3))
    assert (counter.now, counter.saved_peak) == ({"trainable": WEIGHTS * F32}, 0)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())  # pyright: ignore[reportAttributeAccessIssue]
