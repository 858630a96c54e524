"""Help texts of `lit-sparse VERB --help` and `--help_all` on the keys of a fit, and the script that completes them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import jsonargparse

from lit_sparse import data, strategies
from lit_sparse.commands.shipped import COLUMN, laid_out
from lit_sparse.places import configs_folder

SHORT, LONG = ("-h", "--help"), "--help_all"
EXAMPLES = {
    "fit": (
        "lit-sparse fit --config smt.yaml --config trainers/demo.yaml",
        "lit-sparse fit --config lora.yaml --model.base NAME --data rows.jsonl --run mine",
        "lit-sparse fit --config runs/mine-1/config.yaml --ckpt_path last",
    ),
    "validate": ("lit-sparse validate --config runs/smt-1/config.yaml --ckpt_path runs/smt-1/checkpoints/last.ckpt",),
    "test": ("lit-sparse test --config runs/smt-1/config.yaml --ckpt_path runs/smt-1/checkpoints/last.ckpt",),
}
KEYS = {
    "The run": "run ckpt_path task samples profile.examine profile.profiled checkpoint_steps seed_everything",
    "The model": "model.base model.updates model.lr model.schedule model.warmup_steps model.optimizer model.precision "
    "model.activation_checkpointing model.quantize",
    "The trainer": "trainer.max_steps trainer.max_epochs trainer.max_time trainer.accumulate_grad_batches "
    "trainer.gradient_clip_val trainer.val_check_interval trainer.accelerator trainer.devices trainer.strategy "
    "trainer.logger trainer.callbacks",
}
"""The keys that people set, by their headings; those of data and of the methods named stand between."""
LINKED = "tokenizer"
"""The key of data that follows `model.base`."""


def short_help(
    parser: argparse.ArgumentParser, verb: str, documents: Iterable[Mapping[str, Any]], data_name: str
) -> str:
    """Return the keys of a verb that people set, each in a line with a sentence and its default.

    Args:
        parser: The verb's parser.
        verb: `fit`, `validate` or `test`.
        documents: The contents of each --config that was given, whose methods and data are told of.
        data_name: The data module that was named on the command line; empty if none was.
    """
    actions = {action.dest: action for action in parser._actions}
    parts = [
        f"usage: lit-sparse {verb} --config YAML [--config YAML ...] [--KEY VALUE ...]",
        "\n".join(f"  {example}" for example in EXAMPLES[verb]),
        "--config takes a YAML's path, or its name among the shipped ones (lit-sparse\n"
        "list). Several stack from left to right, and keys override them; --print_config\n"
        "prints the result. Below are the keys that are set most often; lit-sparse\n"
        f"{verb} --help_all has all, lit-sparse VERB --help those of another verb.",
    ]
    documents = list(documents)
    for title, keys in KEYS.items():
        parts.append(section(title, [actions[key] for key in keys.split() if key in actions]))
        if title == "The model":
            parts += [keys_of(kind, "model.updates") for kind in named_updates(documents)]
            parts.append(keys_of(named_data(documents, data_name), "data"))
    return "\n\n".join(parts)


def long_help(parser: argparse.ArgumentParser) -> str:
    """Return every key of a verb, with those of all methods and data modules."""
    return "\n\n".join([parser.format_help(), *(laid_out(keys_of(kind, prefix)) for kind, prefix in with_prefixes())])


def update_strategies() -> list[type]:
    """Return the update strategies of lit_sparse."""
    return classes(strategies, strategies.UpdateStrategy)


def data_modules() -> list[type]:
    """Return the data modules of lit_sparse."""
    return classes(data, data.TokenData, data.Labelled)


def classes(module: Any, *bases: type) -> list[type]:
    """Return the classes of a package's `__all__` below `bases` from which no other is derived."""
    named = [getattr(module, name) for name in module.__all__]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, bases)]
    return [kind for kind in kinds if not any(kind is not one and issubclass(one, kind) for one in kinds)]


def with_prefixes() -> list[tuple[type, str]]:
    """Return each class of which a fit may have keys, with what the keys begin with."""
    updates = [(kind, "model.updates") for kind in update_strategies()]
    return updates + [(kind, "data") for kind in data_modules()]


def named_updates(documents: Iterable[Mapping[str, Any]]) -> list[type]:
    """Return the update strategies of lit_sparse that YAMLs name."""
    names = []
    for document in documents:
        model = document.get("model") or {}
        updates = model.get("updates+") or model.get("updates") or []
        names += [str(one.get("class_path", "")).rpartition(".")[2] for one in updates if isinstance(one, dict)]
    return [vars(strategies)[name] for name in dict.fromkeys(names) if name in strategies.__all__]


