"""Ceilings: the rates are right, and the process is left as it was."""

import pytest
import torch

from lit_sparse_profiling import ceilings as module
from lit_sparse_profiling.ceilings import ceilings

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_BYTES", 2**20)
    monkeypatch.setattr(module, "PRODUCT_SIZES", (16, 32))


@pytest.mark.usefixtures("small")
def test_rates_are_work_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 4.0, 2.0, 3.0, 5.0] * 3)  # the first, of warm-up, does not count

    def timed(work: object, _: torch.device) -> float:
        return next(seconds) / 1000

    monkeypatch.setattr(module, "_seconds_on_cpu", timed)
    found = ceilings(CPU, torch.float32)
    assert found.flops == pytest.approx(2 * 32**3 / 0.002)
    assert found.bytes == pytest.approx(2 * 2**20 / 0.002)


@pytest.mark.usefixtures("small")
def test_a_long_product_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(module, "_product_seconds", lambda size, *_: sizes.append(size) or 0.5)
    assert ceilings(CPU, torch.float32).flops == 2 * 16**3 / 0.5
    assert sizes == [16]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_state_is_left_alone(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    found = ceilings(CPU, dtype)
    assert found.flops > 0
    assert found.bytes > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_device_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ceilings of meta .* known for cpu and cuda; give one of these"):
        ceilings(torch.device("meta"), torch.float32)
    with pytest.raises(ValueError, match=r"Ceilings in torch.int8 .* torch.float16, .* give one"):
        ceilings(CPU, torch.int8)


@pytest.mark.gpu
def test_gpu_memory_is_freed() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings(device, torch.bfloat16)  # makes cuBLAS's workspace, which stays
    before = torch.cuda.memory_allocated(device)
    found = ceilings(device, torch.bfloat16)
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.memory_reserved(device) - before < 128 * 2**20
    assert found.flops > 1e12
    assert found.bytes > 1e10
