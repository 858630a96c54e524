"""Where files that come with lit_sparse are."""

import sys
from pathlib import Path

import lit_sparse


def configs_folder() -> Path:
    """Return the folder of shipped YAMLs: beside the package in a checkout, or where the wheel installs them."""
    checkout = Path(lit_sparse.__file__).parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lit-sparse" / "configs"
