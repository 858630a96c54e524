"""The counted memory of a step beside a shim under torch's allocator, which shares nothing with the profiler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sparse_profiling import profiler

SOURCE = Path(__file__).with_name("shim.c")
ROOT = Path(__file__).parents[2]
FAMILIES = ("llama", "qwen2", "gpt2", "mistral")
STEPS = """
import ctypes, gc, json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from lit_sparse_profiling.profiler import Profiler
from lit_sparse_profiling.step_plan import Plan

shim = ctypes.CDLL(None)
shim.shim_live.restype = shim.shim_peak.restype = ctypes.c_size_t
SIZES = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, vocab_size=600)
gc.freeze()  # so that the collections of the examination are fast
found, base = {}, shim.shim_live()  # tensors of the imports
for family in sys.argv[1:]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters())
    peaks = []
    with Profiler(model, optimizer, Plan(warmup=2, profiled=0)) as profiled:
        for _ in range(5):
            ids = torch.randint(0, 600, (4, 64))
            with profiled.step({"input_ids": ids}):
                shim.shim_reset()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                peaks.append(shim.shim_peak() - base)
    memory = profiled.record("one").memory
    ours = dict(counted=memory.held.total, allocator=memory.allocator.requested, before=memory.allocator.uncounted)
    found[family] = dict(ours, lead_in=peaks[2], examined=peaks[3], plain=peaks[4])
    del model, optimizer, profiled, memory
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs a C compiler and glibc, whose allocator the shim is put before")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    built = subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)], capture_output=True)
    if built.returncode:
        pytest.skip(f"the shim does not compile here: {built.stderr.decode().splitlines()[:1]}")
    return library


def test_a_step_of_four_families_is_what_a_shim_under_the_allocator_counts(shim: Path) -> None:
    paths = [str(Path(profiler.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = subprocess.run(
        [sys.executable, "-c", STEPS, *FAMILIES],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    assert set(found) == set(FAMILIES)
    for family, sizes in found.items():
        peak = pytest.approx(sizes["examined"], rel=1e-4)
        assert (sizes["counted"], sizes["allocator"]) == (peak, peak), family
        assert sizes["plain"] == sizes["lead_in"], family
        # What counting adds is told: the examined step's peak beside that of the step before.
        assert sizes["before"] == pytest.approx(sizes["plain"], rel=2e-4), family
