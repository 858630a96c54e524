"""Runs are never lost: what a fit writes and when, whose folder it is, how it ends, and what a new one starts from.

By the command line and with its settings: one epoch is the default, and all that is not named here is too.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest
import torch
import yaml

from lit_sparse import cli
from lit_sparse.callbacks import recorder
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.runs import LAST, check_name
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.run_folders import folders, next_folder
from tests.test_cli import refused

F = [
    *("--config", "lora.yaml", "--model.base", "tiny", "--data", "Instructions", "--data.train", "rows.jsonl"),
    *("--data.heldout=4", "--data.max_length=16", "--data.batch_size=2", "--data.num_workers=0", "--samples=0"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
    *("--profile.warmup=0", "--profile.examine=false", "--profile.profiled=0"),
]
"""24 rows: 10 batches an epoch."""


def fit(*words: str) -> None:
    cli.run(["fit", *F, *words])


def tree(folder: str | Path = ".") -> dict[str, bytes]:
    """All files under a folder, with their contents."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def losses(run: Path) -> dict[int, str]:
    """The training losses in a run's metrics.csv, by step, each step once."""
    with (run / "metrics.csv").open() as file:
        rows = [(int(row["step"]), row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(dict(rows)) == len(rows), f"steps are logged twice: {rows}"
    return dict(rows)


def step_of(run: Path) -> int:
    return torch.load(run / LAST, weights_only=True)["global_step"]


RUN = Path("runs/lora-1")


# ---- nothing is overwritten until training moves


REFUSED = {
    "another base": (["--model.base=other"], "another base"),
    "another method": (["--model.updates=[]"], "the checkpoint was trained with"),
    "no such file": (["--data.train=nowhere.jsonl"], "nowhere.jsonl"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_resume_leaves_the_run_as_it_was(home, capsys, monkeypatch, words, message):
    fit("--trainer.max_steps=2")
    from lit_sparse.testing import tiny_llm

    tiny_llm("llama", seed=1).save_pretrained("other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("other", name).write_bytes(Path("tiny", name).read_bytes())
    before = tree("runs")
    told = refused(capsys, monkeypatch, "fit", *F, "--trainer.max_steps=4", "--ckpt_path=last", *words)
    assert message in told
    assert tree("runs") == before


def test_a_resume_that_fails_in_its_first_step_leaves_the_run_as_it_was(home, monkeypatch):
    fit("--trainer.max_steps=2")
    before = tree("runs")

    def broken(self, batch, batch_idx):
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(CausalLM, "training_step", broken)
    with pytest.raises(RuntimeError, match="fell out"):
        fit("--trainer.max_steps=4", "--ckpt_path=last")
    assert tree("runs") == before


@pytest.mark.parametrize("words", [["--trainer.max_steps=2"], []])
def test_a_resume_with_nothing_left_to_do_says_so_and_leaves_the_run(home, caplog, words):
    fit(*words)
    before = tree("runs")
    fit(*words, "--ckpt_path=last")
    assert tree("runs") == before
    assert "Nothing was left to do: the checkpoint is at step" in caplog.text


def test_a_run_that_goes_on_has_one_record_and_one_table_of_metrics(home):
    fit("--trainer.max_steps=4", "--config", "smt.yaml", "--run=both", "--model.updates=[SMT]")
    run = Path("runs/both-1")
    first = RunRecord.read(run / "record.json")
    fit("--trainer.max_steps=9", "--config", "smt.yaml", "--run=both", "--model.updates=[SMT]", "--ckpt_path=last")
    record = RunRecord.read(run / "record.json")
    assert record.outcome["before"] == first.outcome["before"]
    assert record.outcome["after"] != first.outcome["after"]
    assert record.created == first.created
    assert first.throughput is not None
    assert record.throughput is not None
    assert (first.throughput.steps, record.throughput.steps) == (4, 9)
    seconds = [{phase.name: phase.seconds for phase in one.phases} for one in (first, record)]
    assert seconds[1]["selection"] == seconds[0]["selection"]
    assert all(seconds[1][name] >= seconds[0][name] for name in seconds[0])
    assert list(losses(run)) == list(range(9))
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 9
    assert [path.name for path in Path("runs").iterdir()] == ["both-1"]


def test_after_a_kill_metrics_go_on_from_the_checkpoint(home, monkeypatch):
    """Steps after it are trained again, and are in the table once. The first part wrote no record of its own."""
    fit("--trainer.max_steps=9", "--checkpoint_steps=4")
    straight = losses(RUN)
    killed = CausalLM.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 7:
            os._exit(9)
        return killed(self, batch, batch_idx)

    monkeypatch.setattr(CausalLM, "training_step", dies)
    if (child := os.fork()) == 0:
        fit("--trainer.max_steps=9", "--checkpoint_steps=4", "--run=mine")
    assert os.waitpid(child, 0)[1] == 9 << 8
    monkeypatch.undo()
    monkeypatch.chdir(home)
    run = Path("runs/mine-1")
    assert list(losses(run)) == list(range(7))
    assert not (run / "record.json").exists()
    fit("--trainer.max_steps=9", "--checkpoint_steps=4", "--run=mine", "--ckpt_path=last")
    assert losses(run) == straight
    record = RunRecord.read(run / "record.json")
    assert record.throughput is not None
    assert record.throughput.steps == 9
    assert record.outcome["before"] == RunRecord.read(RUN / "record.json").outcome["before"]


@pytest.mark.parametrize("words", [["--trainer.limit_val_batches=0"], []], ids=["nothing held out", "held out"])
def test_a_run_killed_between_its_last_checkpoint_and_its_record_gets_one(home, caplog, words):
    fit("--trainer.max_steps=3", *words)
    record, saved = RunRecord.read(RUN / "record.json"), (RUN / LAST).read_bytes()
    (RUN / "record.json").unlink()
    fit("--trainer.max_steps=3", *words, "--ckpt_path=last")
    again = RunRecord.read(RUN / "record.json")
    assert again.status == "ok"
    assert words or again.outcome == record.outcome
    assert again.throughput is not None
    assert again.throughput.steps == 3
    assert (RUN / LAST).read_bytes() == saved
    assert list(losses(RUN)) == [0, 1, 2]
    assert "Nothing was left to do" not in caplog.text


def test_a_new_run_that_is_refused_leaves_no_folder_and_one_that_fails_leaves_its_record(home, capsys, monkeypatch):
    refused(capsys, monkeypatch, "fit", *F, "--trainer.max_steps=2", "--data.train=nowhere.jsonl")
    assert not list(Path().glob("runs/*"))

    def broken(self, batch, batch_idx):
        raise RuntimeError("the card fell out")

    monkeypatch.setattr(CausalLM, "training_step", broken)
    with pytest.raises(RuntimeError, match="fell out"):
        fit("--trainer.max_steps=4")
    assert RunRecord.read(RUN / "record.json").status == "failed"
    assert (RUN / "config.yaml").is_file()


# ---- whose folder it is


@pytest.mark.parametrize("path", ["ckpts/mine.ckpt", "mine.ckpt", "checkpoints/mine.ckpt"])
def test_a_checkpoint_elsewhere_begins_a_run_of_its_own(home, path):
    fit("--trainer.max_steps=2")
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes((RUN / LAST).read_bytes())
    Path("config.yaml").write_text("mine: true\n")
    before = tree("runs")
    fit("--trainer.max_steps=4", "--run=next", f"--ckpt_path={path}")
    assert Path("config.yaml").read_text() == "mine: true\n"
    assert {path: content for path, content in tree("runs").items() if "lora-1" in path} == before
    assert step_of(Path("runs/next-1")) == 4
    assert sorted(path.name for path in Path().iterdir() if path.is_file()) == sorted(
        {"config.yaml", "rows.jsonl", *([path] if "/" not in path else [])}
    )


def test_a_runs_own_checkpoint_goes_on_in_its_folder(home):
    fit("--trainer.max_steps=2")
    fit("--trainer.max_steps=4", f"--ckpt_path={(RUN / LAST).resolve()}")
    assert [path.name for path in Path("runs").iterdir()] == ["lora-1"]
    assert list(losses(RUN)) == [0, 1, 2, 3]


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("path", ["best", "hpc", "nowhere.ckpt"])
def test_a_checkpoint_that_is_not_there_is_named(home, capsys, monkeypatch, verb, path):
    words = [*F[: F.index("--samples=0")], "--trainer.accelerator=cpu"]
    told = refused(capsys, monkeypatch, verb, *words, f"--ckpt_path={path}")
    assert f"--ckpt_path {path} was asked for, but there is no such file" in told
    assert not list(Path().glob("runs/*"))


def test_a_runs_config_starts_a_new_run_and_not_the_old_checkpoint(home):
    fit("--trainer.max_steps=2")
    fit("--trainer.max_steps=4", "--ckpt_path=last")
    cli.run(["fit", "--config", str(RUN / "config.yaml"), "--trainer.max_steps=1"])
    assert step_of(Path("runs/lora-2")) == 1
    assert step_of(RUN) == 4


# ---- names


@pytest.mark.parametrize("name", ["exp [v1]", "a/b", "50% *", "[bold]x[/bold]", "-x", "ä b"])
def test_a_run_may_have_any_name_that_a_folder_may(home, capsys, name):
    for number in (1, 2):
        fit("--trainer.max_steps=1", f"--run={name}")
        assert (Path("runs") / f"{name}-{number}" / "record.json").is_file()
        shown = " ".join(capsys.readouterr().out.split())
        assert f"{Path(name).name}-{number}: what the fit changed" in shown
        assert f"Files: runs/{name}-{number}/" in shown
    before = tree(f"runs/{name}-1")
    fit("--trainer.max_steps=2", f"--run={name}", "--ckpt_path=last")
    assert step_of(Path("runs") / f"{name}-2") == 2
    assert tree(f"runs/{name}-1") == before


def test_folders_of_names_with_special_characters_are_found(tmp_path):
    for name in ("a[b]-1", "a[b]-2", "ab-7", "x/y-3"):
        (tmp_path / name).mkdir(parents=True)
    assert [path.name for path in folders(tmp_path, "a[b]")] == ["a[b]-1", "a[b]-2"]
    assert next_folder(tmp_path, "x/y") == tmp_path / "x/y-4"
    assert next_folder(tmp_path, "*") == tmp_path / "*-1"


@pytest.mark.parametrize("name", ["../up", "/elsewhere", "a/", "a/../../b", ".", "a\nb", "s3://b", "a::b", "\x00"])
def test_a_name_that_is_no_folder_of_the_runs_is_refused(name):
    with pytest.raises(BadInput, match="--run"):
        check_name(name)


# ---- a new run starts fresh


def slurm(monkeypatch) -> None:
    for key, value in {"JOB_ID": "7", "NTASKS": "1", "JOB_NAME": "fit", "LOCALID": "0", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    for key in ("NODEID", "NODELIST"):
        monkeypatch.setenv(f"SLURM_{key}", "0" if key == "NODEID" else "localhost")


def test_a_checkpoint_of_slurm_is_not_taken_up_by_another_run(home, monkeypatch):
    fit("--trainer.max_steps=2")
    Path("runs/hpc_ckpt_1.ckpt").write_bytes((RUN / LAST).read_bytes())
    slurm(monkeypatch)
    fit("--trainer.max_steps=1", "--run=next")
    assert step_of(Path("runs/next-1")) == 1
    cli.run(["validate", *F[: F.index("--samples=0")], "--trainer.accelerator=cpu"])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_of_a_failed_fit_is_not_taken_up_by_another_run(home):
    fit("--trainer.max_steps=2")
    Path("failed").mkdir()
    for name in ("on_exception.ckpt", "last.ckpt"):
        Path("failed", name).write_bytes((RUN / LAST).read_bytes())
    Path("callbacks.yaml").write_text(
        "trainer:\n  callbacks:\n"
        "    - {class_path: lightning.pytorch.callbacks.OnExceptionCheckpoint, init_args: {dirpath: failed}}\n"
        "    - {class_path: ModelCheckpoint, init_args: {dirpath: failed, save_last: true}}\n"
    )
    fit("--trainer.max_steps=1", "--run=next", "--config", "callbacks.yaml")
    assert step_of(Path("runs/next-1")) == 1


def test_a_trial_of_one_batch_leaves_no_run(home, capsys, monkeypatch):
    fit("--trainer.fast_dev_run=true")
    assert not list(Path().glob("runs/*"))
    told = refused(capsys, monkeypatch, "fit", *F, "--ckpt_path=last")
    assert "no run lora-<n>" in told
    assert "which a fit saves every --checkpoint_steps steps" in told


def test_without_loggers_everything_is_in_the_runs_folder(home):
    fit("--trainer.logger=false", "--trainer.max_steps=2")
    assert [path.name for path in Path("runs").iterdir()] == ["lora-1"]
    assert (RUN / "config.yaml").is_file()
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=kept"]
    fit("--trainer.logger=false", "--trainer.max_steps=2", *keep, "--trainer.callbacks.every_n_train_steps=1")
    assert {path.name for path in Path("runs").iterdir()} == {"lora-1", "lora-2"}
    assert (Path("runs/lora-2/checkpoints") / "kept.ckpt").is_file()


# ---- an end with a result


def test_a_fit_that_ends_in_mid_epoch_shows_the_loss_before_and_after(home, capsys):
    fit("--trainer.max_steps=3")
    outcome = RunRecord.read(RUN / "record.json").outcome
    assert outcome["before"].keys() == outcome["after"].keys() >= {"heldout_loss"}
    assert outcome["before"]["heldout_loss"] != outcome["after"]["heldout_loss"]
    row = next(line for line in capsys.readouterr().out.splitlines() if "heldout loss" in line)
    assert f"{outcome['before']['heldout_loss']:.4f}" in row
    assert f"{outcome['after']['heldout_loss']:.4f}" in row


def test_a_fit_that_scores_nothing_shows_its_training_loss(home, capsys):
    fit("--trainer.max_steps=3", "--trainer.limit_val_batches=0")
    assert RunRecord.read(RUN / "record.json").outcome["after"].keys() == {"train_loss"}
    assert "train loss" in capsys.readouterr().out


def test_steps_that_are_asked_for_are_taken(home, caplog):
    fit("--trainer.max_steps=12")
    assert step_of(RUN) == 12
    fit("--trainer.max_steps=12", "--trainer.max_epochs=1")
    assert step_of(Path("runs/lora-2")) == 10
    assert "ended after step 10 of max_steps 12, since max_epochs is 1; set --trainer.max_epochs=-1" in caplog.text
    fit()
    assert step_of(Path("runs/lora-3")) == 10


def test_test_prints_a_number_or_says_why_not(home, capsys, monkeypatch):
    fit("--trainer.max_steps=2")
    words = [*F[: F.index("--data.heldout=4")], "--data.max_length=16", "--trainer.accelerator=cpu"]
    cli.run(["test", *words, "--data.heldout=4", "--ckpt_path=last"])
    assert "heldout_loss" in capsys.readouterr().out
    for verb in ("test", "validate"):
        told = refused(capsys, monkeypatch, verb, *words, "--data.heldout=0", "--ckpt_path=last")
        assert "set data.heldout" in told


PACED = """
import time, lightning
class Paced(lightning.Callback):
    def on_train_batch_start(self, *args, **options):
        time.sleep(0.2)
"""


def signalled(words: list[str], number: int, until: Path) -> subprocess.CompletedProcess[str]:
    """Run the command, and signal it when a file appears."""
    words = [sys.executable, "-m", "lit_sparse", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # nothing need be installed
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env)
    deadline = time.monotonic() + 120
    while not until.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    told = process.communicate(timeout=120)[1]
    return subprocess.CompletedProcess(words, process.returncode, None, told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_go_on(home, number):
    """A straight run and one that was stopped and went on log the same losses."""
    Path("paced.py").write_text(PACED)
    Path("paced.yaml").write_text("trainer:\n  callbacks: [paced.Paced]\n")
    steps = ["--config", "paced.yaml", "--trainer.max_steps=14", "--trainer.max_epochs=-1"]
    ended = signalled(["fit", *F, *steps, "--run=lora"], number, RUN / "metrics.csv")
    assert ended.returncode == 128 + number, ended.stderr
    assert f"{number.name} stopped the fit after step" in ended.stderr
    assert f"go on with --ckpt_path {RUN / LAST}" in ended.stderr
    assert 0 < step_of(RUN) < 14
    record = RunRecord.read(RUN / "record.json")
    assert record.status == "failed"
    assert number.name in str(record.reason)
    fit(*steps[2:], f"--ckpt_path={RUN / LAST}")
    fit(*steps[2:], "--run=straight")
    assert losses(RUN) == losses(Path("runs/straight-1"))
    assert RunRecord.read(RUN / "record.json").status == "ok"


def test_a_reader_that_leaves_fails_no_fit(home, monkeypatch):
    """As in `lit-sparse fit ... | head`: rich ends the process when the pipe is closed."""

    def closed(*arguments):
        raise SystemExit(1)

    monkeypatch.setattr(recorder, "print_summary", closed)
    with pytest.raises(SystemExit):
        fit("--trainer.max_steps=2", "--run=lora")
    assert RunRecord.read(RUN / "record.json").status == "ok"


def test_signals_belong_to_others_again_after_a_fit(home):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    fit("--trainer.max_steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_in_an_accumulation_window_waits_for_its_step(home, monkeypatch):
    step = CausalLM.training_step

    def signalled(self, batch, batch_idx):
        if batch_idx == 4:  # the first of the third window of two
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CausalLM, "training_step", signalled)
    with pytest.raises(cli.Stopped, match="after step 3"):
        fit("--trainer.accumulate_grad_batches=2")
    assert step_of(RUN) == 3


class Slow(L.Callback):
    """Signals this process while it evaluates after the second step."""

    def on_validation_batch_start(self, trainer, *args, **options):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class SlowWithinAWindow(L.Callback):
    """Signals this process once while it evaluates between the two batches of the second step."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == 1 and batch_idx == 0 and trainer.fit_loop._should_accumulate():
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_an_evaluation_within_a_window_loses_no_gradient(home):
    """The first step's checkpoint, resumed from: nothing is saved before the second step is done."""
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
    fit(*words, "--run=straight", "--trainer.max_steps=3")
    Path("slow.yaml").write_text("trainer:\n  callbacks: [tests.test_runs.SlowWithinAWindow]\n")
    for _ in range(2):
        saved = [f"--ckpt_path={RUN / LAST}"] if RUN.is_dir() else []
        with pytest.raises(cli.Stopped):
            fit("--config", "slow.yaml", "--run=lora", *words, *saved, "--trainer.max_steps=3", "--checkpoint_steps=1")
    fit(*words, f"--ckpt_path={RUN / LAST}", "--run=lora", "--trainer.max_steps=3")
    assert losses(RUN) == losses(Path("runs/straight-1"))


def test_a_run_that_went_on_from_an_epochs_end_is_complete_at_its_last(home):
    """Lightning does not count the epoch that follows such a checkpoint, and would train one more."""
    fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    for _ in range(2):
        fit("--trainer.max_epochs=2", "--trainer.limit_train_batches=2", f"--ckpt_path={RUN / LAST}")
        assert step_of(RUN) == 4


def test_a_signal_in_an_evaluation_saves_too(home):
    Path("slow.yaml").write_text("trainer:\n  callbacks: [tests.test_runs.Slow]\n")
    with pytest.raises(cli.Stopped, match="after step 2"):
        fit("--config", "slow.yaml", "--run=lora", "--trainer.val_check_interval=2")
    assert step_of(RUN) == 2


# ---- what a run's configuration may import


MINE = """
import sys
from dataclasses import dataclass
from pathlib import Path
from lit_sparse.strategies import UpdateStrategy

Path("imported").touch()

@dataclass
class Mine(UpdateStrategy):
    claims = frozenset()
"""
FORMS = {
    "a method": lambda model: model.update(updates=[{"class_path": "stranger.Mine"}]),
    "a method by its name": lambda model: model.update(updates=["stranger.Mine"]),
    "an optimizer": lambda model: model.update(optimizer={"class_path": "stranger.Mine"}),
    "an adapter": lambda model: model["updates"][0]["init_args"].update(config={"class_path": "stranger.Mine"}),
    "of the program": lambda model: model.update(updates=["__main__.Mine"]),
    "of Python": lambda model: model.update(updates=[{"class_path": "antigravity.Mine"}]),
    "methods in a text": lambda model: model.update(updates='[{"class_path": "stranger.Mine"}]'),
    "an optimizer in a text": lambda model: model.update(optimizer="{class_path: stranger.Mine}"),
    "escaped": lambda model: model.update(optimizer='{"class_path": "\\u0073tranger.Mine"}'),
    "an adapter in a text": lambda model: model["updates"][0]["init_args"].update(config="class_path: stranger.Mine"),
}


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_a_configuration_imports_nothing_that_nobody_named(home, capsys, monkeypatch, change):
    fit("--trainer.max_steps=1")
    Path("stranger.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(home))  # as `python -m lit_sparse` has it
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    change(config["model"])
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    for words in (["export", str(RUN)], ["generate", str(RUN), "1"]):
        told = refused(capsys, monkeypatch, *words)
        assert "is none of lit_sparse or of what it builds on" in told
        assert "--modules" in told
    assert not Path("imported").exists()
    assert "stranger" not in sys.modules
    assert "antigravity" not in sys.modules


STARTS = {"class_path": "stranger.Starts"}
LAUGHS = "[&a0 [x, x]" + "".join(f", &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 10)) + "]"
ODD = {
    "a class for the base": (lambda model: model.update(base=STARTS), "model.base"),
    "a part of itself": (lambda model: model.update(optimizer="&all {class_path: *all}"), "is a part of itself"),
    "nested deeply": (lambda model: model.update(optimizer=3000 * "[" + 3000 * "]"), "nested too deeply"),
    "aliases that multiply in a text": (lambda model: model.update(optimizer=LAUGHS), "has too many aliases"),
    "no date": (lambda model: model.update(optimizer="2026-13-45"), "model.optimizer is 2026-13-45"),
    "no boolean": (lambda model: model.update(optimizer="!!bool x"), "in the configuration of the run, "),
    "no such key": (lambda model: model.update(zzz=1), "in the configuration of the run, there is no key zzz"),
    "a key that is no text": (lambda model: model.update({5: 1}), "in the configuration of the run, "),
    "no such class": (lambda model: model.update(updates=["NoSuch"]), "model.updates is NoSuch, and there is no such"),
    "no list": (lambda model: model.update(updates=5), "model.updates is 5; it must be a list"),
    "no method": (lambda model: model.update(updates=["torch.hub.load"]), "torch.hub.load, which is no UpdateStrategy"),
    "another precision": (lambda model: model.update(precision="float99"), "model.precision is float99; it must be au"),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD)
def test_an_odd_configuration_is_a_sentence_and_makes_no_object(home, capsys, monkeypatch, change, message):
    fit("--trainer.max_steps=1")
    stranger = ModuleType("stranger")  # imported already, by whatever is loaded
    stranger.Starts = type("Starts", (), {"__module__": "stranger", "__init__": lambda self: Path("made").touch()})
    monkeypatch.setitem(sys.modules, "stranger", stranger)
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    change(config["model"])
    (RUN / "config.yaml").write_text(yaml.safe_dump(config))
    for words in (["export", str(RUN)], ["generate", str(RUN), "1"]):
        assert message in refused(capsys, monkeypatch, *words)
    assert not Path("made").exists()


UNREADABLE = {
    "not UTF-8": (b"model: {base: caf\xe9}", "cannot be read as YAML (UnicodeDecodeError)"),
    "no date": (b"model: {base: 2026-13-45}", "cannot be read as YAML (ValueError)"),
    "no boolean": (b"model: {base: !!bool x}", "cannot be read as YAML (KeyError)"),
    "data that are a number": (
        b"model: {base: tiny}\ndata: 5",
        "the data in runs/lora-1/config.yaml, or their init_args",
    ),
    "init_args that are a number": (b"model: {base: tiny}\ndata: {init_args: 5}", "or their init_args, are no mapping"),
    "a list of tasks": (b"model: {base: tiny}\ntask: [1]", "the task [1] was asked for; there is CausalLM, Classifier"),
    "a mapping of tasks": (b"model: {base: tiny}\ntask: {a: 1}", "the task {'a': 1} was asked for"),
}


@pytest.mark.parametrize(("text", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_configuration_of_another_form_is_a_sentence(home, capsys, monkeypatch, text, message):
    RUN.mkdir(parents=True)
    (RUN / "config.yaml").write_bytes(text)
    for words in (["export", str(RUN)], ["generate", str(RUN), "1"]):
        assert message in refused(capsys, monkeypatch, *words)


@pytest.mark.parametrize("task", ["[1]", "{a: 1}"])
def test_a_task_that_is_no_text_is_refused(home, capsys, monkeypatch, task):
    Path("odd.yaml").write_text(f"task: {task}\n")
    assert "the task " in refused(capsys, monkeypatch, "fit", *F, "--config=odd.yaml")


@pytest.mark.parametrize("root", ["null", '"a\\0b"'])
def test_runs_in_a_folder_that_cannot_be_are_refused(home, capsys, monkeypatch, root):
    Path("odd.yaml").write_text(f"trainer: {{default_root_dir: {root}}}\n")
    for verb in ("fit", "validate"):
        words = F if verb == "fit" else F[: F.index("--samples=0")]
        told = refused(capsys, monkeypatch, verb, *words, "--config=odd.yaml")
        assert "trainer.default_root_dir is " in told
        assert "which names no folder" in told


@pytest.mark.parametrize("name", ["", ".x"])
def test_modules_without_a_name_are_refused(home, capsys, monkeypatch, name):
    for words in (["export", str(RUN)], ["generate", str(RUN), "1"]):
        assert "names no module" in refused(capsys, monkeypatch, *words, f"--modules={name}")


def test_aliases_that_multiply_are_a_sentence_soon(home, capsys, monkeypatch):
    RUN.mkdir(parents=True)
    (RUN / "config.yaml").write_text(f"model: {{base: tiny, optimizer: {LAUGHS}}}")
    assert "its aliases stand for more than 100,000 values" in refused(capsys, monkeypatch, "export", str(RUN))


def test_a_class_where_any_value_goes_stays_a_value(home, capsys, monkeypatch):
    settings = {
        "console_kwargs": {"stderr": {"class_path": "tarfile.TarFile", "init_args": {"name": "made", "mode": "w"}}}
    }
    bar = {"class_path": "lightning.pytorch.callbacks.RichProgressBar", "init_args": settings}
    Path("stranger.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [bar]}}))
    refused(capsys, monkeypatch, "fit", *F, "--config=stranger.yaml", "--model.base=nowhere/")
    assert not Path("made").exists()


def test_a_method_of_ones_own_is_exported_once_it_is_named(home, capsys, monkeypatch):
    Path("my_methods.py").write_text(MINE)
    fit("--trainer.max_steps=1", "--model.updates=[my_methods.Mine]")
    monkeypatch.delitem(sys.modules, "my_methods")
    assert "--modules my_methods" in refused(capsys, monkeypatch, "export", str(RUN))
    cli.run(["export", str(RUN), "--modules", "my_methods"])
    monkeypatch.delitem(sys.modules, "my_methods")
    cli.run(["generate", str(RUN), "1", "--modules", "my_methods", "--max_new_tokens=2"])
    assert "--modules nowhere cannot be" in refused(capsys, monkeypatch, "generate", str(RUN), "1", "--modules=nowhere")
