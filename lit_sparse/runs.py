"""Run folders: `runs/<name>-<n>/{config.yaml, record.json, metrics.csv, checkpoints/}`."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.utilities import rank_zero_only

import lit_sparse.strategies  # noqa: F401 - short class names in YAML resolve among what is imported
from lit_sparse.aliases import TooManyValues, check_aliases
from lit_sparse.checkpoints import LAST, TOKENIZER, read_checkpoint, trained_values
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import MALFORMED
from lit_sparse.modules import CausalLM, Classifier, LitSparse
from lit_sparse.refusals import explain
from lit_sparse_profiling.run_folders import folders, next_folder

TASKS: dict[str, type[LitSparse]] = {"CausalLM": CausalLM, "Classifier": Classifier}
"""Values of the key `task`; the first is the default."""


def check_name(name: str) -> None:
    """Refuse a name of a run that names no folder under the root of all runs.

    Raises:
        BadInput: saying what is wrong with it.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.name or name.endswith("/"):
        raise BadInput(f"--run {name!r} names no folder under the folder of all runs; give a name such as mine or a/b.")
    if not name.isprintable() or "::" in name or "://" in name:  # which Lightning's file systems take for a URL
        raise BadInput(f"--run {name!r} has '::' or '://', or characters that do not print; leave them out.")


def check_root(root: str | Path | None) -> None:
    """Refuse a folder of all runs that no file system can have.

    Raises:
        BadInput: if it is None or a URL, or has a null character.
    """
    if root is None or "\0" in str(root) or "://" in str(root):
        raise BadInput(f"trainer.default_root_dir is {root!r}, which names no folder; give a path, such as runs.")


