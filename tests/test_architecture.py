"""The rules of the layout, checked in the source: direction of imports, reserved names, contents of files."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "profiling")
KERNELS = ROOT / "kernels" / "lit_sparse_kernels"
PROFILING = ROOT / "profiling" / "lit_sparse_profiling"
PACKAGES = (ROOT / "lit_sparse", KERNELS, PROFILING)

# What a part of lit_sparse never imports, neither itself nor through another part. cli is on top: it imports them all.
TOP = {"testing", "commands", "cli"}
TASKS = {"modules", "callbacks", "planning", "export", *TOP}
NEVER_REACHES = {
    "optim": {"strategies", "data", "demo", "checkpoints", *TASKS},
    "anatomy": {"strategies", "data", "demo", "checkpoints", *TASKS},
    "strategies": {"data", "demo", "runs", *TASKS},
    "demo": {"strategies", "data", "checkpoints", *TASKS},
    "data": {"strategies", "checkpoints", *TASKS},
    "checkpoints": TASKS,
    "storage": {"strategies", "data", "demo", "checkpoints", "runs", *TASKS},
    "modules": TASKS - {"modules"},
    "planning": {"callbacks", "export", *TOP},
    "callbacks": TOP,
    "export": TOP,
    "testing": {"commands", "cli"},
}
# Taken by the standard library (profile, and profiling from 3.15 on) and by what transformers, peft and torch import.
TAKEN_NAMES = ("kernels", "profiling", "datasets", "transformers", "triton", "profile")
# Of strategies/: what all of them share, or all of a kind: without gradients, or with an optimizer of their own.
PROTOCOL = ("base", "updates", "forward_only", "own_optimizer")
EMPTY_NAMES = {"utils", "common", "core", "helpers", "layers"}
NOT_KEPT = {"build", "dist", "runs", "shared", "lightning_logs", "__pycache__"}
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:work|root|farm|home|Users|tmp)/")


def kept_files() -> Iterator[Path]:
    """The repository's own files, without environments, caches and what builds and runs leave behind."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or not is_litter(name)]
        yield from (Path(folder, name) for name in files if name != ".git")


def is_litter(folder: str) -> bool:
    return folder in NOT_KEPT or folder.startswith(".") or folder.endswith(".egg-info")


def sources(package: Path) -> Iterator[Path]:
    return (path for path in sorted(package.rglob("*.py")) if "__pycache__" not in path.parts)


def dotted(path: Path) -> str:
    """The name under which the module in `path` is imported."""
    package = next(package for package in PACKAGES if path.is_relative_to(package))
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> Iterator[str]:
    """Every module named by an import statement in `path`; `from a import b` names `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def parts_imported() -> dict[str, set[str]]:
    """For every part (file or folder directly in lit_sparse) the other parts that it imports."""
    names = {path.stem for path in (ROOT / "lit_sparse").iterdir()}
    parts: dict[str, set[str]] = {}
    for path in sources(ROOT / "lit_sparse"):
        own = dotted(path).removeprefix("lit_sparse").lstrip(".").split(".")[0] or "__init__"
        found = {name.split(".")[1] for name in imported(path) if name.startswith("lit_sparse.")}
        parts.setdefault(own, set()).update((found & names) - {own})
    return parts


def reached(part: str, parts: dict[str, set[str]]) -> set[str]:
    """Every part that `part` imports, directly or through others; itself too where imports run in a circle."""
    found: set[str] = set()
    ahead = set(parts.get(part, ()))
    while ahead:
        found |= ahead
        ahead = {further for name in ahead for further in parts.get(name, ())} - found
    return found


def defined(path: Path) -> set[str]:
    """The functions, classes and values that the module in `path` defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def test_imports_run_one_way() -> None:
    parts = parts_imported()
    assert parts["strategies"], "no import was found where there are some: the test reads nothing"
    assert [part for part in parts if part in reached(part, parts)] == [], "imports in a circle"
    wrong = {part: reached(part, parts) & never for part, never in NEVER_REACHES.items()}
    assert {part: found for part, found in wrong.items() if found} == {}


