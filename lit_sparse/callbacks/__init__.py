"""Lightning callbacks: the profiler, the record of a fit, forgetting, and the density of activations."""

from lit_sparse.callbacks.density import DensityMonitor as DensityMonitor
from lit_sparse.callbacks.forgetting import Forgetting as Forgetting
from lit_sparse.callbacks.profile import Profile as Profile
