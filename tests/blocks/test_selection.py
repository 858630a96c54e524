"""Choosing blocks of matrices: scores, the best of them, and fixed patterns."""

import pytest
import torch
from torch import nn

from lit_sparse.blocks.selection import (
    ScoreSheet,
    block_scores,
    diagonal_blocks,
    final_scores,
    random_scores,
    slab_blocks,
    top_blocks,
    within_columns,
)
from lit_sparse.errors import BadInput


def tiles(matrix, size):
    """Every block by plain slicing."""
    (height, width), (rows, columns) = size, matrix.shape
    return [[matrix[r : r + height, c : c + width] for c in range(0, columns, width)] for r in range(0, rows, height)]


def brute_force(scores, count):
    entries = [
        (-float(s[r, c]), name, r, c)
        for name, s in scores.items()
        for r in range(s.shape[0])
        for c in range(s.shape[1])
    ]
    return {entry[1:] for entry in sorted(entries)[:count]}


def as_set(choice):
    return {(name, r, c) for name, blocks in choice.items() for r, c in blocks.index.tolist()}


def some_scores(ties):
    generator = torch.Generator().manual_seed(0)
    draw = (
        (lambda *shape: torch.randint(0, 3, shape, generator=generator).float())
        if ties
        else (lambda *shape: torch.rand(*shape, generator=generator))
    )
    return {"b": draw(5, 3), "a": draw(2, 7), "c": draw(4, 4)}


@pytest.mark.parametrize("shape", [(12, 8), (13, 9), (5, 30)])
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_scores_are_means_and_sums_over_real_weights(shape, size):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = {
        "abs_mean": lambda t: t.abs().mean(),
        "mean_abs": lambda t: t.mean().abs(),
        "l2": lambda t: t.norm(),
    }
    for score, measure in wanted.items():
        expected = torch.stack([torch.stack([measure(t) for t in row]) for row in tiles(gradient, size)])
        torch.testing.assert_close(final_scores(block_scores(gradient, size, score), score), expected)


@pytest.mark.parametrize("ties", [False, True])
def test_global_choice_is_the_brute_force_one_whatever_the_order(ties):
    scores = some_scores(ties)
    for count in (1, 7, 45):
        expected = brute_force(scores, count)
        assert as_set(top_blocks(scores, (4, 4), count, "global")) == expected
        assert as_set(top_blocks(dict(reversed(scores.items())), (4, 4), count, "global")) == expected


def test_choice_per_matrix_shares_the_count():
    scores = some_scores(ties=False)
    choice = top_blocks(scores, (4, 4), 9, "per_matrix")
    assert sum(len(blocks.index) for blocks in choice.values()) == 9
    for name, blocks in choice.items():
        assert as_set({name: blocks}) == brute_force({name: scores[name]}, len(blocks.index))
        assert len(blocks.index) in (2, 3, 4)


