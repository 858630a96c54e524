"""Bridges from Lightning to the record of a run."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lit_sparse.data import TokenData
from lit_sparse.data.collate import Question, Questions, token_counts
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import trainable
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse_profiling.ledger import ledger
from lit_sparse_profiling.record import Device, Memory, ModelSize, RunRecord, Status, Throughput

PACKAGES = ("torch", "lightning", "transformers", "peft")
SAMPLE_TOKENS = 96
CHECKPOINT_STEPS = 100
"""Optimizer steps from one last checkpoint to the next."""


class Recorder(Callback):
    """Writes the record of a fit, keeps its last checkpoint, and prints what the fit changed and what it took.

    Args:
        folder: The run's folder.
        settings: The run's configuration, for the record.
        samples: How many held-out questions are answered before and after training.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], samples: int = 2) -> None:
        self.folder, self.settings, self.samples = folder, dict(settings), samples
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.answers: list[dict[str, Any]] = []
        self._tokens: Tensor | int = 0
        self._positions = 0
        self._steps = 0
        self._saved = -1

    # ---- phases

    def on_train_start(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        self._answer(trainer, pl_module, "before")
        pl_module.phases.begin("training")

    def on_train_end(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        pl_module.phases.end("training")
        if self._saved != trainer.global_step:  # the training ended by a time limit, say
            self._save(trainer, pl_module)
        self._answer(trainer, pl_module, "after")
        if trainer.is_global_zero:
            record = self.record(trainer, pl_module)
            record.write(self.folder / "record.json")
            print_summary(record, self.folder)

    def on_validation_start(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            pl_module.phases.end("training")
        pl_module.phases.begin("evaluation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: CausalLM) -> None:  # pyright: ignore
        pl_module.phases.end("evaluation")
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "train_loss"}
        if trainer.sanity_checking:
            self.before = scores
            return
        self.after = scores
        if trainer.state.fn == "fit":
            pl_module.phases.begin("training")

    def on_train_batch_end(  # pyright: ignore
        self, trainer: L.Trainer, pl_module: CausalLM, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens, positions = token_counts(batch)
        self._tokens = self._tokens + tokens  # read at the end: reading it now would wait for the device
        self._positions += positions
        self._steps += 1
        step = trainer.global_step
        # Saved here and not at the end of training, where Lightning has counted an unfinished epoch as finished.
        if step != self._saved and (step % CHECKPOINT_STEPS == 0 or step == trainer.max_steps or trainer.is_last_batch):
            pl_module.phases.end("training")
            self._save(trainer, pl_module)
            pl_module.phases.begin("training")

    def on_exception(self, trainer: L.Trainer, pl_module: CausalLM, exception: BaseException) -> None:  # pyright: ignore
        if isinstance(exception, BadInput) or not trainer.is_global_zero or not self.folder.is_dir():
            return
        status: Status = "oom" if isinstance(exception, torch.OutOfMemoryError) else "failed"
        reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
        RunRecord(name=self.folder.name, status=status, reason=reason, settings=self.settings).write(
            self.folder / "record.json"
        )

    # ---- results

    def _save(self, trainer: L.Trainer, module: CausalLM) -> None:
        last = self.folder / "checkpoints" / "last.ckpt"
        with module.phases("saving"):  # a run that is killed here keeps the checkpoint before
            trainer.save_checkpoint(last.with_suffix(".part"))
            if trainer.is_global_zero:
                os.replace(last.with_suffix(".part"), last)
        self._saved = trainer.global_step

    def _answer(self, trainer: L.Trainer, module: CausalLM, moment: str) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        samples = data.samples[: self.samples] if isinstance(data, TokenData) else []
        if not samples:
            return
        with module.phases("samples"):
            batch = Questions(data.padding)([Question(sample["prompt_ids"], "") for sample in samples])
            texts = module.answer(
                batch["prompt_ids"].to(module.device), batch["prompt_mask"].to(module.device), SAMPLE_TOKENS
            )
        if not self.answers:
            self.answers = [{"prompt": s["prompt"], "reference": s["reference"]} for s in samples]
        for answer, text in zip(self.answers, texts, strict=True):
            answer[moment] = text.strip()

    def record(self, trainer: L.Trainer, module: CausalLM) -> RunRecord:
        """The record of the fit that has just ended."""
        model, phases, memory = module.build(), module.phases.to_list(), module.phases.memory
        seconds = next(phase.seconds for phase in phases if phase.name == "training")
        trained = sum(parameter.numel() for _, parameter in trainable(model))
        return RunRecord(
            name=self.folder.name,
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            device=device_of(module),
            model=ModelSize(base=module.base, parameters=module.base_parameters, trainable=trained),
            updates=[{"class": type(u).__name__, "fields": fields(u)} for u in module.updates],
            settings=self.settings,
            phases=phases,
            ledger=ledger(model, trainer.optimizers[0], [update.state_dict() for update in module.updates]),
            memory=Memory(memory.peak(), memory.method),
            throughput=Throughput(int(self._tokens), self._positions, seconds, self._steps) if self._steps else None,
            outcome={moment: scores for moment, scores in (("before", self.before), ("after", self.after)) if scores},
            samples=self.answers,
        )


def fields(update: UpdateStrategy) -> dict[str, Any]:
    """The fields of a strategy as plain values, for a record."""
    if not dataclasses.is_dataclass(update):
        return {}
    values = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    return {name: value.to_dict() if isinstance(value, PeftConfig) else value for name, value in values.items()}


def device_of(module: L.LightningModule) -> Device:
    """The device that the module is on."""
    if module.device.type == "cuda":
        properties = torch.cuda.get_device_properties(module.device)
        return Device("cuda", properties.name, memory=properties.total_memory)
    return Device(
        "cpu",
        platform.processor() or platform.machine(),
        cores=torch.get_num_threads(),
        memory=psutil.virtual_memory().total,
    )


def print_summary(record: RunRecord, folder: Path, console: Console | None = None) -> None:
    """What a fit changed and what it took, as tables on the terminal."""
    console = console or Console()
    console.print(summary(record))
    for sample in record.samples:
        console.print(answers(sample))
    console.print(f"Files: {folder}/ (config.yaml, record.json, metrics.csv, checkpoints/last.ckpt)")


def summary(record: RunRecord) -> Table:
    """The table at the end of a fit."""
    table = Table(title=f"{record.name}: what the fit changed, and what it took")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name in record.outcome.get("after", {}):
        before = record.outcome.get("before", {}).get(name)
        table.add_row(
            name.replace("_", " "), "-" if before is None else f"{before:.4f}", f"{record.outcome['after'][name]:.4f}"
        )
    table.add_section()
    for name, value in totals(record):
        table.add_row(name, "", value)
    return table


def totals(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Sizes, speed, and seconds of a fit, in words."""
    if record.model is not None:
        model = record.model
        yield "trainable", f"{model.trainable:,} of {model.parameters:,} ({model.trainable / model.parameters:.2%})"
    if record.throughput is not None:
        yield (
            "tokens/s (with padding)",
            f"{record.throughput.tokens_per_second:,.0f} ({record.throughput.padded_tokens_per_second:,.0f})",
        )
    if record.memory is not None and record.memory.peak_resident is not None:
        yield "peak memory of the process", f"{record.memory.peak_resident / 2**30:.2f} GiB"
    for phase in record.phases:
        peak = "" if phase.peak_rss is None else f" (peak {phase.peak_rss / 2**30:.2f} GiB)"
        yield f"seconds of {phase.name}", f"{phase.seconds:.1f}{peak}"


def answers(sample: Mapping[str, str]) -> Table:
    """A held-out question with the answers before and after training."""
    table = Table(show_header=False)
    for key in ("prompt", "reference", "before", "after"):
        if key in sample:
            table.add_row(key, Text(sample[key]))  # Text: nothing in it is markup
    return table
