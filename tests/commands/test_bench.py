"""The verb `bench`: its options and those of each fit, its comparisons, and real runs of tiny models."""

import errno
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress

from lit_sparse import cli
from lit_sparse.commands import bench as verb
from lit_sparse.commands import bench_inputs
from lit_sparse.errors import BadInput
from lit_sparse.places import configs_folder
from lit_sparse.storage import held
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import SCHEMA, RunRecord
from lit_sparse_profiling.runner import Job, Repeat
from lit_sparse_profiling.speed_sections import Throughput

ROOTS = [str(Path(verb.__file__).parents[2] / folder) for folder in ("", "kernels", "profiling")]
SYNTHETIC = f"--config={configs_folder()}/data/synthetic.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty folder to work in; processes started there find what is under test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(ROOTS))
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def planned(monkeypatch):
    """`planned(*words)`: the jobs that these words ask for, and what else `run` is given; nothing is run."""
    given: list[tuple] = []
    monkeypatch.setattr(verb, "run", lambda *arguments: given.append(arguments) or 0)

    def plan(*words: str) -> tuple[dict[str, Job], Path, int, float | None]:
        assert cli.run(["bench", *words]) == 0
        jobs, *rest = given.pop()
        return {job.name: job for job in jobs}, *rest

    return plan


def config_files(job: Job) -> list[str]:
    return [word.removeprefix("--config=") for word in job.command if word.startswith("--config=")]


# ---- words

SPLIT = {
    "nothing": ("", "", ""),
    "YAMLs": ("smt.yaml a.yaml+b.yaml", "smt.yaml a.yaml+b.yaml", ""),
    "a fit's option and its value": ("--model.base tiny smt.yaml", "smt.yaml", "--model.base tiny"),
    "joined by =": ("--model.base=tiny smt.yaml", "smt.yaml", "--model.base=tiny"),
    "ours": ("--steps 2 --repeat=3 x.yaml --into out", "--steps 2 --repeat=3 x.yaml --into out", ""),
    "a negative value": ("--data.seed -1 smt.yaml", "smt.yaml", "--data.seed -1"),
    "ours and negative": ("--repeat -1 smt.yaml", "--repeat -1 smt.yaml", ""),
    "an option without value": ("--print_config --steps 2", "--steps 2", "--print_config"),
    "common YAMLs": ("--config a.yaml -c b.yaml c.yaml", "--config a.yaml -c b.yaml c.yaml", ""),
    "an option that begins alike": ("--steps_more 2 --configs x", "", "--steps_more 2 --configs x"),
    "help": ("--help smt.yaml", "--help smt.yaml", ""),
}


@pytest.mark.parametrize(("words", "own", "passed"), SPLIT.values(), ids=SPLIT)
def test_words_are_ours_or_a_fit_s(words, own, passed):
    assert verb.take(words.split(), verb.OWN) == (own.split(), passed.split())


