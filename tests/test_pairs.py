"""Every two methods under configs/ train together, each with its effect, or are refused in a sentence."""

from itertools import combinations, permutations, product

import pytest

from lit_sparse.errors import BadInput
from lit_sparse.strategies import UpdateStrategy
from lit_sparse.testing import contract
from tests.methods import METHODS, VARIANTS, strategies

pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")  # PEFT takes the next that divides the side


def traits(strategy: UpdateStrategy) -> tuple[object, ...]:
    """What decides how a strategy works beside another: its class, and what it says of itself."""
    said = (strategy.claims, strategy.backward, strategy.base, strategy.leaves, strategy.needs, strategy.denies)
    return type(strategy).__name__, *said, strategy.gradients, strategy.masters, strategy.cycle is None


def families() -> list[list[str]]:
    """Methods whose strategies have the same traits, less those families that are only variants."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for method in METHODS:
        alike.setdefault(tuple(map(traits, strategies(method))), []).append(method)
    return [methods for methods in alike.values() if not VARIANTS.issuperset(methods)]


def tried() -> list[str]:
    """One pair of methods for every two families, and for each with itself; the members of a family take turns."""
    found, turns = [], dict.fromkeys(METHODS, 0)
    kinds = families()
    for one, other in [*combinations(kinds, 2), *((kind, kind) for kind in kinds if len(kind) > 1)]:
        able = [pair for pair in product(one, other) if pair[0] != pair[1]]
        pair = min(able, key=lambda pair: (turns[pair[0]] + turns[pair[1]], pair))
        for method in pair:
            turns[method] += 1
        found.append("+".join(sorted(pair)))
    return found


def assert_names_both(sentence: str, pair: str) -> None:
    """A refusal names two strategies of the pair, or one that does not fit the model, and a way out."""
    names = [type(update).__name__ for method in pair.split("+") for update in strategies(method)]
    begins = [f"{a} and {b} cannot be combined: " for a, b in permutations(names, 2)] + [f"{name}: " for name in names]
    assert sentence.startswith(tuple(begins)), sentence
    assert "; " in sentence, sentence


@pytest.mark.parametrize("pair", tried())
def test_a_pair_has_both_effects_or_is_refused(pair):
    """The contract sees the effect of each strategy."""
    try:
        contract(lambda: strategies(pair), steps=3)
    except BadInput as refused:
        assert_names_both(str(refused), pair)


def test_every_two_methods_compose_or_are_refused():
    refused = set()
    for pair in map("+".join, combinations(METHODS, 2)):
        try:
            strategies(pair)
        except BadInput as sentence:
            assert_names_both(str(sentence), pair)
            refused.add(pair)
    assert {"lora+smt", "galore+mezo"} <= refused
    assert not {"lora+mezo", "deft+smt", "gmt+lora"} & refused


def test_members_of_a_family_take_turns():
    """So that each method is tried in some pair, and a family of many methods no more often than one of a single."""
    kinds, pairs = families(), tried()
    assert len(pairs) == len(set(pairs)) >= len(kinds) * (len(kinds) - 1) / 2
    assert {method for pair in pairs for method in pair.split("+")} == {method for kind in kinds for method in kind}
    assert ["full"] in kinds
    assert any({"lora", "dora"} <= set(kind) for kind in kinds)
