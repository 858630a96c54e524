"""Tasks: what is learned. How the weights are updated is a strategy's affair."""

from lit_sparse.modules.base import LitSparse
from lit_sparse.modules.causal_lm import CausalLM

__all__ = ["CausalLM", "LitSparse"]
