"""Ops on fake tensors whose results are remembered: what is made again is what torch makes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, LlamaConfig

from lit_sparse.cli import make_planned
from lit_sparse.commands.plan import fit_command
from lit_sparse.planning.forecast import Forecast, Setting, forecast
from lit_sparse_profiling.fake_ops import FakeOps

aten = torch.ops.aten
OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "new memory": lambda x, y: x @ y.t(),
    "a view": lambda x, y: x.view(2, 4, 3)[:, 1:].transpose(0, 1),
    "an unsafe view": lambda x, y: aten._unsafe_view(x, [3, 8]),
    "several views": lambda x, y: x.split(1, dim=1),
    "several outputs": lambda x, y: torch.ops.aten.native_layer_norm(x, [3], None, None, 1e-5),
    "in place": lambda x, y: x.add_(y, alpha=2),
    "a list in place": lambda x, y: torch._foreach_mul_([x, y], 2.0),  # pyright: ignore[reportPrivateImportUsage]
    "another dtype": lambda x, y: x.to(torch.bfloat16),
    "strides kept": lambda x, y: torch.ones_like(x.t()),
    "a shape changed in place": lambda x, y: x.t_(),
    "a constant beside a tensor": lambda x, y: [x * 1, x * 1.0, x * True, x > 1],
}


class Ops(TorchDispatchMode):
    """Runs ops by `FakeOps`, as a trace does."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.ops = FakeOps(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        with torch._C.DisableTorchFunction():
            return self.ops(func, args, kwargs or {})


def told(out: Any, given: list[Tensor]) -> Any:
    """Everything that tells tensors apart: form, keys, the argument whose memory they are in, or that they are."""
    if isinstance(out, list | tuple):
        return type(out), [told(one, given) for one in out]
    if not isinstance(out, Tensor):
        return out
    places = [one.untyped_storage()._cdata for one in given]
    place = places.index(out.untyped_storage()._cdata) if out.untyped_storage()._cdata in places else None
    form = out.shape, out.stride(), out.dtype, out.storage_offset(), out.untyped_storage().nbytes(), out.device
    return (*form, str(torch._C._dispatch_key_set(out)), place, [out is one for one in given])


@pytest.mark.parametrize("name", OPS)
def test_an_op_that_ran_before_returns_what_torch_returns(name: str) -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def tensors() -> list[Tensor]:
        with fake:
            return [torch.empty(8, 3), torch.empty(8, 3)]

    given = tensors()
    with torch.no_grad():
        expected = told(OPS[name](*given), given), told(given, [])
        mode = Ops(fake)
        for _ in range(3):
            given = tensors()
            with mode:
                found = OPS[name](*given)
            assert (told(found, given), told(given, [])) == expected


def test_tensors_that_are_not_plain_are_left_to_torch() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        x, z = torch.empty(4, 4), torch.empty(4, 4, dtype=torch.complex64)
    mode = Ops(fake)
    real = torch.arange(4)
    with mode, torch.no_grad():
        for _ in range(2):
            _ = x[real], z.conj(), x.to_sparse()
            with torch.inference_mode():
                _ = x.sin()
    assert not [key for key in mode.ops._known if key[0] in (aten.index.Tensor, aten._conj.default, aten.sin.default)]


def without_time(plan: Forecast) -> Forecast:
    return replace(plan, seconds=0.0)


@pytest.mark.parametrize(
    ("method", "config", "device"),
    [
        ("smt", LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4), "cuda"),
        ("full", GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=64), "cpu"),
    ],
    ids=["smt", "full"],
)
def test_a_plan_is_the_same_where_nothing_is_remembered(
    method: str, config: Any, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.update({"vocab_size": 512})
    config.save_pretrained(tmp_path)
    command = fit_command(f"{method}.yaml", [], [f"--model.base={tmp_path / 'config.json'}"])
    setting = Setting(device, 2, 32)
    plan = forecast(method, make_planned(command).module, setting)
    monkeypatch.setattr(FakeOps, "__call__", lambda self, func, args, kwargs: func(*args, **kwargs))
    assert without_time(forecast(method, make_planned(command).module, setting)) == without_time(plan)
