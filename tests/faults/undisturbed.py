"""Fits without a fault, to compare with: kept between campaigns, as long as the code that made them stays the same."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, processor

CODE = ("lit_sparse", "kernels", "profiling", "configs", "tests/fuzz.py", "tests/conftest.py")
"""Files and folders that a fit's values depend on."""
LIBRARIES = ("torch", "transformers", "peft", "lightning")


@dataclass(frozen=True)
class Undisturbed:
    """A fit without a fault.

    Attributes:
        checkpoint: Its last checkpoint; None if it was refused.
        events: The number of file events of its first rank.
        seconds: How long it took.
        refusal: The sentence that refused it, such as a method's that knows no ranks.
    """

    checkpoint: dict[str, Any] | None
    events: int = 0
    seconds: float = 0.0
    refusal: str = ""


def read(path: Path, line: list[str]) -> Undisturbed | None:
    """Return the fit that is kept at `path`; None if there is none of this command line, code and machine."""
    if not path.is_file():
        return None
    kept = torch.load(path, weights_only=True)
    return Undisturbed(**kept["fit"]) if kept["key"] == key(line) else None


def keep(fit: Undisturbed, path: Path, line: list[str]) -> None:
    """Keep a fit at `path`, in place of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": key(line), "fit": asdict(fit)}, path)


def key(line: list[str]) -> str:
    """Return a hash of what the values of the fit with this command line depend on."""
    return hashlib.sha256(" ".join([code(), *line]).encode()).hexdigest()


@cache
def code() -> str:
    """Return a hash of the code, the versions of the libraries, and the processor with its number of threads."""
    digest = hashlib.sha256(f"{[version(name) for name in LIBRARIES]}".encode())
    digest.update(f"{processor()} {torch.get_num_threads()}".encode())
    for path in sorted(file for name in CODE for file in files(ROOT / name)):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.hexdigest()


def files(path: Path) -> list[Path]:
    """Return a file, or the code and the YAMLs in a folder."""
    return [path] if path.is_file() else [file for end in ("py", "yaml") for file in path.rglob(f"*.{end}")]
