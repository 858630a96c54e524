"""The bench: records of processes however they end, repetitions, and the loss of at most one run if it is killed."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lit_sparse_profiling import runner
from lit_sparse_profiling.drafts import ENDING
from lit_sparse_profiling.record import SCHEMA, RunRecord
from lit_sparse_profiling.run_folders import folders, next_folder
from lit_sparse_profiling.runner import Job, execute, finished_runs, hash_sources, plan_repeats

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(runner.__file__).parents[1])}
SECONDS = 60.0
"""Time limit of waits."""

RUN = f"""
import json, os, pathlib, signal, sys, time

root, name = pathlib.Path(sys.argv[1]), sys.argv[2]
numbers = [int(path.name.rpartition("-")[2]) for path in root.glob(name + "-*")]
folder = root / (name + "-" + str(max(numbers, default=0) + 1))

def record(**fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps({{"schema": {SCHEMA}, "name": folder.name, **fields}}))

def hold():
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "draft").write_text(str(os.getpid()))
    (folder / "draft").rename(folder / "pid")
    end = time.monotonic() + {SECONDS}
    while (root / "hold").exists() and time.monotonic() < end:
        time.sleep(0.02)
"""
"""Prologue of every job: it creates the next folder as a fit does."""


def job(root: Path, name: str = "a", body: str = "record()", **settings: str) -> Job:
    return Job(name, [sys.executable, "-IS", "-c", RUN + body, str(root), name], settings)


def make(jobs: list[Job], root: Path, repeat: int = 1) -> list[str]:
    """Run the jobs that have no result; return the names of their folders, in order."""
    return [execute(turn.job, root).name for turn in plan_repeats(jobs, root, repeat) if turn.folder is None]


def made(body: str, root: Path, limit: float | None = None) -> RunRecord:
    """Run `body` once and return its record."""
    folder = execute(job(root, body=body), root, limit)
    assert folder == root / "a-1"
    assert {"record.json", "bench.json", "log.txt"} <= {path.name for path in folder.iterdir()}
    return RunRecord.read(folder / "record.json")


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each file in a folder, which change when it is rewritten."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Poll processes more often."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 20))


# ---- results

RESULTS = {
    "ok": ("record()", "ok", "^$"),
    "ok, then it crashed": ("record(); os._exit(7)", "ok", "^$"),
    "oom": ("record(status='oom', reason='full'); sys.exit(1)", "oom", "^full$"),
    "failed": ("record(status='failed', reason='bug'); sys.exit(1)", "failed", "^bug$"),
    "refused": ("print('loading\\nlit-sparse: give /b.', file=sys.stderr); sys.exit(2)", "refused", r"^give /b\.$"),
    "last sentence": ("print('lit-sparse: hm.\\nlit-sparse: no.'); sys.exit(2)", "refused", r"^no\.$"),
    "exit 2 without a sentence": ("print('usage'); sys.exit(2)", "failed", "^exit status 2 .*the log ends: usage$"),
    "a sentence, but exit 1": ("print('lit-sparse: no.'); sys.exit(1)", "failed", "^exit status 1 .*lit-sparse: no"),
    "silence": ("pass", "failed", r"^exit status 0 without a complete record; the log ends: \(empty\)$"),
    "traceback": ("1 / 0", "failed", "^exit status 1 .*the log ends: ZeroDivisionError: division by zero$"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "by SIGKILL; Linux does so when memory runs out"),
    "another signal": ("os.kill(os.getpid(), signal.SIGTERM)", "failed", r"killed by SIGTERM\.$"),
    "undecodable log": ("os.write(1, b'\\xff!\\n'); sys.exit(3)", "failed", "^exit status 3 .*the log ends: \ufffd!$"),
    "truncated": ("record(); os.truncate(folder / 'record.json', 9)", "failed", "^exit status 0 without a complete"),
    "foreign": ("record(loss=1)", "failed", "^exit status 0 without a complete record"),
    "contradictory": ("record(status='oom')", "failed", "^exit status 0 without a complete record"),
}


@pytest.mark.parametrize(("body", "status", "reason"), RESULTS.values(), ids=RESULTS)
def test_a_process_leaves_a_result_however_it_ends(tmp_path, body, status, reason):
    record = made(body, tmp_path)
    assert (record.name, record.status) == ("a-1", status)
    assert re.search(reason, record.reason or "")


def test_the_log_has_what_the_process_said(tmp_path):
    made("print('out', flush=True); print('err', file=sys.stderr); record()", tmp_path)
    assert (tmp_path / "a-1" / "log.txt").read_text() == "out\nerr\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a-1"]


def test_a_log_of_the_users_stays_and_that_of_a_killed_bench_goes(tmp_path):
    (tmp_path / "a.log").write_text("mine")
    ended = subprocess.Popen([sys.executable, "-IS", "-c", ""])
    ended.wait()
    left = tmp_path / f".a.log.{ended.pid}{ENDING}"
    left.touch()
    made("print('theirs'); record()", tmp_path)
    assert (tmp_path / "a.log").read_text() == "mine"
    assert (tmp_path / "a-1" / "log.txt").read_text() == "theirs\n"
    assert not left.exists()


def test_a_folder_with_a_record_is_not_removed_where_a_file_cannot_be_written(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner, "replace_text", full)
    with pytest.raises(OSError, match="No space left"):
        execute(job(tmp_path), tmp_path)
    assert RunRecord.read(tmp_path / "a-1" / "record.json").status == "ok"
    monkeypatch.setattr(RunRecord, "write", full)
    with pytest.raises(OSError, match="No space left"):
        execute(job(tmp_path, body="pass"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-1"]


def test_a_process_is_stopped_at_its_limit(tmp_path):
    begin = time.monotonic()
    record = made(f"(root / 'pid').write_text(str(os.getpid())); time.sleep({SECONDS})", tmp_path, limit=1.0)
    assert time.monotonic() - begin < SECONDS
    assert (record.status, record.reason) == ("failed", "it was stopped after 1 seconds.")
    assert is_dead(int((tmp_path / "pid").read_text()))


def test_a_record_written_before_the_limit_counts(tmp_path):
    assert made(f"record(); time.sleep({SECONDS})", tmp_path, limit=1.0).status == "ok"


def test_an_interrupted_bench_ends_its_process(tmp_path):
    pid = tmp_path / "a-1" / "pid"
    (tmp_path / "hold").touch()

    def interrupt() -> None:
        if pid.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job(tmp_path, body="record(); hold()"), tmp_path, tick=interrupt)
    assert is_dead(int(pid.read_text()))
    assert finished_runs(tmp_path, job(tmp_path, body="record(); hold()")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a-1", "hold"}


# ---- turns


def test_jobs_are_interleaved_and_results_are_kept(tmp_path):
    jobs = [job(tmp_path, name) for name in "abc"]
    assert make(jobs[1:2], tmp_path) == ["b-1"]
    plan = [(turn.job.name, turn.number, turn.folder and turn.folder.name) for turn in plan_repeats(jobs, tmp_path, 2)]
    assert plan == [("a", 1, None), ("b", 1, "b-1"), ("c", 1, None), ("a", 2, None), ("b", 2, None), ("c", 2, None)]
    before = stamps(tmp_path / "b-1")
    assert make(jobs, tmp_path, 2) == ["a-1", "c-1", "a-2", "b-2", "c-2"]
    assert stamps(tmp_path / "b-1") == before
    assert make(jobs, tmp_path, 2) == []
    assert make(jobs, tmp_path, 3) == ["a-3", "b-3", "c-3"]
    assert [turn.folder.name for turn in plan_repeats(jobs, tmp_path, 1)] == ["a-1", "b-1", "c-1"]


def test_failed_and_refused_runs_are_repeated(tmp_path):
    """The reason of a refusal may be gone, such as a file that was missing."""
    bodies = {
        "a": "record(status='oom', reason='full')",
        "b": "print('lit-sparse: no.'); sys.exit(2)",
        "c": "record(status='failed', reason='bug')",
        "d": "sys.exit(1)",
    }
    jobs = [job(tmp_path, name, body) for name, body in bodies.items()]
    assert make(jobs, tmp_path) == ["a-1", "b-1", "c-1", "d-1"]
    assert make(jobs, tmp_path) == ["b-2", "c-2", "d-2"]


CHANGED: dict[str, Callable[[Job], Job]] = {
    "command": lambda job: replace(job, command=[*job.command, "--lr=1"]),
    "order of words": lambda job: replace(job, command=[*job.command[:-2], job.command[-1], job.command[-2]]),
    "setting": lambda job: replace(job, settings={"code": "2"}),
    "further setting": lambda job: replace(job, settings={**job.settings, "torch": "1"}),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_runs_of_another_identity_do_not_count(tmp_path, change):
    one = job(tmp_path, code="1")
    assert make([one], tmp_path) == ["a-1"]
    assert [turn.folder for turn in plan_repeats([change(one)], tmp_path, 1)] == [None]
    assert make([job(tmp_path, code="1")], tmp_path) == []


def test_runs_of_another_identity_get_new_numbers(tmp_path):
    jobs = [job(tmp_path, code=version) for version in "12"]
    assert make(jobs, tmp_path, 2) == ["a-1", "a-2", "a-3", "a-4"]
    assert [[path.name for path in finished_runs(tmp_path, one)] for one in jobs] == [["a-1", "a-3"], ["a-2", "a-4"]]


def test_folders_match_by_name_and_are_ordered_by_number(tmp_path):
    assert next_folder(tmp_path / "nowhere", "a") == tmp_path / "nowhere" / "a-1"
    for name in ("a-10", "a-9", "a-b-11", "a-12.part", "ba-13", "a-", "a--1"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.log").touch()
    assert [path.name for path in folders(tmp_path, "a")] == ["a-9", "a-10"]
    assert next_folder(tmp_path, "a") == tmp_path / "a-11"
    assert next_folder(tmp_path, "a-b") == tmp_path / "a-b-12"


# ---- what is no result


@pytest.mark.parametrize("file", ["record.json", "bench.json"])
def test_a_truncated_file_is_not_a_result(tmp_path, file):
    one = job(tmp_path)
    assert make([one], tmp_path) == ["a-1"]
    whole = (tmp_path / "a-1" / file).read_bytes()
    for length in range(len(whole.rstrip())):
        (tmp_path / "a-1" / file).write_bytes(whole[:length])
        assert finished_runs(tmp_path, one) == []
    (tmp_path / "a-1" / file).unlink()
    assert finished_runs(tmp_path, one) == []
    assert make([one], tmp_path) == ["a-2"]
    (tmp_path / "a-1" / file).write_bytes(whole)
    assert [path.name for path in finished_runs(tmp_path, one)] == ["a-1", "a-2"]


FOREIGN = ["[]", '"identity"', "null", "3", "{}", '{"identity": null}', '{"identity": ["x"]}', '{"loss": 1.0}', "\0"]


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("file", ["record.json", "bench.json"])
def test_a_foreign_file_is_not_a_result(tmp_path, file, text):
    one = job(tmp_path)
    make([one], tmp_path)
    (tmp_path / "a-1" / file).write_text(text, encoding="utf-8")
    assert finished_runs(tmp_path, one) == []


def test_neither_a_record_alone_nor_a_file_named_like_a_folder_is_a_result(tmp_path):
    RunRecord(name="a-1").write(tmp_path / "record.json")
    (tmp_path / "a-1").mkdir()
    (tmp_path / "record.json").rename(tmp_path / "a-1" / "record.json")
    (tmp_path / "a-2").touch()
    assert make([job(tmp_path)], tmp_path) == ["a-3"]


# ---- killed

BENCH = """
import json, os, pathlib, signal, sys, time
from lit_sparse_profiling import runner

