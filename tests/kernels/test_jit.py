"""Rules for all ops: the path a tensor takes, and that CPU tensors need no Triton."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_sparse_kernels import jit

KERNELS = Path(jit.__file__).parents[1]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import torch
from lit_sparse_kernels import block_adamw, block_delta, master_adamw
from lit_sparse_kernels.block_grad import block_grad
from lit_sparse_kernels.pack_columns import pack_columns
packed = pack_columns(torch.ones(3, 8), torch.tensor([1]), 4)
assert block_grad([torch.ones(3, 4)], packed, torch.tensor([[0, 0, 0]]), (4, 4)).eq(3).all()
"""


def test_the_host_needs_no_triton() -> None:
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, check=True)


def test_a_cuda_tensor_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "triton", None)
    with pytest.raises(ImportError, match=r"need Triton, which is not installed here: pip install triton\."):
        jit.on_cuda(SimpleNamespace(is_cuda=True))  # pyright: ignore[reportArgumentType]
    assert not jit.on_cuda(torch.ones(1))


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """Stands in for CUDA's: which device is current, and what was launched on which."""

        current, launched = torch.device("cuda:0"), []

        @contextmanager
        def device(self, device: torch.device) -> Iterator[None]:
            before, self.current = self.current, device
            yield
            self.current = before

        def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: self.launched.append((self.current, programs, arguments, constants))

    driver = Driver()
    monkeypatch.setattr(torch.cuda, "device", driver.device)
    jit.enqueue(driver, [3, 2], torch.device("cuda:1"), "x", M=16)
    assert driver.launched == [(torch.device("cuda:1"), (3, 2), ("x",), {"M": 16})]
    assert driver.current == torch.device("cuda:0")


def test_no_kernel_is_launched_otherwise() -> None:
    sources = [path for path in Path(jit.__file__).parent.glob("*.py") if path.name != "jit.py"]
    assert len(sources) > 5
    assert not [path.name for path in sources if re.search(r"_kernel\[", path.read_text("utf-8"))]


def test_an_index_is_read_again_when_it_or_what_it_indexes_changed() -> None:
    def read(end: int) -> jit.Listed:
        return jit.listed("index", index, 1, end, lambda number: number < end, f"numbers below {end}")

    index = torch.tensor([[1], [0]])
    first = read(4)
    assert first.rows == [(1,), (0,)]
    assert read(4) is first
    index += 1
    assert read(4).rows == [(2,), (1,)]
    with pytest.raises(ValueError, match=r"index has \(2,\), which lies outside; expected numbers below 2\."):
        read(2)


def test_an_op_skips_the_dispatcher_only_where_nothing_watches_it() -> None:
    plain, trained = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    assert jit.runs_directly(plain)
    assert not jit.runs_directly(plain, trained)  # autograd would record what the op does
    with torch.no_grad():
        assert jit.runs_directly(plain, trained)
        assert not jit.runs_directly(torch.ones(2, device="meta"))
    with FakeTensorMode():
        assert not jit.runs_directly(plain)
    assert not torch.vmap(lambda one: torch.tensor(jit.runs_directly(plain)) & one)(
        torch.ones(2, dtype=torch.bool)
    ).any()
