"""A fit that is stopped anywhere and resumed equals a straight one, whatever the settings: some of `make fuzz`."""

import pytest
from hypothesis import given, settings

from tests.fuzz import UNHURRIED, Example, check, examples


@pytest.mark.filterwarnings("ignore")  # of odd settings, which Lightning accepts with a warning
@settings(max_examples=12, derandomize=True, **UNHURRIED)
@given(examples())
def test_a_resumed_fit_is_a_straight_one(example: Example):
    check(example)
