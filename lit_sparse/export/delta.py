"""Deltas: the changes of a run to its base, as one small file that can be applied and removed again.

The file is a safetensors file. Chosen blocks of a linear layer are two tensors, `index/<layer>` (N, 2) int32 and
`values/<layer>` (N, h, w) fp32, of its weight as (out, in). Single entries of a parameter are `places/<parameter>`
(N,) int32, counted row by row (int64 from 2^31 entries on), and `entries/<parameter>` (N,) fp32. Another changed
parameter is `whole/<parameter>` in fp32. Its metadata has one key, FORMAT, with a JSON object: version, base, the
base's fingerprint, the strategies, the block sizes, and a checksum of everything. Equal deltas are equal files, byte
for byte.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_sparse.anatomy import weight_matrix
from lit_sparse.blocks.grid import Blocks, grid
from lit_sparse.checkpoints import fingerprint
from lit_sparse.errors import BadInput

FORMAT = "lit_sparse.delta"
VERSIONS = (1, 2)
"""Versions that are read. A delta with single entries is of version 2, which older readers refuse; others are of 1."""


@dataclass(frozen=True, eq=False)
class ChangedBlocks:
    """New values of chosen blocks of a linear layer's weight, or of the matrix of one expert.

    Attributes:
        name: The linear layer; or the parameter of fused experts with a number, as in `mlp.experts.down_proj[3]`.
        blocks: The N blocks, in its weight as (out, in).
        values: (N, h, w) fp32; zeros where a block reaches over the edge of the weight.
    """

    name: str
    blocks: Blocks
    values: Tensor

    def target(self, model: nn.Module) -> Tensor:
        """Return the weight in `model`, as (out, in).

        Raises:
            BadInput: if there is no such linear layer or expert, or it has no such blocks.
        """
        found, index = weight_matrix(model, self.name), self.blocks.index
        if found is None:
            raise BadInput(
                f"the delta changes blocks of {self.name}, which is no linear layer of this {type(model).__name__}; "
                "apply it to the model it was made for."
            )
        weight = found.detach()
        outside = (index < 0) | (index >= torch.tensor(grid(weight, self.blocks.size)))
        if outside.any() or self.values.shape != (len(index), *self.blocks.size):
            raise BadInput(
                f"the delta's blocks of {self.name} do not fit its weight of {' x '.join(map(str, weight.shape))} in "
                f"this {type(model).__name__}; apply it to the model it was made for."
            )
        return weight

    def read(self, target: Tensor) -> Tensor:
        """Return a copy of the current values at the place of this change."""
        return self.blocks.read(target)

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write `values` to the place of this change, cast to the target's dtype."""
        self.blocks.write(target, values)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this change in the file, by key."""
        return {f"index/{self.name}": self.blocks.index, f"values/{self.name}": self.values}


@dataclass(frozen=True, eq=False)
class ChangedParameter:
    """New values (fp32) of a whole parameter."""

    name: str
    values: Tensor

    def target(self, model: nn.Module) -> Tensor:
        """Return the parameter in `model`.

        Raises:
            BadInput: if there is none of that name and shape.
        """
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(self.name)
        if parameter is None or parameter.shape != self.values.shape:
            found = "has none" if parameter is None else f"has one of {tuple(parameter.shape)}"
            raise BadInput(
                f"the delta changes a parameter {self.name} of {tuple(self.values.shape)}, but this "
                f"{type(model).__name__} {found}; apply it to the model it was made for."
            )
        return parameter.detach()

    def read(self, target: Tensor) -> Tensor:
        """Return a copy of the current values at the place of this change."""
        return target.clone()

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write `values` to the place of this change, cast to the target's dtype."""
        target.copy_(values)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this change in the file, by key."""
        return {f"whole/{self.name}": self.values}


@dataclass(frozen=True, eq=False)
class ChangedEntries:
    """New values of single entries of a parameter.

    Attributes:
        name: The parameter.
        places: Their positions, counted row by row, (N,) int32 or int64, sorted.
        values: (N,) fp32.
    """

    name: str
    places: Tensor
    values: Tensor

    @classmethod
    def between(cls, name: str, before: Tensor, after: Tensor) -> Self:
        """Return the entries in which `after` differs from `before`."""
        places = (after != before).flatten().nonzero().squeeze(1)
        kind = torch.int32 if after.numel() < 2**31 else torch.int64
        return cls(name, places.to(kind), after.flatten()[places])

    def target(self, model: nn.Module) -> Tensor:
        """Return the parameter in `model`.

        Raises:
            BadInput: if there is none of that name, or it has no such entries.
        """
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(self.name)
        if parameter is None:
            raise BadInput(
                f"the delta changes entries of {self.name}, which this {type(model).__name__} does not have; apply it "
                "to the model it was made for."
            )
        inside = (self.places >= 0) & (self.places < parameter.numel())
        if not inside.all() or self.places.shape != self.values.shape:
            raise BadInput(
                f"the delta's entries of {self.name} do not fit its {parameter.numel():,} in this "
                f"{type(model).__name__}; apply it to the model it was made for."
            )
        return parameter.detach()

    def read(self, target: Tensor) -> Tensor:
        """Return a copy of the current values at the place of this change."""
        return target.flatten()[self.places.long().to(target.device)]

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write `values` to the place of this change, cast to the target's dtype."""
        places = torch.unravel_index(self.places.long().to(target.device), target.shape)
        target[places] = values.to(target.device, target.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this change in the file, by key."""
        return {f"places/{self.name}": self.places, f"entries/{self.name}": self.values}


Change = ChangedBlocks | ChangedEntries | ChangedParameter


@dataclass(frozen=True, eq=False)
class Delta:
    """The changes of a run to its base.

    Attributes:
        base: The base as the run named it.
        base_fingerprint: `lit_sparse.checkpoints.fingerprint` of the base, the only model that it applies to.
        updates: Names of the strategies that the run trained with.
        changes: New values, in fp32; `apply` casts them to the model's dtype.
    """

    base: str
    base_fingerprint: str
    updates: tuple[str, ...]
    changes: tuple[Change, ...]

    def save(self, path: str | Path) -> None:
        """Write the delta as one safetensors file."""
        header = {
            "version": 2 if any(isinstance(change, ChangedEntries) for change in self.changes) else 1,
            "base": self.base,
            "base_fingerprint": self.base_fingerprint,
            "updates": list(self.updates),
            "block_sizes": {c.name: list(c.blocks.size) for c in self.changes if isinstance(c, ChangedBlocks)},
        }
        tensors = {key: value.contiguous() for change in self.changes for key, value in change.tensors().items()}
        signed = header | {"sha256": checksum(header, tensors)}
        save_file(tensors, path, {FORMAT: json.dumps(signed)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the delta in the file at `path`.

        Raises:
            BadInput: if there is none, it is no delta or one of another version, or it is damaged.
        """
        header, tensors = contents(path)
        blocks = (
            ChangedBlocks(name, Blocks((height, width), tensors[f"index/{name}"]), tensors[f"values/{name}"])
            for name, (height, width) in header["block_sizes"].items()
        )
        whole = (
            ChangedParameter(key.removeprefix("whole/"), value)
            for key, value in tensors.items()
            if key.startswith("whole/")
        )
        entries = (
            ChangedEntries(name := key.removeprefix("entries/"), tensors[f"places/{name}"], value)
            for key, value in tensors.items()
            if key.startswith("entries/")
        )
        return cls(header["base"], header["base_fingerprint"], tuple(header["updates"]), (*blocks, *entries, *whole))

    def apply(self, model: nn.Module) -> None:
        """Write the changes into `model` in place, and keep the values that they replace for `remove`.

        Raises:
            BadInput: if the model is not the base, or has a delta applied already; the model is unchanged.
        """
        if model in _applied:
            raise BadInput("a delta is applied to this model already; take that one off first, with its remove().")
        found = fingerprint(model)
        if found != self.base_fingerprint:
            raise BadInput(
                f"the delta was made of {self.base} (fingerprint {self.base_fingerprint[:12]}), this model is another "
                f"or was changed (fingerprint {found[:12]}); apply it to the unchanged {self.base}."
            )
        targets = [change.target(model) for change in self.changes]
        displaced = [change.read(target) for change, target in zip(self.changes, targets, strict=True)]
        for change, target in zip(self.changes, targets, strict=True):
            change.write(target, change.values)
        _applied[model] = Applied(self, displaced)

    def remove(self, model: nn.Module) -> None:
        """Restore, bit for bit, the values that `apply` replaced in `model`.

        Raises:
            BadInput: if this delta is not applied to `model`, or its weights were changed since; they are left alone.
        """
        if model not in _applied or _applied[model].delta is not self:
            raise BadInput("this delta is not applied to this model; there is nothing to take off.")
        targets = [change.target(model) for change in self.changes]
        for change, target in zip(self.changes, targets, strict=True):
            now = change.read(target)
            if not torch.equal(now, change.values.to(target.device, target.dtype).to(now.dtype)):
                raise BadInput(
                    f"{change.name} is no longer what the delta wrote, so that taking it off would not give the base "
                    f"back; load {self.base} anew."
                )
        for change, target, values in zip(self.changes, targets, _applied[model].displaced, strict=True):
            change.write(target, values)
        del _applied[model]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Apply the delta to `model` for the duration of a `with` block."""
        self.apply(model)
        try:
            yield
        finally:
            self.remove(model)


@dataclass(frozen=True, eq=False)
class Applied:
    """A delta applied to a model, and the values that it replaced, one tensor for each change."""

    delta: Delta
    displaced: list[Tensor]


_applied: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()


def contents(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors of the delta file at `path`.

    Raises:
        BadInput: if there is none, it is no delta or one of another version, or it is damaged.
    """
    if not Path(path).is_file():
        raise BadInput(f"there is no delta at {path}; give a file that lit-sparse export RUN --to delta wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as a delta ({error}): it is truncated, or of another kind.") from error
    if not isinstance(header, dict):
        raise BadInput(f"{path} is a safetensors file, but no delta; give one that lit-sparse export --to delta wrote.")
    if header.get("version") not in VERSIONS:
        raise BadInput(
            f"{path} is a delta of version {header.get('version')}, this lit_sparse reads version "
            f"{' or '.join(map(str, VERSIONS))}; export the run again, or use the lit_sparse that wrote it."
        )
    if header.pop("sha256", None) != checksum(header, tensors):
        raise BadInput(f"{path} is damaged: its contents do not match its checksum; export the run again.")
    if (odd := oddity(header, tensors)) is not None:
        raise BadInput(f"{path} is no delta that lit-sparse export wrote: {odd}; export the run again.")
    return header, tensors


def oddity(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Return what a delta's header or tensors have that `Delta.save` does not write, None if there is nothing.

    A checksum tells damage; whoever writes a file can compute it too.
    """
    kinds = {"version": int, "base": str, "base_fingerprint": str, "updates": list, "block_sizes": dict}
    if header.keys() != kinds.keys():
        return f"its header has the keys {', '.join(sorted(header))}"
    for key, kind in kinds.items():
        if type(header[key]) is not kind:
            return f"its {key} is {header[key]!r:.40}"
    if not all(isinstance(name, str) for name in header["updates"]):
        return "its updates are no names"
    for name, size in header["block_sizes"].items():
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            return f"the block size of {name} is {size!r:.40}"
    blocks = {f"{part}/{name}" for name in header["block_sizes"] for part in ("index", "values")}
    whole = {key.removeprefix("whole/") for key in tensors if key.startswith("whole/")}
    single = {key.partition("/")[2] for key in tensors if key.startswith(("places/", "entries/"))}
    wanted = blocks | {f"{part}/{name}" for name in single for part in ("places", "entries")}
    if other := wanted ^ (tensors.keys() - {f"whole/{name}" for name in whole}):
        return f"{min(other)} is {'not there' if min(other) in wanted else 'a tensor that belongs to nothing'}"
    of_blocks = set(map(owner_of, header["block_sizes"]))
    if twice := (whole & single) | (whole & of_blocks) | (single & of_blocks):
        return f"{min(twice)} is changed twice"
    odd = (
        *(odd_tensor(key, value) for key, value in sorted(tensors.items())),
        *(odd_blocks(name, size, tensors) for name, size in header["block_sizes"].items()),
        *(odd_entries(name, tensors) for name in sorted(single)),
    )
    return next(filter(None, odd), None)


def owner_of(matrix: str) -> str:
    """Return the name of the parameter that holds the weight of a linear layer, or the matrix of an expert."""
    fused, _, number = matrix.partition("[")
    return fused if number else f"{matrix}.weight"


def odd_tensor(key: str, value: Tensor) -> str | None:
    """Return what is wrong with the dtype or the values of a tensor of a delta; None if nothing is."""
    places, index = key.startswith("places/"), key.startswith("index/")
    dtypes = (torch.int32, torch.int64) if places else (torch.int32,) if index else (torch.float32,)
    if value.dtype not in dtypes:
        return f"{key} is {value.dtype}, and not {' or '.join(map(str, dtypes))}"
    return None if value.isfinite().all() else f"{key} is not finite"


def odd_blocks(name: str, size: list[int], tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the places or the shape of a layer's blocks; None if nothing is."""
    index, values = tensors[f"index/{name}"], tensors[f"values/{name}"]
    if index.ndim != 2 or index.shape[1] != 2 or values.shape != (len(index), *size):
        return f"the blocks of {name} have the shapes {tuple(index.shape)} and {tuple(values.shape)}"
    return None if len(index.unique(dim=0)) == len(index) else f"a block of {name} is there twice"


def odd_entries(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with the places of a parameter's single entries; None if nothing is."""
    places, values = tensors[f"places/{name}"], tensors[f"entries/{name}"]
    if places.ndim != 1 or places.shape != values.shape:
        return f"the entries of {name} have the shapes {tuple(places.shape)} and {tuple(values.shape)}"
    return None if bool((places[1:] > places[:-1]).all()) else f"the entries of {name} are not in order, or one twice"


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a delta's header and tensors: safetensors itself does not notice a flipped bit."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
