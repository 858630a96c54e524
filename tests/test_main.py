"""The command before torch is imported: help, version, and verbs that there are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sparse import cli
from lit_sparse.__main__ import VERBS

ROOT = Path(__file__).parents[1]
WATCHED = """
import runpy, sys
try:
    runpy.run_module("lit_sparse", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "profiling"))
    code = f"import sys; sys.argv[1:] = {list(words)!r}\n{WATCHED}"
    environment = {**os.environ, "PYTHONPATH": search}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)], ids=str)
def test_help_names_every_verb_without_torch(words):
    found = run(*words)
    assert found.returncode == 0
    assert all(f"  {verb} " in found.stdout for verb in VERBS)
    assert found.stdout.splitlines()[-1] == "False", "torch was imported"


def test_every_verb_is_one():
    assert {*cli.VERBS, *cli.RUN_VERBS} < set(VERBS)


def test_the_version_is_told():
    assert run("--version").stdout.startswith("lit-sparse 0.")


@pytest.mark.parametrize(("word", "meant"), [("fitt", "did you mean fit?"), ("xyz", "lit-sparse --help lists them.")])
def test_an_unknown_verb_gets_the_nearest(word, meant):
    found = run(word)
    assert found.returncode == 2
    assert found.stderr.strip().splitlines()[-1] == f"lit-sparse: there is no verb {word!r}; {meant}"
