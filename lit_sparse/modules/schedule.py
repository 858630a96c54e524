"""Learning-rate schedules with linear warm-up, as factors of the peak learning rate."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_sparse.errors import BadInput

Schedule = Literal["linear", "cosine", "constant"]


def factor(schedule: Schedule, step: int, warmup: int, total: float) -> float:
    """Return the factor of the peak learning rate at optimizer step `step`, which counts from 0.

    Args:
        schedule: Course after warm-up: `linear` and `cosine` end at 0, `constant` stays at 1.
        warmup: Steps of linear warm-up. The first step has the factor 1 / warmup: at 0 it would move nothing.
        total: Steps of the whole training, warm-up included; later steps keep the last factor.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]


def scheduler_of(optimizer: Optimizer, schedule: Schedule, warmup_steps: float, total: float) -> LambdaLR:
    """Return the scheduler of a training of `total` optimizer steps.

    Args:
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps.

    Raises:
        BadInput: if that is a share of a number of steps without a limit.
    """
    if total == float("inf") and 0 < warmup_steps < 1:
        raise BadInput(
            f"model.warmup_steps is {warmup_steps}, a share of all steps, but the trainer's limit is none of steps or "
            "epochs; give warmup_steps as a number of steps, or set trainer.max_steps."
        )
    warmup = warmup_steps if warmup_steps >= 1 else warmup_steps * total if warmup_steps else 0
    return LambdaLR(optimizer, lambda step: factor(schedule, step, int(warmup), total))
