"""Refuse YAML whose aliases multiply: nine lines of ten aliases of the line before stand for a billion values."""

from __future__ import annotations

import yaml

MOST = 100_000
"""Values that the aliases of a YAML may stand for."""


class TooManyValues(yaml.MarkedYAMLError):
    """A YAML that is small to read and endless to go through, which is what everything after reading does."""


def check_aliases(text: str) -> None:
    """Check that YAML, its aliases written out, has no more than `MOST` values.

    Raises:
        TooManyValues: if it has more, or a part that is a part of itself.
        yaml.YAMLError: if it is no YAML.
    """
    if "*" not in text or "&" not in text:
        return
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and _values(node, {}) > MOST:
        problem = f"its aliases stand for more than {MOST:,} values"
        raise TooManyValues(problem=problem, problem_mark=node.start_mark)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a node; each node is gone through once."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # while it is gone through: a part of itself has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
