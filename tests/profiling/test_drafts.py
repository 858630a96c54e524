"""Files that are replaced whole, and only where they are ours."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_sparse_profiling.drafts import ENDING, replace_text
from lit_sparse_profiling.gate import save_baseline
from lit_sparse_profiling.page import write_page
from lit_sparse_profiling.peft_export import write_results
from lit_sparse_profiling.run_folders import Runs
from tests.profiling.page_records import gpu_record

RUNS: Runs = [(Path("smt-1/record.json"), gpu_record("smt"))]
WRITERS: dict[str, Callable[[Path], object]] = {
    "page": lambda path: write_page(RUNS, path, {}),
    "baseline": lambda path: save_baseline(RUNS, path),
    "result": lambda path: write_results(RUNS, path.parent),
}
FILES = {
    "rows": '{"question": "1 and 1", "answer": "2"}\n' * 3,
    "json": '{"schema": "mine", "runs": [1]}',
    "peft": '{"run_info": {}, "train_info": {}, "meta_info": {}}',
    "html": "<!DOCTYPE html><html><head><title>My notes</title></head></html>",
    "binary": "\x00\x01\x02",
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "smt-1.json"  # the name of a result of this run


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_of_another_kind_is_not_replaced(target: Path, kind: str, text: str) -> None:
    target.write_text(text)
    sentence = rf"The {kind} was to be written to .*json, but .* no earlier {kind}; give another path, or remove it\."
    with pytest.raises(ValueError, match=sentence):
        WRITERS[kind](target)
    assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", WRITERS)
def test_an_earlier_one_and_an_empty_file_are_replaced(target: Path, kind: str) -> None:
    target.touch()
    WRITERS[kind](target)
    size = target.stat().st_size
    assert size > 0
    with target.open("a") as file:
        file.write("  \n")
    WRITERS[kind](target)
    assert target.stat().st_size == size


@pytest.mark.parametrize("kind", WRITERS)
def test_no_kind_replaces_one_of_another(target: Path, kind: str) -> None:
    for other in WRITERS.keys() - {kind}:
        target.unlink(missing_ok=True)
        WRITERS[other](target)
        with pytest.raises(ValueError, match=f"no earlier {kind}"):
            WRITERS[kind](target)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pipe_is_refused_and_a_link_stays_one(tmp_path: Path, target: Path, kind: str) -> None:
    os.mkfifo(target)
    with pytest.raises(ValueError, match=r"smt-1\.json, which is a device or a pipe; name a file"):
        WRITERS[kind](target)
    assert target.is_fifo()
    target.unlink()
    (tmp_path / "far").mkdir()
    target.symlink_to(tmp_path / "far" / "file")
    WRITERS[kind](target)
    assert target.is_symlink()
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["file"]
    assert (tmp_path / "far" / "file").stat().st_size > 0


def test_only_drafts_of_processes_that_ended_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [".a.html.20261128", f".a.html.{ended.pid}", f".a.html.{os.getppid()}{ENDING}", f".a.html.old{ENDING}"]
    kept += [f".a.html.{10**30}{ENDING}", f".b.html.{ended.pid}{ENDING}"]
    for name in (*kept, f".a.html.{ended.pid}{ENDING}"):
        (tmp_path / name).write_text(name)
    replace_text(tmp_path / "a.html", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.html", *kept])


def test_a_killed_writer_leaves_a_draft_that_the_next_one_removes(tmp_path: Path) -> None:
    code = "import os, sys; from pathlib import Path; from lit_sparse_profiling import drafts; " + (
        "os.fsync = lambda _: os._exit(9); drafts.replace_text(Path(sys.argv[1]), 'cut off')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.html")], check=False).returncode == 9
    (draft,) = tmp_path.iterdir()
    assert re.fullmatch(rf"\.a\.html\.\d+{re.escape(ENDING)}", draft.name)
    replace_text(tmp_path / "a.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
