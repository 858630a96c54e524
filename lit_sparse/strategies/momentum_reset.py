"""Momentum reset: forget the optimizer's moments every so many steps, and raise the learning rate again over a few.

From section 3 of arXiv 2505.22922, where it goes with low-rank factors; also part of SPAM and Stable-SPAM. By itself it
is the control for these: a share of what a restart gives may be what a reset does for any run.
"""

import dataclasses
from typing import ClassVar

from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW
from lit_sparse.strategies.base import Attaches, BaseWeights, Claim, Need, UpdateStrategy

FLOOR = 0.001
"""Factor of the learning rate at the first step after a reset."""


@dataclasses.dataclass
class MomentumReset(UpdateStrategy):
    """Forget the optimizer's state every so many steps, with a short warm-up after each (arXiv 2505.22922).

    It resets whatever the stacked method trains; all weights if used alone. All moments go, of embeddings and norms
    too, and the counts of steps of the bias correction; fp32 masters stay. Without the warm-up, the first step
    after a reset would move every weight by the whole learning rate, about four times as far as steps before it.

    Args:
        every: Optimizer steps from one reset to the next.
        recovery_steps: Steps, at most `every`, in which the learning rate rises again after a reset, from a thousandth
            of what the schedule says; 0 or 1 leaves it alone.

    Raises:
        BadInput: if a number is out of its range.
    """

    every: int = 200
    recovery_steps: int = 10

    claims: ClassVar[frozenset[Claim]] = frozenset({"optimizer"})
    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BadInput(f"MomentumReset: every is {self.every}; it must be a number of steps from 1 on.")
        if not self.recovery_steps >= 0:
            raise BadInput(f"MomentumReset: recovery_steps is {self.recovery_steps}; it must be 0 or more.")

    @property
    def cycle(self) -> int | None:
        return self.every

    def lr_factor(self, step: int) -> float:
        since, length = (step - 1) % self.every, min(self.recovery_steps, self.every)  # steps since the reset
        if step <= self.every or since >= length or length < 2:
            return 1.0
        return FLOOR + (1 - FLOOR) * since / (length - 1)

    def after_step(self, step: int, optimizer: Optimizer) -> bool:
        if step % self.every == 0:
            if isinstance(optimizer, AdamW):
                optimizer.reset()
            else:
                optimizer.state.clear()  # made anew at the next step, as at the first
        return False
