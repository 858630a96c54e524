"""YAMLs: those that come with lit_sparse are found by name, each is checked, and lists in several of them add up."""

import functools
import io
import operator
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_sparse.aliases import check_aliases
from lit_sparse.errors import BadInput
from lit_sparse.places import configs_folder

STACKED = ("recipes", "trainers", "data", "models", "tasks")
"""Folders of configs/ whose YAMLs stack on a method's, so that runs are not named after them."""
SECTIONS = ("model", "data", "trainer", "profile")
"""Keys of a YAML whose values are mappings; `data` may be the name of a class too."""
PARTS = {"model": ("updates",), "trainer": ("callbacks", "logger", "plugins")}
"""Lists that add to those of the YAMLs before. An empty list, null, true or false replaces them."""
UNMEASURED = {"examine": False, "profiled": 0, "predict": False}
"""Keys that `profile: false` stands for: nothing is predicted, and no step measured that would be slower for it."""
STACKING = "stacking"
"""The parser mode in which they do."""


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
    if os.path.exists(word) and not os.path.isfile(word) and not os.path.isdir(word):  # reading a pipe may not end
        raise BadInput(f"--config {word} is a pipe or a device, which is read more than once; give the path of a YAML.")
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
    except RecursionError as error:
        raise BadInput(f"{word} is nested too deeply to be read as YAML; give the YAML of a fit.") from error
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
    check_aliases(text)
    try:
        value = get_loader("yaml")(text)
    except TypeError as error:  # jsonargparse's, which compares a lone key with the text
        raise yaml.MarkedYAMLError(problem=f"a key of {text.strip()[:40]!r} is no text") from error
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


class Parser(LightningArgumentParser):
    """LightningCLI's parser; what it prints for --print_config has no null that means nothing."""

    def dump(self, *args: Any, **kwargs: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if "skip_none" in kwargs:  # Lightning's word; jsonargparse warns its caller of the old name
            kwargs["skip_unset"] = kwargs.pop("skip_none")
        text = super().dump(*args, **kwargs)
        printed = hasattr(getattr(self, "parent_parser", self), "print_config")
        return self._without_nulls(text) if printed else text

    def _without_nulls(self, text: str) -> str:
        """Return a YAML without keys that are null, but for those that would not be null if they were left out."""
        head = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
        tree = yaml.safe_load(text)
        parsed = self.parse_object(pruned(tree, {}), _skip_validation=True)
        again = yaml.safe_load(super().dump(parsed, skip_unset=False, skip_validation=True))
        return "".join(head) + yaml.safe_dump(pruned(tree, again), sort_keys=False, allow_unicode=True)


def pruned(tree: Any, others: Any) -> Any:
    """Return a tree of dicts and lists without keys that are null in it, but for those that are not in `others`."""
    if isinstance(tree, list):
        parts = others if isinstance(others, list) else []
        return [pruned(item, other) for item, other in zip_longest(tree, parts[: len(tree)])]
    if not isinstance(tree, dict):
        return tree
    others = others if isinstance(others, dict) else {}
    kept = {key: value for key, value in tree.items() if value is not None or others.get(key) is not None}
    return {key: pruned(value, others.get(key)) for key, value in kept.items()}


def read_whole_numbers_first(kind: type) -> None:
    """Let a whole number that is given for an argument `int | float` of a class be an int.

    Lightning means batches by 1 and all of them by 1.0. Python keeps `Optional[Union[int, float]]` and its like with
    float first under one key, so that the order in which libraries wrote them down decides which one a parser tries.
    """
    annotations = kind.__init__.__annotations__
    for name, annotation in annotations.items():
        if {int, float} <= set(kinds := get_args(annotation)):
            annotations[name] = functools.reduce(operator.or_, sorted(kinds, key=lambda one: one is not int))


def listed(parts: Any) -> list[Any]:
    """Return one or several parts of a configuration as a list; a switch or None is none."""
    return parts if isinstance(parts, list) else [] if parts is None or isinstance(parts, bool) else [parts]


def as_plain(value: Any) -> Any:
    """Replace enumerations and devices in a configuration, which are defaults of Timer and SWA, by what YAML holds."""
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    if isinstance(value, Namespace):
        return Namespace(**{key: as_plain(item) for key, item in vars(value).items()})
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, torch.device) else value


def without_twins(parts: Any) -> Any:
    """Return parts of a configuration that several YAMLs may have named, each that is given twice alike only once."""
    return [part for n, part in enumerate(parts) if part not in parts[:n]] if isinstance(parts, list) else parts


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict into one with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}.{name}".lstrip(".")).items()
    }


set_loader(STACKING, load_stacking, exceptions=(yaml.YAMLError,))
