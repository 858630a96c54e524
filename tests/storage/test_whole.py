"""Checkpoint files: whole after a kill, a full disk and a flipped bit, and refused by every reader if they are not."""

import errno
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lit_sparse import cli
from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.modules.checkpoint_io import WholeCheckpoints
from lit_sparse.runs import LAST
from lit_sparse.storage import whole
from lit_sparse.storage.whole import check_whole, damage, draft_of, keep_previous, write_whole
from lit_sparse.testing import tiny_llm
from tests.conftest import make_home
from tests.test_cli import DATA, SMALL, fit, refused

SAVED = {
    "lit_sparse": {"base": "", "updates": []},
    "state_dict": {"a": torch.arange(64.0), "b": torch.ones(3, dtype=torch.int8)},
}


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


@pytest.fixture
def file(tmp_path):
    write_whole(SAVED, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_torch_reads_what_was_written(file):
    found = torch.load(file, weights_only=True)
    assert torch.equal(found["state_dict"]["a"], SAVED["state_dict"]["a"])
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]
    check_whole(file)


def test_any_flipped_bit_and_any_shorter_file_is_found(file, tmp_path):
    whole_file, draw = file.read_bytes(), random.Random(0)
    for bit in draw.sample(range(8 * len(whole_file)), 400):
        file.write_bytes(whole_file)
        flip(file, bit)
        assert damage(file) is not None, f"bit {bit} of {8 * len(whole_file)}"
    for length in [0, 1, len(whole_file) - 1, *draw.sample(range(len(whole_file) - whole.TRAILER), 50)]:
        file.write_bytes(whole_file[:length])
        with pytest.raises(BadInput, match=r"last\.ckpt is damaged.*give another checkpoint"):
            check_whole(file)


def test_a_file_that_torch_saved_is_checked_by_its_archive(tmp_path):
    path = tmp_path / "plain.ckpt"
    torch.save(SAVED, path)
    check_whole(path)
    start = path.read_bytes().index(SAVED["state_dict"]["a"].numpy().tobytes())
    for bit in random.Random(0).sample(range(8 * start, 8 * (start + 256)), 72):
        flip(path, bit)
        assert damage(path) is not None
        flip(path, bit)


def test_a_compressed_archive_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(2**20))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it is inflated"))
    with pytest.raises(BadInput, match=r"bomb\.ckpt is damaged.*its part bomb/data\.pkl is compressed, which"):
        check_whole(path)


def test_a_text_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    whole.replace_text("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "new"


def test_a_run_s_folder_keeps_copies_that_the_user_made(tmp_path):
    for name in (
        ".record.json.1234.lit-sparse-draft",
        ".metrics.csv.part",
        ".record.json.20261128",
        ".record.json.bak",
    ):
        (tmp_path / name).touch()
    whole.remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".record.json.20261128", ".record.json.bak"]


def test_a_full_disk_is_a_sentence_and_keeps_the_checkpoint_before(file, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.file, name)

    before, init = file.read_bytes(), whole.Hashed.__init__
    monkeypatch.setattr(whole.Hashed, "__init__", lambda self, file: init(self, Full(file)))  # pyright: ignore
    with pytest.raises(BadInput, match=r"No space left on device\. The .* is kept; free some space, and go on with"):
        write_whole(SAVED, file)
    assert file.read_bytes() == before
    assert not draft_of(file).exists()
    with pytest.raises(BadInput, match=r"There is none before it; free some space, and begin again\.$"):
        write_whole(SAVED, file.with_name("first.ckpt"))


def test_what_reads_back_otherwise_never_replaces_the_checkpoint_before(file, monkeypatch):
    before, fsync = file.read_bytes(), os.fsync

    def corrupting(fd):
        fsync(fd)
        if draft_of(file).exists():
            flip(draft_of(file), 3000)

    monkeypatch.setattr(whole.os, "fsync", corrupting)
    with pytest.raises(BadInput, match="reads back otherwise"):
        write_whole(SAVED, file)
    assert file.read_bytes() == before


