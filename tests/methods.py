"""Every method under configs/ on tiny models: what the tests of all methods share."""

import dataclasses
import re
from functools import cache
from itertools import islice
from typing import Any

import lightning as L
import torch
import yaml

from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse
from lit_sparse.optim import trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module
from lit_sparse.strategies import PEFT, Updates
from lit_sparse.testing import TINY, tiny_llm

METHODS = sorted(path.stem for path in configs_folder().glob("*.yaml"))
VARIANTS = {
    *("fira", "fzoo", "helene_lora", "lezo", "mezo_lora"),
    *("badam", "diablo", "oft", "ows", "sparse_entries", "supertuning"),
}
"""Methods whose strategies stand in other files, too: they are tried on one model, and in no pair."""


def in_turn(first: int = 0) -> list[tuple[str, str]]:
    """Each method on one of the tiny models, the first on the kind of that number, for what takes seconds."""
    return [(method, TINY[number % len(TINY)]) for number, method in enumerate(METHODS, first)]


ON_EACH = [(method, kind) for method, own in in_turn() for kind in TINY if method not in VARIANTS or kind == own]
"""Each method on every tiny model; variants on one."""


@cache
def settings(method: str) -> dict[str, Any]:
    """The section `model` of a method's YAML."""
    return yaml.safe_load((configs_folder() / f"{method}.yaml").read_text())["model"]


def module(method: str, base: object, **options: object) -> LitSparse:
    """Return the module of a method's YAML, or of several as in `smt+deft`, on a tiny model; sets change often."""
    configs = [settings(name) for name in method.split("+")]
    keys = {key: value for config in configs for key, value in config.items() if not key.startswith("updates")}
    updates = [update for config in configs for update in config.get("updates+", [])]
    made = build_module({"model": {**keys, "updates": updates, "base": str(base), **options}})
    for update in made.updates:
        for field in dataclasses.fields(update) if update.cycle is not None else ():
            if getattr(update, field.name) == update.cycle:
                setattr(update, field.name, 2)
    return made


@cache
def _first(method: str) -> Updates:
    return module(method, "unused").updates


def strategies(methods: str) -> Updates:
    """Return new strategies of a method's YAML, or of several as in `smt+deft`, as `module` has them."""
    return Updates([strategy for method in methods.split("+") for strategy in _first(method).fresh()])


@cache
def adapted(method: str, kind: str) -> str:
    """Return `kind`, or llama where PEFT has no such adapter for that model, as a sentence must say."""
    updates = strategies(method)
    if not any(isinstance(update, PEFT) for update in updates):
        return kind
    model, ids = tiny_llm(kind).train(), torch.arange(3, 9)[None]
    losses = (model(input_ids=ids, labels=ids).loss for _ in range(100))
    try:
        updates.attach(model, lambda steps: islice(losses, steps))
    except BadInput as refused:
        sentence = r"asked for, but PEFT cannot put it on \w+ \(.*\); give other target_modules"
        if kind == "llama" or not re.search(sentence, str(refused)):
            raise
        return "llama"
    return kind


def dropout(method: str) -> float:
    """The dropout probability of a method's tiny model: none where it excludes dropout."""
    return 0.0 if method == "meft" else 0.1


def trainer(steps: int, **options) -> L.Trainer:
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False}
    return L.Trainer(**{**fixed, **defaults, **options})


def data(**options) -> Synthetic:
    return Synthetic(**{"vocab_size": 96, "max_length": 12, "rows": 14, "heldout": 2, "batch_size": 2, **options})


def trained(model: LitSparse) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model.build())}


def over_gradients(task: LitSparse, accumulate: int = 1) -> dict[str, object]:
    """The trainer's options for gradients, where there are any at the optimizer step."""
    if task.updates.backward != "autograd":
        return {}
    return {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
