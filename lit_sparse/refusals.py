"""Turn refusals of jsonargparse and Lightning's trainer into a sentence with what to do."""

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import StrategyRegistry
from torch.optim import Optimizer

import lit_sparse.data
from lit_sparse.errors import BadInput
from lit_sparse.strategies import UpdateStrategy

KINDS: dict[str, type] = {
    "model.updates": UpdateStrategy,
    "model.optimizer": Optimizer,
    "data": L.LightningDataModule,
    "trainer.callbacks": L.Callback,
    "trainer.logger": Logger,
    "trainer.profiler": Profiler,
}
"""Keys whose values are classes, with the class that they derive from."""
WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "NoneType": "null",
}
CLASS_PATH = r"class_path[ =]'([\w.]+)'"
FILES_OF_DATA = {"Instructions": "data/instructions.yaml", "Text": "data/text.yaml", "Labelled": "data/labelled.yaml"}
LEAST: dict[str, tuple[float, str]] = {
    "accumulate_grad_batches": (1, "but a step needs a batch; give 1 or more"),
    "gradient_clip_val": (0, "but a norm is not negative; give a number above 0, or null"),
    "limit_train_batches": (1e-9, "which trains on nothing; give a number of batches, a share of them, or null"),
    "val_check_interval": (1e-9, "but it is a number of batches, or a share of an epoch; give one above 0, or null"),
    "check_val_every_n_epoch": (1, "but it is a number of epochs; give 1 or more"),
    "log_every_n_steps": (1, "but it is a number of steps; give 1 or more, or trainer.logger=false"),
}
"""Keys of `trainer` with the least number that makes sense, and why."""
MOST_BATCHES = 10**6
"""Bound of `accumulate_grad_batches`, far below the number at which torch can no longer divide a loss by it."""


# ---- jsonargparse


def explain(message: str, options: Iterable[str], verb: str) -> str:
    """Return what a refusal of jsonargparse means.

    Args:
        message: Its own words.
        options: The options that there are, as in `--model.lr`.
        verb: The verb that has them.
    """
    text = " ".join(message.split())
    keys = [option.removeprefix("--") for option in options if option.startswith("--")]
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        word = found[1].partition("=")[0]
        return no_key(word.lstrip("-"), keys, verb) if word.startswith("-") else f"{found[1]!r} belongs to no option."
    if found := re.search(r"does not accept option '(.+?)'", text):
        return no_key(found[1], keys, verb)
    if found := re.search(r"argument (-\S+): expected (?:one|at least one) argument", text):
        return f"{found[1]} was given without a value; write {found[1].split('/')[-1]} VALUE."
    if found := re.search(r"^the following arguments are required: (.+)$", text):
        return f"{found[1]} is missing; lit-sparse {verb} --help tells the options."
    key = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    if "Unable to load config" in text:
        key = key.partition(".")[0]
        return f"{key} has keys of its own; give those, as in {next(one for one in keys if one.startswith(key + '.'))}."
    if "unsupported operand type(s) for +" in text:  # jsonargparse's own, of a mapping such as `?` or `1:`
        return f"{key} is a mapping whose only key is no text; give a plain value, or quote it."
    return class_refused(text, key) or value_refused(text, key) or text


def no_key(key: str, keys: Sequence[str], verb: str) -> str:
    """Return the refusal of a key that there is not, with the nearest that there is."""
    section, _, leaf = key.rpartition(".")
    within = [name.rpartition(".")[2] for name in keys if name.rpartition(".")[0] == section]
    near = [f"{section}.{name}".lstrip(".") for name in nearest(leaf, within)]
    near = near or [name for name in keys if name.rpartition(".")[2] == leaf] or nearest(key, keys)
    return f"there is no key {key}; {suggestion(near, f'lit-sparse {verb} --help lists all keys')}"