WRITER = """
import sys, torch
from lit_sparse.storage.whole import write_whole
saved = {"lit_sparse": {}, "a": torch.zeros(4_000_000)}
print("ready", flush=True)
while True:
    write_whole(saved, sys.argv[1])
"""


def test_a_killed_writer_leaves_a_whole_file_and_its_draft_is_written_over(tmp_path):
    path = tmp_path / "runs" / "last.ckpt"
    drafts = 0
    for n in range(4):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # nothing need be installed
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=env)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3 + 0.013 * n)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            check_whole(path)
        drafts += draft_of(path).exists()
        assert {one.name for one in path.parent.iterdir()} <= {"last.ckpt", ".last.ckpt.part"}
    write_whole(SAVED, path)
    assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]


# ---- by the command line


@pytest.fixture
def damaged(home):
    """A run whose last checkpoint has one other bit, in the values of a trained tensor."""
    fit("--config", "lora.yaml", "--trainer.max_steps=2")
    last = Path("runs/lora-1") / LAST
    values = torch.load(last, weights_only=True)["state_dict"]
    needle = next(value for value in values.values() if value.any()).numpy().tobytes()
    flip(last, 8 * last.read_bytes().index(needle) + 5)
    return last


READERS = {
    "fit": ["fit", "--trainer.max_steps=4", "--ckpt_path=last"],
    "validate": ["validate", "--ckpt_path=runs/lora-1/checkpoints/last.ckpt"],
    "test": ["test", "--ckpt_path=runs/lora-1/checkpoints/last.ckpt"],
    "start_from": ["fit", "--run=next", "--model.updates.init_args.start_from=runs/lora-1"],
}


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_every_verb_of_the_trainer_refuses_a_damaged_checkpoint(damaged, capsys, monkeypatch, words):
    before = damaged.read_bytes()
    more = SMALL if words[0] == "fit" else ["--trainer.accelerator=cpu"]
    told = refused(
        capsys, monkeypatch, words[0], "--config", "lora.yaml", "--model.base", "tiny", *DATA, *more, *words[1:]
    )
    assert "last.ckpt is damaged" in told
    assert damaged.read_bytes() == before


FOREIGN = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
    "text": lambda data: b"model:\n  lr: 1\n",
    "pickle": lambda data: pickle.dumps({"state_dict": Path("x")}),
}


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("other", FOREIGN.values(), ids=FOREIGN)
def test_a_file_given_by_its_path_is_checked_before_anything_is_read(damaged, capsys, monkeypatch, verb, other):
    damaged.write_bytes(other(damaged.read_bytes()))
    words = ["--config", "lora.yaml", "--model.base", "tiny", *DATA, f"--ckpt_path={damaged}"]
    told = refused(capsys, monkeypatch, verb, *words, *(SMALL if verb == "fit" else ["--trainer.accelerator=cpu"]))
    assert "last.ckpt is damaged" in told


def test_a_checkpoint_chooses_no_settings_and_imports_nothing(home, monkeypatch):
    """Lightning would take `hyper_parameters` of the file for the model's settings, whatever was asked for."""
    fit("--config", "lora.yaml", "--trainer.max_steps=2")
    last = Path("runs/lora-1") / LAST
    Path("stranger.py").write_text("open('it-ran', 'w').close()")
    monkeypatch.syspath_prepend(".")
    forged = {"lr": 5.0, "updates": [{"class_path": "stranger.Any"}]}
    write_whole({**torch.load(last, weights_only=True), "hyper_parameters": forged}, last)
    fit("--config", "lora.yaml", "--trainer.max_steps=4", "--model.lr=0.01", f"--ckpt_path={last}")
    assert not Path("it-ran").exists()
    assert "lr: 0.01" in Path("runs/lora-1/config.yaml").read_text()