def killed_at(frame, event, argument):
    if frame.f_code.co_filename != file:
        return None
    if event == "line" and frame.f_lineno == int(line):
        os.kill(os.getpid(), signal.SIGKILL)
    return killed_at

sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 20)
root, jobs, file, line = pathlib.Path(sys.argv[1]), [runner.Job(*job) for job in json.loads(sys.argv[2])], *sys.argv[3:]
if file:
    sys.settrace(killed_at)
for turn in runner.plan_repeats(jobs, root, 1):
    if turn.folder is None:
        runner.execute(turn.job, root)
"""
"""A bench that runs all jobs once, in a process that is killed at a given line of a file, if any."""


def started(
    jobs: list[Job], root: Path, file: str = "", line: int = 0, stdin: int | None = None
) -> subprocess.Popen[bytes]:
    document = json.dumps([[one.name, one.command, one.settings] for one in jobs])
    command = [sys.executable, "-c", BENCH, str(root), document, file, str(line)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=stdin)


MOMENTS = {
    "in the middle of the first run": ("a", "hold(); record()", ["a-2", "b-1", "c-1"]),
    "in the middle of a run": ("b", "hold(); record()", ["b-2", "c-1"]),
    "in the middle of the last run": ("c", "hold(); record()", ["c-2"]),
    "with half a record": ("b", "record(); os.truncate(folder / 'record.json', 9); hold(); record()", ["b-2", "c-1"]),
    "with a record, before it is noted": ("b", "record(); hold()", ["b-2", "c-1"]),
}


@linux
@pytest.mark.parametrize(("held", "body", "missing"), MOMENTS.values(), ids=MOMENTS)
def test_a_killed_bench_loses_only_its_current_run(tmp_path, held, body, missing):
    jobs = [job(tmp_path, name, body if name == held else "record()") for name in "abc"]
    (tmp_path / "hold").touch()
    bench_, pid = started(jobs, tmp_path), tmp_path / f"{held}-1" / "pid"
    wait_for(pid.exists)
    bench_.kill()
    assert bench_.wait(SECONDS) == -signal.SIGKILL
    wait_for(lambda: is_dead(int(pid.read_text())))
    (tmp_path / "hold").unlink()
    before = {path: stamps(path) for one in jobs for path in finished_runs(tmp_path, one)}
    assert len(before) == len(jobs) - len(missing)
    assert make(jobs, tmp_path) == missing
    assert {path: stamps(path) for path in before} == before
    assert make(jobs, tmp_path) == []
    assert all(RunRecord.read(finished_runs(tmp_path, one)[0] / "record.json").status == "ok" for one in jobs)


def test_a_bench_killed_before_its_first_run_loses_nothing(tmp_path):
    jobs = [job(tmp_path, name) for name in "ab"]
    assert started(jobs, tmp_path, *lines_of(plan_repeats)[0]).wait(SECONDS) == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert make(jobs, tmp_path) == ["a-1", "b-1"]


def test_a_process_does_not_read_the_terminal(tmp_path):
    reading = job(tmp_path, body="print(sys.stdin.read()); record()")
    started([reading], tmp_path, stdin=subprocess.PIPE).communicate(b"typed", SECONDS)
    assert (tmp_path / "a-1" / "log.txt").read_text() == "\n"


def lines_of(function: Callable[..., object]) -> list[tuple[str, int]]:
    """Return file and number of each line in a function's body."""
    code = function.__code__
    return sorted({(code.co_filename, line) for *_, line in code.co_lines() if line and line > code.co_firstlineno})


