"""Log lines without noise, and the progress of a fit: the screen of a command while it runs."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers.utils import logging as transformers_logging

LOG_SECONDS, SCREEN_SECONDS = 30.0, 0.1
"""Least seconds between two lines of a log, and between two states of the line on a terminal."""
RATE_STEPS = 20
"""Steps of which the speed is shown."""
WIDE, BAR, WIDE_BAR = 100, 6, 20
"""Columns from which a terminal is wide, and of the bar on others and on wide ones."""
NOISE = (
    "TPU available: ",
    "💡 Tip: ",
    "Loading `train_dataloader` to estimate",
    "Restoring states from the checkpoint path",
    "`Trainer.fit` stopped: `max_",
)
"""Beginnings of Lightning's log lines that tell a user nothing, or what other lines say."""


class Stderr:
    """Standard error as it is at each write: a progress line replaces it while it is shown."""

    def write(self, text: str) -> int:
        """Write `text`."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what was written."""
        sys.stderr.flush()


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a log line tells a user anything."""
    return not record.getMessage().startswith(NOISE)


def tidy() -> None:
    """Put Lightning's log lines above a progress line, without noise, and no bar of transformers into a file."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(Stderr())
                handler.addFilter(is_news)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


class Progress(L.Callback):
    """Shows how far a fit or an evaluation is: one line on a terminal; in a log, a line every 30 seconds.

    Not a `ProgressBar` of Lightning's, for which the loss of every step is read, which waits for the device.

    Args:
        console: Where to; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        self._shown_at = -LOG_SECONDS
        self._total: float = 0
        self._step = self._first = 0
        self._batches = 0  # of the evaluation under way
        self._ends: deque[float] = deque(maxlen=RATE_STEPS + 1)  # of steps

    # ---- the course of a fit

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._total = trainer.estimated_stepping_batches
        self._step = self._first = trainer.global_step
        self._ends.clear()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        if trainer.global_step == self._step:  # more batches are accumulated
            return
        self._step = trainer.global_step
        self._ends.append(time.monotonic())
        self._show_training(trainer, at_once=self._step == self._first + 1)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.clear()
        elif not trainer.sanity_checking:
            self._show_training(trainer, at_once=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.clear()

    # ---- evaluations

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._batches = 0

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        if trainer.sanity_checking:
            self._show_evaluation(trainer, "evaluation before training", trainer.num_sanity_val_batches)
        else:
            self._show_evaluation(trainer, "evaluation", trainer.num_val_batches)

    def on_test_batch_start(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        self._show_evaluation(trainer, "test", trainer.num_test_batches)

    def on_predict_batch_start(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        self._show_evaluation(trainer, "prediction", trainer.num_predict_batches)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clear()

    on_predict_end = on_test_end

    # ---- showing

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_training(self, trainer: L.Trainer, at_once: bool) -> None:
        if not self._due(trainer, at_once):
            return
        of = f"/{self._total:.0f}" if self._total < float("inf") else ""
        shown = trainer.callback_metrics, trainer.progress_bar_metrics
        loss = [f"train_loss {float(shown[0]['train_loss']):.4g}"] if "train_loss" in shown[0] else []
        scores = [f"{name} {value:.4g}" for name, value in shown[1].items() if name != "train_loss"]
        self._show([f"step {self._step}{of}", *self._speed(), *loss, *scores], self._step / self._total)

    def _show_evaluation(self, trainer: L.Trainer, what: str, batches: Sequence[float]) -> None:
        self._batches += 1
        if self._due(trainer, at_once=False):
            self._show([f"{what}, batch {self._batches}/{sum(batches):.0f}"], self._batches / sum(batches))

    def _speed(self) -> list[str]:
        if len(self._ends) < 2:
            return []
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        speed = f"{seconds:.2f} s/step" if seconds > 1 else f"{1 / max(seconds, 1e-9):.1f} steps/s"
        left = seconds * (self._total - self._step)
        return [speed, f"{clock(left)} left"] if left < float("inf") else [speed]

    def _due(self, trainer: L.Trainer, at_once: bool) -> bool:
        pause = SCREEN_SECONDS if self.console.is_terminal else LOG_SECONDS
        return trainer.is_global_zero and (at_once or time.monotonic() - self._shown_at >= pause)

    def _show(self, parts: list[str], share: float) -> None:
        self._shown_at = time.monotonic()
        if not self.console.is_terminal:
            print(", ".join(parts), file=sys.stderr, flush=True)
            return
        if self._live is None:
            # Drawn by hand: a thread that draws could hold a lock while a loader forks its workers.
            self._live = Live(
                console=self.console, auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty()
            )
            self._live.start()
        self._live.update(self._line(parts, share), refresh=True)

    def _line(self, parts: list[str], share: float) -> Text:
        columns = WIDE_BAR if self.console.width >= WIDE else BAR
        full = round(min(share, 1.0) * columns)
        line = Text(f"{parts[0]} ", no_wrap=True, overflow="ellipsis")
        line.append("━" * full, "cyan").append("━" * (columns - full), "bright_black")
        return line.append("".join(f"  {part}" for part in parts[1:]))


def shown(config: Any, callbacks: Sequence[L.Callback]) -> dict[str, Any]:
    """Return a trainer's arguments with `callbacks`, and `Progress` where Lightning would choose a bar itself."""
    if config.enable_progress_bar is False or any(isinstance(callback, ProgressBar) for callback in callbacks):
        return {"callbacks": [*callbacks]}
    return {"callbacks": [Progress(), *callbacks], "enable_progress_bar": False}


def clock(seconds: float) -> str:
    """Return seconds as 1:02:03, or as 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