def test_random_choice_comes_from_the_seed():
    grids = {"a": (8, 8), "b": (4, 4)}
    first, again, other = (as_set(top_blocks(random_scores(grids, seed), (4, 4), 20, "global")) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 20


def test_diagonal_covers_every_row_and_column_once():
    matrices = {"square": torch.zeros(64, 64), "wide": torch.zeros(24, 64)}
    choice = diagonal_blocks(matrices, weights=(64 * 64 + 24 * 64) / 8)
    for name, blocks in choice.items():
        covered = torch.zeros_like(matrices[name])
        for rows, columns in blocks.slices():
            covered[rows, columns] += 1
        assert covered.max() == 1
        assert covered.any(0).all()
        assert covered.any(1).all()
        assert covered.sum() == matrices[name].numel() / 8


def test_sides_are_multiples_of_16_and_the_diagonal_still_covers_all():
    matrices = {"q": torch.empty(2048, 2048, device="meta"), "k": torch.empty(512, 2048, device="meta")}
    chosen = diagonal_blocks(matrices, weights=0.1 * 2560 * 2048)
    assert {name: blocks.size for name, blocks in chosen.items()} == {"q": (208, 208), "k": (48, 208)}
    for name, blocks in chosen.items():
        rows, columns = blocks.index.t()
        assert set(rows.tolist()) == set(range(-(-matrices[name].shape[0] // blocks.size[0])))
        assert set(columns.tolist()) == set(range(10))
        assert len(blocks.index.unique(dim=0)) == len(blocks.index)
    slabs = slab_blocks(matrices, [], 0.1 * 2560 * 2048, seed=0)
    assert {name: blocks.size for name, blocks in slabs.items()} == {"q": (208, 2048), "k": (48, 2048)}


def test_scores_add_up_and_no_gradient_stays():
    layer = nn.Linear(8, 12)
    sheet = ScoreSheet({"w": layer.weight}, (4, 4), "abs_mean")
    sheet.watch_weight("w", layer.weight, transposed=False, keep=False)
    expected = torch.zeros(3, 2)
    for seed in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        layer(x).square().sum().backward()
        assert layer.weight.grad is None
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
        expected += block_scores(gradient, (4, 4), "abs_mean")
    torch.testing.assert_close(sheet.close()["w"], expected)
    layer(torch.ones(1, 8)).sum().backward()
    assert layer.weight.grad is not None  # the hook is off


def test_a_gradient_that_is_not_finite_is_refused():
    layer = nn.Linear(8, 12)
    sheet = ScoreSheet({"w": layer.weight}, (4, 4), "l2")
    sheet.watch_weight("w", layer.weight, transposed=False, keep=False)
    (layer(torch.full((1, 8), torch.inf))).sum().backward()
    with pytest.raises(BadInput, match="gradient of w is not finite"):
        sheet.close()


def test_scores_of_a_layer_whose_weight_can_have_no_gradient():
    layer, x = nn.Linear(8, 12), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    sheets = [ScoreSheet({"w": layer.weight}, (4, 4), "abs_mean") for _ in range(2)]
    sheets[0].watch_weight("w", layer.weight, transposed=False, keep=True)
    layer(x).square().sum().backward()
    layer.requires_grad_(False)
    sheets[1].watch_layer("w", layer)
    layer(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(sheets[1].close()["w"], sheets[0].close()["w"])
    assert layer.weight.grad is not None  # it was to be kept


def test_slabs_are_one_band_of_each_matrix_and_as_many_weights_as_asked():
    matrices = {"q": torch.zeros(64, 32), "down": torch.zeros(32, 128)}
    wanted = 0.25 * (64 * 32 + 32 * 128)
    chosen = slab_blocks(matrices, ["down"], wanted, seed=0)
    assert {name: blocks.size for name, blocks in chosen.items()} == {"q": (16, 32), "down": (32, 32)}
    assert sum(blocks.numel(matrices[name]) for name, blocks in chosen.items()) == wanted
    places = {tuple(slab_blocks(matrices, ["down"], wanted, seed)["q"].index[0].tolist()) for seed in range(20)}
    assert places == {(place, 0) for place in range(4)}  # anywhere, and never past the end
    assert list(chosen) == list(matrices)


def test_slabs_do_not_depend_on_the_order_of_the_matrices():
    matrices = {name: torch.zeros(64, 32) for name in "abc"}
    turned = dict(reversed(matrices.items()))
    one, two = (slab_blocks(some, [], 300, seed=3) for some in (matrices, turned))
    assert all(torch.equal(one[name].index, two[name].index) for name in matrices)


def test_blocks_lie_in_the_best_columns_of_their_input_only():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(rows, 8, generator=generator) for name, rows in (("q", 6), ("k", 2), ("o", 6))}
    inside = within_columns(scores, [["q", "k"], ["o"]], 0.25)
    together = (scores["q"].sum(0) + scores["k"].sum(0)).topk(2).indices.sort().values
    for name, columns in (("q", together), ("k", together), ("o", scores["o"].sum(0).topk(2).indices.sort().values)):
        assert torch.equal(inside[name].isfinite().all(0).nonzero()[:, 0], columns)
        assert torch.equal(inside[name][:, columns], scores[name][:, columns])
    chosen = top_blocks(inside, (4, 4), 10, "global")
    assert all(
        set(chosen[name].index[:, 1].tolist()) <= set(together.tolist()) for name in ("q", "k") if name in chosen
    )
