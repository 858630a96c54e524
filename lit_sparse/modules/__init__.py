"""Tasks: what is learned. How the weights are updated is a strategy's affair."""

from lit_sparse.modules.base import LitSparse
from lit_sparse.modules.causal_lm import CausalLM
from lit_sparse.modules.classifier import Classifier

__all__ = ["CausalLM", "Classifier", "LitSparse"]