REFUSED = {
    "unknown YAML": ("nowhere.yaml", r"no nowhere\.yaml, neither here nor .*smt\.yaml"),
    "unknown part": ("smt.yaml+nowhere.yaml", r"no nowhere\.yaml, "),
    "unknown common YAML": ("smt.yaml --config nowhere.yaml", r"no nowhere\.yaml, "),
    "a folder": ("folder.yaml", r"no folder\.yaml, "),
    "twice": ("smt.yaml lora.yaml smt.yaml", "smt is asked for twice"),
    "two of one name": ("smt.yaml mine/smt.yaml", "smt is asked for twice"),
    "no repetition": ("smt.yaml --repeat 0", "--repeat 0, .* above 0"),
    "no step": ("smt.yaml --steps=0", "--steps 0 .* above 0"),
    "no time": ("smt.yaml --minutes 0", "--minutes 0.0 .* above 0"),
    "negative": ("smt.yaml --repeat -1", "--repeat -1, .* above 0"),
    "no number": ("smt.yaml --minutes nan", "--minutes nan .* above 0"),
    "no end": ("smt.yaml --minutes inf", "--minutes inf .* above 0"),
    "too many": ("smt.yaml --repeat 1000000000", "--repeat 1000000000, .* at most 10000 repeats"),
    "too many steps": ("smt.yaml --steps 1000000", "--steps 1000000 .* at most 10000 repeats, 999999 steps"),
    "too long": ("smt.yaml --minutes 1e300", "--minutes 1e.300 .* and 1000000 minutes"),
    "into a file": (
        "smt.yaml --into mine/smt.yaml",
        "--into mine/smt.yaml is a file or leads nowhere, and the runs need a folder; give",
    ),
    "into what is gone": ("smt.yaml --into dangling", "--into dangling is a file or leads nowhere"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_words_are_refused_before_anything_runs(planned, words, message):
    Path("folder.yaml").mkdir()
    Path("mine").mkdir()
    Path("mine", "smt.yaml").write_text("")
    Path("dangling").symlink_to("gone")
    with pytest.raises(BadInput, match=message):
        planned(*words.split())
    assert not Path("runs").exists()


def test_the_command_line_says_a_refusal_in_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse", "bench", "nowhere.yaml"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("lit-sparse: there is no nowhere.yaml, ")


def test_help_is_the_bench_s_own(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(["bench", "smt.yaml", "--help"])
    assert exit_.value.code == 0
    assert "a.yaml+b.yaml is both at once" in capsys.readouterr().out


# ---- jobs


def test_without_yamls_all_that_come_along_are_compared(planned):
    jobs, root, repeat, limit = planned()
    shipped = configs_folder().glob("*.yaml")
    assert sorted(jobs) == sorted(path.stem for path in shipped)
    assert {"full", "lora", "smt"} <= set(jobs)
    assert (root, repeat, limit) == (Path("runs/bench"), 1, None)
    for name, job in jobs.items():
        assert config_files(job) == [SYNTHETIC.partition("=")[2], str(configs_folder() / f"{name}.yaml")]


def test_a_job_is_a_fit_of_a_few_measured_steps(planned):
    jobs, root, repeat, _ = planned("full.yaml", "--model.base", "tiny", "--steps", "7", "--repeat", "3", "--into", "x")
    command = list(jobs["full"].command)
    assert command[:4] == [sys.executable, "-m", "lit_sparse", "fit"]
    assert command[-5:] == ["--model.base", "tiny", "--trainer.default_root_dir=x", "--run=full", "--profile.timed=7"]
    assert {"--trainer.limit_val_batches=0", "--checkpoint_steps=0", "--samples=0"} <= set(command)
    assert (root, repeat) == (Path("x"), 3)


def test_yamls_may_stand_between_options(planned):
    jobs, *_ = planned("full.yaml", "--steps", "2", "smt.yaml", "--model.base", "tiny", "lora.yaml")
    assert list(jobs) == ["full", "smt", "lora"]


def test_joined_yamls_are_one_job_on_a_common_base(planned):
    for name in ("base", "mine", "other"):
        Path(f"{name}.yaml").write_text("model:\n  lr: 1.0e-3\n")
    jobs, *_ = planned(
        "mine.yaml+smt.yaml+./other.yaml", "mine.yaml", "--config", "trainers/demo.yaml", "-c", "base.yaml"
    )
    shipped = configs_folder()
    common = [str(shipped / "trainers" / "demo.yaml"), "base.yaml"]
    assert list(jobs) == ["mine+smt+other", "mine"]
    assert config_files(jobs["mine+smt+other"]) == [*common, "mine.yaml", str(shipped / "smt.yaml"), "other.yaml"]
    assert config_files(jobs["mine"]) == [*common, "mine.yaml"]
    assert "--run=mine+smt+other" in jobs["mine+smt+other"].command


def test_settings_of_runs_are_called_after_the_runs_even_of_two_methods(planned):
    """A file whose path has a + is one file."""
    paths = [Path("runs", name, "config.yaml") for name in ("lora+deft-1", "lora+deft-2")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text("model:\n  lr: 1.0e-3\n")
    jobs, *_ = planned(*map(str, paths), "smt.yaml")
    assert list(jobs) == ["lora+deft-1", "lora+deft-2", "smt"]
    assert [config_files(jobs[path.parent.name])[-1] for path in paths] == list(map(str, paths))


@pytest.mark.parametrize(
    "name", ["config.yaml", "./config.yaml", "../mine-1/config.yaml", "checkpoints/../config.yaml"]
)
def test_a_run_is_called_the_same_from_inside_of_it(tmp_path, monkeypatch, name):
    folder = tmp_path / "mine-1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    monkeypatch.chdir(folder)
    assert verb.label_of(name) == "mine-1"
    monkeypatch.chdir(folder / "checkpoints")
    assert verb.label_of("../config.yaml") == "mine-1"


DATA = {
    "none": ("", "", True),
    "by class": ("--data Text", "", False),
    "joined by =": ("--data=Text", "", False),
    "by class path": ("--data.class_path=Text", "", False),
    "only a batch size": ("--data.batch_size 8", "", True),
    "in a YAML": ("", "data:\n  class_path: Text\n", False),
    "in a word of a YAML": ("", "data: Text\n", False),
    "only a batch size in a YAML": ("", "data:\n  init_args:\n    batch_size: 8\n", True),
    "another key of a YAML": ("", "model:\n  data: Text\n", True),
    "no mapping": ("", "data\n", True),
    "no YAML": ("", "data: [\n", True),
    "no date": ("", "data: 2001-13-45\n", True),
    "no text": ("", "data: Text # \udcff\n", True),
}


@pytest.mark.parametrize(("words", "content", "synthetic"), DATA.values(), ids=DATA)
def test_rows_are_random_unless_data_are_chosen(planned, words, content, synthetic):
    Path("mine.yaml").write_text(content, encoding="utf-8", errors="surrogateescape")
    jobs, *_ = planned("mine.yaml", *words.split())
    assert (SYNTHETIC in jobs["mine"].command) == synthetic
    assert config_files(jobs["mine"])[-1] == "mine.yaml"  # which so wins over the synthetic data


def test_the_common_yaml_may_choose_the_data(planned):
    jobs, *_ = planned("smt.yaml", "--config", "data/text.yaml")
    assert SYNTHETIC not in jobs["smt"].command


def test_minutes_end_the_training_and_then_the_process(planned):
    jobs, *_, limit = planned("smt.yaml", "--minutes", "1.5")
    assert "--trainer.max_time=00:00:01:30" in jobs["smt"].command
    assert limit == 90 + verb.GRACE
    jobs, *_, limit = planned("smt.yaml")
    assert not any("max_time" in word for word in jobs["smt"].command)
    assert limit is None


@pytest.mark.parametrize(
    ("minutes", "text"), [(0.001, "00:00:00:01"), (1, "00:00:01:00"), (60.5, "00:01:00:30"), (1441, "01:00:01:00")]
)
def test_a_time_limit_in_lightning_s_form(minutes, text):
    assert verb.max_time(minutes) == text


def test_the_same_command_asks_for_the_same_and_anything_else_for_something_else(planned, monkeypatch):
    for folder in ("", "one", "two"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "mine.yaml").write_text("model:\n  lr: 1.0e-3\n")
    words = ["mine.yaml", "--config", "one/mine.yaml", "--config", "two/mine.yaml"]

    def identity(*more: str) -> str:
        return planned(*words, *more)[0]["mine"].identity

    seen = [identity()]
    assert identity("--repeat", "3") == identity() == seen[0]
    for more in (["--steps", "9"], ["--minutes", "3"], ["--model.lr=1"], ["--model.lr=2"], ["--config", "smt.yaml"]):
        seen.append(identity(*more))
    for path in ("mine.yaml", "one/mine.yaml", "two/mine.yaml"):
        Path(path).write_text("model:\n  lr: 2.0e-3\n")
        seen.append(identity())
    Path("kernels").mkdir()
    monkeypatch.setattr(verb.lit_sparse_kernels, "__path__", [str(Path("kernels").resolve())])
    for source in ("", "x = 1"):
        Path("kernels", "op.py").write_text(source)
        seen.append(identity())
    monkeypatch.setattr(verb, "version", lambda package: "0")
    seen.append(identity())
    assert len(set(seen)) == len(seen)


INPUTS = {
    "rows": ("", "--data rows.jsonl", "rows.jsonl"),
    "rows joined by =": ("", "--data=rows.jsonl", "rows.jsonl"),
    "a key of the data": ("", "--data Text --data.validation=rows.jsonl", "rows.jsonl"),
    "several": ("", "--data Text --data.train [here.txt,rows.jsonl]", "rows.jsonl"),
    "a folder": ("", "--data books/", "books/deep/one.txt"),
    "a folder with the runs": ("", "--data ./", "rows.jsonl"),
    "rows in a YAML": ("data:\n  class_path: Text\n  init_args:\n    train: [rows.jsonl]\n", "", "rows.jsonl"),
    "a base": ("", "--model.base base", "base/model.safetensors"),
    "a base in a YAML": ("model:\n  base: ${oc.env:PLACE}/base\n", "", "base/model.safetensors"),
}


@pytest.mark.parametrize(("content", "words", "changed"), INPUTS.values(), ids=INPUTS)
def test_runs_on_other_rows_or_another_base_are_no_repetitions(planned, monkeypatch, home, content, words, changed):
    monkeypatch.setenv("PLACE", str(home))
    Path("mine.yaml").write_text(content)
    for path in ("rows.jsonl", "books/deep/one.txt", "base/model.safetensors", "out/mine-1/log.txt", "other.jsonl"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("one")

    def identity() -> str:
        return planned("mine.yaml", *words.split(), "--into", "out")[0]["mine"].identity

    seen = [identity()]
    Path("out", "mine-1", "log.txt").write_text("of another run")
    if "./" not in words:
        Path("other.jsonl").write_text("another")
    assert identity() == seen[0]
    time = Path(changed).stat().st_mtime_ns
    os.utime(changed, ns=(time, time + 10**9))
    seen.append(identity())
    Path(changed).write_text("longer")
    os.utime(changed, ns=(time, time))
    seen.append(identity())
    Path(changed).unlink()
    seen.append(identity())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("text", ["a\0b", "~a\0b", "[", "[*a]", "~nobody/x", "x" * 300, "\udcff"])
def test_what_is_no_path_names_no_file(text, home):
    words = ["--data.train", text]
    assert [*bench_inputs.states_of_inputs([], words, "out")] == []


# ---- a course, with quick processes in place of fits

QUICK = f"""
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "record.json").write_text(json.dumps({{"schema": {SCHEMA}, "name": folder.name, **json.loads(sys.argv[2])}}))
"""


def quick(name: str, fields: str) -> Job:
    return Job(name, [sys.executable, "-IS", "-c", QUICK, f"out/{name}-1", fields], {})


STATUS: dict[str, tuple[list[str], int]] = {
    "all well": (["{}"], 0),
    "oom": (["{}", '{"status": "oom", "reason": "full"}'], 0),
    "refused": (['{"status": "refused", "reason": "no"}', "{}"], 0),
    "all refused": (['{"status": "refused", "reason": "no"}'] * 2, 1),
    "failed": (["{}", '{"status": "failed", "reason": "a bug"}', "{}"], 1),
    "no record": (["{}", "no JSON"], 1),
}


@pytest.mark.parametrize(("records", "status"), STATUS.values(), ids=STATUS)
def test_the_exit_status_tells_of_failures_and_of_nothing_measured(records, status):
    assert verb.run([quick(f"r{i}", fields) for i, fields in enumerate(records)], Path("out"), 1, None) == status


def test_each_run_is_told_and_all_are_compared(capsys):
    reason = "it takes [red] or [/b], not [c]"
    jobs = [quick("one", "{}"), quick("two", f'{{"status": "oom", "reason": "{reason}"}}')]
    for earlier in ("", " (made earlier)"):
        assert verb.run(jobs, Path("out"), 1, None) == 0
        said = capsys.readouterr().out
        lines = [line.rstrip() for line in said.splitlines()]
        assert f"one-1: ok{earlier}" in lines
        assert f"two-1: oom{earlier} {reason}" in lines
        assert any(line.split() == ["run", "status"] for line in lines)
        assert any(line.split() == ["one-1", "ok"] for line in lines)
        assert any(line.split() == ["two-1", "oom"] for line in lines)
        assert lines[-1] == "The same again: lit-sparse report out"


def test_a_run_beyond_the_limit_has_failed(capsys):
    endless = Job("endless", [sys.executable, "-IS", "-c", "import time; time.sleep(60)"], {})
    assert verb.run([endless], Path("out"), 1, 0.5) == 1
    assert "endless-1: failed it was stopped after " in capsys.readouterr().out


def test_a_full_disk_is_a_sentence_and_leaves_no_part_of_a_run(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "write", full)
        with pytest.raises(BadInput, match=r"could not be written under out: No space left on device; make room"):
            verb.run([Job("one", [sys.executable, "-IS", "-c", ""], {})], Path("out"), 1, None)
    assert [*Path("out").iterdir()] == []
    assert verb.run([quick("one", "{}")], Path("out"), 1, None) == 0


def test_a_folder_in_which_another_bench_runs_is_refused_and_left_as_it_is(monkeypatch):
    assert verb.run([quick("one", "{}")], Path("out"), 1, None) == 0
    monkeypatch.setattr(held, "PATIENCE", 0.0)
    other = held.Held(Path("out"))
    other.take()
    with pytest.raises(BadInput, match=r"^another bench makes its runs in out; wait until it ends, or give .*--into"):
        verb.run([quick("two", "{}")], Path("out"), 1, None)
    assert [path.name for path in Path("out").iterdir()] == ["one-1"]
    other.release()
    for _ in range(2):
        assert verb.run([quick("two", "{}")], Path("out"), 1, None) == 0


@pytest.mark.parametrize("against", [None, "other"])
def test_each_run_begins_cool_where_its_energy_counts(home, monkeypatch, against):
    """Not before a run that was made earlier; interleaved runs have no energy."""
    order: list[str] = []

    def execute(job: Job, *_: object, **__: object) -> Path:
        order.append(job.name)
        folder = home / f"{job.name}-1"
        folder.mkdir(exist_ok=True)
        RunRecord(name=folder.name).write(folder / "record.json")
        return folder

    monkeypatch.setattr(verb.Cooling, "wait", lambda self, tick: order.append("cool"))
    monkeypatch.setattr(verb, "execute", execute)
    other = None if against is None else Job(against, [], {})
    jobs = [Job(name, [name], {}, other) for name in ("a", "b")]
    assert verb.run(jobs, home, 1, None) == 0
    assert order == (["cool", "a", "cool", "b"] if against is None else ["a", "b"])


def test_a_good_run_is_told_by_its_step(tmp_path):
    throughput = Throughput(tokens=None, padded_tokens=None, seconds=3.0, steps=2, median_step=1.25)
    RunRecord(name="x-1", throughput=throughput).write(tmp_path / "record.json")
    turn = Repeat(quick("x", "{}"), 1, None)
    assert verb.outcome(turn, tmp_path) == f"{tmp_path.name}: ok 1.250 s a step"


# ---- real runs

FAULTY = """
from dataclasses import dataclass
from lit_sparse.strategies.base import UpdateStrategy

@dataclass
class Faulty(UpdateStrategy):
    "Breaks."

    def before_step(self, step, optimizer):
        raise RuntimeError("a bug in a strategy")
"""
TINY = [
    *("--model.base", "bare/config.json", "--trainer.accelerator", "cpu", "--into", "out"),
    *("--data", "Synthetic", "--data.max_length", "16", "--data.batch_size", "2"),
    *("--steps", "2", "--profile.warmup", "1", "--profile.profiled", "1"),
]


def records() -> Mapping[str, RunRecord]:
    return {path.parent.name: RunRecord.read(path) for path in Path("out").glob("*/record.json")}


def test_methods_are_measured_side_by_side_and_only_what_is_missing_is_made(capsys):
    tiny_llm("llama").config.save_pretrained("bare")
    Path("slow.yaml").write_text("model:\n  lr: 1.0e-5\n")
    Path("broken.yaml").write_text("model:\n  blocksize: 4\n")
    words = ["bench", "full.yaml", "broken.yaml", "smt.yaml+slow.yaml", *TINY, "--minutes", "9"]

    assert cli.run(words) == 0
    said, made = capsys.readouterr().out, records()
    assert {name: record.status for name, record in made.items()} == {
        "full-1": "ok",
        "broken-1": "refused",
        "smt+slow-1": "ok",
    }
    assert "blocksize" in made["broken-1"].reason
    assert f"broken-1: refused {made['broken-1'].reason}" in " ".join(said.split())
    assert [update["class"] for update in made["smt+slow-1"].updates] == ["SMT"]
    assert yaml.safe_load(Path("out/smt+slow-1/config.yaml").read_text())["model"]["lr"] == 1e-5
    for name in ("full-1", "smt+slow-1"):
        assert made[name].throughput.steps == 2
        assert made[name].settings["data"]["class_path"] == "lit_sparse.data.Synthetic"
        assert not Path("out", name, "checkpoints").exists()
    assert "tokens/s" in said
    assert said.rstrip().endswith("The same again: lit-sparse report out")

    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path("out").rglob("*")}
    assert cli.run(words) == 0
    said = capsys.readouterr().out
    assert said.count("(made earlier)") == 2
    assert "broken-2: refused " in said  # again: it takes seconds, and its reason may be gone
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert {path for path in Path("out").rglob("*") if "broken-2" not in path.parts} == before.keys()

    Path("faulty.py").write_text(FAULTY)
    Path("faulty.yaml").write_text("model:\n  updates+:\n    - class_path: faulty.Faulty\n")
    Path("broken.yaml").write_text("model:\n  lr: 1.0e-4\n")
    words[1:4] = ["broken.yaml", "faulty.yaml", "full.yaml"]
    assert cli.run(words) == 1
    made = records()
    assert {name: record.status for name, record in made.items()} == {
        "full-1": "ok",
        "broken-1": "refused",
        "broken-2": "refused",
        "smt+slow-1": "ok",
        "broken-3": "ok",
        "faulty-1": "failed",
    }
    assert made["faulty-1"].reason == "RuntimeError: a bug in a strategy"


def test_what_a_run_says_of_its_memory_is_shown_once_while_it_runs(tmp_path: Path) -> None:
    log, out = tmp_path / ".lora.log.1.lit-sparse-draft", io.StringIO()
    relay = verb.Relay("lora", log, Progress(console=Console(file=out, width=200), auto_refresh=False))
    relay.tick()  # the run has written nothing yet
    log.write_text("Seed set to 0\nPredicted peak of memory: 1.00 GiB of tensors\nWarning: this will")
    relay.tick()
    assert "lora: Predicted peak of memory: 1.00 GiB of tensors" in out.getvalue()
    assert "Warning" not in out.getvalue()
    with log.open("a") as file:
        file.write(" not fit. 2 GiB are needed\nSeed set to 0\n")
    relay.tick()
    assert out.getvalue().count("lora: Predicted") == 1
    assert "lora: Warning: this will not fit. 2 GiB are needed" in out.getvalue()
    assert "Seed" not in out.getvalue()
