"""The commands of the README and of docs/ are real, and their tables are those of the committed records."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lit_sparse import cli
from lit_sparse.commands import bench, plan
from lit_sparse.commands.configs import find_configs
from lit_sparse.export import generate

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    command
    for page in PAGES
    for command in re.findall(r"^(lit-sparse .*?)(?:\s+#.*)?$", page.read_text(), re.MULTILINE)
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def test_tables_are_those_of_the_records():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_both_set_up_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_parses(command, monkeypatch, capsys):
    verb, *words = find_configs(shlex.split(command.partition(" > ")[0])[1:])
    if verb in cli.VERBS:
        parser = cli.jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_function_arguments(cli.VERBS[verb], as_positional=True)
        parser.parse_args(cli.switched_on(cli.VERBS[verb], words))
        return
    if verb == "generate":
        generate.parser().parse_intermixed_args(words)
        return
    if verb == "report":
        cli.report_parser().parse_args(words)
        return
    if verb in ("bench", "plan"):
        module, switches = (bench, ()) if verb == "bench" else (plan, ("--largest",))
        own, words = bench.take(words, module.OWN, switches)
        yamls = [bench.existing(name) for name in module.parser().parse_args(own).yamls]
        assert all(yaml.is_file() for yaml in yamls)
        verb, words = "fit", [*(f"--config={yaml}" for yaml in yamls[:1]), *words]
    if "--help" in words:
        assert cli.run([verb, *words]) == 0
        assert "usage:" in capsys.readouterr().out
        return
    kept = [n for n, word in enumerate(words) if not word.startswith("runs/")]
    kept = [n for n in kept if n + 1 in kept or not words[n].startswith("--")]
    words = [words[n] for n in kept]
    monkeypatch.setattr(sys, "argv", ["lit-sparse", verb, *words, "--print_config"])
    with pytest.raises(SystemExit) as left:
        cli.run([verb, *words, "--print_config"])
    assert not left.value.code
    assert "updates:" in capsys.readouterr().out


def test_there_are_commands():
    assert len(COMMANDS) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in names, f"{target}#{anchor}"
