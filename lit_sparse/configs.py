"""YAMLs: those that come with lit_sparse are found by name, each is checked, and lists in several of them add up."""

import io
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lit_sparse
from lit_sparse.errors import BadInput

STACKED = ("trainers", "data", "models", "tasks")
"""Folders of configs/ whose YAMLs stack on a method's, so that runs are not named after them."""
SECTIONS = ("model", "data", "trainer", "profile")
"""Keys of a YAML whose values are mappings; `data` may be the name of a class too."""
PARTS = {"model": ("updates",), "trainer": ("callbacks", "logger", "plugins")}
"""Lists that add to those of the YAMLs before. An empty list, null, true or false replaces them."""
UNMEASURED = {"examine": False, "profiled": 0, "predict": False}
"""What `profile: false` stands for: nothing is predicted, and no step measured that would be slower for it."""
STACKING = "stacking"
"""The parser mode in which they do."""


def configs_folder() -> Path:
    """Return the folder of shipped YAMLs: beside the package in a checkout, or where the wheel installs them."""
    checkout = Path(lit_sparse.__file__).parents[1] / "configs"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "lit-sparse" / "configs"


def methods() -> list[Path]:
    """Return the YAML of each method, sorted by name."""
    return sorted(configs_folder().glob("*.yaml"))


def find_configs(argv: Sequence[str]) -> list[str]:
    """Return `argv` with shipped YAMLs as paths, and all --config before the other options, which override them."""
    verbs = 1 if argv and not argv[0].startswith("-") else 0
    verb, words = list(argv[:verbs]), list(argv[verbs:])
    configs: list[str] = []
    others: list[str] = []
    while words:
        word = words.pop(0)
        if word in ("-c", "--config") and words:
            configs += [word, found(words.pop(0))]
        elif word.startswith("--config="):
            configs.append("--config=" + found(word.removeprefix("--config=")))
        else:
            others.append(word)
    return [*verb, *configs, *others]


def found(name: str) -> str:
    """Return the path of the shipped YAML `name`, unless `name` is a path that exists."""
    shipped = configs_folder() / name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


def config_words(argv: Sequence[str]) -> Iterator[str]:
    """Yield the value of each --config in `argv`."""
    for word, after in zip(argv, [*argv[1:], None], strict=True):
        if word in ("-c", "--config") and after is not None:
            yield after
        elif word.startswith("--config="):
            yield word.removeprefix("--config=")


def read_documents(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the contents of each --config in `argv` by its path, and tell what a later one takes out.

    Raises:
        BadInput: if a file is missing, is no YAML, or has another value where a mapping belongs.
    """
    documents: dict[str, dict[str, Any]] = {}
    for word in config_words(argv):
        document = read_document(word)
        for section, key in ((section, key) for section, keys in PARTS.items() for key in keys):
            earlier = [path for path, one in documents.items() if parts_of(one, section, key)]
            if earlier and empties(document, section, key):
                rank_zero_info(f"{word} takes out {section}.{key} of {', '.join(earlier)}.")
        documents[word] = document
    return documents


def parts_of(document: dict[str, Any], section: str, key: str) -> Any:
    """Return what a YAML adds to a list of parts."""
    values = document.get(section)
    return (values.get(key) or values.get(f"{key}+")) if isinstance(values, dict) else None


def empties(document: dict[str, Any], section: str, key: str) -> bool:
    """Return whether a YAML replaces a list of parts by none."""
    values = document.get(section)
    return isinstance(values, dict) and key in values and not values[key]


def read_document(word: str) -> dict[str, Any]:
    """Return the content of a YAML, given as its path, or as text with a mapping in it.

    Raises:
        BadInput: naming the file, and the line of an error in it.
    """
    try:
        text = Path(word).read_text(encoding="utf-8")
    except OSError as error:
        if not word.lstrip().startswith("{") and "\n" not in word:
            raise no_config(word, error) from error
        word, text = "the text of --config", word
    except UnicodeDecodeError as error:
        raise BadInput(f"{word} is no text in UTF-8, so it is no YAML; give the path of a YAML.") from error
    try:
        document = load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "no YAML"
        place = f"{word} line {mark.line + 1}" if mark is not None else word
        raise BadInput(f"{place} is not valid YAML: {problem}; mend it there, or in the line before.") from error
    except (ValueError, OmegaConfBaseException) as error:  # the former for what looks like a date and is none
        raise BadInput(f"{word} cannot be read: {str(error).splitlines()[0]}; mend the value, or quote it.") from error
    if not isinstance(document, dict):
        raise BadInput(f"{word} has no keys; give a YAML such as `trainer: {{max_steps: 100}}`.")
    check_sections(word, document)
    return document


def no_config(word: str, error: OSError) -> BadInput:
    """Return the refusal of a YAML that cannot be opened, with the nearest that can."""
    if not isinstance(error, FileNotFoundError):
        return BadInput(f"--config {word} cannot be read: {error.strerror}; give the path of a YAML.")
    shipped = [path.relative_to(configs_folder()).as_posix() for path in configs_folder().rglob("*.yaml")]
    names = [*map(str, Path().glob("*.yaml")), *shipped]
    near = [name for name in names if Path(name).stem == Path(word).stem] or get_close_matches(word, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "lit-sparse list names the shipped ones."
    return BadInput(f"--config {word} was given, but there is no such file here or among the shipped YAMLs; {hint}")


def check_sections(word: str, document: dict[str, Any]) -> None:
    """Refuse a YAML in which a section is no mapping: it would discard what earlier YAMLs have there.

    Raises:
        BadInput: naming the section.
    """
    for section in SECTIONS:
        value = document.get(section)
        if not (value is None or isinstance(value, dict) or (section == "data" and isinstance(value, str))):
            raise BadInput(
                f"{word} has {section}: {value!r}, but {section} has keys of its own; write them below it, as in "
                f"`{section}: {{key: value}}`, or leave it out."
            )
    named = document.get("data")
    if isinstance(named, str) and not named.rpartition(".")[2][:1].isupper():
        raise BadInput(
            f"{word} has data: {named}, where the name of a class belongs; write `data: {{class_path: Instructions, "
            f"init_args: {{train: {named}}}}}`, or give --data {named} on the command line."
        )


def load(text: str) -> Any:
    """Load YAML, with interpolations such as ${model.lr}; `profile: false` as the keys that it stands for."""
    value = get_loader("yaml")(text)
    if not isinstance(value, dict | list):
        return value
    document = OmegaConf.to_object(OmegaConf.load(io.StringIO(text)))
    if isinstance(document, dict) and isinstance(document.get("profile"), bool):
        document["profile"] = {} if document["profile"] else dict(UNMEASURED)  # true is the default
    return document


def load_stacking(text: str) -> Any:
    """Load YAML; lists of `PARTS` in it are named as those that are added, and sections without a key are left out."""
    document = load(text)
    if not isinstance(document, dict):
        return document
    for section, keys in PARTS.items():
        values = document.get(section)
        if isinstance(values, dict):
            document[section] = {f"{k}+" if k in keys and adds(v) else k: v for k, v in values.items()}
    return {key: value for key, value in document.items() if value is not None or key not in SECTIONS}


def adds(value: Any) -> bool:
    """Return whether a value is one or several parts, and not a switch or nothing."""
    return bool(value) and value is not True


set_loader(STACKING, load_stacking, exceptions=(yaml.YAMLError,))
