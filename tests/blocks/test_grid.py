"""Reading and writing blocks of matrices, and choices of them in files."""

import pytest
import torch

from lit_sparse.blocks.grid import Blocks, automatic_size, read_choice
from lit_sparse.errors import BadInput
from lit_sparse.selections import write_selection


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


def test_automatic_size_divides_and_leaves_a_choice():
    matrices = {"q": torch.zeros(576, 576), "k": torch.zeros(192, 576)}
    assert automatic_size(matrices, weights=1.1e6) == (64, 64)
    assert automatic_size(matrices, weights=16 * 32 * 32) == (32, 32)
    assert automatic_size({"odd": torch.zeros(37, 41)}, weights=1e9) == (8, 8)


def test_a_choice_is_read_from_json_or_a_run(tmp_path):
    state = {"q": {"size": [4, 2], "index": torch.tensor([[1, 0], [0, 3]], dtype=torch.int32)}}
    updates = [{"class": "PEFT", "state": {}}, {"class": "SMT", "state": state}]
    torch.save({"lit_sparse": {"base": "", "updates": updates}, "state_dict": {}}, tmp_path / "last.ckpt")
    (tmp_path / "blocks.json").write_text('{"q": {"size": [4, 2], "index": [[1, 0], [0, 3]]}}')
    for name in ("last.ckpt", "blocks.json"):
        back = read_choice(tmp_path / name, {"q": torch.zeros(8, 8)}, "SMT")
        assert back["q"].size == (4, 2)
        assert torch.equal(back["q"].index, state["q"]["index"])
    torch.save({"lit_sparse": {"base": "", "updates": []}, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(BadInput, match=r"no choice of blocks could be read .*it was trained without SMT"):
        read_choice(tmp_path / "other.ckpt", {"q": torch.zeros(8, 8)}, "SMT")


def test_a_damaged_choice_is_refused(tmp_path):
    state = {"q": {"size": [4, 2], "index": torch.tensor([[1, 0], [0, 3]], dtype=torch.int32)}}
    write_selection(state, path := tmp_path / "blocks.json")
    text = path.read_text()
    assert torch.equal(read_choice(path, {"q": torch.zeros(8, 8)}, "SMT")["q"].index, state["q"]["index"])
    path.write_text(text.replace("[0, 3]", "[0, 2]"))
    with pytest.raises(BadInput, match=r"could be read from .*blocks\.json \(it is damaged, or was changed by hand"):
        read_choice(path, {"q": torch.zeros(8, 8)}, "SMT")


NO_INDEX = [
    *("[[1099511627776, 0]]", "[[4294967296, 0]]", "[[-1, 0]]", f"[[{10**30}, 0]]"),
    *(
        "[[0.5, 0]]",
        "[[true, false]]",
        "[[0, true]]",
        "[[[0, 0]]]",
        "[0, 0]",
        "[[0, 0, 0]]",
        "null",
        '"00"',
        '{"0": 0}',
    ),
]
NO_SIZE = ["[8.5, 8]", "[0, 4]", "[-4, 4]", "[true, 4]", "[4, 4, 4]", "null"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no choice of blocks could be read"),
        ("{", "no choice of blocks could be read"),
        ("[]", "no choice of blocks could be read"),
        ('{"q": {"size": [4]}}', "no choice of blocks could be read"),
        ('{"v": {"size": [4, 4], "index": [[0, 0]]}}', "selects blocks of v, which is not among"),
        ('{"q": {"size": [4, 4], "index": [[0, 2]]}}', "a block outside the 2 x 2 blocks of q"),
        *((f'{{"q": {{"size": [4, 4], "index": {index}}}}}', r"`index` must be \[\[row, column") for index in NO_INDEX),
        *((f'{{"q": {{"size": {size}, "index": [[0, 0]]}}}}', r"`size` must be \[height, width") for size in NO_SIZE),
        ('{"q": {"size": [1000000000, 4], "index": [[0, 0]]}}', "no target matrix has a side longer than 8"),
        (f'{{"q": {{"size": [{10**30}, 4], "index": [[0, 0]]}}}}', "no target matrix has a side longer than 8"),
        ('{"q": {"size": [4, 4], "index": [[0, 1], [0, 1]]}}', r"selects the block \[0, 1\] of q twice"),
        ('{"q": {"size": [4, 4], "index": []}}', "selects no block"),
        ("{}", "selects no block"),
        ('{"q": {"size": [4, 4], "index": []}, "q": {"size": [4, 4], "index": [[0, 0]]}}', "q is there twice"),
        ('{"a":' * 9000 + "1" + "}" * 9000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "blocks.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message):
        read_choice(path, {"q": torch.zeros(8, 8)}, "SMT")
