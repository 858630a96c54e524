"""Provide bases that differ from a demo model in their configuration, such as an encoder with ReLU in place of GELU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_sparse import demo
from lit_sparse.errors import BadInput
from lit_sparse.storage.sealed import SUMS

FOLDER = Path("runs/bases")


@dataclass(frozen=True)
class ChangedBase:
    """A model with the weights of another and values of its own in config.json.

    Attributes:
        of: Name of a demo model, or a folder with one.
        config: The values that take the place of its own.
    """

    of: str
    config: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The folder, which its name describes: a trial's identity has nothing else of it."""
        values = [f"{key}_{value}" for key, value in sorted(self.config.items())]
        return FOLDER / "-".join([Path(self.of).name, *values])

    def write(self) -> None:
        """Write the folder if it is missing.

        Raises:
            BadInput: if the base has no config.json, or no such key in it.
        """
        if self.path.is_dir():
            return
        whole = Path(demo.resolve(self.of))
        if not (whole / "config.json").is_file():
            raise BadInput(f"base.of is {self.of}, which has no config.json; give a demo model or a model's folder.")
        config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
        if unknown := sorted(self.config.keys() - config.keys()):
            raise BadInput(f"base.config has {unknown[0]}, which {self.of} has not; known are {', '.join(config)}.")
        draft = self.path.with_name(f"{self.path.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for file in whole.iterdir():
            if file.is_file() and file.name != SUMS:  # which hash the configuration, too
                shutil.copy2(file, draft)
        (draft / "config.json").write_text(json.dumps({**config, **self.config}, indent=2), encoding="utf-8")
        draft.rename(self.path)
