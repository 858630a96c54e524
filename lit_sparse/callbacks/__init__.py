"""Callbacks: the bridge from Lightning to the profiler, the record of a run, and what is scored beside it."""

from lit_sparse.callbacks.density import DensityMonitor as DensityMonitor
from lit_sparse.callbacks.forgetting import Forgetting as Forgetting
from lit_sparse.callbacks.profile import Profile as Profile
