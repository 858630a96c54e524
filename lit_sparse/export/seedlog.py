"""Seed logs: a run without a backward pass as the numbers that its steps came to, from which it is made again.

A step of MeZO is a function of the seed, the step's number, the learning rate and a slope for each direction; HELENE's
also of the estimates of the curvature. The directions are made anew from the seed (`lit_sparse_kernels.philox`). So a
run is its configuration and 8 bytes for the rate and for each number of a step: 16 KB for 1,000 steps of MeZO, whatever
the model's size. With Rademacher noise the weights are those of the run to the bit, on another device, too.

The file is a safetensors file with one tensor, `log` (steps, 1 + numbers) float64: the learning rate and the numbers of
each step, NaN where it was skipped, or has fewer than others. Its metadata has one key, FORMAT, with a JSON object:
version, base, the base's fingerprint, the dtype of the weights, the strategies as in YAML, and a checksum of it all.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jsonargparse import Namespace
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.anatomy import settle_trainable
from lit_sparse.checkpoints import fingerprint
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import checksum
from lit_sparse.modules import LitSparse
from lit_sparse.runs import build_module
from lit_sparse.strategies import Updates
from lit_sparse.strategies.forward_only import ForwardOnlyMethod, take_again

FORMAT, VERSION = "lit_sparse.seedlog", 1


@dataclass(frozen=True, eq=False)
class SeedLog:
    """A run of forward passes as its seeds and numbers.

    Attributes:
        base: The base's name.
        base_fingerprint: Its fingerprint, of names, shapes and values of all parameters.
        dtype: Dtype of the weights that were trained, as in `float32`.
        updates: The strategies, as in a run's configuration.
        log: (steps, 1 + numbers) float64.
    """

    base: str
    base_fingerprint: str
    dtype: str
    updates: list[Any]
    log: Tensor

    @classmethod
    def of(cls, module: LitSparse, config: dict[str, Any]) -> Self:
        """Return the log of a run that `lit_sparse.runs.load_run` returned.

        Raises:
            BadInput: if gradients trained it, or it started from random adapters.
        """
        method = next((update for update in module.updates if isinstance(update, ForwardOnlyMethod)), None)
        if method is None:
            raise BadInput(
                f"a seed log was asked for, but {module.updates.names} trains through gradients, which a seed does not "
                "give; export it with --to delta."
            )
        if any("modules" in update.claims for update in module.updates):
            raise BadInput(
                f"a seed log was asked for, but {module.updates.names} began with an adapter drawn at random, which a "
                "base does not give; export it with --to adapter."
            )
        if method.tape.changed:
            raise BadInput(
                f"a seed log was asked for, but earlier steps of this run had other settings ({method.tape.changed}), "
                "which one log cannot tell; export it with --to delta."
            )
        dtype = next(p.dtype for _, p in module.updates.named)
        updates = [plain(update) for update in config["model"]["updates"]]
        return cls(module.base, module.base_fingerprint, str(dtype).removeprefix("torch."), updates, method.tape.log)

    def save(self, path: str | Path) -> None:
        """Write the log as one safetensors file."""
        names = ("base", "base_fingerprint", "dtype", "updates")
        header = {"version": VERSION, **{name: getattr(self, name) for name in names}}
        signed = header | {"sha256": checksum(header, {"log": self.log})}
        save_file({"log": self.log}, path, {FORMAT: json.dumps(signed)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the log in the file at `path`.

        Raises:
            BadInput: if there is none, it is of another kind or version, or it is damaged.
        """
        if not Path(path).is_file():
            raise BadInput(f"there is no seed log at {path}; give a file that lit-sparse export --to seedlog wrote.")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(FORMAT, "null"))
                log = None if header is None else file.get_tensor("log")
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{path} cannot be read as a seed log ({error}): it is truncated, or of another kind."
            ) from error
        if log is None:
            raise BadInput(
                f"{path} is a safetensors file, but no seed log; give one that lit-sparse export --to seedlog wrote, "
                "or a checkpoint."
            )
        if not isinstance(header, dict) or header.pop("sha256", None) != checksum(header, {"log": log}):
            raise BadInput(f"{path} is damaged: its contents do not match its checksum; export the run again.")
        if header.get("version") != VERSION:
            raise BadInput(f"{path} is a seed log of another version than {VERSION}; export the run again.")
        if (odd := oddity(header, log)) is not None:
            raise BadInput(f"{path} is no seed log that lit-sparse export wrote: {odd}; export the run again.")
        del header["version"]
        return cls(**header, log=log)

    def replay(self, model: nn.Module) -> tuple[Updates, Optimizer]:
        """Take the run's steps on its base, in place; return strategies and optimizer, with which a loop can go on.

        The next step is number `len(log) + 1`.

        Raises:
            BadInput: if the model is not the base, or its weights have another dtype; it is unchanged.
        """
        self.check(fingerprint(model), {p.dtype for p in model.parameters()})
        updates = self.strategies()
        updates.attach(model)
        settle_trainable(model)  # as a run does
        optimizer = updates.optimizer(0.0)
        take_again(updates, optimizer, self.log)
        return updates, optimizer

    def apply(self, model: nn.Module) -> None:
        """Make the run's model of its base, in place.

        Raises:
            BadInput: as `replay`.
        """
        updates, _ = self.replay(model)
        updates.detach(model)

    def strategies(self) -> Updates:
        """Return the run's strategies as they were before its first step.

        Raises:
            BadInput: if there is no such strategy, or it has no such settings.
        """
        return build_module({"model": {"updates": self.updates}}, "the seed log").updates.fresh()

    def check(self, found: str, dtypes: Collection[torch.dtype]) -> None:
        """Refuse a model that is not the base of the run.

        Args:
            found: The model's fingerprint.
            dtypes: Those of its weights.

        Raises:
            BadInput: saying what differs.
        """
        if found != self.base_fingerprint:
            raise BadInput(
                f"the seed log was made of {self.base} (fingerprint {self.base_fingerprint[:12]}), this model has "
                f"other weights, or parameters of other names (fingerprint {found[:12]}); replay it on the unchanged "
                f"{self.base}."
            )
        other = {str(dtype).removeprefix("torch.") for dtype in dtypes} - {self.dtype}
        if other:
            raise BadInput(
                f"the seed log is of weights in {self.dtype}, which this model has in {', '.join(sorted(other))}; load "
                f"it with dtype=torch.{self.dtype}."
            )


def oddity(header: Mapping[str, Any], log: Tensor) -> str | None:
    """Return what a log's header or numbers have that `SeedLog.save` does not write, None if there is nothing."""
    kinds = {"version": int, "base": str, "base_fingerprint": str, "dtype": str, "updates": list}
    if header.keys() != kinds.keys():
        return f"its header has the keys {', '.join(sorted(header))}"
    for key, kind in kinds.items():
        if type(header[key]) is not kind:
            return f"its {key} is {header[key]!r:.40}"
    if not all(isinstance(update, dict) for update in header["updates"]):
        return "its updates are no configurations"
    if log.dtype != torch.float64 or log.ndim != 2 or log.shape[1] < 2:
        return f"its numbers are {log.dtype} of the shape {tuple(log.shape)}"
    return (
        "a learning rate or a slope is infinite, or a rate is NaN"
        if log.isinf().any() or log[:, 0].isnan().any()
        else None
    )


def plain(value: Any) -> Any:
    """Return a part of a configuration as dicts, which JSON can hold."""
    return value.as_dict() if isinstance(value, Namespace) else value