def class_refused(text: str, key: str) -> str | None:
    """Return the refusal of a class, or of one of its keys; None if the message is about none."""
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        paths = re.findall(CLASS_PATH, text[: found.start()])[-1:] or re.findall(CLASS_PATH, text)
        return no_field(paths[0], found[1], key)
    if found := re.search(r"Expected a dot import path string: ([^\s-]\S*)?", text):
        return no_class(found[1] or "empty", key)
    if found := re.search(r"class_path '([\w.]+)': (No module named '\S+'|module '\S+' has no attribute '\w+')", text):
        return cannot_import(found[1], found[2], key)
    if found := re.search(r"Multiple subclasses with name (\w+).*?ambiguity: (.+?)\.? - ", text):
        return f"{key} is {found[1]}, which is the name of several classes; give one of {found[2]}."
    if found := re.search(r"class_path '([\w.]+)': the following arguments are required: ([\w, .]+?) -", text):
        name = found[1].rpartition(".")[2]
        return f"{key} is {name} without {found[2]}, which it needs; write `{found[2]}: VALUE` below its init_args."
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        return f"{key} is {found[1]}, which is no {found[2]}."
    found = re.search(r"Not a valid subclass of (\w+)(?:\. Got value: (\S+))?", text)
    if found and text.count("Parser key") == 1:
        given = found[2] or text.rpartition("Given value: ")[2]
        return f"{key} is {given}; give the name of a {found[1]}, or `class_path: NAME` with its keys as `init_args`."
    return None


def no_field(path: str, field: str, key: str) -> str:
    """Return the refusal of a key that a class does not have."""
    name = path.rpartition(".")[2]
    fields = fields_of(import_class(path))
    others = [other for other in FILES_OF_DATA if field in fields_of(getattr(lit_sparse.data, other))]
    if key == "data" and others and name not in others:
        files = " or ".join(f"--config {FILES_OF_DATA[other]}" for other in others)
        return f"data.{field} is no key of {name}, which the data are; name other data first, with {files}."
    near = [f"{key}.{name}" for name in nearest(field, fields)]
    return f"there is no key {key}.{field} of {name}; {suggestion(near, f'it has {in_words(fields)}')}"


def no_class(word: str, key: str) -> str:
    """Return the refusal of the name of a class that there is not."""
    names = sorted({kind.__name__ for kind in subclasses(KINDS[key])}) if key in KINDS else []
    own = "a class of your own is named with its module, as in my_module.MyClass"
    return f"{key} is {word}, and there is no such class; {suggestion(nearest(word, names), own)}"


def cannot_import(path: str, why: str, key: str) -> str:
    """Return the refusal of a class that is not where it is said to be."""
    module, _, name = path.rpartition(".")
    names = [] if why.startswith("No module") else dir(importlib.import_module(module))
    near = [f"{module}.{found}" for found in nearest(name, names)]
    own = "give the module as Python imports it; those in this folder are found too"
    return f"{key} is {path}, which cannot be imported ({why}); {suggestion(near, own)}"


def value_refused(text: str, key: str) -> str | None:
    """Return the refusal of a value of another type; None if the message does not tell it."""
    inner = text[text.rfind('Parser key "') :]
    found = re.search(r"Got value: (.+?)(?:\. Got value| - |$)", inner) or re.search(r"Given value: (.+)$", inner)
    if "Expected a" not in inner or found is None:
        return None
    value = re.sub(r"^NestedArg\(key='[^']*', val='?(.*?)'?\)$", r"\1", found[1].removesuffix(" Given value type:"))
    types = inner[: found.start()].partition("Given value type")[0]
    literals = [word for words in re.findall(r"Literal\[([^\]]*)\]", types) for word in words.split(", ")]
    choices = list(dict.fromkeys(word.strip("'\"") for word in literals))
    names = dict.fromkeys(re.findall(r"<class '(\w+)'>|Expected a (\w+)\[", types))
    wanted = choices + [WANTED[name] for pair in names for name in pair if name in WANTED]
    near = f"; did you mean {meant[0]}?" if (meant := nearest(value, choices)) else "."
    return f"{key} is {value}; it must be {in_words(list(dict.fromkeys(wanted)), 'or')}{near}" if wanted else None


def suggestion(near: Sequence[str], otherwise: str) -> str:
    """Return a question that names the nearest, or what to do where nothing is near."""
    return f"did you mean {near[0]}?" if near else f"{otherwise}."


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """Return the name that `word` was probably meant to be, if any."""
    lower = {name.lower(): name for name in names}
    begun = [name for name in lower if len(word) > 3 and name.startswith(word.lower())]
    return [lower[name] for name in begun or get_close_matches(word.lower(), lower, n=1, cutoff=0.7)][:1]


