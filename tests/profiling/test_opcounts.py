"""Counts of a step's ops: FLOPs and bytes against those that one computes by hand."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import _create_empty_block_mask

from lit_sparse_profiling.opcounts import OpCount, OpCounts, span

aten = torch.ops.aten
T, K, H, O = 32, 8, 16, 4  # noqa: E741 - tokens, in, hidden, out
F32 = 4


@pytest.fixture(scope="module")
def mlp() -> OpCounts:
    model = nn.Sequential(nn.Linear(K, H), nn.ReLU(), nn.Linear(H, O))
    x, dy = torch.randn(T, K), torch.randn(T, O)
    with OpCounts() as counts:
        model(x).backward(dy)
    return counts


def test_flops_of_forward_and_backward(mlp: OpCounts) -> None:
    first, second = 2 * T * K * H, 2 * T * H * O
    assert mlp.ops["aten::addmm"].flops == first + second
    assert mlp.ops["aten::mm"].flops == first + 2 * second  # nobody asked for the gradient of x
    assert mlp.flops == 2 * first + 3 * second
    assert mlp.ops["aten::relu"].flops is None


def test_bytes_of_forward_and_backward(mlp: OpCounts) -> None:
    forward = (T * K + K * H + H + T * H) + (T * H + H * O + O + T * O)
    backward = (T * O + O * H + T * H) + (T * O + T * H + O * H) + (T * H + T * K + H * K)
    assert mlp.ops["aten::addmm"] == OpCount(2, 2 * T * H * (K + O), F32 * forward)
    assert mlp.ops["aten::mm"].calls == 3
    assert mlp.ops["aten::mm"].bytes == F32 * backward
    assert mlp.ops["aten::relu"].bytes == F32 * 2 * T * H
    assert mlp.ops["aten::threshold_backward"].bytes == F32 * 3 * T * H
    assert mlp.ops["aten::sum"].bytes == F32 * (T * O + O + T * H + H)


def test_only_these_ops_move_bytes(mlp: OpCounts) -> None:
    moving = {name for name, op in mlp.ops.items() if op.bytes}
    assert moving == {"aten::addmm", "aten::mm", "aten::relu", "aten::threshold_backward", "aten::sum"}
    assert mlp.bytes == sum(mlp.ops[name].bytes for name in moving)
    assert mlp.ops["aten::t"].calls > 0


def test_views_and_allocations_move_nothing() -> None:
    x = torch.randn(4, 6)
    with OpCounts() as counts:
        _ = x.view(24), x.t(), x.transpose(0, 1), x.expand(3, 4, 6), x.as_strided((2,), (1,)), x.detach(), x[1:, 2]
        _ = x.split(2), x.unbind(), x.unsqueeze(0), aten._unsafe_view(x, [24])
        _ = torch.empty(9), torch.empty_like(x), x.new_empty(3), x.clone().t_(), x.clone().resize_(30)
    assert {name for name, op in counts.ops.items() if op.bytes} == {"aten::clone"}
    assert {"aten::_unsafe_view", "aten::t_", "aten::resize_", "aten::as_strided", "aten::split"} <= set(counts.ops)


A = 24 * F32  # bytes of a (4, 6) tensor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::clone", 2 * A),
        ("aten::add", 3 * A),
        ("aten::mul", 2 * A),  # by itself
        ("aten::add_", 3 * A),
        ("aten::copy_", 2 * A),
        ("aten::fill_", A),
        ("aten::zeros_like", A),
        ("aten::cos", 2 * A),  # into a tensor that is there
        ("aten::div", F32 + A),  # of one number, expanded
        ("aten::_foreach_mul_", 6 * A),
        ("aten::_to_copy", A + A // 2),
        ("aten::embedding", 2 * (2 * 8 + 2 * 6 * F32)),  # of the table two rows, and as much as their numbers take
        ("aten::index_add_", 3 * (2 * 8 + 2 * 6 * F32)),
        ("aten::nll_loss_forward", 4 * 8 + (4 * 8 + 2 * F32) + 2 * F32),
    ],
)
def test_bytes_are_those_read_and_written(name: str, expected: int) -> None:
    x, y, z, out = (torch.randn(4, 6) for _ in range(4))
    table, places = torch.randn(100, 6), torch.tensor([3, 7])
    with OpCounts() as counts:
        _ = x.clone(), x + y, y.add_(x), out.copy_(x), out.fill_(1), torch.zeros_like(x), torch.cos(x, out=out)
        _ = x * x, torch.ones(()).expand(4, 6) / 2, x.to(torch.bfloat16)
        aten._foreach_mul_([x, y], [z, out])
        _ = functional.embedding(places, table), table.index_add_(0, places, torch.randn(2, 6))
        _ = functional.nll_loss(x, torch.arange(4))
    assert counts.ops[name].bytes == expected


@pytest.mark.parametrize(("scale", "transfers"), [(None, 7), (torch.ones(()), 8)])
def test_a_fused_optimizer_writes_gradients_only_to_unscale_them(scale: Tensor | None, transfers: int) -> None:
    weight, grad, mean, square = ([torch.rand(1000)] for _ in range(4))
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    switches = {"amsgrad": False, "maximize": False, "grad_scale": scale}
    steps = [torch.ones(())]
    with OpCounts() as counts:
        aten._fused_adamw_(weight, grad, mean, square, [], steps, **options, **switches)
    assert counts.bytes == transfers * 1000 * F32 + F32 + (0 if scale is None else F32)


@pytest.mark.parametrize("inference", [False, True])
def test_attention_counts_once(inference: bool) -> None:
    batch, heads, length, size = 2, 4, 16, 8
    q, k, v = (torch.randn(batch, heads, length, size, requires_grad=not inference) for _ in range(3))
    with torch.inference_mode(inference), OpCounts() as counts:
        out = functional.scaled_dot_product_attention(q, k, v)
    product = 2 * batch * heads * length * length * size
    assert counts.flops == 2 * product
    assert "aten::scaled_dot_product_attention" not in counts.ops
    if not inference:
        with OpCounts() as counts:
            out.sum().backward()
        assert counts.flops == 5 * product


def test_products_into_their_own_memory_count_as_others_do() -> None:
    total, batches = torch.zeros(3, 5), torch.zeros(2, 3, 5)
    with OpCounts() as counts:
        total.addmm_(torch.ones(3, 4), torch.ones(4, 5))
        batches.baddbmm_(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert (counts.ops["aten::addmm_"].flops, counts.ops["aten::baddbmm_"].flops) == (2 * 3 * 4 * 5, 2 * 2 * 3 * 4 * 5)
    assert not counts.uncounted


def test_composite_ops_count_as_what_they_are_made_of_in_inference_too() -> None:
    x, weight = torch.randn(T, K), torch.randn(H, K)
    with torch.inference_mode(), OpCounts() as counts:
        functional.linear(x, weight)
    assert counts.flops == 2 * T * K * H
    assert set(counts.ops) == {"aten::t", "aten::mm"}


def test_a_custom_op_counts_its_own_tensors_and_nothing_within() -> None:
    @torch.library.custom_op("lit_sparse_test::scale", mutates_args=())
    def scale(x: Tensor, by: Tensor) -> Tensor:
        return (x + 0) * by

    @torch.library.custom_op("lit_sparse_test::scale_", mutates_args={"x"})
    def scale_(x: Tensor, by: Tensor) -> None:
        x.mul_(by)

    x, by = torch.randn(4, 6), torch.randn(6)
    with OpCounts() as counts:
        scale(x, by)
        scale_(x, by)
    size = 2 * 24 * F32 + 6 * F32
    assert counts.ops == {
        "lit_sparse_test::scale": OpCount(1, None, size),
        "lit_sparse_test::scale_": OpCount(1, None, size),
    }


def test_a_higher_order_op_counts_as_one() -> None:
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    mask = _create_empty_block_mask(q, k).as_tuple()
    with OpCounts() as counts:
        torch.ops.higher_order.flex_attention(q, k, v, lambda score, *_: score, mask, 1.0, {})
    assert counts.ops == {"flex_attention": OpCount(1, 2 * 2 * 2 * 16 * 16 * 8, None)}
    assert (counts.flops, counts.bytes) == (2 * 2 * 2 * 16 * 16 * 8, 0)


def test_no_tensor_is_kept() -> None:
    with OpCounts() as counts:
        x = torch.randn(4, requires_grad=True)
        y = x * 2
        y.sum().backward()
        alive = [weakref.ref(t) for t in (x, y, x.grad)]
        del x, y
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]
    assert counts.ops["aten::mul"].calls == 2


def test_results_and_gradients_are_those_without_it() -> None:
    model, x = nn.Sequential(nn.Linear(K, H), nn.GELU(), nn.Linear(H, O)), torch.randn(T, K)
    model(x).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with OpCounts():
        model(x).square().mean().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(plain, model.parameters(), strict=True))


def test_span_is_what_a_view_shows() -> None:
    x = torch.zeros(4, 6)
    assert span(x) == 24 * F32
    assert span(x[::2]) == 12 * F32
    assert span(x[:1].expand(4, 6)) == 6 * F32
    assert span(x[:0]) == span(torch.zeros(()).expand(0)) == 0
    assert span(torch.zeros(())) == F32
    assert span(torch.eye(3).to_sparse()) == 2 * 3 * 8 + 3 * F32