SWEPT = {
    "ok": ("record()", [execute, runner._run_until]),
    "refused": ("print('lit-sparse: no.'); sys.exit(2)", [execute, runner._record, runner.diagnose, RunRecord.write]),
}


@linux
@pytest.mark.parametrize("status", SWEPT)
def test_a_bench_killed_at_any_line_can_continue(tmp_path, status):
    functions = SWEPT[status][1]
    places = [place for function in functions for place in lines_of(function)]
    killed = [place for place in places if was_killed(tmp_path, status, *place)]
    assert {lines_of(function)[0] for function in functions} | {lines_of(execute)[-1]} <= set(killed)


def was_killed(folder: Path, status: str, file: str, line: int) -> bool:
    """Kill a bench at a line in its second run, and check that it can continue; return whether it reached the line."""
    root = folder / f"{Path(file).stem}-{line}"
    jobs = [job(root, "a"), job(root, "b", SWEPT[status][0])]
    assert make(jobs[:1], root) == ["a-1"]
    before = stamps(root / "a-1")
    code = started(jobs, root, file, line).wait(SECONDS)
    noted = [path.name for path in finished_runs(root, jobs[1])]
    final = ["b-1"] if status in runner.FINAL_STATUSES else []
    assert (code, noted) in [(0, final), (-signal.SIGKILL, final), (-signal.SIGKILL, [])]
    assert len(make(jobs, root)) == 1 - len(noted)
    assert RunRecord.read(folders(root, "b")[-1] / "record.json").status == status
    assert finished_runs(root, jobs[0]) == [root / "a-1"]
    assert stamps(root / "a-1") == before
    return code != 0


@linux
def test_a_process_ends_if_its_bench_ended_before_it_began():
    code = """
import os, sys
from lit_sparse_profiling import runner
begin = runner.parent_death_hook()
if os.fork() == 0:
    if os.fork() == 0:  # its parent is not the bench, as after the bench's end
        begin()
        print("it goes on")
        sys.exit()
    os.wait()
else:
    os.wait()
"""
    child = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert (child.stdout, child.stderr) == ("", "")


# ---- what the program is


def test_sources_change_with_names_and_contents_of_python_files_only(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "x.py").write_text("1")
    first = hash_sources([tmp_path])
    (tmp_path / "x.yaml").write_text("2")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "y.py").write_text("3")
    assert hash_sources([tmp_path]) == first
    (tmp_path / "inner" / "x.py").write_text("4")
    second = hash_sources([tmp_path])
    (tmp_path / "inner" / "x.py").rename(tmp_path / "inner" / "z.py")
    assert len({first, second, hash_sources([tmp_path]), hash_sources([])}) == 4
