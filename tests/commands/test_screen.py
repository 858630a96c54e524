"""The screen: one line of progress on a terminal, plain lines in a log, and no noise in either."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console

from lit_sparse import cli
from lit_sparse.commands import configs, screen
from lit_sparse.commands.screen import Progress, clock
from lit_sparse.commands.words import unmeasured
from lit_sparse.errors import BadInput
from lit_sparse_profiling import walltime
from lit_sparse_profiling.record import RunRecord
from tests.test_runs import F

QUIET = "--trainer.enable_progress_bar=false"
FIT = ["fit", *(word for word in F if word != QUIET and not word.startswith("--profile"))]
NOISE = (
    *("v_num", "USDT", "CPUAllocator", "weights_only", "litlogger", "FLOPs: 0", "Modules in", "Epoch 0/", "/-2"),
    *("TPU", "train_dataloader"),
)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(columns: int, *words: str) -> tuple[int, str]:
    """Run the command in a terminal; return its exit status and all that it wrote."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm-256color"}
        for key in ("COLUMNS", "LINES", "KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL"):
            environment.pop(key, None)
        os.execve(sys.executable, [sys.executable, "-m", "lit_sparse", *words], environment)
    written = b""
    while select.select([terminal], [], [], 120)[0]:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # Linux: the other side is closed
            break
        written += more
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), written.decode()


def test_a_terminal_of_80_columns_shows_one_line_of_progress(home):
    status, written = on_a_terminal(80, *FIT, "--samples=1")
    assert status == 0
    assert not [noise for noise in NOISE if noise in written]
    drawn = [CONTROL.sub("", state).split("\r")[-1] for state in re.findall(r"[^\n]*step \d+/10[^\n\r]*", written)]
    assert drawn
    assert all(len(line) <= 80 and line.startswith("step ") for line in drawn)
    assert any("train_loss" in line and "left" in line for line in drawn)
    assert "━" in drawn[-1]
    end = CONTROL.sub("", written[written.rindex("step 10/10") :])
    assert "what the fit changed" in end, "the line is not drawn again over the tables"
    assert "Answering 1 of the held-out questions before training; --samples=0 asks none." in written
    told = (
        "Steps 3 to 6 are measured, and slower, if that takes at most 10% of the fit; --profile=false leaves that out."
    )
    assert told in written.replace("\r\n", " ").replace("\n", " ")


def test_a_log_has_plain_lines(home):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("log.txt").open("w") as log:
        words = [sys.executable, "-m", "lit_sparse", *FIT, "--profile", "false"]
        subprocess.run(words, stdout=log, stderr=log, env=environment, check=True, timeout=240)
    text = Path("log.txt").read_text()
    assert not [noise for noise in NOISE if noise in text]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text), "a control character"
    lines = text.splitlines()
    assert "evaluation before training, batch 1/2" in lines
    assert [line for line in lines if re.fullmatch(r"step 1/10, train_loss \d\.\d+", line)]
    assert [line for line in lines if re.match(r"step 10/10, .* left, train_loss .*, heldout_loss \d", line)]
    assert "Loading tiny." in lines
    assert not [line for line in lines if "are measured" in line or "questions" in line]
    (told,) = [line for line in lines if line.startswith("Wall time ")]
    parts = walltime.parts(RunRecord.read("runs/lora-1/record.json"))
    assert [*parts] == [
        *("imports", "command line", "data", "model", "selection", "evaluation", "training", "saving", "other")
    ]
    assert min(parts.values()) >= 0
    assert all(f"{name} {seconds:.1f}" in told for name, seconds in parts.items())


def test_without_a_progress_bar_there_is_no_progress(home, capsys):
    cli.run([*FIT, QUIET, "--trainer.max_steps=2"])
    assert "step 1/2" not in capsys.readouterr().err


def test_a_bar_of_the_users_stays(home, capsys):
    cli.run([*FIT, "--trainer.max_steps=2", "--trainer.callbacks+=TQDMProgressBar"])
    told = capsys.readouterr()
    assert "step 1/2" not in told.err
    assert "Epoch 0" in told.out + told.err


