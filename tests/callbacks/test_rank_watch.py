"""A run of two ranks ends soon, with one reason, when one of them dies or fails; ranks are started as torchrun does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_sparse.testing import tiny_llm

ROOT = Path(__file__).parents[2]
ENDING = '''
import os, signal, time
import lightning as L
from lit_sparse.callbacks import rank_watch
from lit_sparse.data import Synthetic

rank_watch.BEAT, rank_watch.SILENCE, rank_watch.GRACE = 0.5, 5.0, 2.0


class Ending(L.Callback):
    """A rank ends in its third step."""

    def __init__(self, how: str = "", rank: int = 1) -> None:
        self.how, self.rank = how, rank

    def setup(self, trainer, pl_module, stage) -> None:
        if self.how == "failed at once":
            if trainer.global_rank == self.rank:
                raise ArithmeticError("the setup is planted")
            time.sleep(6)  # until that rank has gone

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and batch_idx == 2:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the third batch is planted")


class Lethal(Synthetic):
    """Data whose preparation kills rank 0, while rank 1 waits for them."""

    def prepare_data(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
'''


def ranks_of(folder: Path, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Run `lit-sparse fit` on two ranks, and return how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(folder), *(str(ROOT / part) for part in ("", "kernels", "profiling"))]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    there |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "lit_sparse", "fit", *words]
    started = []
    for rank in range(2):
        own = {name: str(value) for name, value in {**there, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **own}, text=True, **pipes))
    try:
        told = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(command, p.returncode, "", t) for p, t in zip(started, told, strict=True)]


def sentences(*ended: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what `lit-sparse` says on stderr, on any rank."""
    lines = "\n".join(one.stderr for one in ended).splitlines()
    return [line for line in lines if line.startswith("lit-sparse: ")]


@pytest.fixture
def words(tmp_path) -> list[str]:
    tiny_llm("llama").save_pretrained(tmp_path / "tiny")
    (tmp_path / "ending.py").write_text(ENDING)
    rows = {"vocab_size": 96, "max_length": 12, "rows": 64, "heldout": 4, "batch_size": 2}
    small = {
        "model": {"base": str(tmp_path / "tiny")},
        "data": {"class_path": "lit_sparse.data.Synthetic", "init_args": rows},
        "trainer": {"accelerator": "cpu", "devices": 2, "max_epochs": -1, "max_steps": 10},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    return ["--profile=false", "--config", "full.yaml", "--config", "trainers/ddp.yaml", "--config", "small.yaml"]


@pytest.mark.parametrize(
    ("how", "rank", "reason"),
    [
        ("killed", 1, "rank 1 has died: it gave no sign of life for 5 s"),
        ("killed", 0, "rank 0 has died: the store that it keeps is gone"),
        ("failed", 1, "rank 1 failed (ArithmeticError: the third batch is planted)"),
    ],
)
def test_a_rank_that_ends_ends_the_others_with_the_reason(how, rank, reason, words, tmp_path):
    callback = {"class_path": "ending.Ending", "init_args": {"how": how, "rank": rank}}
    (tmp_path / "ending.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    before = time.monotonic()
    ended = ranks_of(tmp_path, *words, "--config", "ending.yaml")
    assert time.monotonic() - before < 120  # of which most is the start
    assert ended[1 - rank].returncode == 1
    assert ended[rank].returncode == (-9 if how == "killed" else 1)
    (told,) = sentences(*ended)
    assert (
        told == f"lit-sparse: {reason}; the other ranks end too. Go on from the last checkpoint with --ckpt_path last."
    )
    assert "Traceback" not in ended[1 - rank].stderr


def test_a_rank_that_dies_before_the_fit_ends_the_others_with_a_sentence(words, tmp_path):
    first, second = ranks_of(tmp_path, *words, "--data", "ending.Lethal")
    assert (first.returncode, second.returncode) == (-9, 1)
    (told,) = sentences(first, second)
    assert told.startswith("lit-sparse: another rank has ended; the other ranks end too.")
    assert "Traceback" not in second.stderr


def test_a_rank_that_fails_at_once_ends_one_that_comes_late(words, tmp_path):
    callback = {"class_path": "ending.Ending", "init_args": {"how": "failed at once", "rank": 0}}
    (tmp_path / "ending.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    first, second = ranks_of(tmp_path, *words, "--config", "ending.yaml")
    assert (first.returncode, second.returncode) == (1, 1)
    assert "ArithmeticError: the setup is planted" in first.stderr
    (told,) = sentences(second)
    assert told.startswith("lit-sparse: another rank has ended; the other ranks end too.")
    assert "Traceback" not in second.stderr


def test_a_refusal_of_all_ranks_is_printed_once(words, tmp_path):
    first, second = ranks_of(tmp_path, *words, "--trainer.precision", "bf16-mixed")
    assert (first.returncode, second.returncode) == (2, 2)
    (told,) = sentences(first, second)
    assert "trainer.precision is bf16-mixed" in told
