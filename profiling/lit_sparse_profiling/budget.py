"""The limit of what measuring takes of a run: a tenth of its wall time, as far as that can be told beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from lit_sparse_profiling.phases import Phases
from lit_sparse_profiling.sections import INSTRUMENTED_PHASES, SAMPLES

SHARE = 0.1


@dataclass(frozen=True)
class Cost:
    """Expected time of an instrument: that of so many plain steps, and seconds that do not depend on the model."""

    steps: float
    seconds: float


MEMORY, KERNELS, CEILING = Cost(3, 2), Cost(2.5, 3), Cost(0, 1)
"""Costs of counting memory, of timing kernels with three measurements of the ceilings, and of one more of these.

Two steps of each are the run's own. The rest was measured in seconds of a CPU core: 1.2 s and 1.5 s for a model of two
layers, 2.7 s and 3 s for one of 30 with steps of 0.45 s.
"""


class Budget:
    """Compares what measuring takes with the run's wall time: until now, and as far as its steps are known.

    What was spent on samples is expected to be spent once more, after training.

    Args:
        phases: Phases of the run.
        steps: Number of steps to come; infinite if nothing limits it.
        seconds: Time to come at most; infinite likewise.

    Attributes:
        step_seconds: Time of a plain step; 0 while it is unknown.
    """

    def __init__(self, phases: Phases, steps: float, seconds: float = float("inf")) -> None:
        self.step_seconds = 0.0
        self._phases, self._steps, self._end = phases, steps, phases.elapsed + seconds

    def count_step(self) -> None:
        """Note that a step has begun."""
        self._steps -= 1

    def run_seconds(self) -> float:
        """Return the expected wall time of the whole run."""
        ahead = self._steps * self.step_seconds if self.step_seconds else 0.0
        return max(self._phases.elapsed, min(self._phases.elapsed + ahead, self._end))

    def seconds_of(self, cost: Cost) -> float:
        """Return the expected time of an instrument."""
        return cost.steps * self.step_seconds + cost.seconds

    def left(self) -> float:
        """Return the seconds that measuring may still take, after what it has taken so far."""
        spent = self._phases.own(*INSTRUMENTED_PHASES) + 2 * self._phases.own(SAMPLES)
        return SHARE * self.run_seconds() - spent

    def allows(self, cost: Cost) -> bool:
        """Return whether an instrument fits in."""
        return self.seconds_of(cost) <= self.left()

    def refusal(self, cost: Cost) -> str:
        """Return why an instrument is left out, for a note."""
        return f"that takes about {self.seconds_of(cost):.1f} s, and measuring at most {SHARE:.0%} of the fit"
