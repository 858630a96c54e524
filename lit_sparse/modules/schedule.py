"""Learning-rate schedules with warm-up, as factors of the peak rate."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def factor(schedule: Schedule, step: int, warmup: int, total: float) -> float:
    """Factor of the peak rate at optimizer step `step` (from 0) of `total`, after `warmup` steps of linear rise."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]
