"""Learning-rate schedules with linear warm-up, as factors of the peak learning rate."""

import math
from typing import Literal

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
