"""Strict conversion between dataclasses and JSON values. An error names the place of the value that does not fit."""

from __future__ import annotations

import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, which a terminal obeys, and those that turn the direction of a text around."""

MOST = 10**30
"""Bound of whole numbers in a document: beyond any count, far below where Python cannot divide them as floats."""


def printable(text: str) -> str:
    """Return a text of a document with a mark in place of what a terminal or a browser would obey."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


MARKUP = re.compile(r"[\\|]|(?<=\])[(\[:]")
"""Characters that end a cell of Markdown, and that make a link or a picture of brackets before it."""


def plain_markdown(text: str) -> str:
    """Return a text of a document such that Markdown makes no HTML, link or picture of it."""
    return MARKUP.sub(lambda found: f"\\{found[0]}", printable(text)).replace("<", "&lt;")


def spell_nonfinite(value: Any) -> Any:
    """Replace NaN and infinities in nested dicts and lists by "NaN", "Infinity" and "-Infinity".

    JSON has no such numbers, and Python's `json` would write documents that other readers reject. `parse_as` reads the
    words back as floats.
    """
    if isinstance(value, dict):
        return {key: spell_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spell_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def parse_as(value: Any, wanted: Any, where: str) -> Any:
    """Convert a JSON value to the annotated type `wanted`: a dataclass, list, dict, literal, optional or plain type.

    Args:
        where: Path of the value in its document, for the error message.

    Raises:
        ValueError: if the value has another type, is a whole number above `MOST`, or an object has unknown or missing
            fields.
    """
    if wanted is Any:
        return value
    if is_dataclass(wanted):
        return _parse_dataclass(value, wanted, where)
    if get_origin(wanted) in (Union, types.UnionType):  # all unions in records are `X | None`
        return None if value is None else parse_as(value, get_args(wanted)[0], where)
    if get_origin(wanted) is list and isinstance(value, list):
        return [parse_as(item, get_args(wanted)[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(wanted) is dict and isinstance(value, dict):
        return {key: parse_as(item, get_args(wanted)[1], f"{where}.{key}") for key, item in value.items()}
    if get_origin(wanted) is Literal and value in get_args(wanted):
        return value
    if type(value) is int and abs(value) > MOST:
        raise ValueError(f"{where} is a number above {MOST:.0e} in size, which no measurement gives")
    if wanted is float and (type(value) is int or value in ("NaN", "Infinity", "-Infinity")):
        return float(value)
    if type(value) is wanted:  # not isinstance: True is an int, and must not pass for a number of bytes
        return value
    raise ValueError(f"{where} is {value!r:.60} where {getattr(wanted, '__name__', wanted)} is due")


def _parse_dataclass(value: Any, wanted: Any, where: str) -> Any:
    """Convert a JSON object to the dataclass `wanted`; refuse unknown and missing fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.60} where an object is due")
    hints = get_type_hints(wanted)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}")
    required = {f.name for f in fields(wanted) if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{where} lacks: {', '.join(missing)}")
    return wanted(**{key: parse_as(item, hints[key], f"{where}.{key}") for key, item in value.items()})
