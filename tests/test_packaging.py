"""The wheel: its contents, and that it works without a checkout."""

import ast
import email
import email.policy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCES = ("lit_sparse", "kernels", "profiling", "configs")
REPOSITORY = "someone/lit_sparse"
PACKAGES = {"lit_sparse", "lit_sparse_kernels", "lit_sparse_profiling"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in the checkout leaves litter there, and packs what an old one left."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    with pytest.MonkeyPatch.context() as patch:  # as in a workflow that releases
        patch.setenv("GITHUB_REPOSITORY", REPOSITORY)
        patch.setenv("GITHUB_REF_NAME", "v0.1.0")
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds the wheel, and borrows everything else from the running one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, symlinks=os.name != "nt")
    paths = sysconfig.get_paths("venv", vars={"base": str(home), "platbase": str(home)})
    python = Path(paths["scripts"], "python")
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    # Only now: pip would take an editable install in the borrowed folder for this very package.
    Path(paths["purelib"], "borrowed.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return python


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


def outside(python: Path, folder: Path, *arguments: str) -> str:
    """Return what `python` prints in `folder`, without this checkout's folders on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], check=False, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def requirement_names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^;\s]+)", line) for line in lines if line and not line.startswith("#"))
    return {normal(match[1]): match[2] for match in found if match}


def imported_packages() -> set[str]:
    """Every top-level name that the product's files import, at the top of a file or within a function."""
    names: set[str] = set()
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return names


def test_wheel_holds_three_packages_and_no_taken_name(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not re.search(r"\.(dist-info|data)$", top)} == PACKAGES
    assert {f"{package}/{name}" for package in PACKAGES for name in ("__init__.py", "py.typed")} <= set(names)


def test_wheel_holds_every_file_of_the_source(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        packed = {re.sub(r"^[^/]*\.data/data/share/lit-sparse/", "", name) for name in archive.namelist()}
    roots = {"lit_sparse": ROOT, "kernels": ROOT / "kernels", "profiling": ROOT / "profiling", "configs": ROOT}
    kept = {".py", ".yaml", ".html", ".txt", ".typed"}
    files = {
        path.relative_to(root).as_posix()
        for folder, root in roots.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kept
    }
    assert any(name.startswith("configs/") for name in files)
    assert sorted(files - packed) == []


def test_wheel_installs_the_command_and_the_licence(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        entries, licences = (
            [name for name in archive.namelist() if name.endswith(ending)]
            for ending in (".dist-info/entry_points.txt", ".dist-info/licenses/LICENSE")
        )
        assert len(licences) == 1
        assert "lit-sparse = lit_sparse.__main__:main" in archive.read(entries[0]).decode()


def test_the_description_on_pypi_has_links_that_lead_to_files(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name), policy=email.policy.default)
    assert metadata["Project-URL"] == f"Source, https://github.com/{REPOSITORY}"
    assert metadata["Description-Content-Type"] == "text/markdown"
    places = (
        f"https://github.com/{REPOSITORY}/blob/v0.1.0/",
        f"https://raw.githubusercontent.com/{REPOSITORY}/v0.1.0/",
    )
    targets = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    ours = [target.removeprefix(place) for target in targets for place in places if target.startswith(place)]
    assert len(ours) == len(re.findall(r"\]\((?!http)", (ROOT / "README.md").read_text())) > 10
    assert all((ROOT / path.partition("#")[0]).exists() for path in ours)
    assert all(target.startswith("https://") for target in targets)


def test_the_description_of_a_build_of_ones_own_has_no_dead_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    # In its place, since setuptools cannot be imported where something has imported the standard library's distutils.
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=dict))
    text = runpy.run_path(str(ROOT / "setup.py"))["absolute"](
        "![a](b.svg)[c\nd](e.md#f) [g](https://h.org)", "", "HEAD"
    )
    assert text == "c\nd [g](https://h.org)"


def test_installed_wheel_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = outside(installed, tmp_path, "-c", "import lit_sparse; print(lit_sparse.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parents[1])


def test_installed_wheel_finds_configs_by_name(installed: Path, tmp_path: Path) -> None:
    shown = outside(installed, tmp_path, "-m", "lit_sparse", "fit", "--config", "smt.yaml", "--print_config")
    assert "SMT" in shown


def test_installed_wheel_trains(installed: Path, home: Path) -> None:
    command = ["fit", "--config", "smt.yaml", "--model.base", "tiny", "--data", "rows.jsonl", "--data.heldout", "4"]
    few = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--samples", "0", "--profile", "false"]
    outside(installed, home, str(installed.parent / "lit-sparse"), *command, *few)
    assert json.loads((home / "runs/smt-1/record.json").read_text())["status"] == "ok"


def test_the_version_is_in_one_place(wheel: Path) -> None:
    assert wheel.name.startswith(f"lit_sparse-{PROJECT['version']}-")
    assert "version" not in PROJECT["dynamic"]
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
    sources = [path.read_text() for path in (ROOT / "lit_sparse").rglob("*.py")]
    assert not any(re.search(r"^__version__ =", source, re.MULTILINE) for source in sources)


def test_the_forms_of_github_are_whole() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= form.keys()
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    commands = [step["run"] for step in release["jobs"]["build"]["steps"] if "run" in step]
    targets = [target for command in commands for target in re.findall(r"^make (\w+)", command, re.MULTILINE)]
    assert targets == ["dist", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}  # trusted publishing


def test_the_image_gets_what_the_wheel_is_built_from() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == {*SOURCES, "pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"}
    assert all((ROOT / name).exists() for name in copied)
    extra = re.findall(r"'\.\[(\w+)\]'", text)
    assert {*extra} <= PROJECT["optional-dependencies"].keys()
    assert 'ENTRYPOINT ["lit-sparse"]' in text
    assert "lit-sparse" in PROJECT["scripts"]


def test_imports_are_declared() -> None:
    """A package that only came along with another one goes when that one changes its mind."""
    owners = packages_distributions()
    foreign = imported_packages() - PACKAGES - set(sys.stdlib_module_names)
    declared = requirement_names([*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())])
    missing = {name for name in foreign if not {normal(owner) for owner in owners.get(name, [name])} & declared}
    assert missing == set(), "add these to [project] dependencies in pyproject.toml"


def test_constraints_pin_what_is_required() -> None:
    extras = PROJECT["optional-dependencies"]
    named = [*PROJECT["dependencies"], *(line for extra in ("data", "quant", "eval", "dev") for line in extras[extra])]
    required = requirement_names(named) - {"lit-sparse"}
    assert required - set(pins()) == set(), "add the tested version to constraints.txt"
