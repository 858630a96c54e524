"""Lightning's tools by the command line: lists of several YAMLs add up, and each tool works in a run of ours."""

import csv
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_sparse import cli
from lit_sparse_profiling.record import RunRecord
from tests.commands.test_refusals import refused
from tests.test_runs import F, step_of

RUN = Path("runs/lora-1")


def fit(*words: str, **yamls: Any) -> dict[str, Any]:
    """Fit with YAMLs of these names and contents; return the run's configuration."""
    configs = []
    for name, content in yamls.items():
        Path(f"{name}.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        configs += ["--config", f"{name}.yaml"]
    cli.run(["fit", *F, *configs, "--run=lora", *words])
    return yaml.safe_load((RUN / "config.yaml").read_text())


def classes(parts: list[dict[str, Any]]) -> list[str]:
    return [part["class_path"].rpartition(".")[2] for part in parts]


def callback(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, **({"init_args": options} if options else {})}


# ---- lists of several YAMLs


def test_callbacks_of_several_yamls_add_up(home):
    """In the README's form, as one that is no list, and from the command line; the same twice is there once."""
    forgetting = (
        "trainer:\n  callbacks:\n    - class_path: lit_sparse.callbacks.DensityMonitor\n      init_args: {error: 0.1}\n"
    )
    config = fit(
        "--trainer.max_steps=1",
        "--trainer.callbacks+=LearningRateMonitor",
        a=forgetting,
        b={"trainer": {"callbacks": callback("Timer")}},
        c=forgetting,
        d={"trainer": {"callbacks": [callback("lit_sparse.callbacks.DensityMonitor", error=0.2)]}},
    )
    found = config["trainer"]["callbacks"]
    assert classes(found) == ["DensityMonitor", "Timer", "DensityMonitor", "LearningRateMonitor"]
    assert [found[0]["init_args"]["error"], found[2]["init_args"]["error"]] == [0.1, 0.2]


def test_a_method_that_is_given_twice_alike_is_there_once(home):
    penalty = {"model": {"updates": [{"class_path": "L2SP"}]}}
    config = fit("--trainer.max_steps=1", a=penalty, b=penalty)
    assert classes(config["model"]["updates"]) == ["PEFT", "L2SP"]


def test_an_option_replaces_the_lists_of_yamls(home):
    timer = {"trainer": {"callbacks": [callback("Timer")], "logger": False}}
    config = fit("--trainer.max_steps=1", "--trainer.callbacks=[LearningRateMonitor]", "--trainer.logger=true", a=timer)
    assert classes(config["trainer"]["callbacks"]) == ["LearningRateMonitor"]
    assert config["trainer"]["logger"] is True


def test_a_single_callback_is_no_error(home):
    config = fit("--trainer.max_steps=1", a={"trainer": {"callbacks": callback("LearningRateMonitor")}})
    assert classes(config["trainer"]["callbacks"]) == ["LearningRateMonitor"]
    assert "lr-AdamW" in (RUN / "metrics.csv").read_text().splitlines()[0]


def test_loggers_of_several_yamls_add_up(home):
    one, two = ({"trainer": {"logger": [callback("CSVLogger", save_dir=name)]}} for name in ("one", "two"))
    fit("--trainer.max_steps=1", a=one, b=two)
    assert [len(list(Path(name).rglob("metrics.csv"))) for name in ("one", "two", "runs")] == [1, 1, 1]


def test_updates_of_several_yamls_add_up_and_an_empty_list_takes_out(home, caplog, capsys, monkeypatch):
    deft = {"model": {"updates": [callback("ActivationDensity")]}}
    config = fit("--trainer.max_steps=1", a=deft)
    assert classes(config["model"]["updates"]) == ["PEFT", "ActivationDensity"]
    Path("both.yaml").write_text(yaml.safe_dump({"model": {"updates": [callback("SMT")]}}))
    assert "PEFT and SMT" in refused(capsys, monkeypatch, "fit", *F, "--config", "both.yaml")
    Path("none.yaml").write_text("model: {updates: []}\n")
    cli.run(["fit", *F, "--config", "none.yaml", "--trainer.max_steps=1", "--run=none"])
    assert yaml.safe_load(Path("runs/none-1/config.yaml").read_text())["model"]["updates"] == []
    assert "none.yaml takes out model.updates of " in caplog.text


# ---- callbacks and profilers

TOOLS: dict[str, dict[str, Any]] = {
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "OnExceptionCheckpoint": {"dirpath": "failed"},
    "DeviceStatsMonitor": {},
    "Timer": {"duration": "00:01:00:00"},
    "ThroughputMonitor": {"batch_size_fn": "mine.size"},
    "RichProgressBar": {},
    "ModelSummary": {"max_depth": 2},
    "LambdaCallback": {"on_train_start": "mine.say"},
    "mine.Counter": {},
}
MINE = """
import lightning
from pathlib import Path
def size(batch):
    return len(batch["input_ids"])
def say(trainer, module):
    Path("said").write_text("started")
class Counter(lightning.Callback):
    def on_train_batch_end(self, *args, **options):
        Path("counted").write_text("x" * (args[-1] + 1))
"""


@pytest.fixture
def mine(home, monkeypatch):
    """A module of the user's in the folder in which the command runs."""
    Path("mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return home


@pytest.mark.filterwarnings("ignore:When using .*(accumulate_grad_batches|the `ThroughputMonitor`)")
@pytest.mark.parametrize(("name", "options"), TOOLS.items(), ids=TOOLS)
def test_a_callback_works_in_a_run(mine, name, options):
    words = [word for word in F if "enable_progress_bar" not in word] if name == "RichProgressBar" else F
    Path("a.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback(name, **options)]}}))
    cli.run(["fit", *words, "--config", "a.yaml", "--run=lora", "--trainer.max_steps=2"])
    assert step_of(RUN) == 2
    columns = (RUN / "metrics.csv").read_text().splitlines()[0]
    if name == "DeviceStatsMonitor":
        assert "cpu_percent" in columns
    if name == "LambdaCallback":
        assert Path("said").read_text() == "started"
    if name == "mine.Counter":
        assert Path("counted").read_text() == "xx"


REFUSED = {
    "ModelPruning": {"pruning_fn": "l1_unstructured", "amount": 0.5},
    "BackboneFinetuning": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "EMAWeightAveraging": {},
    "LearningRateFinder": {},
    "BatchSizeFinder": {},
}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(("name", "options"), REFUSED.items(), ids=REFUSED)
def test_a_callback_that_cannot_work_is_refused_before_training(home, capsys, monkeypatch, name, options):
    Path("a.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback(name, **options)]}}))
    told = refused(capsys, monkeypatch, "fit", *F, "--config", "a.yaml")
    assert f"trainer.callbacks has {name}, which does not work here" in told


def test_early_stopping_and_a_time_limit_end_a_run(home):
    stop = callback("EarlyStopping", monitor="heldout_loss", patience=1, min_delta=10.0)
    fit("--trainer.val_check_interval=2", a={"trainer": {"callbacks": stop}})
    assert step_of(RUN) == 4
    fit("--trainer.val_check_interval=2", "--ckpt_path=last", a={"trainer": {"callbacks": stop}})
    assert step_of(RUN) == 6  # it goes on within its epoch, and has no better loss either
    cli.run(["fit", *F, "--run=limited", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01"])
    assert step_of(Path("runs/limited-1")) > 0


def test_a_run_that_a_time_limit_ended_within_an_epoch_goes_on(home, monkeypatch, caplog):
    def up(timer: Timer, trainer: L.Trainer) -> None:
        trainer.should_stop |= trainer.global_step == 3

    limited = ["fit", *F, "--run=limited", "--trainer.max_time=00:01:00:00"]
    with monkeypatch.context() as patched:
        patched.setattr(Timer, "_check_time_remaining", up)
        cli.run(limited)
    assert step_of(Path("runs/limited-1")) == 3
    cli.run([*limited, "--ckpt_path=last"])
    assert step_of(Path("runs/limited-1")) == 10
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: 3600.0)
    cli.run([*limited, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert "the time limit is spent by the 3600 s up to the checkpoint at step 10" in caplog.messages[-1]


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
@pytest.mark.parametrize(
    ("name", "shown"),
    [("simple", "optimizer_step"), ("advanced", "optimizer_step"), ("pytorch", "Self CPU time total")],
)
def test_lightnings_profilers_work_beside_ours(home, caplog, name, shown):
    """torch's own profiler runs once at a time, so that the fit does without its examination."""
    ours = ["--profile.warmup=1", "--profile.timed=2", "--profile.examine=true", "--profile.profiled=1"]
    fit("--trainer.max_steps=8", f"--trainer.profiler={name}", *ours)
    assert shown in caplog.text
    record = RunRecord.read(RUN / "record.json")
    assert record.status == "ok"
    assert (record.kernels is None) == (name == "pytorch")


# ---- loggers


class Kept(Logger):
    """Keeps what a fit sends to a logger."""

    sent: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        type(self).sent = {"parameters": {}, "metrics": [], "ends": []}

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> str:
        return "0"

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **options: Any) -> None:
        self.sent["parameters"] |= dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.sent["metrics"].append((step, metrics))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.sent["ends"].append(status)


def test_a_logger_gets_parameters_metrics_and_the_end(home):
    fit("--trainer.max_steps=3", "--trainer.logger=tests.test_tools.Kept")
    sent = Kept.sent
    assert sent["parameters"]["model"]["lr"] == 5e-4
    assert sent["parameters"]["trainer"]["max_steps"] == 3
    losses = {step: metrics["train_loss"] for step, metrics in sent["metrics"] if "train_loss" in metrics}
    with (RUN / "metrics.csv").open() as file:
        assert losses == {
            int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]
        }
    assert any("heldout_loss" in metrics for _, metrics in sent["metrics"])
    assert sent["ends"] == ["success"]


def test_wandb_logs_a_run_offline(home, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = callback("WandbLogger", offline=True, project="mine", save_dir="logs")
    fit("--trainer.max_steps=2", a={"trainer": {"logger": logger}})
    assert list(Path("logs").rglob("*.wandb"))


def test_mlflow_logs_a_run_to_files(home, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    fit("--trainer.max_steps=2", a={"trainer": {"logger": callback("MLFlowLogger", tracking_uri="file:./logs")}})
    assert [path.parent.name for path in Path("logs").rglob("train_loss")] == ["metrics"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet-ml"), ("TrackioLogger", "trackio")],
)
def test_a_logger_without_its_package_names_the_command(home, capsys, monkeypatch, name, package):
    if find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    told = refused(capsys, monkeypatch, "fit", *F, f"--trainer.logger={name}")
    assert f"the package {package} is needed and not installed; run pip install {package}" in told


def test_trackio_gets_the_scalars_of_metrics_csv(home, monkeypatch):
    """By the calls of trackio 0.43, in whose place a module stands that keeps them."""
    calls: list[Any] = []
    kept = SimpleNamespace(
        name="mine",
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    trackio = ModuleType("trackio")
    trackio.__spec__ = ModuleSpec("trackio", None)
    trackio.init = lambda **options: calls.append(options) or kept
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    fit("--trainer.max_steps=3", "--trainer.logger=TrackioLogger", "--trainer.logger.name=mine")
    options, *logged, end = calls
    assert (options["project"], options["name"], options["resume"]) == ("lit-sparse", "mine", "allow")
    assert options["config"]["trainer"]["max_steps"] == 3
    sent: dict[int, dict[str, float]] = {}
    for step, metrics in logged:
        sent.setdefault(step, {}).update(metrics)
    with (RUN / "metrics.csv").open() as file:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    assert {"train_loss", "heldout_loss", "tokens_per_second", "peak_memory_gib"} <= {
        key for row in rows for key in row
    }
    for row in rows:
        assert {name: value for name, value in row.items() if name != "step"}.items() <= sent[int(row["step"])].items()
    assert end == "finish"


def test_predict_names_the_verbs_to_use():
    found = subprocess.run([sys.executable, "-m", "lit_sparse", "predict"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "use lit-sparse generate to answer a prompt with a run, or lit-sparse test" in found.stderr
