"""Exports that are complete or not there: whatever kills their writer, and whenever."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sparse.errors import BadInput
from lit_sparse.export import drafts
from lit_sparse.export.drafts import remove_leftovers, replace, written

WRITER = """
import os, signal, sys
from pathlib import Path
from lit_sparse.export import drafts
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "between": drafts.exchange, Path.rename = lambda *_: False, (
    lambda path, to, rename=Path.rename: rename(path, to) if path.name == "out" else kill())
with drafts.written(Path("out")) as draft:
    draft.mkdir()
    (draft / "half").touch()
    if sys.argv[1] == "writing": kill()
"""


def hidden() -> list[Path]:
    return [path for path in Path().iterdir() if path.name.startswith(".")]


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/earlier").touch()
    return Path("out")


@pytest.mark.parametrize("moment", ["writing", "between"])
def test_what_a_killed_writer_leaves_is_removed_and_the_earlier_export_is_there(earlier, moment):
    killed = subprocess.run([sys.executable, "-c", WRITER, moment], env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert hidden()
    remove_leftovers(earlier)
    assert not hidden()
    assert list(earlier.iterdir()) == [earlier / "earlier"]


def folder_of(*names: str):
    def make(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).touch()

    return make


def link_to_a_draft(path: Path) -> None:
    folder_of("lock", "new")(Path("elsewhere"))
    path.symlink_to("elsewhere")


def draft_with_a_linked_lock(path: Path) -> None:
    folder_of("new")(path)
    Path("precious").write_text("precious")
    (path / "lock").symlink_to(Path("precious").resolve())


OTHERS = {
    "another name": (".out-backup", folder_of("lock", "new")),
    "no lock": (".out-abcd_123", folder_of("new", "old")),
    "something beside": (".out-abcd_123", folder_of("lock", "new", "thesis.txt")),
    "a file": (".out-abcd_123", Path.touch),
    "a link": (".out-abcd_123", link_to_a_draft),
    "a linked lock": (".out-abcd_123", draft_with_a_linked_lock),
}


@pytest.mark.parametrize(("name", "make"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_draft_stays(earlier, name, make):
    make(Path(name))
    before = sorted(Path().rglob("*"))
    remove_leftovers(earlier)
    assert sorted(Path().rglob("*")) == before
    assert not Path("precious").exists() or Path("precious").read_text() == "precious"


def test_a_link_stays_one(earlier):
    Path("deep").mkdir()
    Path("deep/file").write_text("earlier")
    Path("link").symlink_to("deep/file")
    with written(Path("link")) as draft:
        draft.write_text("later")
    assert Path("link").is_symlink()
    assert Path("deep/file").read_text() == "later"
    assert not hidden()
    assert [path.name for path in Path("deep").iterdir()] == ["file"]


def test_a_draft_of_a_living_process_stays(earlier):
    with written(earlier) as draft:
        draft.mkdir()
        remove_leftovers(earlier)
        assert draft.is_dir()
    assert not hidden()
    assert not list(earlier.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_one_export_replaces_another(earlier, can_exchange, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(drafts, "exchange", lambda *_: False)
    with written(earlier) as draft:
        draft.mkdir()
        (draft / "later").touch()
    assert list(earlier.iterdir()) == [earlier / "later"]
    assert not hidden()


def test_an_export_that_fails_leaves_the_earlier_one(earlier):
    with pytest.raises(BadInput, match="could not be written"), written(earlier):
        raise OSError("no space")
    assert list(earlier.iterdir()) == [earlier / "earlier"]
    assert not hidden()


def test_a_move_that_fails_is_undone(earlier, monkeypatch):
    monkeypatch.setattr(drafts, "exchange", lambda *_: False)
    with pytest.raises(FileNotFoundError):
        replace(Path("nothing"), earlier, Path("old"))
    assert list(earlier.iterdir()) == [earlier / "earlier"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_an_exchange_is_one_step(earlier):
    Path("new").mkdir()
    assert drafts.exchange(Path("new"), earlier)
    assert not list(earlier.iterdir())
    assert Path("new/earlier").exists()
