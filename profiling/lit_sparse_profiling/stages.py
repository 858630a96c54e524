"""The stages of a loop's steps to come: taken in order, given up where they cost too much, tried again if cut off."""

from __future__ import annotations

from collections import deque

import torch

from lit_sparse_profiling.budget import Budget, Cost
from lit_sparse_profiling.open_profilers import another_is_open
from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.step_plan import COSTS, INSTRUMENTS, PROFILED, Plan, Stage

GIVE_UP_NOTES = {"examined": "Memory was not counted", "kernels": "Kernels were not timed"}
MAX_ATTEMPTS = 5
"""Attempts at the steps of one kind before they are given up, if evaluation or saving interrupts each."""


class Stages:
    """The stages of a plan that are still to come.

    Args:
        plan: The purpose of each step.
        device: Device of the model.
        phases: Stop-watch of the run.
        budget: Limits what the plan measures only where it takes little of the run; None sets no limit.
        notes: Gets a sentence for each instrument that is given up.
    """

    def __init__(
        self, plan: Plan, device: torch.device, phases: Phases, budget: Budget | None, notes: list[str]
    ) -> None:
        self._ahead = plan.stages()
        self._device, self._phases, self._notes = device, phases, notes
        self._budget, self._limited = budget, set(plan.limited) if budget is not None else set()
        self._step_began: float | None = None  # of the warm-up
        self._attempts: dict[Stage, int] = {}

    @property
    def left(self) -> bool:
        """True while stages are left before the timed steps."""
        return bool(self._ahead)

    def take(self, instrumented: bool) -> Stage:
        """Return the stage of the step that begins now.

        Only one torch.profiler can run. If another one does when one is needed, those stages are given up.

        Args:
            instrumented: An instrument is at work, so that the torch.profiler that runs is our own.
        """
        self._skip_costly()
        if not instrumented:
            self._skip_impossible()
        return self._ahead.popleft() if self._ahead else "timed"

    def affords(self, cost: Cost) -> bool:
        """Return whether the budget allows an instrument of this cost."""
        return self._budget is None or self._budget.allows(cost)

    def allows_longer(self) -> bool:
        """Return whether a later step with a longer batch may be examined, as to attempts and other profilers."""
        if self._attempts.get("longer", 0) >= MAX_ATTEMPTS:
            return False
        return self._device.type == "cuda" or not another_is_open()  # which ours would stop

    def count_longer(self) -> None:
        """Note that such a step was interrupted."""
        self._attempts["longer"] = self._attempts.get("longer", 0) + 1

    def remove(self, stage: Stage) -> None:
        """Take a stage out, however many steps it has."""
        self._ahead = deque(other for other in self._ahead if other != stage)

    def clear(self) -> None:
        """Take all stages out: steps are only timed from now on."""
        self._ahead.clear()

    def retry(self, again: list[Stage]) -> None:
        """Put these stages before the remaining ones, or give them up with a note after `MAX_ATTEMPTS`."""
        if not again:
            return
        name = again[-1]
        self._attempts[name] = self._attempts.get(name, 0) + 1
        others = [stage for stage in self._ahead if stage not in again]
        if self._attempts[name] < MAX_ATTEMPTS:
            self._ahead = deque(again + others)
            return
        self._ahead = deque(others)
        self._notes.append(
            f"{GIVE_UP_NOTES[name]}: evaluation or saving interrupted all of {MAX_ATTEMPTS} attempts; do these less "
            "often."
        )

    def _skip_impossible(self) -> None:
        """Give up the next stages that need torch.profiler, if another one is running or is to run."""
        while self._ahead:
            stage = self._ahead[0]
            needed = stage == "kernels" or (stage == "lead-in" and self._device.type != "cuda")
            if not needed or not another_is_open():
                return
            self._give_up(stage, "another torch.profiler was running, and only one can; profile without it.")

    def _skip_costly(self) -> None:
        """Give up instruments that would take too much of the run, now that a step's time is known."""
        if self._budget is None:
            return
        self._time_warmup(self._budget)
        self._budget.count_step()
        while self._ahead and self._ahead[0] in self._limited:
            stage = self._ahead[0]
            self._limited.remove(stage)
            if self._budget.allows(COSTS[stage]):
                return
            key = "examine=true" if stage == "lead-in" else f"profiled={PROFILED}"
            self._give_up(stage, f"{self._budget.refusal(COSTS[stage])}; --profile.{key} does it nevertheless.")

    def _time_warmup(self, budget: Budget) -> None:
        """Take the time of the last step of the warm-up."""
        warming = self._ahead and self._ahead[0] == "warm-up"
        if not warming and self._step_began is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._phases.elapsed
        if self._step_began is not None:
            budget.step_seconds = now - self._step_began
        self._step_began = now if warming else None

    def _give_up(self, stage: Stage, why: str) -> None:
        gone = INSTRUMENTS[stage]
        self._ahead = deque(other for other in self._ahead if other not in gone)
        self._notes.append(f"{GIVE_UP_NOTES[gone[-1]]}: {why}")
