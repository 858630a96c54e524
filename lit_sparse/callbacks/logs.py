"""The logs of a run: one metrics.csv and one TensorBoard folder that go on when the run does, and Trackio's."""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment as NoExperiment
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_sparse.errors import BadInput
from lit_sparse.storage.whole import replace_text


class Rows(ExperimentWriter):
    """Rows of metrics.csv, kept in memory until `go_on`; Lightning's writer deletes the file that it finds.

    Attributes:
        held: Whether rows are kept in memory still.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.held = True

    def go_on(self, step: int, evaluated: bool) -> None:
        """Write from now on, after the rows of the steps before `step`: those after it are trained again.

        Args:
            step: The optimizer step that the run goes on from.
            evaluated: Whether the evaluation after the step before is kept; False if it is run again.
        """
        path = Path(self.metrics_file_path)
        if path.is_file():
            text = path.read_text()
            table = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))  # a kill may have torn the last row
            rows = [row for row in table if int(row["step"]) < step]
            if not evaluated:
                rows = [row for row in rows if int(row["step"]) < step - 1 or row.get("train_loss")]
            self.metrics_keys = list(table.fieldnames or [])
            self._replace(rows)
        self.held = False
        self.save()

    def save(self) -> None:
        """Append the rows in memory to the file."""
        if not self.held:
            super().save()

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        replace_text(text.getvalue(), Path(self.metrics_file_path))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._replace(rows)

    def _check_log_dir_exists(self) -> None:
        """Delete nothing: the run goes on."""


class RunCSV(CSVLogger):
    """Writes metrics.csv in the folder of a run, once training has moved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Rows:
        if self._experiment is None:
            self._experiment = Rows(self.log_dir)
        return self._experiment  # pyright: ignore[reportReturnType]

    def go_on(self, step: int, evaluated: bool) -> None:
        """Write from now on; what the file has of steps from `step` on, or is evaluated again, is dropped."""
        self.experiment.go_on(step, evaluated)


class RunTensorBoard(TensorBoardLogger):
    """Writes TensorBoard's events in the folder of a run, once training has moved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="tensorboard")
        self.held = True

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return NoExperiment() if self.held else super().experiment

    def go_on(self, step: int, evaluated: bool) -> None:
        """Write from now on; TensorBoard hides what it has of steps from `step` on."""
        self.held = False
        self._kwargs |= {"purge_step": step} if step else {}


class TrackioLogger(Logger):
    """Sends the parameters and metrics of a run to Trackio, once training has moved.

    Args:
        project: Trackio's project.
        name: Name of the run in the project, which goes on where it is there already; by default, Trackio makes one up.
        group: Group of the run.
        space_id: The Hugging Face Space to log to, as `user/name`; by default, files on this machine.

    Raises:
        BadInput: if the package trackio is missing.
    """

    def __init__(
        self,
        project: str = "lit-sparse",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise BadInput("the package trackio is needed and not installed; run pip install trackio.")
        self._options = {"project": project, "name": name, "group": group, "space_id": space_id}
        self._run: Any = None
        self._held: list[tuple[dict[str, float], int | None]] = []  # until the run exists

    @property
    def name(self) -> str | None:
        return self._options["project"]

    @property
    def version(self) -> str | None:
        return self._options["name"] if self._run is None else self._run.name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        """Begin the run, with these parameters as its configuration."""
        if self._run is not None:
            return
        import trackio  # pyright: ignore[reportMissingImports] - not required; it takes seconds

        self._run = trackio.init(**self._options, config=dict(params), resume="allow", embed=False)
        for metrics, step in self._held:
            self._run.log(metrics, step=step)
        self._held.clear()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._run is None:
            self._held.append((dict(metrics), step))
        else:
            self._run.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