def test_benchmarks_import_in_no_circle() -> None:
    paths = sources(ROOT / "benchmarks")
    files = {
        path.stem: {name.split(".")[1] for name in imported(path) if name.startswith("benchmarks.")} for path in paths
    }
    files = {name: found & files.keys() for name, found in files.items()}
    assert files["readme"], "no import was found where there are some: the test reads nothing"
    assert [name for name in files if name in reached(name, files)] == []


@pytest.mark.parametrize("leaf", [KERNELS, PROFILING], ids=lambda leaf: leaf.name)
def test_leaves_stand_alone(leaf: Path) -> None:
    foreign = {"lit_sparse", "lightning", "lightning_fabric", "pytorch_lightning", KERNELS.name, PROFILING.name}
    foreign -= {leaf.name}
    assert {dotted(path): tops(path) & foreign for path in sources(leaf) if tops(path) & foreign} == {}


def test_strategies_import_no_lightning_and_no_profiler() -> None:
    foreign = {"lightning", "lightning_fabric", "pytorch_lightning", "lightning_utilities", PROFILING.name}
    strategies = sources(ROOT / "lit_sparse" / "strategies")
    assert {dotted(path): tops(path) & foreign for path in strategies if tops(path) & foreign} == {}


def test_strategies_load_without_lightning() -> None:
    """A bare loop or another trainer relies on it; packages imported on the way count too."""
    code = "import sys, lit_sparse.strategies; sys.exit('lightning' in sys.modules)"
    search = os.pathsep.join(map(str, SOURCE_ROOTS))
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": search}).returncode == 0


def test_product_imports_neither_benchmarks_nor_tests() -> None:
    paths = [path for package in PACKAGES for path in sources(package)]
    assert [dotted(path) for path in paths if tops(path) & {"benchmarks", "tests"}] == []


@pytest.mark.parametrize("root", SOURCE_ROOTS, ids=lambda root: root.name)
def test_source_roots_shadow_no_other_package(root: Path) -> None:
    found = {name: (root / f"{name}.py").exists() or (root / name / "__init__.py").exists() for name in TAKEN_NAMES}
    assert [name for name, exists in found.items() if exists] == []


def test_names_say_what_is_inside() -> None:
    named = [path.relative_to(ROOT) for path in kept_files()]
    assert [str(path) for path in named if EMPTY_NAMES & {*path.parts[:-1], path.stem}] == []


def strategies_in(path: Path) -> set[str]:
    """The classes of `path` that derive from UpdateStrategy."""
    classes = (node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef))
    return {node.name for node in classes if "UpdateStrategy" in {ast.unparse(base) for base in node.bases}}


def test_strategies_are_registered_by_a_config() -> None:
    configs = "\n".join(path.read_text("utf-8") for path in (ROOT / "configs").glob("*.yaml"))
    used = set(re.findall(r"class_path:\s*(?:[\w.]+\.)?(\w+)", configs))
    found = {path.name: strategies_in(path) for path in sources(ROOT / "lit_sparse" / "strategies")}
    assert len([name for name, classes in found.items() if classes]) > 5, (
        "no strategy was found: the test reads nothing"
    )
    assert [name for name, classes in found.items() if classes and not classes & used] == []


