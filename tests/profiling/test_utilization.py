"""Utilization: four conventions, figures that cannot be, and FLOPs that follow each step's tokens."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lit_sparse.testing import tiny_llm
from lit_sparse_profiling import ceilings as ceilings_module
from lit_sparse_profiling import profiler, stopwatch, timed_steps, utilization
from lit_sparse_profiling.ceilings import Ceilings, CeilingSeries
from lit_sparse_profiling.opcounts import OpCounts
from lit_sparse_profiling.profiler import Profiler
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import CEILINGS
from lit_sparse_profiling.speed_sections import Kernel, Kernels, Throughput
from lit_sparse_profiling.step_plan import Plan

KERNELS = Kernels(2, 1.0, 0.1, "float32", flops_ceiling=1e12, bytes_ceiling=1e11, count=1, top=[])
STEP = Throughput(
    100, 100, 10.0, 10, 1.0, flops=400 * 10**9, recomputed=100 * 10**9, masked=30 * 10**9, masked_recomputed=10 * 10**9
)
RECORD = RunRecord(name="mine-1", throughput=STEP, kernels=KERNELS)


def said(record: RunRecord) -> str:
    return " ".join(utilization.findings(record))


# ---- conventions


def test_the_four_conventions() -> None:
    found = utilization.utilizations(RECORD)
    assert found == utilization.Utilization(0.4, 0.3, pytest.approx(0.36), pytest.approx(0.27))
    assert RECORD.utilization == 0.4
    assert utilization.describe(RECORD) == (
        "Utilization of the matrix-product rate: 30.0% (MFU, without recomputation), 40.0% (HFU, with it), causal "
        "attention in full; 27.0% and 36.0% with it halved."
    )
    plain = replace(RECORD, throughput=replace(STEP, recomputed=0, masked=0, masked_recomputed=0))
    assert utilization.describe(plain) == (
        "Utilization of the matrix-product rate: 40.0% (MFU, without recomputation), causal attention in full."
    )


def test_more_than_the_ceiling_is_a_finding_and_no_figure() -> None:
    record = replace(RECORD, throughput=replace(STEP, flops=1593 * 10**10))
    assert record.utilization is None
    assert utilization.utilizations(record) is None
    assert utilization.describe(record) is None
    assert "at 1593% of the measured matrix-product rate, which cannot be" in said(record)
    assert said(RECORD) == ""


def test_a_kernel_above_the_ceiling_is_a_finding() -> None:
    fast = Kernel("aten::add", "aten::add", 1, 0.001, bytes=10**9)
    record = replace(RECORD, kernels=replace(KERNELS, top=[fast, replace(fast, name="aten::mul", bytes=10**7)]))
    assert "Above the device's ceilings: aten::add. Their data fit into the caches" in said(record)


def test_ceilings_far_apart_are_a_finding() -> None:
    record = replace(RECORD, kernels=replace(KERNELS, flops_measured=[1e12, 1e11], bytes_measured=[1e11, 0.9e11]))
    assert said(record).startswith("The machine was not quiet: the rate of matrix products was between 10% and 100%")
    assert "copies" not in said(record)


def test_old_records_have_their_utilization_still() -> None:
    old = replace(RECORD, throughput=Throughput(100, 100, 10.0, 10, median_step=2.0, flops=400 * 10**9))
    assert old.utilization == 0.2


# ---- ceilings, measured again and again


def test_the_highest_ceiling_counts_and_all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(itertools.count(0, 0.0))
    monkeypatch.setattr(ceilings_module, "perf_counter", lambda: next(now))
    rates = iter([1e11, 1e12, 5e11])
    series = CeilingSeries(lambda: Ceilings(next(rates), 1e11))
    for _ in range(3):
        series.measure()
    assert series.best == Ceilings(1e12, 1e11)
    assert [one.flops for one in series.found] == [1e11, 1e12, 5e11]


def test_measurements_get_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(ceilings_module, "perf_counter", lambda: now[0])
    series, at = CeilingSeries(lambda: Ceilings(1.0, 1.0)), []
    while now[0] < 100:
        if series.due:
            at.append(now[0])
            series.measure()
        now[0] += 1.0
    assert at == [0, 2, 6, 14, 30, 62]


def test_a_ceiling_that_cannot_be_measured_ends_no_run() -> None:
    def full() -> Ceilings:
        raise RuntimeError("CUDA out of memory.\nTried")

    series = CeilingSeries(full)
    series.measure()
    assert (series.best, series.due, series.failure) == (None, False, "CUDA out of memory.")


# ---- a loop with uneven batches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean()


def uneven(monkeypatch: pytest.MonkeyPatch, gap: float = 1e9) -> tuple[RunRecord, list[str]]:
    """Steps on batches of 64 tokens are examined; the timed ones have 8 tokens, and take an eighth of the time."""
    clock, course = [0.0], []
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(ceilings_module, "FIRST_GAP", gap)

    def measure(device: Any, dtype: Any) -> Ceilings:
        course.append("ceilings")
        return Ceilings(1e6, 1e6)

    monkeypatch.setattr(profiler, "ceilings", measure)
    model = Net()
    with Profiler(model, None, Plan(warmup=0, profiled=1)) as profiled:
        for length in (64, 64, 64, 8, 8, 8):
            ids = torch.ones(1, length)
            with profiled.step({"input_ids": ids}):
                model(torch.ones(length, 16)).backward()
                clock[0] += length / 64
                course.append(f"step of {length}")
    return profiled.record("uneven"), course


def test_flops_follow_each_steps_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = uneven(monkeypatch)
    assert record.throughput.flops == 2 * 2 * 64 * 16 * 16
    assert record.throughput.flops_per_second == record.throughput.flops  # a step of 64 takes a second
    assert record.utilization == record.throughput.flops / 1e6
    assert utilization.utilizations(record).executed == record.utilization


def test_ceilings_are_measured_before_between_and_after_the_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    record, course = uneven(monkeypatch, gap=0.0)
    monkeypatch.setattr(ceilings_module, "COST_GAP", 0)
    timed = ["ceilings", "step of 8"] * 3
    assert course[3:] == [*timed, "ceilings"]
    assert len(record.kernels.flops_measured) == len(record.kernels.bytes_measured) == 4
    assert record.throughput.seconds == 3 / 8
    assert next(phase for phase in record.phases if phase.name == CEILINGS).calls == 4


def test_without_tokens_the_examined_batch_stands_for_all_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "ceilings", lambda *_: Ceilings(1e15, 1e15))
    model = Net()
    with Profiler(model, None, Plan(warmup=0, profiled=1)) as profiled:
        for _ in range(4):
            with profiled.step(torch.ones(1)):
                model(torch.ones(8, 16)).backward()
    record = profiled.record("mine")
    assert record.throughput.steps_per_second is None
    assert record.utilization is not None
    assert record.notes == [
        timed_steps.NO_TOKENS,
        "The FLOPs of the examined step stand for those of all: without tokens, nothing scales them.",
    ]


# ---- FLOPs beside torch's own counter, and by hand


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_models_step_is_what_torchs_counter_and_the_hand_say(name: str, padded: bool) -> None:
    model = tiny_llm(name)
    ids = torch.randint(0, 30, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        batch["attention_mask"] = (torch.arange(16) < torch.tensor([[16], [10]])).long()
    with OpCounts() as counts, FlopCounterMode(display=False) as torchs:
        model(**batch).loss.backward()
    config = model.config
    layers, heads, width = config.num_hidden_layers, config.num_attention_heads, config.hidden_size // 1
    attention = layers * 2 * 2 * heads * 16 * 16 * (width // heads) * (2 + 5)
    assert counts.flops == torchs.get_total_flops() + attention  # torch has no formula for the CPU's op
    assert counts.masked == attention // 2
    assert (counts.recomputed, counts.masked_recomputed, counts.uncounted) == (0, 0, {})


def test_attention_that_sees_all_is_not_halved() -> None:
    q = torch.randn(1, 2, 8, 4)
    seen = torch.ones(8, 8, dtype=torch.bool)
    window = seen.tril().triu(-2)
    for mask, halved in ((None, False), (seen, False), (seen.tril(), True), (window, True), (seen.triu(), False)):
        for given in (mask, None if mask is None else torch.zeros(8, 8).masked_fill(~mask, float("-inf"))):
            with OpCounts() as counts:
                nn.functional.scaled_dot_product_attention(q, q, q, given)
            assert (counts.masked > 0) == halved


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_recomputation(reentrant: bool) -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    q = torch.randn(1, 1, 8, 4, requires_grad=True)

    def part(x: Tensor, q: Tensor) -> Tensor:
        return (x @ w).sum() + nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    with OpCounts() as plain:
        part(x, q).backward()
    with OpCounts() as counts:
        checkpoint(part, x, q, use_reentrant=reentrant).backward()
    product, attention = 2 * 8 * 4 * 4, 2 * 2 * 8 * 8 * 4
    assert plain.recomputed == plain.masked_recomputed == 0
    assert (counts.recomputed, counts.masked_recomputed) == (product + attention, attention // 2)
    assert counts.flops - counts.recomputed == plain.flops
    assert counts.masked == plain.masked


def test_checkpointing_of_a_model_is_recomputation() -> None:
    model, ids = tiny_llm("llama"), torch.randint(0, 30, (2, 16))
    with OpCounts() as plain:
        model(input_ids=ids, labels=ids).loss.backward()
    model.activation_checkpointing_enable()
    model.train()
    with OpCounts() as counts:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counts.flops - counts.recomputed == plain.flops
    assert counts.recomputed > plain.flops / 5


def test_a_second_derivative_is_no_recomputation() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with OpCounts() as counts:
        (gradient,) = torch.autograd.grad((x @ w).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert counts.recomputed == 0


def test_a_product_without_a_formula_is_named() -> None:
    @torch.library.custom_op("lit_sparse_test::int8_scaled_mm", mutates_args=())
    def product(x: Tensor) -> Tensor:
        return x @ x

    with OpCounts() as counts:
        product(torch.ones(4, 4))
        torch.ones(4).add(1)
    assert counts.uncounted == {"lit_sparse_test::int8_scaled_mm": 1}
    record = replace(RECORD, throughput=replace(STEP, uncounted=counts.uncounted))
    assert "too low: no formula is known for lit_sparse_test::int8_scaled_mm (1 calls)" in said(record)


def test_products_that_torch_has_no_formula_for() -> None:
    x, experts = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(2, 16, 32, dtype=torch.bfloat16)
    with OpCounts() as counts:
        torch.ops.aten._grouped_mm(x, experts, offs=torch.tensor([3, 8], dtype=torch.int32))
        torch.ops.aten._int_mm(torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8))
    assert counts.ops["aten::_grouped_mm"].flops == 2 * 8 * 16 * 32
    assert counts.ops["aten::_int_mm"].flops == 2 * 32 * 16 * 8


@pytest.mark.parametrize("varlen", [False, True])
def test_flash_attention_by_rows(varlen: bool) -> None:
    """Grouped heads, which torch 2.11's own formula refuses, in the layout that has lengths before heads."""
    from lit_sparse_profiling.attention_flops import attention_flops, is_attention, is_causal

    shape = (12,) if varlen else (2, 6)
    begins = torch.tensor([0, 4, 12]) if varlen else None
    q, kv = torch.empty(*shape, 4, 8), torch.empty(*shape, 2, 8)
    given = {"query": q, "key": kv, "value": kv, "cum_seq_q": begins, "cum_seq_k": begins, "is_causal": True}
    pairs = 4 * 4 + 8 * 8 if varlen else 2 * 6 * 6
    assert is_attention("aten::_flash_attention_forward")
    assert attention_flops("aten::_flash_attention_forward", given) == 2 * 2 * 4 * pairs * 8
    assert attention_flops("aten::_flash_attention_backward", given) == 5 * 2 * 4 * pairs * 8
    assert is_causal(given)


def test_grouped_heads() -> None:
    q, kv = torch.randn(2, 4, 16, 8, requires_grad=True), torch.randn(2, 2, 16, 8, requires_grad=True)
    with OpCounts() as counts:
        nn.functional.scaled_dot_product_attention(q, kv, kv, enable_gqa=True).sum().backward()
    assert counts.flops == 7 * 2 * 2 * 4 * 16 * 16 * 8