def in_words(names: Sequence[str], last: str = "and") -> str:
    """Return names as words in a sentence."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else "".join(names)


def subclasses(kind: type) -> Iterator[type]:
    """Yield the classes derived from `kind`, however far."""
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def import_class(path: str) -> type:
    """Return the class of a dotted path, which jsonargparse has imported before."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def fields_of(kind: type) -> list[str]:
    """Return the names of what a class is made of, its bases' included."""
    found = [name for one in kind.__mro__ if "__init__" in vars(one) for name in inspect.signature(one).parameters]
    return [name for name in dict.fromkeys(found) if name not in ("args", "kwargs", "self", "options", "host")]


# ---- Lightning's trainer


def check_trainer_words(trainer: Mapping[str, Any]) -> None:
    """Refuse values of `trainer` that name nothing on this machine, before anything is loaded.

    Raises:
        BadInput: naming the key.
    """
    check_word("accelerator", trainer["accelerator"], ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
    check_word("strategy", trainer["strategy"], ["auto", *StrategyRegistry.available_strategies()])
    check_word("profiler", trainer["profiler"], ["simple", "advanced", "pytorch"])
    accelerator = check_accelerator(trainer["accelerator"])
    check_devices(trainer["devices"], accelerator)
    check_trainer_numbers(trainer)
    if trainer["barebones"]:
        raise BadInput(
            "trainer.barebones is true, which keeps no log, checkpoint or score of a fit; leave it out, or measure "
            "steps with lit-sparse bench."
        )


def check_trainer_numbers(trainer: Mapping[str, Any]) -> None:
    """Refuse numbers of `trainer` that make no sense, and those that are too large to count with.

    Raises:
        BadInput: naming the key.
    """
    for key, (least, why) in LEAST.items():
        if isinstance(trainer[key], int | float) and not trainer[key] >= least:  # nor NaN
            raise BadInput(f"trainer.{key} is {trainer[key]}, {why}.")
    if trainer["accumulate_grad_batches"] > MOST_BATCHES:
        raise BadInput(
            f"trainer.accumulate_grad_batches is {trainer['accumulate_grad_batches']}, but it is a number of batches "
            f"in a step; give 1 to {MOST_BATCHES:,}."
        )
    try:
        if isinstance(trainer["max_time"], str | dict):
            callbacks.Timer(trainer["max_time"])
    except OverflowError as error:
        raise BadInput(
            f"trainer.max_time is {trainer['max_time']}, longer than Python can count; give days:hours:minutes:seconds "
            "such as 00:08:00:00, or null."
        ) from error


def check_word(key: str, word: Any, names: Sequence[str]) -> None:
    """Refuse a name that is none of `names`, with the nearest."""
    if isinstance(word, str) and word.lower() not in names:
        near = suggestion(nearest(word, names), f"there is {in_words(sorted(names), 'or')}")
        raise BadInput(f"trainer.{key} is {word}, and there is no such {key}; {near}")


def check_accelerator(word: Any) -> str | None:
    """Return the accelerator that the name `word` means here; None if it is no name.

    Raises:
        BadInput: if this machine has none.
    """
    if not isinstance(word, str):
        return None
    name = word.lower()
    kinds = ("cuda", "mps") if name in ("gpu", "auto") else (name,)
    usable = [kind for kind in kinds if AcceleratorRegistry.get(kind).is_available()]
    if not usable and name != "auto":
        raise BadInput(
            f"trainer.accelerator is {word}, but torch {torch.__version__} finds none on this machine; set it to cpu "
            "or auto, or install torch and drivers for it."
        )
    return usable[0] if usable else "cpu"


def check_devices(devices: Any, accelerator: str | None) -> None:
    """Refuse numbers of devices that the accelerator called so does not have.

    Raises:
        BadInput: if there are no such devices.
    """
    if accelerator not in ("cpu", "cuda") or devices == "auto":
        return
    has = max(os.cpu_count() or 1, 2) if accelerator == "cpu" else torch.cuda.device_count()
    what = "CPU cores" if accelerator == "cpu" else "GPUs"
    text = str(devices).strip("[]").replace(" ", "")
    numbers = [int(one) for one in text.split(",") if re.fullmatch(r"-?\d+", one)]
    several = isinstance(devices, list) or "," in text
    if accelerator == "cuda" and (text == "-1" or (several and numbers and set(numbers) <= set(range(has)))):
        return
    if len(numbers) != 1 or several or not 1 <= numbers[0] <= has:
        raise BadInput(f"trainer.devices is {devices}, but there are {has} {what} here; give 1 to {has}, or auto.")
