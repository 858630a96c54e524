"""The purpose of each step of a measured loop: which are warm-up, which are instrumented, which are timed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch

from lit_sparse_profiling.budget import KERNELS, MEMORY

Stage = str
"""Purpose of a step: warm-up, lead-in, examined, kernels or timed. An interrupted step has lost its purpose."""
INTERRUPTED: Stage = "interrupted"
INSTRUMENTS = {"lead-in": ("lead-in", "examined"), "kernels": ("kernels",)}
"""Stages that are given up with one of them."""
COSTS = {"lead-in": MEMORY, "kernels": KERNELS}
"""Costs of the stages that begin an instrument."""
MOST_STEPS = 10**6
"""Bound of the steps of each kind, each of which is planned ahead."""
PROFILED = 2
"""Steps in which kernels are timed."""


@dataclass(frozen=True)
class Plan:
    """The purpose of each step of a loop: warm-up, memory, kernels. The steps that follow are timed.

    Args:
        warmup: Steps that do not count. Optimizer states are created in them, and kernels compiled and tuned.
        examine: Count memory in the two steps that follow, by category and beside the allocator, and again in each
            later step whose batch is clearly longer. null, the default of `lit-sparse fit`, counts it if all measuring,
            samples included, takes at most a tenth of the run.
        profiled: Steps after these in which each kernel (on a CPU, each op) is timed. null, the default of
            `lit-sparse fit`, times two on the same condition.
        trace: File for the Chrome trace of these steps; null writes none.
        predict: Before the first step, predict the memory that a fit of the command line takes. null, the default of
            `lit-sparse fit`, predicts it on the same condition.
        timed: Number of timed steps after which to stop, later where they took less than the 5 s that a GPU's energy
            counter needs; null continues to the end of training.
        turns: Two file descriptors, "READ,WRITE", through which a bench interleaves this run's timed steps with those
            of another run; null does not wait.

    Raises:
        ValueError: if a number is negative or above `MOST_STEPS`.
    """

    warmup: int = 2
    examine: bool | None = True
    profiled: int | None = PROFILED
    trace: str | None = None
    predict: bool | None = True
    timed: int | None = None
    turns: str | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "profiled", "timed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"profile.{name} is {getattr(self, name)}; it must be 0 or more.")
            if (getattr(self, name) or 0) > MOST_STEPS:
                raise ValueError(f"profile.{name} is {getattr(self, name)}; it must be at most {MOST_STEPS:,}.")

    def stages(self) -> deque[Stage]:
        """Return the stages of the steps before the timed ones."""
        memory = [] if self.examine is False else ["lead-in", "examined"]
        return deque(["warm-up"] * self.warmup + memory + self.kernel_stages)

    @property
    def kernel_stages(self) -> list[Stage]:
        """The stages in which kernels are timed."""
        return ["kernels"] * (PROFILED if self.profiled is None else self.profiled)

    @property
    def limited(self) -> tuple[Stage, ...]:
        """The stages that are left out if they take too much of the run; none if steps are timed on purpose."""
        if self.timed is not None:
            return ()
        return ("lead-in",) * (self.examine is None) + ("kernels",) * (self.profiled is None)


def plan_on(device: torch.device, plan: Plan, notes: list[str]) -> Plan:
    """Return the plan without what cannot be measured on the device, of which a note is left."""
    if device.type in ("cpu", "cuda") or (plan.examine is False and plan.profiled == 0):
        return plan
    notes.append(f"Memory by category and kernels were not measured: on {device.type} neither has an account.")
    return replace(plan, examine=False, profiled=0)