def named_data(documents: Iterable[Mapping[str, Any]], name: str) -> type:
    """Return the data module of lit_sparse that is named last; that of a user's own rows if none is."""
    for document in documents:
        chosen = document.get("data") or ""
        name = name or str(chosen.get("class_path", "") if isinstance(chosen, dict) else chosen)
    name = name.rpartition(".")[2]
    return vars(data)[name] if name in data.__all__ else data.Instructions


def keys_of(kind: type, prefix: str) -> str:
    """Return the keys of a class, as they are written below `prefix`."""
    parser = jsonargparse.ArgumentParser(add_help=False)
    parser.add_class_arguments(kind, prefix)
    actions = [action for action in parser._actions if action.dest.startswith(f"{prefix}.")]
    return section(f"{prefix}: {kind.__name__}", [one for one in actions if one.dest != f"{prefix}.{LINKED}"])


def section(title: str, actions: Iterable[argparse.Action]) -> str:
    """Return a heading with a line for each option below it: its first sentence and its default."""
    lines = [title]
    for action in actions:
        if action.dest.endswith(".help"):
            continue
        text = re.split(r"(?<=[.;])\s+(?=[A-Z`])", " ".join((action.help or "").split()))[0]
        head = f"  --{action.dest}"
        head += " " * max(2, COLUMN - len(head))
        lines.append(head + f"{text} {default(action)}".replace("%%", "%").strip())
    return "\n".join(lines)


def default(action: argparse.Action) -> str:
    """Return the default of an option in brackets; nothing where it is null."""
    if action.required:
        return "[required]"
    plain = isinstance(action.default, str | int | float) and action.default != argparse.SUPPRESS
    return f"[{str(action.default).lower() if isinstance(action.default, bool) else action.default}]" if plain else ""


# ---- completion

SCRIPT = Template(
    """\
# Completes lit-sparse in bash and, through bashcompinit, in zsh; written by: lit-sparse completion $shell
${before_it}
_lit_sparse() {
    local word="$${COMP_WORDS[COMP_CWORD]}" before="$${COMP_WORDS[COMP_CWORD-1]}" offered=""
    if [ "$$word" = "=" ]; then word=""; fi
    if [ "$$before" = "=" ]; then before="$${COMP_WORDS[COMP_CWORD-2]}"; fi
    if [ "$$COMP_CWORD" -eq 1 ]; then
        offered="$verbs"
    elif [ "$$before" = "--config" ] || [ "$$before" = "-c" ] || [ "$$before" = "--against" ]; then
        offered="$yamls"
    else
        case "$${COMP_WORDS[1]}:$$word" in
$cases
        esac
    fi
    COMPREPLY=( $$(compgen -W "$$offered" -- "$$word") )
}
complete -o default -F _lit_sparse lit-sparse
"""
)
"""Without a word of ours, the shell completes paths."""
ZSH = "autoload -Uz compinit bashcompinit; whence compdef > /dev/null || compinit; bashcompinit"
"""Lines that let zsh read a script for bash."""


def completion(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """Return a script for `shell` that completes verbs, their options and the names of shipped YAMLs.

    Args:
        shell: `bash` or `zsh`.
        options: The options of each verb.
    """
    paths = [path.relative_to(configs_folder()) for path in sorted(configs_folder().rglob("*.yaml"))]
    methods = [path.as_posix() for path in paths if path.parent == Path()]
    cases = [f'            {verb}:-*) offered="{" ".join(words)}" ;;' for verb, words in options.items() if words]
    cases += [f'            {verb}:*) offered="{" ".join(methods)}" ;;' for verb in ("bench", "plan")]
    return SCRIPT.substitute(
        shell=shell,
        before_it=ZSH if shell == "zsh" else "",
        verbs=" ".join(options),
        yamls=" ".join(path.as_posix() for path in paths),
        cases="\n".join(cases),
    )


def option_words(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser that begin with two dashes."""
    words = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    return [word for word in words if not word.endswith("+")]


def fit_words(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a verb of LightningCLI, with the keys of all methods and data modules."""
    words = option_words(parser)
    for kind, prefix in with_prefixes():
        below = jsonargparse.ArgumentParser(add_help=False)
        below.add_class_arguments(kind, prefix)
        words += option_words(below)
    return [*dict.fromkeys([*words, LONG])]