def test_the_checkpoint_before_a_damaged_one_is_offered_and_goes_on(home, capsys, monkeypatch):
    words = ["--config", "lora.yaml", "--trainer.max_steps=4", "--checkpoint_steps=1"]
    fit(*words)
    folder = Path("runs/lora-1") / LAST.parent
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]
    straight = torch.load(folder / "last.ckpt", weights_only=True)
    assert torch.load(folder / "previous.ckpt", weights_only=True)["global_step"] == 3
    flip(folder / "last.ckpt", 8 * 3000)
    given = ["fit", *words[:2], "--model.base", "tiny", *DATA, *SMALL, *words[2:]]
    told = refused(capsys, monkeypatch, *given, "--ckpt_path=last")
    assert told.endswith(f"The one before it, of step 3, is whole: {folder / 'previous.ckpt'}.")
    for read in (read_checkpoint, WholeCheckpoints().load_checkpoint):
        with pytest.raises(BadInput, match=r"last\.ckpt is damaged.*of step 3, is whole: .*previous\.ckpt"):
            read(folder / "last.ckpt")
    fit(*words, f"--ckpt_path={folder / 'previous.ckpt'}")
    again = torch.load(folder / "last.ckpt", weights_only=True)
    assert again["global_step"] == 4
    for name, value in straight["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    assert torch.load(folder / "previous.ckpt", weights_only=True)["global_step"] == 3  # and not the damaged one
    flip(folder / "last.ckpt", 8 * 3000)
    flip(folder / "previous.ckpt", 8 * 3000)
    assert "is whole" not in refused(capsys, monkeypatch, *given, "--ckpt_path=last")


def test_the_one_before_is_kept_where_a_file_has_one_name_only(file, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    before = file.read_bytes()
    monkeypatch.setattr(whole.os, "link", no_links)
    keep_previous(file)
    write_whole({**SAVED, "later": 1}, file)
    assert file.with_name("previous.ckpt").read_bytes() == before != file.read_bytes()
    assert sorted(path.name for path in file.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("words", [["export"], ["export", "--to", "adapter"], ["generate"]])
def test_every_verb_of_a_run_refuses_a_damaged_checkpoint(damaged, capsys, monkeypatch, words):
    more = ["1"] if words == ["generate"] else []
    told = refused(capsys, monkeypatch, words[0], "runs/lora-1", *words[1:], *more)
    assert "last.ckpt is damaged" in told
    assert not Path("runs/lora-1/hf").exists()


def rewrite(path: Path, change) -> None:
    """Change what a checkpoint holds, and sign it."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    write_whole(saved, path)


def blocks_beyond(saved):
    for entry in saved["lit_sparse"]["updates"][0]["state"].values():
        entry["index"] = entry["index"] + 1000


def negative_blocks(saved):
    for entry in saved["lit_sparse"]["updates"][0]["state"].values():
        entry["index"] = entry["index"] - 1000


def other_names(saved):
    saved["state_dict"]["model.nowhere"] = torch.zeros(2)


def other_shapes(saved):
    saved["state_dict"] = {name: value[:1] for name, value in saved["state_dict"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (blocks_beyond, "selects a block outside"),
        (negative_blocks, "selects a block outside"),
        (other_names, "model.nowhere of shape (2,), and this model has no such parameter"),
        (other_shapes, "and this model one of"),
    ],
)
def test_what_a_checkpoint_restores_is_checked(home, capsys, monkeypatch, change, message):
    fit("--config", "smt.yaml", "--trainer.max_steps=2")
    rewrite(Path("runs/smt-1") / LAST, change)
    assert message in refused(capsys, monkeypatch, "export", "runs/smt-1")
    assert not Path("runs/smt-1/hf").exists()
    words = ["--model.base", "tiny", *DATA, *SMALL, "--trainer.max_steps=4", "--ckpt_path=last"]
    assert message in refused(capsys, monkeypatch, "fit", "--config", "smt.yaml", *words)


def with_first(change):
    """A change of the first trained value."""

    def act(saved):
        name = next(iter(saved["state_dict"]))
        saved["state_dict"][name] = change(saved["state_dict"][name])

    return act


ODD_SHARDS = {"folder": "../base", "files": {}}
ODD_FILES = {"folder": "last.ckpt.shards-0", "files": {"../config.yaml": "0"}}
FORMS = {
    "no mapping": (lambda saved: saved.update(lit_sparse=5), "its lit_sparse is 5"),
    "empty": (lambda saved: saved.update(lit_sparse={}), "its lit_sparse has no base"),
    "base": (lambda saved: saved["lit_sparse"].update(base=5), "its lit_sparse has 5 as base"),
    "seed": (lambda saved: saved["lit_sparse"].update(init_seed="x"), "its lit_sparse has 'x' as init_seed"),
    "updates": (lambda saved: saved["lit_sparse"].update(updates=5), "its lit_sparse has 5 as updates"),
    "an update": (lambda saved: saved["lit_sparse"].update(updates=[5]), "a method of its lit_sparse is 5"),
    "no values": (lambda saved: saved.pop("state_dict"), "its state_dict is None"),
    "none as values": (lambda saved: saved.update(state_dict=None), "its state_dict is None"),
    "a number": (with_first(lambda value: 5), "its state_dict has 5 as 'model."),
    "meta": (with_first(lambda value: value.to("meta")), "its state_dict has a meta tensor as model."),
    "sparse": (with_first(lambda value: value.to_sparse()), "its state_dict has a sparse tensor as model."),
    "complex": (
        with_first(lambda value: value.to(torch.complex64)),
        "in torch.complex64, and this model in ",
    ),
    "integers": (with_first(lambda value: value.long()), "in torch.int64, and this model in "),
    "shards": (lambda saved: saved.update(shards=5), "its shards name no folder beside it"),
    "shards elsewhere": (lambda saved: saved.update(shards=ODD_SHARDS), "its shards name no folder beside it"),
    "files elsewhere": (lambda saved: saved.update(shards=ODD_FILES), "its shards name the file '../config.yaml'"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run whose checkpoint tests change."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LIT_SPARSE_CACHE", str(folder / "cache"))
        make_home("tiny", tiny_llm("llama"))
        fit("--config", "lora.yaml", "--trainer.max_steps=1")
    return folder


@pytest.mark.parametrize(("change", "message"), FORMS.values(), ids=FORMS)
def test_a_checkpoint_of_another_form_is_a_sentence(trained, tmp_path, capsys, monkeypatch, change, message):
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(trained / "cache"))
    run = Path("runs/lora-1")
    rewrite(run / LAST, change)
    before = (run / LAST).read_bytes()
    given = ["--config", "lora.yaml", "--model.base", "tiny", *DATA]
    for words in (
        ["export", str(run)],
        ["generate", str(run), "1"],
        ["fit", *given, *SMALL, "--trainer.max_steps=2", "--ckpt_path=last"],
        ["validate", *given, "--trainer.accelerator=cpu", f"--ckpt_path={run / LAST}"],
    ):
        assert message in refused(capsys, monkeypatch, *words)
    assert (run / LAST).read_bytes() == before
    assert not (run / "hf").exists()


def test_layers_of_lisa_that_are_not_there_are_refused(home, capsys, monkeypatch):
    fit("--config", "lisa.yaml", "--trainer.max_steps=2")
    rewrite(
        Path("runs/lisa-1") / LAST, lambda saved: saved["lit_sparse"]["updates"][0]["state"].update(draws=[[7], [9]])
    )
    assert "trains decoder layer 7, but the model has 3" in refused(capsys, monkeypatch, "export", "runs/lisa-1")


def test_a_checkpoint_of_the_trainer_is_whole_too(home):
    """ModelCheckpoint's files are written by the same hand as last.ckpt."""
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=kept"]
    fit("--config", "lora.yaml", "--trainer.max_steps=2", *keep, "--trainer.callbacks.every_n_train_steps=1")
    files = list(Path("runs/lora-1/checkpoints").iterdir())
    assert {file.name for file in files} == {"kept.ckpt", "last.ckpt"}
    for file in files:
        assert whole.MARK in file.read_bytes()[-whole.TRAILER :]
    cli.run(["export", "runs/lora-1", "--to", "adapter"])
