"""A folder that one process has is refused to others, until it gives it back or ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_sparse.errors import BadInput
from lit_sparse.runs import LAST
from lit_sparse.storage import held
from lit_sparse.storage.held import Held
from tests.test_cli import DATA, SMALL, fit, refused

HOLD = """
import sys, time
from pathlib import Path
from lit_sparse.storage.held import Held

Held(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(held, "PATIENCE", 0.3)


def test_a_folder_is_taken_by_one_at_a_time(tmp_path, impatient):
    first, second = Held(tmp_path), Held(tmp_path)
    first.take()
    first.take()  # it has it
    with pytest.raises(BadInput, match="another process is training the run in"):
        second.take()
    first.release()
    second.take()
    second.release()
    assert not [*tmp_path.iterdir()]


def test_a_killed_process_holds_nothing(tmp_path, impatient):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(BadInput):
            Held(tmp_path).take()
        process.kill()
    begun, own = time.monotonic(), Held(tmp_path)
    own.take()
    own.release()
    assert time.monotonic() - begun < held.PATIENCE + 1


def test_a_run_that_is_being_trained_is_not_resumed_by_another_process(home, impatient, capsys, monkeypatch):
    words = ["--config", "lora.yaml", "--trainer.max_steps=2"]
    fit(*words)
    folder = Path("runs/lora-1")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = Held(folder)
    other.take()
    again = [*words[:2], "--trainer.max_steps=4", f"--ckpt_path={folder / LAST}"]
    told = refused(capsys, monkeypatch, "fit", "--model.base", "tiny", *DATA, *SMALL, *again)
    assert f"another process is training the run in {folder}" in told
    assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other.release()
    fit(*again)
