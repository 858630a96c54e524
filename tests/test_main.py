"""The command before torch is imported: help, version, and verbs that there are not."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_sparse import cli
from lit_sparse.__main__ import VERBS, fault, main, wait_passively
from lit_sparse.commands.parsers import help_of
from lit_sparse.commands.shipped import laid_out

ROOT = Path(__file__).parents[1]
HERE = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling"))}
"""Environment in which the modules are those of this checkout."""
COMMAND = [sys.executable, "-m", "lit_sparse"]
WATCHED = """
import runpy, sys
try:
    runpy.run_module("lit_sparse", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.argv[1:] = {list(words)!r}\n{WATCHED}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=HERE)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)], ids=str)
def test_help_names_every_verb_without_torch(words):
    found = run(*words)
    assert found.returncode == 0
    assert all(f"  {verb} " in found.stdout and f"$ {one.example}" in found.stdout for verb, one in VERBS.items())
    assert found.stdout.splitlines()[-1] == "False", "torch was imported"


def test_methods_are_listed_without_torch():
    found = run("list")
    assert found.returncode == 0
    assert "smt.yaml" in found.stdout
    assert found.stdout.splitlines()[-1] == "False", "torch was imported"


@pytest.mark.parametrize("verb", cli.FIT_VERBS)
def test_the_help_of_a_fit_is_the_parsers_without_torch(verb, monkeypatch):
    found = run(verb, "--help")
    assert found.returncode == 0
    *lines, torch = found.stdout.splitlines()
    assert torch == "False", "torch was imported"
    monkeypatch.setattr(sys, "argv", ["lit-sparse", verb])
    assert "\n".join(lines) == laid_out(help_of([verb], long=False)), "run python benchmarks/readme.py"
    assert all(len(line) <= 80 for line in lines if not line.startswith("  lit-sparse "))


def test_every_verb_is_one():
    assert {*cli.VERBS, *cli.RUN_VERBS, *cli.FIT_VERBS} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_an_example_is_of_its_verb(verb):
    assert f"lit-sparse {verb}" in VERBS[verb].example


def test_the_version_is_told():
    assert run("--version").stdout.startswith("lit-sparse 0.")


@pytest.mark.parametrize(("word", "meant"), [("fitt", "did you mean fit?"), ("xyz", "lit-sparse --help lists them.")])
def test_an_unknown_verb_gets_the_nearest(word, meant):
    found = run(word)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1] == f"lit-sparse: there is no verb {word!r}; {meant}"


CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def test_openmp_threads_sleep_at_barriers():
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, "-m", "lit_sparse", "report", "nowhere"]
    environment["OMP_DISPLAY_ENV"] = "true"  # OpenMP itself says what it read, when torch loads it
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_user_holds(name, monkeypatch):
    for other in CHOICES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    wait_passively()
    assert os.environ.get("OMP_WAIT_POLICY") == ("7" if name == "OMP_WAIT_POLICY" else None)


@pytest.mark.parametrize("words", [("--help",), ("list",), ("completion", "bash")], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(words):
    reads, writes = os.pipe()
    os.close(reads)
    found = subprocess.run([*COMMAND, *words], stdout=writes, stderr=subprocess.PIPE, text=True, env=HERE)
    os.close(writes)
    assert (found.returncode, found.stderr) == (0, "")


def test_streams_that_are_closed_are_no_error():
    script = f'{shlex.join(COMMAND)} completion bash <&- >&- 2>&-; echo "$?"'
    found = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=HERE)
    assert found.stdout == "0\n"


def heed_interrupts() -> None:
    """Let Ctrl-C end this process, even where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_while_libraries_load_leaves_no_traceback():
    options = {"stderr": subprocess.PIPE, "text": True, "env": HERE}
    process = subprocess.Popen([*COMMAND, "plan", "lora.yaml"], **options, preexec_fn=heed_interrupts)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["runs/a-1", "caf\udce9"], {}, r"'caf\udce9' is not UTF-8"),
        ([], {"PL_GLOBAL_SEED": "abc"}, "the environment variable PL_GLOBAL_SEED is 'abc'; it must be a whole number"),
        ([], {"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ([], {"SLURM_NTASKS": "2(x3)"}, "SLURM_NTASKS is '2(x3)'"),
        ([], {"PL_GLOBAL_SEED": "1" * 5000}, "PL_GLOBAL_SEED is "),
        (["café"], {"PL_GLOBAL_SEED": "7", "LOCAL_RANK": "0"}, None),
    ],
    ids=range(6),
)
def test_words_and_environment_that_no_fit_can_work_with_are_told(words, environment, said):
    found = fault("fit", words, environment)
    assert found == said or (said is not None and found is not None and said in found)
    assert fault("report", words, environment) is None


def test_a_current_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir("gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "argv", ["lit-sparse", "fit", "--config", "lora.yaml"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err == "lit-sparse: the current folder is not there any more; change to another.\n"
