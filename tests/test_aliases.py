"""Aliases of YAML, counted as if they were written out."""

import pytest

from lit_sparse.aliases import MOST, TooManyValues, check_aliases


@pytest.mark.parametrize("times", [1, 99, 101, 10_000])
def test_values_are_counted_as_often_as_they_are_named(times):
    text = f"- &all [{'x, ' * 999}]\n- [{'*all, ' * times}]\n"
    if (times + 1) * 1000 + 2 <= MOST:
        check_aliases(text)
    else:
        with pytest.raises(TooManyValues, match="aliases stand for more than 100,000 values"):
            check_aliases(text)


def test_a_part_of_itself_has_no_end():
    with pytest.raises(TooManyValues):
        check_aliases("a: &a {b: [*a]}")
