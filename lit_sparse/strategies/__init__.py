"""Update strategies: one method, one file."""

from importlib import import_module
from pkgutil import iter_modules

from lit_sparse.strategies.activation_density import ActivationDensity
from lit_sparse.strategies.adalomo import AdaLomo
from lit_sparse.strategies.anchors import L2SP, AdaptiveRegularization
from lit_sparse.strategies.base import Claim, Context, Need, Probe, UpdateStrategy, compose
from lit_sparse.strategies.cola import CoLA
from lit_sparse.strategies.gmt import GMT
from lit_sparse.strategies.helene import HELENE
from lit_sparse.strategies.kl_to_base import KLToBase
from lit_sparse.strategies.lisa import LISA
from lit_sparse.strategies.losia import LoSiA
from lit_sparse.strategies.low_rank import LowRank
from lit_sparse.strategies.meft import MEFT
from lit_sparse.strategies.mezo import MeZO
from lit_sparse.strategies.momentum_reset import MomentumReset
from lit_sparse.strategies.muon import Muon
from lit_sparse.strategies.peft import PEFT
from lit_sparse.strategies.record_importance import RecordFisher, RecordImportance
from lit_sparse.strategies.scale import SCALE
from lit_sparse.strategies.smt import SMT
from lit_sparse.strategies.sparse_entries import SparseEntries
from lit_sparse.strategies.stable_spam import StableSPAM
from lit_sparse.strategies.subspace_adam import SubspaceAdam
from lit_sparse.strategies.updates import Updates

__all__ = [
    "GMT",
    "HELENE",
    "L2SP",
    "LISA",
    "MEFT",
    "PEFT",
    "SCALE",
    "SMT",
    "ActivationDensity",
    "AdaLomo",
    "AdaptiveRegularization",
    "Claim",
    "CoLA",
    "Context",
    "KLToBase",
    "LoSiA",
    "LowRank",
    "MeZO",
    "MomentumReset",
    "Muon",
    "Need",
    "Probe",
    "RecordFisher",
    "RecordImportance",
    "SparseEntries",
    "StableSPAM",
    "SubspaceAdam",
    "UpdateStrategy",
    "Updates",
    "compose",
]

for _file in iter_modules(__path__):  # so that a YAML may name a method whose file was only put here
    import_module(f"{__name__}.{_file.name}")
