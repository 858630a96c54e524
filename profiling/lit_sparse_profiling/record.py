"""The record of a run: one JSON document, which is all that reports, tables and comparisons read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from lit_sparse_profiling.documents import parse_as, spell_nonfinite
from lit_sparse_profiling.drafts import replace_text
from lit_sparse_profiling.sections import Device, Driver, Ledger, Memory, ModelSize, Phase, Predicted, StateBytes
from lit_sparse_profiling.speed_sections import Kernels, Pair, Rank, Throughput

SCHEMA = 1
"""Incremented when records of the previous version can no longer be read. A new field with a default leaves it."""

Status = Literal["ok", "oom", "refused", "failed"]


CHECKSUM = "sha256"
"""Key of the document beside the record's own: a hash of those, by which a flipped digit is found."""


def checksum(fields: Any) -> str:
    """Return the hash of a record's fields as JSON has them, whatever their order and layout in the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of one run. Only the name is required: a run that was refused before it began has a record too.

    Attributes:
        status: How the run ended. Out of memory ("oom") is a result, not a failure.
        reason: One sentence that says why `status` is not "ok"; None if it is.
        created: Time of creation in ISO format, UTC.
        command: The command line that began the run; None if no command did.
        versions: Version by package name.
        updates: One `{"class": ..., "fields": {...}}` per update strategy.
        predicted: Memory that was predicted before the first step; None if it was not.
        settings: Everything else that defines the run: batch size, length, precision, seed.
        seconds: Wall time until the record was made, of the process, or of the fit since its setup if Python code began
            it; `walltime.parts` says what it was spent on. None where it was not measured.
        states: Optimizer and strategy state after each change of the trainable set; empty if it never changes.
        outcome: Metrics before and after training: `{"before": {"loss": ...}, "after": {"loss": ...}}`.
        samples: Generated texts.
        ranks: What each rank measured, if the run had several; `ranks.combined` says what the other sections have then.
        notes: One sentence for each figure that could not be measured.

    Raises:
        ValueError: if `status` and `reason` contradict each other.
    """

    schema: int = SCHEMA
    name: str
    status: Status = "ok"
    reason: str | None = None
    created: str = field(default_factory=_now)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: Device | None = None
    model: ModelSize | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    predicted: Predicted | None = None
    phases: list[Phase] = field(default_factory=list)
    ledger: Ledger | None = None
    memory: Memory | None = None
    throughput: Throughput | None = None
    pair: Pair | None = None
    driver: Driver | None = None
    kernels: Kernels | None = None
    states: list[StateBytes] = field(default_factory=list)
    outcome: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: list[Any] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError(
                f"A record has status {self.status!r} and reason {self.reason!r}; give a reason unless the status is "
                '"ok", and none if it is.'
            )

    @property
    def utilization(self) -> float | None:
        """FLOP/s of the timed steps as a fraction of the measured matrix-product rate; None if not measured.

        All that is executed counts: recomputation, and causal attention in full. A fraction above 1 is no figure and
        None; `utilization.findings` reports it. `utilization.utilizations` has the other conventions.
        """
        rate = None if self.throughput is None else self.throughput.flops_per_second
        if rate is None or self.kernels is None or rate > self.kernels.flops_ceiling:
            return None
        return rate / self.kernels.flops_ceiling

    @property
    def joules_per_step(self) -> float | None:
        """Energy of a timed step with the time after it, from the windows that were read; None if none was."""
        if self.driver is None or self.driver.joules is None or self.throughput is None:
            return None
        windows = self.throughput.seconds + (self.throughput.between or 0.0)  # the energy is theirs
        measured = self.driver.energy_seconds or windows
        return self.driver.joules / measured * windows / self.throughput.steps

    def write(self, path: str | Path) -> None:
        """Write the record to `path` atomically: a reader sees the old document or the new one, never a part.

        NaN and infinities, which JSON lacks, are written as "NaN", "Infinity" and "-Infinity".

        Raises:
            TypeError: if a value has no JSON form, such as a tensor or a path; nothing is written.
            ValueError: if `read` would refuse the document; nothing is written.
        """
        fields = json.loads(json.dumps(spell_nonfinite(asdict(self)), allow_nan=False))
        # Dataclasses do not check types. A wrong one must fail here, in the run that has it, and not in a later report.
        parse_as(fields, type(self), "record")
        document = json.dumps({**fields, CHECKSUM: checksum(fields)}, indent=1, allow_nan=False) + "\n"
        replace_text(Path(path), document)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the record in the file `path`.

        Raises:
            ValueError: if the file is not a complete record of this schema, or is no regular file.
            FileNotFoundError: if the file does not exist.
        """
        if Path(path).exists() and not Path(path).is_file():  # reading a pipe may not end
            raise ValueError(f"{path} is a folder, a device or a pipe; give a run's record.json.")
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a complete JSON document ({error}); repeat the run.") from error
        if not isinstance(document, dict) or "schema" not in document:
            raise ValueError(f"{path} is JSON but not a run record (it has no schema); give a run's record.json.")
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"{path} is a record of schema {document['schema']}, and this version reads schema {SCHEMA}; "
                "read it with the version that wrote it, or repeat the run."
            )
        signed = document.pop(CHECKSUM, None)  # which those of earlier versions lack
        try:
            record = parse_as(document, cls, "record")
        except ValueError as error:
            raise ValueError(f"{path} is not a valid run record: {error}; correct it, or repeat the run.") from error
        if signed is not None and signed != checksum(document):
            raise ValueError(
                f"{path} is damaged or was changed by hand: its contents do not match its {CHECKSUM}; give a copy of "
                f"it, repeat the run, or remove its key {CHECKSUM} if the change is meant."
            )
        return record
