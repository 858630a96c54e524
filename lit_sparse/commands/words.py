"""The words of a command line before they are parsed: what they imply is written out."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_sparse.commands.configs import UNMEASURED
from lit_sparse.data.sources import READERS

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:.+)?")
"""Name of a Hugging Face data set, with or without its split."""


def named_task(argv: Sequence[str], documents: Mapping[str, Any]) -> str | None:
    """Return the last task named in `argv` or its YAMLs; it decides the parser's keys, so that it is needed first."""
    named = [document["task"] for document in documents.values() if document.get("task")]
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        option, given, value = word.partition("=")
        if option == "--task":
            named.append(value if given else after)
    return named[-1] if named else None


def find_data(argv: Sequence[str], task: str | None) -> list[str]:
    """Replace `--data NAME` in `argv` by the data module that reads NAME, if it is a data file or a data set's name."""
    out: list[str] = []
    for word, before in zip(argv, ["", *argv], strict=False):
        value = word if before == "--data" else word.removeprefix("--data=") if word.startswith("--data=") else ""
        if kind := reader_of(value, task):
            out = out[:-1] if before == "--data" else out
            out += [f"--data=lit_sparse.data.{kind}", f"--data.train={value}"]
        else:
            out.append(word)
    return out


def reader_of(name: str, task: str | None) -> str | None:
    """Return the data module that reads a file, folder or Hugging Face data set called `name`; None for other names."""
    suffix = Path(name).suffix.lower()
    if suffix == ".txt" or ("/" in name and Path(name).is_dir()):  # without a slash it may be the name of a class
        return "Text"
    known = suffix in READERS or (HUB_NAME.fullmatch(name) and suffix not in (".yaml", ".yml"))
    return ("Labelled" if task == "Classifier" else "Instructions") if known else None


def switched_on(verb: Callable[..., Any], argv: Sequence[str]) -> list[str]:
    """Write `--name` in `argv` as `--name=true` if the verb's parameter is a bool and no value follows."""
    switches = {
        f"--{name}" for name, parameter in inspect.signature(verb).parameters.items() if parameter.annotation is bool
    }
    following = [*argv, ""][1:]
    bare = [word in switches and after not in ("true", "false") for word, after in zip(argv, following, strict=True)]
    return [f"{word}=true" if alone else word for word, alone in zip(argv, bare, strict=True)]


def unmeasured(argv: Sequence[str]) -> list[str]:
    """Write `--profile false` in `argv` as the keys that it stands for."""
    words, out = list(argv), []
    while words:
        word = words.pop(0)
        if word == "--profile" and words:
            word = f"--profile={words.pop(0)}"
        if word.lower() == "--profile=false":
            out += [f"--profile.{key}={json.dumps(value)}" for key, value in UNMEASURED.items()]
        elif word.lower() != "--profile=true":  # the default
            out.append(word)
    return out
