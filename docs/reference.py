"""The reference pages, made from the code: keys of the YAMLs, and options of the verbs."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_origin

from docstring_parser import parse

from lit_sparse import callbacks, cli
from lit_sparse.__main__ import VERBS
from lit_sparse.commands import usage
from lit_sparse.data import Synthetic, TokenData
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.optim import AdamW
from lit_sparse_profiling.step_plan import Plan

PATHS = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])")
"""Module paths in the text of an annotation."""


def configuration() -> str:
    """Return the keys of a configuration: a table for each class that a YAML can name."""
    parts = [
        section("model, with task: CausalLM", CausalLM),
        section("model, with task: Classifier", Classifier),
        *(section(f"model.updates: {kind.__name__}", kind) for kind in by_name(usage.update_strategies())),
        section("data: every class but Labelled and Synthetic", TokenData),
        *(section(f"data: {kind.__name__}", kind) for kind in by_name([*usage.data_modules(), Synthetic])),
        *(
            section(f"trainer.callbacks: {name}", getattr(callbacks, name))
            for name in sorted(vars(callbacks))
            if name[0].isupper()
        ),
        section("model.optimizer: lit_sparse.optim.AdamW", AdamW),
        section("profile", Plan),
    ]
    return "\n\n".join(parts)


def by_name(kinds: Iterable[type]) -> list[type]:
    """Return classes in the order of their names."""
    return sorted(kinds, key=lambda kind: kind.__name__)


def section(title: str, kind: type) -> str:
    """Return a heading, the first line of a class's docstring, and a table of its parameters."""
    said = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    rows = [
        (name, annotation(parameter.annotation, kind), default(kind, parameter), described(kind, name))
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and not name.startswith("_")
    ]
    more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in inspect.signature(kind).parameters.values())
    where = "under `task: CausalLM`" if kind is Classifier else "under `data: every class`"
    said += f" It has the keys {where}, too." if more else ""
    return f"## {title}\n\n{said}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}"


def described(kind: type, name: str) -> str:
    """Return what a class's docstring, or a base's, says of a parameter."""
    for one in inspect.getmro(kind):
        for parameter in parse(one.__doc__ or "").params:
            if parameter.arg_name == name and parameter.description:
                return parameter.description.replace("\n", " ")
    return ""


def annotation(value: Any, of: Any) -> str:
    """Return a type of a class or function `of` as a user writes it: names of literals by their values."""
    text = inspect.formatannotation(value) if not isinstance(value, str) else value
    modules = [sys.modules[one.__module__] for one in (inspect.getmro(of) if inspect.isclass(of) else [of])]

    def spelt(name: re.Match[str]) -> str:
        found = next((vars(module)[name.group()] for module in modules if name.group() in vars(module)), None)
        return inspect.formatannotation(found) if get_origin(found) is Literal else name.group()

    return PATHS.sub("", re.sub(r"\b[A-Z]\w*", spelt, text))


def default(kind: Any, parameter: inspect.Parameter) -> str:
    """Return the default of a parameter of `kind`, or "required"."""
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if dataclasses.is_dataclass(kind):
        field = next(field for field in dataclasses.fields(kind) if field.name == parameter.name)
        value = value if field.default_factory is dataclasses.MISSING else field.default_factory()
    return f"`{value!r}`"


def command_line() -> str:
    """Return the verbs with their own options; those of fit and its like are the keys of a configuration."""
    rows = ((f"`{verb}`", one.what, f"`{one.example}`") for verb, one in VERBS.items())
    parts = [table(("verb", "what it does", "for example"), rows)]
    parts += [f"## lit-sparse {verb}\n\n{function(call)}" for verb, call in cli.VERBS.items()]
    parts += [f"## lit-sparse {verb}\n\n{options(parser())}" for verb, parser in cli.PARSERS.items()]
    return "\n\n".join(parts)


def function(call: Callable[..., Any]) -> str:
    """Return the docstring's first paragraph and the parameters of a verb that is a function."""
    said = (inspect.getdoc(call) or "").partition("\n\n")[0].replace("\n", " ")
    texts = {one.arg_name: (one.description or "").replace("\n", " ") for one in parse(call.__doc__ or "").params}
    rows = [
        (
            name if one.default is inspect.Parameter.empty else f"--{name}",
            annotation(one.annotation, call),
            default(call, one),
            texts.get(name, ""),
        )
        for name, one in inspect.signature(call).parameters.items()
    ]
    return f"{said}\n\n{table(('option', 'type', 'default', 'meaning'), rows)}" if rows else said


def options(parser: argparse.ArgumentParser) -> str:
    """Return the description and the options of an argparse parser."""
    rows = [
        (
            ", ".join(action.option_strings) or action.dest,
            "" if action.default is None else f"`{action.default}`",
            (action.help or "").replace("%%", "%"),
        )
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]
    return f"{' '.join((parser.description or '').split())}\n\n{table(('option', 'default', 'meaning'), rows)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table of texts."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])