@rank_zero_only
def make_folder(root: Path, name: str) -> Path:
    """Make the next free folder `<name>-<n>`, on rank 0: no other process takes its number from then on.

    Raises:
        BadInput: if it cannot be made.
    """
    while True:
        folder = next_folder(root, name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                continue  # another process was faster
            raise BadInput(f"a run's folder is to be made at {folder}, where a file is in the way.") from None
        except OSError as error:
            raise BadInput(
                f"the run's folder {folder} could not be made: {error.strerror or error}; set "
                "--trainer.default_root_dir to a folder that can be written."
            ) from error
        return folder


@rank_zero_only
def remove_unused(folder: Path) -> None:
    """Remove the folder of a run that has left nothing in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def folder_of(checkpoint: Path, root: Path) -> Path | None:
    """Return the folder of the run that a checkpoint lies in, if it is one of the runs under `root`; None otherwise.

    Any other file with checkpoints beside it may be the user's own, so that nothing is written there.
    """
    folder = checkpoint.parent.parent
    if checkpoint.parent.name != LAST.parent.name or not (folder / "config.yaml").is_file():
        return None
    known = re.fullmatch(r".+-\d+", folder.resolve().name) and folder.resolve().is_relative_to(root.resolve())
    return folder if known else None


def name_of(folder: Path, root: Path) -> str:
    """Return the name of a run under `root`: that of its folder, without its number."""
    return re.sub(r"-\d+$", "", folder.resolve().relative_to(root.resolve()).as_posix())


def own_checkpoint(configs: Iterable[Any], root: Path) -> Path | None:
    """Return the last checkpoint of the run under `root` whose own configuration is among the files; None without."""
    for path in reversed([Path(str(config)) for config in configs]):
        checkpoint = path.parent / LAST
        if path.name == "config.yaml" and checkpoint.is_file() and folder_of(checkpoint, root) is not None:
            return checkpoint
    return None


def last_checkpoint(root: Path, name: str) -> Path:
    """Return the path of the newest last checkpoint of the runs called `name`.

    Raises:
        BadInput: if none has one.
    """
    for folder in reversed(folders(root, name)):
        if (folder / LAST).is_file():
            return folder / LAST
    raise BadInput(
        f"--ckpt_path last was asked for, but no run {name}-<n> under {root}/ has {LAST}, which a fit "
        f"saves every --checkpoint_steps steps and at its end; start without --ckpt_path, or name a file."
    )


def load_run(folder: Path) -> tuple[LitSparse, dict[str, Any]]:
    """Load the module of a run at its last checkpoint (in evaluation mode, on the CPU), and its configuration.

    Raises:
        BadInput: if `folder` is no run, or has no checkpoint yet.
    """
    module, config, checkpoint = open_run(folder)
    restore_run(module, checkpoint, folder)
    return module, config


def open_run(folder: Path) -> tuple[LitSparse, dict[str, Any], dict[str, Any]]:
    """Return the module of a run as it began, its configuration, and its last checkpoint for `restore_run`.

    Raises:
        BadInput: as `load_run` does.
    """
    if not (folder / "config.yaml").is_file():
        raise BadInput(
            f"{folder} is not a run: it has no config.yaml; give a folder that lit-sparse fit wrote, such as "
            f"runs/smt-1."
        )
    config = read_config(folder / "config.yaml")
    module = build_module({**config, "model": {**config["model"], "compile": False}})
    checkpoint = read_checkpoint(folder / LAST, ("lit_sparse",), mapped=True)
    module.take_seed(checkpoint["lit_sparse"])
    if module.quantize is not None or module.is_drawn or not module.updates.masters:
        # These weights were quantised, drawn or trained in the run's precision; `auto` may mean another one here.
        module.precision = checkpoint["lit_sparse"].get("precision", module.precision)  # older checkpoints lack it
    if (folder / TOKENIZER).is_dir():
        module.tokenizer_name = str(folder / TOKENIZER)
    module.take_task(checkpoint)
    return module, config, checkpoint


def restore_run(module: LitSparse, checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Give the module of the run in `folder` what its checkpoint has, one tensor of a sharded one after the other."""
    module.restore(checkpoint)
    module.check_complete(checkpoint)
    for values in trained_values(checkpoint, folder / LAST):
        module.load_state_dict(values, strict=False)
    module.eval()


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's configuration.

    Raises:
        BadInput: if it is no YAML with a model in it, or its data are no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_aliases(text)
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, *MALFORMED) as error:  # PyYAML raises many, as a KeyError of !!bool x
        reason = error.problem if isinstance(error, TooManyValues) else type(error).__name__
        raise BadInput(f"{path} cannot be read as YAML ({reason}); restore it, or make the run again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise BadInput(f"{path} configures no model; restore it, or make the run again.")
    data = config.get("data") or {}
    if not isinstance(data, dict) or not isinstance(data.get("init_args") or {}, dict):
        raise BadInput(f"the data in {path}, or their init_args, are no mapping; restore it, or make the run again.")
    return config


KNOWN = ("lit_sparse", "lit_sparse_kernels", "lit_sparse_profiling", "torch", "peft", "lightning", "transformers")
"""Packages whose classes a run's configuration may name: this project's, and what its methods and optimizers are of."""


def check_imports(value: Any, place: str) -> None:
    """Refuse a configuration that would import a module which is neither of `KNOWN` nor imported already.

    A run's folder may be a stranger's, and to import a module is to run it. Who has classes of their own imports them
    first: `--modules` of export and generate, or `import` in Python.

    Args:
        place: What has the configuration, for the message.

    Raises:
        BadInput: naming the class and its module.
    """
    try:
        paths = [*class_paths(value)]
    except (RecursionError, TooManyValues) as error:
        raise BadInput(
            f"{place} is a part of itself, nested too deeply, or has too many aliases; restore it."
        ) from error
    for path in paths:
        module = path.partition(".")[0]
        imported = any(path.startswith(f"{name}.") for name in sys.modules if name != "__main__")
        if module in KNOWN or (imported and path.rpartition(".")[0] in sys.modules):
            continue
        if module != "__main__" and find_spec(module) is None:
            continue
        raise BadInput(
            f"{place} names {path}, and the module {module} is none of lit_sparse or of what it builds on; if it is "
            f"your own, name it: --modules {path.rpartition('.')[0]} (in Python, import it first)."
        )


def class_paths(value: Any) -> Iterator[str]:
    """Yield the texts of a configuration that jsonargparse could take for the path of a class."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from class_paths(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from class_paths(item)
    elif isinstance(value, str):
        if "." in value and all(part.isidentifier() for part in value.split(".")):
            yield value
        elif value != (held := _held(value)):
            yield from class_paths(held)


def _held(text: str) -> Any:
    """Return what a text holds as jsonargparse reads it, which takes the YAML of a class for the class."""
    try:
        check_aliases(text)
        return yaml.safe_load(text)
    except (TooManyValues, RecursionError):
        raise
    except (yaml.YAMLError, ValueError, *MALFORMED):  # as of a date that does not exist
        return text


def import_modules(names: Collection[str]) -> None:
    """Import modules with classes of the user's own, which may be in the current folder.

    Raises:
        BadInput: if there is none of that name.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for name in names:
        if not name or name.startswith("."):
            raise BadInput(f"--modules {name!r} names no module; give it as Python imports it, such as my_methods.")
        try:
            import_module(name)
        except ImportError as error:
            raise BadInput(f"--modules {name} cannot be imported ({error}); give it as Python imports it.") from error


def build_module(config: dict[str, Any], place: str = "the configuration of the run") -> LitSparse:
    """Create the module that a run's configuration describes; its model is loaded later, by `build`.

    Args:
        config: The configuration.
        place: What has it, for messages.

    Raises:
        BadInput: if there is no such task, class or key, a value is of another type, or it would import a module that
            nobody asked for.
    """
    given = {key: value for key, value in config["model"].items() if key != "base"}  # a text, whatever is in it
    check_imports(given, place)
    kind = task_class(config.get("task"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    try:
        return parser.instantiate(parser.parse_object({"model": config["model"]})).model
    except ArgumentError as error:
        raise BadInput(f"in {place}, {explain(str(error), parser._option_string_actions, 'fit')}") from error


def task_class(name: Any) -> type[LitSparse]:
    """Return the module class of the task called `name`; the first of `TASKS` for None.

    Raises:
        BadInput: if there is none.
    """
    name = next(iter(TASKS)) if name is None else name
    if not isinstance(name, str) or name not in TASKS:
        raise BadInput(f"the task {name!r} was asked for; there is {', '.join(TASKS)}.")
    return TASKS[name]
