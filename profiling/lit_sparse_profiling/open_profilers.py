"""Other torch.profilers of the process: only one can run, and one that is open may start in any step."""

from __future__ import annotations

import gc
from typing import Any

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import KinetoStepTracker
from torch.profiler import profile
from torch.profiler.profiler import PROFILER_STEP_NAME


def make_profile(**options: Any) -> profile:
    """Return a torch.profiler of our own, which `another_is_open` does not see once it has stopped."""
    others = PROFILER_STEP_NAME in KinetoStepTracker._step_dict
    made = profile(**options)
    if not others:
        KinetoStepTracker.erase_step_count(PROFILER_STEP_NAME)
    return made


def another_is_open() -> bool:
    """Return whether a torch.profiler runs, or waits for steps in which it could not start beside ours.

    Call it while none of ours runs.
    """
    if _profiler_enabled() or PROFILER_STEP_NAME not in KinetoStepTracker._step_dict:
        return _profiler_enabled()
    # Only a counter of steps is left of it elsewhere, which stays if it was stopped without leaving its `with` block.
    return any(issubclass(type(one), profile) and one.record_steps for one in gc.get_objects())
