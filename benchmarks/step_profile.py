"""Where the time of a training step goes on the host and on the device.

`python -m benchmarks.step_profile smt.yaml --config=benchmarks/gpu/workload.yaml` fits as `lit-sparse fit` does with
the method's YAML, and prints the time of plain steps; then Python functions by own and by cumulative time (cProfile,
with the backward on the main thread); then kernels and operations (torch.profiler). Profilers lengthen times.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import Callback
from torch.profiler import ProfilerActivity, profile

WARM, PLAIN, LISTED, TRACED = 5, 10, 10, 3
"""Steps that are not measured, measured plainly, by cProfile, and by torch.profiler."""


class StepProfile(Callback):
    """Measures the steps of a fit, and prints what they took when the last one is done."""

    def __init__(self) -> None:
        self._python = cProfile.Profile()
        self._torch: profile | None = None
        self._begin = self._thread = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == WARM:
            torch.autograd.set_multithreading_enabled(False)  # profilers see one thread
            self._begin, self._thread = self._now(), time.thread_time()
        if step == WARM + PLAIN:
            host = (time.thread_time() - self._thread) / PLAIN * 1e3
            issued = (time.perf_counter() - self._begin) / PLAIN * 1e3
            whole = (self._now() - self._begin) / PLAIN * 1e3
            print(f"a plain step: {whole:.2f} ms; host busy {host:.2f} ms, issued after {issued:.2f} ms", flush=True)
            self._python.enable()
        if step == WARM + PLAIN + LISTED:
            self._python.disable()
            self._now()
            self._torch = profile(activities=activities()).__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._now()
        assert self._torch is not None
        self._torch.__exit__(None, None, None)
        print(f"cProfile, {LISTED} steps")
        for order in ("tottime", "cumulative"):
            pstats.Stats(self._python, stream=sys.stdout).strip_dirs().sort_stats(order).print_stats(40)
        print(f"torch.profiler, {TRACED} steps")
        averages = self._torch.key_averages()
        device = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(averages.table(sort_by=device, row_limit=30, max_name_column_width=70))
        print(averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=70))

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def activities() -> list[ProfilerActivity]:
    """Return the events to trace on this device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit for as many steps as are measured."""
    from lit_sparse.cli import run
    from lit_sparse.commands.bench import MEASURED, TIMED_ONLY

    method, *passed = sys.argv[1:] if arguments is None else arguments
    steps = WARM + PLAIN + LISTED + TRACED
    kept = [word for word in MEASURED if "max_steps" not in word]
    words = ["fit", f"--config={method}", *kept, *TIMED_ONLY, f"--trainer.max_steps={steps}", *passed]
    return run([*words, "--trainer.callbacks+=benchmarks.step_profile.StepProfile"])


if __name__ == "__main__":
    sys.exit(main())
