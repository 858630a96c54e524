"""Update strategies: one method, one file."""

from lit_sparse.strategies.base import Claim, Probe, UpdateStrategy, compose
from lit_sparse.strategies.lisa import LISA
from lit_sparse.strategies.peft import PEFT
from lit_sparse.strategies.smt import SMT

__all__ = ["LISA", "PEFT", "SMT", "Claim", "Probe", "UpdateStrategy", "compose"]
