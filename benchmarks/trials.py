"""Read quality tables, YAML files in benchmarks/quality, and make the configurations of their trials."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import lit_sparse.strategies
from benchmarks.changed_base import ChangedBase
from lit_sparse.commands.configs import found
from lit_sparse.errors import BadInput

TABLES = Path(__file__).parent / "quality"
SEEDS = (0, 1, 2)
SEED = "${seed}"
"""Placeholder of the trial's seed, for updates that draw without a `seed` of their own, such as PEFT's SHiRA."""
TABLE_KEYS = {"title", "workload", "base", "test", "seeds", "arms", "race", "widen"}
TABLE_KEYS |= {"also", "against", "reduce", "costs"}  # outcomes to show
ARM_KEYS = {"updates", "method", "model", "lr", "group", "seeds"}
RACE_KEYS = {"every", "to", "whole", "without"}
Config = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One method of a comparison.

    Attributes:
        model: Its part of the key `model` of `lit-sparse fit`.
        rates: Peak learning rates of the sweep, lowest first.
        group: Arms of one group train equally many weights, and are ranked among one another. An arm without a group
            is a reference.
        seeds: How many of the table's seeds it is trained with, the first ones; None for all.
    """

    name: str
    model: Config
    rates: tuple[float, ...]
    group: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Trial:
    """One training: an arm at one learning rate with one seed.

    Attributes:
        config: Its complete configuration of `lit-sparse fit`.
    """

    arm: Arm
    rate: float
    seed: int
    config: Config

    def identity(self, stack: Mapping[str, str]) -> str:
        """Return a hash of everything that affects the result, and so of neither the table nor the arm's name.

        Args:
            stack: Kind of device, and versions.
        """
        return digest(self.config, stack)

    def untrained(self, stack: Mapping[str, str]) -> str:
        """Return a hash of everything that affects the scores before training; trials of one base and data share it."""
        base = {key: self.config["model"].get(key) for key in ("base", "precision")}
        return digest({"model": base, "data": self.config["data"]}, stack)

    @property
    def name(self) -> str:
        """A name for messages."""
        return f"{self.arm.name}, lr {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Race:
    """How soon the arms of a table reach a loss.

    Attributes:
        every: Optimizer steps between validations.
        to: The arm whose final held-out loss is to be reached.
        whole: An arm of which others lack a part, or None.
        without: What each of those lacks, or has in its place, by the names of the arms.
    """

    every: int
    to: str
    whole: str | None
    without: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A comparison of arms, with everything else equal.

    Attributes:
        workload: Configuration that all trials have in common.
        test: Changes to it for `lit-sparse test`; None if there is no test.
        seeds: Seeds; the learning rate is chosen with the first.
        also: Further outcomes of a fit's record to show.
        against: Name of the arm that the others are compared with, or None.
        reduce: The outcomes among `also` that the others should reduce, at the quality of `against`.
        race: How soon arms reach a loss, or None.
        costs: Whether peak memory and step time stand beside the losses.
        widen: How often a sweep goes on beyond its rates while the best one is at an end.
        base: The model of all trials where it is to be made first, or None for the workload's.
    """

    name: str
    title: str
    workload: Config
    test: Config | None
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    also: tuple[str, ...] = ()
    against: str | None = None
    reduce: tuple[str, ...] = ()
    race: Race | None = None
    costs: bool = False
    widen: int = 0
    base: ChangedBase | None = None

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """Return the seeds that an arm is trained with."""
        return self.seeds[: arm.seeds]

    @property
    def steps(self) -> int:
        """Optimizer steps of every trial."""
        return self.workload["trainer"]["max_steps"]

    def trial(self, arm: Arm, rate: float, seed: int) -> Trial:
        """Return the trial of `arm` at a learning rate with a seed, which also sets the order of the data."""
        model = filled(arm.model, {SEED: seed})
        model["updates"] = [_seeded(update, seed, arm.name) for update in model.get("updates", [])]
        own = {"seed_everything": seed, "data": {"init_args": {"seed": seed}}, "model": {**model, "lr": rate}}
        return Trial(arm, rate, seed, merged(self.workload, own))

    def sweep(self, arm: Arm) -> list[Trial]:
        """Return the trials that choose the learning rate."""
        return [self.trial(arm, rate, self.seeds[0]) for rate in arm.rates]


# ---- reading


def read_table(
    name: str, workload: Path | None = None, steps: int | None = None, seeds: Sequence[int] | None = None
) -> Table:
    """Read a table.

    Args:
        name: Name of a table in benchmarks/quality, or a YAML file.
        workload: A YAML of `lit-sparse fit` that replaces the table's workload.
        steps: Optimizer steps of each trial; replaces the workload's.
        seeds: Replace the table's seeds, and are those of every arm, also where it has fewer.

    Raises:
        BadInput: if there is no such table, or something in it makes none.
    """
    path = _table_file(name)
    return table_of(read_yaml(path), path, workload, steps, seeds)


def table_of(
    document: Config, path: Path, workload: Path | None, steps: int | None, seeds: Sequence[int] | None
) -> Table:
    """Return the table in `document`, as if read from `path`; otherwise as `read_table`."""
    _known(document, TABLE_KEYS, {"title", "workload", "arms"}, str(path))
    file, test = workload or path.parent / str(document["workload"]), document.get("test")
    if not isinstance(test, dict | None):
        raise BadInput(f"{path}: `test` is {test!r}; give keys of `lit-sparse test`, or leave it out.")
    also, less = (_outcomes(document, key, str(path)) for key in ("also", "reduce"))
    if not isinstance(document["arms"], dict) or not document["arms"]:
        raise BadInput(f"{path}: `arms` names no arm; give each a name, its updates and its learning rates.")
    raced, base = _race(document, str(path)), _base(document, str(path))
    config = _workload(read_yaml(file), steps, str(file), raced)
    made = Table(
        path.stem,
        str(document["title"]),
        config if base is None else merged(config, {"model": {"base": str(base.path)}}),
        test,
        _seeds(document.get("seeds", SEEDS), str(path)),
        tuple(_arm(arm, body, f"{path}: arm {arm}") for arm, body in document["arms"].items()),
        also,
        _against(document, also, less, str(path)),
        less,
        raced,
        _flag(document, "costs", str(path)),
        _count(document, "widen", 0, str(path)) or 0,
        base,
    )
    if seeds is None:
        return made
    arms = tuple(dataclasses.replace(arm, seeds=None) for arm in made.arms)
    return dataclasses.replace(made, seeds=_seeds(seeds, str(path)), arms=arms)


def _table_file(name: str) -> Path:
    for path in (TABLES / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in TABLES.glob("*.yaml")))
    raise BadInput(f"there is no table {name}; give one of {shipped}, or a YAML file.")


def read_yaml(path: Path) -> Config:
    """Read the mapping in a YAML file.

    Raises:
        BadInput: if there is no such file, or something else in it.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} cannot be read as YAML ({reason}); correct it, or give another.") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} has no keys; write a YAML mapping.")
    return document


