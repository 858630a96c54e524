"""The YAMLs that come with lit_sparse, found by name."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lit_sparse

STACKED = ("trainers", "data", "models", "tasks")
"""Folders of configs/ whose YAMLs stack on a method's, so that runs are not named after them."""


def configs_folder() -> Path:
    """Return the folder of shipped YAMLs: beside the package in a checkout, or where the wheel installs them."""
    checkout = Path(lit_sparse.__file__).parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lit-sparse" / "configs"


def methods() -> list[Path]:
    """Return the YAML of each method, sorted by name."""
    return sorted(configs_folder().glob("*.yaml"))


def find_configs(argv: Sequence[str]) -> list[str]:
    """Replace each `--config NAME` in `argv` that is no file by the shipped file of that name."""
    out = list(argv)
    for i, word in enumerate(out):
        if word in ("-c", "--config") and i + 1 < len(out):
            out[i + 1] = found(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + found(word.removeprefix("--config="))
    return out


def found(name: str) -> str:
    """Return the path of the shipped YAML `name`, unless `name` is a path that exists."""
    shipped = configs_folder() / name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name