def test_who_chooses_the_bar():
    class Config:
        enable_progress_bar = None

    config = Config()
    assert isinstance(screen.shown(config, [])["callbacks"][0], Progress)
    own = TQDMProgressBar()
    assert screen.shown(config, [own]) == {"callbacks": [own]}
    config.enable_progress_bar = False
    assert screen.shown(config, []) == {"callbacks": []}


def steps(progress: Progress, seconds: float, count: int, monkeypatch, **more) -> None:
    """Let `progress` see a fit of `count` steps that take `seconds` each."""
    now = [1000.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    metrics = {"callback_metrics": {"train_loss": 2.0}, "progress_bar_metrics": {}, "is_global_zero": True}
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=count, **{**metrics, **more})
    progress.on_train_start(trainer, None)
    for step in range(1, count + 1):
        now[0] += seconds
        trainer.global_step = step
        progress.on_train_batch_end(trainer, None, None, None, step)
        progress.on_train_batch_end(trainer, None, None, None, step)  # a batch that is accumulated


def test_a_log_gets_a_line_every_30_seconds(monkeypatch, capsys):
    steps(Progress(Console(file=io.StringIO())), 10.0, 12, monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 1/12, train_loss 2",
        "step 4/12, 10.00 s/step, 1:20 left, train_loss 2",
        "step 7/12, 10.00 s/step, 0:50 left, train_loss 2",
        "step 10/12, 10.00 s/step, 0:20 left, train_loss 2",
    ]


def test_the_other_ranks_show_nothing(monkeypatch, capsys):
    steps(Progress(Console(file=io.StringIO())), 40.0, 3, monkeypatch, is_global_zero=False)
    assert not capsys.readouterr().err


def test_a_fit_without_a_last_step_shows_its_steps(monkeypatch, capsys):
    progress = Progress(Console(file=io.StringIO()))
    steps(progress, 40.0, 2, monkeypatch)
    progress._total = float("inf")
    assert progress._speed() == ["40.00 s/step"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_a_clock(seconds, text):
    assert clock(seconds) == text


UNMEASURED = ("--profile.examine=false", "--profile.profiled=0", "--profile.predict=false")


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["fit", "--profile", "false"], ["fit", *UNMEASURED]),
        (["fit", "--profile=False", "--x"], ["fit", *UNMEASURED, "--x"]),
        (["fit", "--profile", "true"], ["fit"]),
        (["fit", "--profile.warmup=1"], ["fit", "--profile.warmup=1"]),
        (["fit", "--profile"], ["fit", "--profile"]),
    ],
)
def test_measuring_is_switched_off_in_a_word(words, written):
    assert unmeasured(words) == written


@pytest.mark.parametrize("how", [["--profile=false"], ["--config", "off.yaml"], ["--config={profile: off}"]])
def test_without_measuring_no_step_is_slower(home, capsys, how):
    """Nor are questions answered, unless their number is given; `report` tells where the time went."""
    Path("off.yaml").write_text("profile: false\n")
    words = [word for word in FIT if word != "--samples=0"]
    for run, samples in (("lora-1", []), ("lora-2", ["--samples=1"])):
        cli.run([*words, QUIET, "--run=lora", "--trainer.max_steps=4", *how, *samples])
        record = RunRecord.read(f"runs/{run}/record.json")
        assert (record.memory.held, record.kernels, len(record.samples)) == (None, None, len(samples))
        assert record.throughput.steps == 2
        assert "examination" not in walltime.parts(record)
        assert ("samples" in walltime.parts(record)) == bool(samples)
    capsys.readouterr()
    cli.run(["report", "runs/lora-1"])
    assert walltime.describe(RunRecord.read("runs/lora-1/record.json")) in capsys.readouterr().out.splitlines()


def test_a_switch_in_a_yaml_is_read_as_its_keys():
    assert configs.load("profile: true") == configs.load("profile: {}")
    assert configs.load("profile: off") == {"profile": {"examine": False, "profiled": 0, "predict": False}}
    with pytest.raises(BadInput, match="profile has keys of its own"):
        configs.read_document("profile: 3\nmodel: {}")
