"""The YAMLs that come with lit_sparse, found by name."""

import sys
from collections.abc import Sequence
from pathlib import Path

import lit_sparse

STACKED = ("trainers", "data", "models", "tasks")
"""Folders of configs/ whose YAMLs do not name a run: they stack on a method's."""


def configs_folder() -> Path:
    """The YAMLs that come with lit_sparse: beside the package in a checkout, else where the wheel laid them."""
    checkout = Path(lit_sparse.__file__).parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lit-sparse" / "configs"


def methods() -> list[Path]:
    """The YAML of each method, by name."""
    return sorted(configs_folder().glob("*.yaml"))


def find_configs(argv: Sequence[str]) -> list[str]:
    """`argv` with each `--config NAME` that is no file here replaced by the file of that name in `configs_folder`."""
    out = list(argv)
    for i, word in enumerate(out):
        if word in ("-c", "--config") and i + 1 < len(out):
            out[i + 1] = found(out[i + 1])
        elif word.startswith("--config="):
            out[i] = "--config=" + found(word.removeprefix("--config="))
    return out


def found(name: str) -> str:
    """The path of the shipped YAML `name`, unless there is such a file here."""
    shipped = configs_folder() / name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name
