"""Flat arrays, overlong and invalid rows, and the cache of tokenised rows."""

import numpy as np
import pytest

from lit_sparse.data import examples as module
from lit_sparse.data.encoding import Encoder, Example
from lit_sparse.data.examples import Examples, encode, tokenise_cached
from lit_sparse.data.sources import Row
from lit_sparse.errors import BadInput

THREE = [Example([1, 2, 3], [-100, 2, 3]), Example([4, 5], [4, 5]), Example([6], [6])]


def rows(*texts: str) -> list[Row]:
    return [Row(f"data.jsonl line {index}", {"text": text}) for index, text in enumerate(texts, 1)]


def test_arrays_give_back_the_examples(tmp_path):
    Examples.of(THREE, dropped=7).save(tmp_path / "a.npz")
    for found in (Examples.of(THREE), Examples.load(tmp_path / "a.npz")):
        assert [found[index] for index in range(len(found))] == THREE
        assert found.lengths == [3, 2, 1]
    assert found.dropped == 7


@pytest.mark.parametrize(("begin", "end"), [(0, 2), (1, 3), (2, 3), (0, 3)])
def test_take(begin, end):
    part = Examples.of(THREE).take(begin, end)
    assert [part[index] for index in range(len(part))] == THREE[begin:end]


def test_overlong_rows_are_dropped_and_counted(chat_tokenizer):
    found = encode(rows("the cat", "the cat " * 50, "the mat"), Encoder(chat_tokenizer), 16, "drop")
    assert len(found) == 2
    assert found.dropped == 1
    assert max(found.lengths) <= 16


def test_overlong_rows_are_truncated(chat_tokenizer):
    encoder = Encoder(chat_tokenizer)
    found = encode(rows("the cat", "the cat " * 50), encoder, 16, "truncate")
    assert found.lengths[1] == 16
    assert found.dropped == 0
    assert encoder.encode_text("the cat " * 50)[:16] == found[1].input_ids


def test_truncated_rows_without_an_answer_are_dropped(chat_tokenizer):
    long = Row("", {"prompt": "the cat " * 50, "completion": "yes"})
    found = encode([long, *rows("the cat")], Encoder(chat_tokenizer), 16, "truncate")
    assert len(found) == 1
    assert found.dropped == 1


def test_nothing_left_is_an_error(chat_tokenizer):
    with pytest.raises(BadInput, match="None of 2 rows fits into max_length=2"):
        encode(rows("the cat sat", "on the mat"), Encoder(chat_tokenizer), 2, "drop")


def test_bad_row_is_named(chat_tokenizer):
    with pytest.raises(BadInput, match=r"data\.jsonl line 2: `text` is empty\."):
        encode(rows("the cat", " "), Encoder(chat_tokenizer), 16, "drop")


def test_cache_is_read_and_depends_on_everything_that_matters(chat_tokenizer, monkeypatch):
    data, encoder = rows("the cat", "the cat sat on the mat"), Encoder(chat_tokenizer)
    first = tokenise_cached(data, encoder, 16, "drop")
    made = []
    monkeypatch.setattr(module, "encode", lambda *args: made.append(args) or first)
    again = tokenise_cached(data, encoder, 16, "drop")
    assert not made
    np.testing.assert_array_equal(again.ids, first.ids)
    tokenise_cached(list(reversed(data)), encoder, 16, "drop")
    tokenise_cached(data, encoder, 15, "drop")
    tokenise_cached(data, encoder, 16, "truncate")
    tokenise_cached(data, Encoder(chat_tokenizer, "plain"), 16, "drop")
    tokenise_cached(rows("the cat", "the cat sat on the hat"), encoder, 16, "drop")
    assert len(made) == 5


def test_cache_that_cannot_be_written_is_one_sentence(chat_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BadInput, match="point LIT_SPARSE_CACHE elsewhere"):
        tokenise_cached(rows("the cat"), Encoder(chat_tokenizer), 16, "drop")


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        Examples.of(THREE).save(tmp_path / "tokens" / "a.npz")
    assert not list((tmp_path / "tokens").iterdir())


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-90]),
    "flipped": flipped,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_named_and_made_again(chat_tokenizer, tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path))
    given = rows("the cat", "on the mat")
    made = tokenise_cached(given, Encoder(chat_tokenizer), 16, "drop")
    (path,) = tmp_path.glob("tokens/*.npz")
    whole = path.read_bytes()
    damage(path)
    again = tokenise_cached(given, Encoder(chat_tokenizer), 16, "drop")
    assert [again[n] for n in range(2)] == [made[n] for n in range(2)]
    assert path.read_bytes() == whole
    assert f"{path} is damaged" in caplog.text


def test_a_cache_of_before_which_has_no_hash_is_read(chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "sign", lambda path: None)
    made = tokenise_cached(rows("the cat"), Encoder(chat_tokenizer), 16, "drop")
    monkeypatch.setattr(module, "encode", lambda *args: pytest.fail("it was made again"))
    assert tokenise_cached(rows("the cat"), Encoder(chat_tokenizer), 16, "drop")[0] == made[0]