def _known(document: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    if unknown := sorted(map(str, document.keys() - known)):
        raise BadInput(f"{where} has the key {unknown[0]}, which means nothing; known are {', '.join(sorted(known))}.")
    if missing := sorted(needed - document.keys()):
        raise BadInput(f"{where} has no {missing[0]}; write one.")


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(seeds, list | tuple) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise BadInput(f"{where}: the seeds are {seeds!r}; give different whole numbers, such as {list(SEEDS)}.")
    return tuple(seeds)


def _outcomes(document: Config, key: str, where: str) -> tuple[str, ...]:
    given = document.get(key, [])
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or len({*given}) < len(given):
        raise BadInput(f"{where}: `{key}` is {given!r}; give a list of different outcomes, such as [heldout_accuracy].")
    return tuple(given)


def _flag(document: Config, key: str, where: str) -> bool:
    given = document.get(key, False)
    if not isinstance(given, bool):
        raise BadInput(f"{where}: `{key}` is {given!r}; give true, or leave it out.")
    return given


def _count(document: Config, key: str, least: int, where: str) -> int | None:
    given = document.get(key)
    if given is not None and (type(given) is not int or given < least):
        raise BadInput(f"{where}: `{key}` is {given!r}; give a whole number from {least} on, or leave it out.")
    return given


def _base(document: Config, where: str) -> ChangedBase | None:
    given = document.get("base")
    if given is None:
        return None
    whole = isinstance(given, dict) and isinstance(given.get("of"), str) and isinstance(given.get("config"), dict)
    if not whole or len(given) > 2 or not given["config"]:
        raise BadInput(f"{where}: `base` is {given!r}; give the model it is made `of`, and the `config` it is to have.")
    return ChangedBase(given["of"], given["config"])


def _against(document: Config, also: Sequence[str], less: Sequence[str], where: str) -> str | None:
    against, arms = document.get("against"), [str(arm) for arm in document["arms"]]
    if against is None and not less:
        return None
    if str(against) not in arms or not less or not {*less} <= {*also}:
        raise BadInput(
            f"{where}: `against` is {against!r} and `reduce` is {list(less)}; give one of its arms "
            f"({', '.join(arms)}) and some of the outcomes in `also` ({', '.join(also)}), or neither key."
        )
    return str(against)


def _race(document: Config, where: str) -> Race | None:
    body, arms = document.get("race"), [str(arm) for arm in document["arms"]]
    if body is None:
        return None
    if not isinstance(body, dict):
        raise BadInput(f"{where}: `race` is {body!r}; give it every, to, and the parts of an arm.")
    _known(body, RACE_KEYS, {"every", "to"}, f"{where}: race")
    without = body.get("without") or {}
    named = [body["to"], *([body["whole"]] if "whole" in body else []), *without]
    if unknown := [str(name) for name in named if str(name) not in arms]:
        raise BadInput(f"{where}: race names the arm {unknown[0]}; give one of {', '.join(arms)}.")
    if type(body["every"]) is not int or body["every"] < 1:
        raise BadInput(f"{where}: race.every is {body['every']!r}; give the steps between validations, 1 or more.")
    if without and "whole" not in body:
        raise BadInput(f"{where}: race has without, but no whole; name the arm that has all parts.")
    return Race(body["every"], str(body["to"]), body.get("whole"), {str(k): str(v) for k, v in without.items()})


def _workload(config: Config, steps: int | None, where: str, race: Race | None) -> Config:
    """Return the configuration that all trials share; it validates at the end of training, and on the way of a race."""
    data, trainer = config.get("data"), dict(config.get("trainer") or {})
    if not isinstance(data, dict) or "class_path" not in data:
        raise BadInput(f"{where} has no data.class_path; say what is learnt, such as lit_sparse.data.Embedded.")
    steps = trainer.get("max_steps") if steps is None else steps
    if type(steps) is not int or steps < 1:
        raise BadInput(f"{where}: trainer.max_steps is {steps}; give the optimizer steps of a trial, 1 or more.")
    between = steps if race is None else math.gcd(race.every, steps)
    every = between * trainer.get("accumulate_grad_batches", 1)
    ends = {"max_steps": steps, "max_epochs": -1, "val_check_interval": every, "check_val_every_n_epoch": None}
    return merged({"model": {}, **config}, {"trainer": {**trainer, **ends}})


def _arm(name: Any, body: Any, where: str) -> Arm:
    if not re.fullmatch(r"[\w.+-]+", str(name)):
        raise BadInput(f"{where}: its name is also its folders'; make it of letters, digits and . _ + -")
    if not isinstance(body, dict):
        raise BadInput(f"{where} is {body!r}; give it updates and learning rates.")
    _known(body, ARM_KEYS, {"lr"}, where)
    if ("updates" in body) == ("method" in body):
        raise BadInput(f"{where} must have either updates or the YAML of a method; give one of the two.")
    model = {"updates": body["updates"]} if "updates" in body else _method(body["method"])
    if not isinstance(model.get("updates", []), list):
        raise BadInput(f"{where}: `updates` is {model['updates']!r}; give a list, [] for full fine-tuning.")
    model = merged(model, body.get("model") or {})
    group = body.get("group")
    rates, seeds = _rates(body["lr"], where), _count(body, "seeds", 1, where)
    return Arm(str(name), model, rates, None if group is None else str(group), seeds)


def _method(name: str) -> Config:
    model = dict(read_yaml(Path(found(name))).get("model") or {})
    return {key.rstrip("+"): value for key, value in model.items() if key != "lr"}


def _rates(given: Any, where: str) -> tuple[float, ...]:
    try:  # YAML 1.1 reads 2e-3 as a string
        rates = sorted(float(rate) for rate in given)
    except (TypeError, ValueError):
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise BadInput(f"{where}: lr is {given!r}; give a list of different numbers above 0, such as [5e-4, 1e-3].")
    return tuple(rates)


# ---- configurations


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """Merge `over` into a copy of `base`, recursively; values of `over` win."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        inner = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if inner else copy.deepcopy(value)
    return out


def filled(value: Any, given: Mapping[str, Any]) -> Any:
    """Replace each placeholder in `value`, at any depth, by its value in `given`."""
    if isinstance(value, dict):
        return {key: filled(item, given) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, given) for item in value]
    return given.get(value, value) if isinstance(value, str) else value


def _seeded(update: Any, seed: int, arm: str) -> Config:
    """Return an update in long form. A strategy that has a `seed` gets the trial's, or all trials would draw alike."""
    update = {"class_path": update} if isinstance(update, str) else copy.deepcopy(update)
    if not isinstance(update, dict) or not isinstance(update.get("class_path"), str):
        raise BadInput(f"arm {arm} has the update {update!r}; give its class_path, and init_args if it needs any.")
    name, own = update["class_path"], {field.name for field in dataclasses.fields(_strategy(update["class_path"]))}
    arguments = update.setdefault("init_args", {})
    if arguments.get("seed", seed) != seed:
        raise BadInput(f"arm {arm} fixes the seed of {name}, but a trial's seed is to take its place; leave it out.")
    if "seed" in own:
        arguments["seed"] = seed
    return update


def _strategy(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    try:
        strategy = getattr(import_module(module) if module else lit_sparse.strategies, kind)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"there is no update strategy {name}; see `lit-sparse list`.") from error
    if not dataclasses.is_dataclass(strategy):
        raise BadInput(f"{name} is no update strategy; see `lit-sparse list`.")
    return strategy


def digest(config: Config, stack: Mapping[str, str]) -> str:
    """Return a hash of a configuration, of the contents of the files that it names, and of where it runs.

    Our own classes enter by their names alone, `lit_sparse.callbacks.Forgetting` as `lit_sparse.Forgetting`: a module
    that moves must not cost hours of measurements.
    """
    files = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in sorted(set(_files(config)))}
    content = [_without_modules(config), files, dict(stack)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_modules(value: Any, key: str = "") -> Any:
    """Strip the modules from our class paths; those of others keep theirs, since torch has an AdamW, too."""
    if isinstance(value, dict):
        return {key: _without_modules(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_modules(item) for item in value]
    if key == "class_path" and isinstance(value, str) and value.startswith("lit_sparse."):
        return f"lit_sparse.{value.rpartition('.')[2]}"
    return value


def _files(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _files(item)
    elif isinstance(value, str) and Path(value).is_file():
        yield value
