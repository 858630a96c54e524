"""All kernels by interpretation, in a process of its own: Triton decides at import which way a kernel runs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels" / "lit_sparse_kernels"


def kernels() -> set[str]:
    """The names of all kernels in the source: functions marked `jit` that no other kernel calls."""
    marked = [node for path in sorted(KERNELS.glob("*.py")) for node in ast.parse(path.read_text("utf-8")).body]
    jitted = [
        n
        for n in marked
        if isinstance(n, ast.FunctionDef) and any(ast.unparse(d).split("(")[0] == "jit" for d in n.decorator_list)
    ]
    called = {ast.unparse(c.func) for n in jitted for c in ast.walk(n) if isinstance(c, ast.Call)}
    return {node.name for node in jitted} - called


def test_every_kernel_is_right_by_interpretation(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--no-header", "-p", "no:cacheprovider"]
    noted = tmp_path / "launched"
    settings = {"TRITON_INTERPRET": "1", "LAUNCHED": str(noted), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert kernels(), "no kernel was found where there are some: the test reads nothing"
    assert set(noted.read_text().split()) == kernels(), "a kernel that no test launches, or one that is gone"


@pytest.mark.gpu
def test_a_gpu_makes_what_the_interpreter_makes(tmp_path: Path) -> None:
    from tests.kernels.results import results

    command = [sys.executable, "-m", "tests.kernels.results", str(tmp_path / "interpreted.pt")]
    search = os.pathsep.join(map(str, (HERE.parents[1], KERNELS.parent)))
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}, check=True)
    for got, wanted in zip(results(torch.device("cuda")), torch.load(tmp_path / "interpreted.pt"), strict=True):
        # fp32 sums of up to 600 products of numbers near 1, in another order; half precision within one unit of it
        tolerance = 1e-4 if got.dtype == torch.float32 else 2e-3
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
