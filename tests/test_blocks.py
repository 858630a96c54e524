"""Choosing, reading and writing blocks of matrices."""

import pytest
import torch
from torch import nn

from lit_sparse.blocks import (
    Blocks,
    ScoreSheet,
    automatic_size,
    block_scores,
    diagonal_blocks,
    final_scores,
    random_blocks,
    read_choice,
    top_blocks,
)
from lit_sparse.errors import BadInput


def tiles(matrix, size):
    """Every block by plain slicing."""
    (height, width), (rows, columns) = size, matrix.shape
    return [[matrix[r : r + height, c : c + width] for c in range(0, columns, width)] for r in range(0, rows, height)]


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


def test_read_and_write_are_inverse_on_ragged_blocks():
    matrix = torch.randn(13, 9)
    blocks = Blocks.of((4, 4), torch.tensor([[3, 2], [0, 0], [3, 0], [1, 2]]))
    assert blocks.index.tolist() == [[0, 0], [3, 0], [1, 2], [3, 2]]
    values = blocks.read(matrix)
    assert blocks.numel(matrix) == 16 + 4 + 4 + 1
    assert torch.equal(values[3, :1, :1], matrix[12:, 8:])
    assert values[3].count_nonzero() == 1
    target = torch.zeros_like(matrix)
    blocks.write(target, values)
    mask = torch.zeros_like(matrix)
    for rows, columns in blocks.slices():
        mask[rows, columns] = 1
    assert torch.equal(target, matrix * mask)


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
    first, again, other = (as_set(random_blocks(grids, (4, 4), 20, "global", seed)) for seed in (1, 1, 2))
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


def test_automatic_size_divides_and_leaves_a_choice():
    matrices = {"q": torch.zeros(576, 576), "k": torch.zeros(192, 576)}
    assert automatic_size(matrices, weights=1.1e6) == (64, 64)
    assert automatic_size(matrices, weights=16 * 32 * 32) == (32, 32)
    assert automatic_size({"odd": torch.zeros(37, 41)}, weights=1e9) == (8, 8)


def test_a_choice_is_read_from_json_or_a_run(tmp_path):
    state = {"q": {"size": [4, 2], "index": torch.tensor([[1, 0], [0, 3]], dtype=torch.int32)}}
    updates = [{"class": "PEFT", "state": {}}, {"class": "SMT", "state": state}]
    torch.save({"lit_sparse": {"updates": updates}}, tmp_path / "last.ckpt")
    (tmp_path / "blocks.json").write_text('{"q": {"size": [4, 2], "index": [[1, 0], [0, 3]]}}')
    for name in ("last.ckpt", "blocks.json"):
        back = read_choice(tmp_path / name, {"q": torch.zeros(8, 8)})
        assert back["q"].size == (4, 2)
        assert torch.equal(back["q"].index, state["q"]["index"])
    torch.save({"lit_sparse": {"updates": []}}, tmp_path / "other.ckpt")
    with pytest.raises(BadInput, match="no choice of blocks could be read"):
        read_choice(tmp_path / "other.ckpt", {"q": torch.zeros(8, 8)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no choice of blocks could be read"),
        ("{", "no choice of blocks could be read"),
        ('{"q": {"size": [4]}}', "no choice of blocks could be read"),
        ('{"v": {"size": [4, 4], "index": [[0, 0]]}}', "chooses blocks of v, which is not among"),
        ('{"q": {"size": [4, 4], "index": [[0, 2]]}}', "a block outside the 2 x 2 blocks of q"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "blocks.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message):
        read_choice(path, {"q": torch.zeros(8, 8)})


def test_scores_add_up_and_no_gradient_stays():
    layer = nn.Linear(8, 12)
    sheet = ScoreSheet({"w": (layer.weight, False)}, (4, 4), "abs_mean")
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
    sheet = ScoreSheet({"w": (layer.weight, False)}, (4, 4), "l2")
    (layer(torch.full((1, 8), torch.inf))).sum().backward()
    with pytest.raises(BadInput, match="gradient of w is not finite"):
        sheet.close()