def methods_named(text: str, methods: set[str], files: set[str]) -> set[str]:
    """The methods that a source knows: their files, and their classes by name, also as texts."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lit_sparse.strategies"):
            found |= {str(node.module).rpartition(".")[2], *(alias.name for alias in node.names)} & (methods | files)
        elif isinstance(node, ast.Import):
            named = {alias.name.removeprefix("lit_sparse.strategies.") for alias in node.names}
            found |= named & files
        elif isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & methods
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & methods
    return found


def test_rooms_outside_strategies_know_no_method() -> None:
    """They use the interface of strategies/base.py, so that a new method is no edit of theirs."""
    folder = ROOT / "lit_sparse" / "strategies"
    methods = {name for path in sources(folder) for name in strategies_in(path)}
    files = {path.stem for path in sources(folder)} - {"__init__", *PROTOCOL}
    for planted in (
        "from lit_sparse.strategies import LISA",
        "from lit_sparse.strategies import lisa",
        "from lit_sparse.strategies.lisa import State",
        "import lit_sparse.strategies.lisa",
        "isinstance(update, strategies.LISA)",
        "type(update).__name__ == 'LISA'",
    ):
        assert methods_named(planted, methods, files), planted
    paths = [path for package in PACKAGES for path in sources(package)]
    known = {
        dotted(path): methods_named(path.read_text("utf-8"), methods, files) - defined(path)  # of its own by that name
        for path in paths
        if not path.is_relative_to(folder) and "examples" not in path.parts
    }
    assert {name: found for name, found in known.items() if found} == {}


def test_no_file_is_long() -> None:
    """A long file has several jobs: divide it along them."""
    limits = {**dict.fromkeys(PACKAGES, 400), ROOT / "benchmarks": 500}
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) - limit
        for package, limit in limits.items()
        for path in sources(package)
    }
    assert {name: beyond for name, beyond in lengths.items() if beyond > 0} == {}


NEW_METHOD = '''
"""Shrunk: multiplies what trains by a factor after each step."""

import dataclasses
from typing import ClassVar

import torch

from lit_sparse.strategies.base import UpdateStrategy


@dataclasses.dataclass
class Shrunk(UpdateStrategy):
    """Shrink what trains by a factor after each step.

    Args:
        factor: The factor.
    """

    factor: float = 0.99

    supports_sharding: ClassVar[bool] = True

    @torch.no_grad()
    def after_step(self, step, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.mul_(self.factor)
        return False
'''
NEW_YAML = """
# Shrunk: all weights, made smaller after each step (arXiv 2405.15525)
# trains: all weights
# costs: as full.yaml
# claims: none
# page: docs/methods/full.md
model:
  lr: 1e-3               # peak learning rate
  updates+:
    - class_path: Shrunk
      init_args:
        factor: 0.5      # of the weights after each step
"""
TRY = """
from lit_sparse.commands.shipped import listing
from lit_sparse.runs import build_module
from lit_sparse.testing import contract
import yaml, lit_sparse.places as places

model = yaml.safe_load((places.configs_folder() / "shrunk.yaml").read_text())["model"]
contract(lambda: build_module({"model": {**model, "base": "unused"}}).updates, steps=2)
assert "shrunk.yaml" in listing()
"""


def test_a_new_method_is_one_file_and_one_yaml(tmp_path: Path) -> None:
    for folder in ("lit_sparse", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lit_sparse" / "strategies" / "shrunk.py").write_text(NEW_METHOD.lstrip())
    (tmp_path / "configs" / "shrunk.yaml").write_text(NEW_YAML.lstrip())
    search = os.pathsep.join(map(str, (tmp_path, *SOURCE_ROOTS[1:])))
    environment = {**os.environ, "PYTHONPATH": search}
    run = subprocess.run([sys.executable, "-c", TRY], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_shared_parts_of_strategies_have_their_own_files() -> None:
    """A file in strategies/ without a strategy is part of the one that imports it."""
    paths = [path for path in sources(ROOT / "lit_sparse" / "strategies") if path.stem != "__init__"]
    parts = [path for path in paths if path.stem not in PROTOCOL and not strategies_in(path)]
    users = {path.name: [user.name for user in paths if dotted(path) in set(imported(user))] for path in parts}
    assert {name: found for name, found in users.items() if len(found) != 1} == {}


def test_kernels_bring_a_reference_and_cases() -> None:
    paths = [path for path in sources(KERNELS) if path.stem not in ("__init__", "jit", "adamw_arguments")]
    missing = {path.name: {"reference", "CASES"} - defined(path) for path in paths}
    assert {name: names for name, names in missing.items() if names} == {}


def test_tree_names_no_machine_path() -> None:
    found = []
    for path in kept_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []
