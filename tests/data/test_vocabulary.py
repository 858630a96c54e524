"""A tokenizer trained on the text: nothing is unknown to it, and it is made once."""

import pytest

from lit_sparse.data import Text, vocabulary
from lit_sparse.data.vocabulary import END, trained_vocabulary
from lit_sparse.demo import cache_folder
from lit_sparse.errors import BadInput

TEXTS = ["the cat sat on the mat and the answer is on the mat\n" * 20, "Ünïcode — too. 1 + 1 = 2"]


def test_it_gives_back_what_it_reads_and_has_the_size_asked_for():
    tokenizer = trained_vocabulary(TEXTS, 270)
    assert len(tokenizer) == 270
    assert tokenizer.get_vocab()[END] == 0 == tokenizer.eos_token_id == tokenizer.pad_token_id
    for text in (*TEXTS, "quite 不同 text\t\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the mat")["input_ids"]) < 4


def test_it_is_trained_once_for_a_text_and_a_size(monkeypatch):
    made = []
    plain = vocabulary.train
    monkeypatch.setattr(vocabulary, "train", lambda texts, size: made.append(size) or plain(texts, size))
    first, again = trained_vocabulary(TEXTS, 270), trained_vocabulary(iter(TEXTS), 270)
    assert made == [270]
    assert first.get_vocab() == again.get_vocab()
    trained_vocabulary(TEXTS, 265)
    trained_vocabulary(TEXTS[:1], 270)
    assert made == [270, 265, 270]


def test_a_damaged_one_is_made_again():
    before = trained_vocabulary(TEXTS, 270).get_vocab()
    (found,) = cache_folder().glob("vocabularies/*/tokenizer.json")
    for text in (found.read_text().replace("mat", "cat"), "{", ""):
        found.write_text(text)
        assert trained_vocabulary(TEXTS, 270).get_vocab() == before
    found.unlink()
    assert trained_vocabulary(TEXTS, 270).get_vocab() == before


def test_it_learns_from_the_beginning_of_a_large_text_only(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHARACTERS", 100)
    assert trained_vocabulary(TEXTS, 400).get_vocab() == trained_vocabulary([TEXTS[0][:100]], 400).get_vocab()


def test_a_size_without_room_for_the_bytes_is_refused():
    with pytest.raises(BadInput, match=r"`vocabulary` is 100; a byte-level one has 257 tokens at least"):
        trained_vocabulary(TEXTS, 100)


def test_data_take_it_in_place_of_the_bases(tmp_path, chat_tokenizer):
    (tmp_path / "a.txt").write_text(TEXTS[0] * 4)
    options = {"heldout": 2, "max_length": 8}
    data = Text(str(tmp_path / "a.txt"), tokenizer="models/llama-3m.json", vocabulary=262, **options)
    data.prepare_data()
    data.setup("fit")
    assert len(data.tokenizer) == 262
    chat_tokenizer.save_pretrained(tmp_path / "other")
    named = Text(str(tmp_path / "a.txt"), tokenizer="unused", vocabulary=str(tmp_path / "other"), **options)
    assert named.tokenizer.get_vocab() == chat_tokenizer.get_vocab()
    with pytest.raises(
        BadInput, match=r"llama-3m\.json is a bare configuration without a tokenizer; set data\.vocabulary"
    ):
        _ = Text(str(tmp_path / "a.txt"), tokenizer="models/llama-3m.json", **options).tokenizer
