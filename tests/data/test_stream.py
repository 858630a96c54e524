"""Streams of text: none of it is lost on any layout of ranks and workers, and a stream goes on where it stopped."""

from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import lightning as L
import pytest
import torch

from lit_sparse.data import Text
from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Encoder
from lit_sparse.data.pieces import PIECE_BYTES, HubPieces, LocalPieces, cut_file
from lit_sparse.data.stream import Rows, StreamLoader
from lit_sparse.errors import BadInput

TEXTS = [f"text {number}: " + "the cat sat on the mat. " * (number % 5) for number in range(23)]
ROWS = 4  # of a step


def loader(encoder: Encoder, rank: int = 0, world: int = 1, workers: int = 0, seed: int | None = 0, size: int = 16):
    batch = ROWS // world
    lanes = range(rank * batch, (rank + 1) * batch)
    return StreamLoader(Rows(LocalPieces(TEXTS, seed), encoder, size, lanes, ROWS), Padded(Padding()), workers)


def steps(made: StreamLoader, count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in islice(made, count)]


def texts(encoder: Encoder, rows: list[list[int]]) -> list[str]:
    """The documents that a lane's rows have whole."""
    end, tokens = encoder.text_end, [token for row in rows for token in row]
    ends = [place for place, token in enumerate(tokens) if token == end]
    begins = [0, *(place + 1 for place in ends)]
    return [str(encoder.tokenizer.decode(tokens[a:b])) for a, b in zip(begins, ends, strict=False)]


@pytest.fixture
def encoder(chat_tokenizer) -> Encoder:
    return Encoder(chat_tokenizer)


def test_every_text_comes_once_a_pass_in_full(encoder):
    batches = steps(loader(encoder), 60)
    seen = Counter(text for lane in range(ROWS) for text in texts(encoder, [batch[lane] for batch in batches]))
    assert set(seen) == set(TEXTS)
    assert min(seen.values()) >= 2  # several passes, and no text far ahead of another
    assert max(seen.values()) - min(seen.values()) <= 2
    assert all(len(row) == 16 for batch in batches for row in batch)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 0), (1, 3)])
def test_a_steps_rows_are_the_same_on_any_layout(encoder, world, workers):
    wanted = steps(loader(encoder), 9)
    parts = [steps(loader(encoder, rank, world, workers), 9) for rank in range(world)]
    assert [[row for part in parts for row in part[step]] for step in range(9)] == wanted


def test_seeds_and_passes_have_orders_of_their_own(encoder):
    assert steps(loader(encoder, seed=1), 3) != steps(loader(encoder), 3)
    pieces = LocalPieces(TEXTS, 0)
    first, second = ([load().text for load in pieces.of_pass(number, 0)] for number in (0, 1))
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert first != second
    assert [load().text for load in LocalPieces(TEXTS, None).of_pass(3, 0)] == TEXTS


@pytest.mark.parametrize(("stop", "workers", "later"), [(1, 0, 0), (7, 0, 2), (31, 2, 0)])
def test_it_goes_on_where_it_stopped_with_other_workers_too(encoder, stop, workers, later):
    wanted = steps(loader(encoder), stop + 5)[stop:]
    first = loader(encoder, workers=workers)
    steps(first, stop)
    second = loader(encoder, workers=later)
    second.load_state_dict(first.state_dict())
    assert steps(second, 5) == wanted


def test_it_goes_on_on_other_ranks(encoder):
    straight = loader(encoder)
    wanted = steps(straight, 12)[6:]
    first = loader(encoder)
    steps(first, 6)
    state = first.state_dict()
    halves = [loader(encoder, rank, 2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    parts = [steps(half, 6) for half in halves]
    assert [parts[0][n] + parts[1][n] for n in range(6)] == wanted


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": 17}])
def test_another_text_seed_or_length_is_refused(encoder, change):
    state = loader(encoder).state_dict()
    with pytest.raises(BadInput, match="was written with other text, another tokenizer, length or seed"):
        loader(encoder, **change).load_state_dict(state)


def test_held_out_pieces_are_in_no_pass(encoder):
    pieces = LocalPieces(TEXTS, 0, held=5)
    out = list(islice(pieces.held_out(), 5))
    left = [load().text for load in pieces.of_pass(0, 0)]
    assert sorted(out + left) == sorted(TEXTS)
    assert list(islice(LocalPieces(TEXTS, 7).held_out(), 5)) == out  # whatever the seed


# ---- files


@pytest.mark.parametrize("lines", [["a\n"] * 30_000, ["é" * 40_000 + "\n", "b\n" * 9, "ü" * 30_000], ["x" * 100]])
def test_the_cuts_of_a_file_are_whole_lines_or_parts_of_long_ones_and_all_of_them(tmp_path, lines):
    path = tmp_path / "one.txt"
    path.write_text("".join(lines), encoding="utf-8")
    pieces = [cut.read() for cut in cut_file(path)]
    assert "".join(piece.text for piece in pieces) == "".join(lines)
    full = [piece for piece in pieces if piece.text]
    assert [piece.ends for piece in full] == [False] * (len(full) - 1) + [True]
    assert max(len(piece.text.encode()) for piece in full) < 2 * PIECE_BYTES
    if max(map(len, lines)) < PIECE_BYTES:
        assert all(piece.text.endswith("\n") for piece in full[:-1])


def test_words_of_a_long_line_stay_whole(tmp_path):
    words = " ".join(f"word{number}" for number in range(9000))
    (tmp_path / "a.txt").write_text(words)
    pieces = [cut.read().text for cut in cut_file(tmp_path / "a.txt")]
    assert len(pieces) > 4
    assert [word for piece in pieces for word in piece.split()] == words.split()


def test_text_without_line_breaks_fills_all_rows_and_is_held_out(tmp_path, chat_tokenizer):
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 9000)
    data = stream(tmp_path / "a.txt", chat_tokenizer)
    data.prepare_data()
    data.setup("fit")
    end = data.encoder.text_end
    assert all(row.input_ids.count(end) <= 1 for row in data.examples["heldout"])
    (batch,) = steps(data.train_dataloader(), 1)
    assert all(row.count(end) == 0 for row in batch)


def test_blank_text_ends_in_a_sentence(encoder):
    rows = Rows(LocalPieces([" ", "\n"], 0), encoder, 16, range(2), 2)
    with pytest.raises(BadInput, match="found nothing but blank text in 20 passes; give more text"):
        next(iter(rows))


def test_a_refusal_of_a_worker_is_its_sentence_alone(tmp_path, encoder):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n" * 9)
    rows = Rows(LocalPieces(cut_file(tmp_path / "a.txt"), 0), encoder, 16, range(2), 2)
    with pytest.raises(BadInput, match=r"^/.*a\.txt is not UTF-8 .*; save it as UTF-8\.$"):
        next(iter(StreamLoader(rows, Padded(Padding()), 2)))


def test_a_document_ends_once_however_many_pieces_it_has(tmp_path, encoder):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * (3 * PIECE_BYTES // 23))
    pieces = LocalPieces(cut_file(tmp_path / "a.txt"), None)
    rows = Rows(pieces, encoder, 64, range(1), 1)
    tokens = [rows._tokens(load())[0] for load in pieces.of_pass(0, 0)]
    assert sum(one.count(encoder.text_end) for one in tokens) == 1


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BadInput, match=r"a\.txt is not UTF-8 .*; save it as UTF-8"):
        cut_file(tmp_path / "a.txt")[0].read()


# ---- a data set as the Hub has them


@pytest.fixture(params=[1, 2])
def hub(request, monkeypatch):
    """A data set of as many shards as the parameter says."""
    parts = [TEXTS[number :: request.param] for number in range(request.param)]
    rows = datasets.IterableDataset.from_generator(
        lambda parts: ({"text": text, "id": 1} for part in parts for text in part), gen_kwargs={"parts": parts}
    )
    assert rows.num_shards == request.param
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_data_set_are_all_read_and_go_on(hub, encoder, workers):
    def made(workers: int = 0) -> StreamLoader:
        rows = Rows(HubPieces("a/b", None, 0), encoder, 16, range(ROWS), ROWS)
        return StreamLoader(rows, Padded(Padding()), workers)

    straight = steps(made(), 40)
    seen = {text for lane in range(ROWS) for text in texts(encoder, [batch[lane] for batch in straight])}
    assert seen == set(TEXTS)
    first, second = made(workers), made(workers)
    steps(first, 30)
    second.load_state_dict(first.state_dict())
    assert steps(second, 10) == straight[30:]


def test_a_pass_of_a_data_set_has_an_order_of_its_own_without_what_is_held_out(hub):
    out = list(islice(HubPieces("a/b", None, 0).held_out(), 2))
    first, second = ([load().text for load in HubPieces("a/b", None, 0, held=2).of_pass(n, 0)] for n in (0, 1))
    assert sorted(first) == sorted(second) == sorted(set(TEXTS) - set(out))
    assert first != second
    assert [load().text for load in HubPieces("a/b", None, 0, held=2).of_pass(1, 7)] == second[7:]


def test_rows_without_a_text_and_data_sets_that_are_not_there_are_refused(monkeypatch):
    rows = datasets.IterableDataset.from_generator(lambda: ({"words": "a"} for _ in range(2)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    with pytest.raises(BadInput, match=r"The rows of a/b have words and no `text`; give"):
        next(HubPieces("a/b", None, 0).of_pass(0, 0))()

    def absent(*args, **options):
        raise ValueError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(BadInput, match=r"a/b is no file or folder here, .*\(no such thing\); check the name"):
        next(HubPieces("a/b", None, 0).of_pass(0, 0))


# ---- the data module


def stream(folder: Path, tokenizer, **options) -> Text:
    return Text(
        **{"train": str(folder), "stream": True, "tokenizer": tokenizer, "max_length": 16, "heldout": 3, **options}
    )


def test_a_folder_is_streamed_without_its_held_out_blocks(tmp_path, chat_tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "below").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / ("below" if number % 2 else "") / f"{number}.txt").write_text(text)
    data = stream(tmp_path / "in", chat_tokenizer)
    data.prepare_data()
    data.setup("fit")
    assert data.val_names == ["heldout"]
    assert len(data.examples["heldout"]) == 3
    out = "".join(chat_tokenizer.decode(one.input_ids) for one in data.examples["heldout"])
    first = TEXTS[int(out.split("text ")[1].split(":")[0])]
    batches = steps(data.train_dataloader(), 80)
    seen = {text for lane in range(4) for text in texts(data.encoder, [batch[lane] for batch in batches])}
    assert first not in seen
    assert len(seen) == len(TEXTS) - data._held_pieces


def test_a_stream_needs_a_number_of_steps(tmp_path, chat_tokenizer):
    (tmp_path / "a.txt").write_text(TEXTS[3] * 20)
    data = stream(tmp_path / "a.txt", chat_tokenizer)
    data.trainer = L.Trainer(logger=False, enable_checkpointing=False, max_epochs=1, accelerator="cpu")
    data.prepare_data()
    with pytest.raises(BadInput, match=r"data\.stream has no end; set trainer\.max_steps"):
        data.setup("fit")
    data.trainer = L.Trainer(
        logger=False, enable_checkpointing=False, max_steps=1, accelerator="cpu", reload_dataloaders_every_n_epochs=1
    )
    with pytest.raises(BadInput, match="reload_dataloaders_every_n_epochs would begin it again; leave that out"):
        data.setup("fit")
    with pytest.raises(BadInput, match=r"data\.train names a/b among 2 sources; give it alone"):
        stream(tmp_path, chat_tokenizer, train=[str(tmp_path / "a.txt"), "a/b"]).setup("fit")
    with pytest.raises(BadInput, match="`stream` fills every row already; set `packing` to false"):
        stream(tmp_path / "a.txt", chat_tokenizer, packing=True)


def test_a_block_of_one_token_is_refused(tmp_path, chat_tokenizer):
    with pytest.raises(BadInput, match="`max_length` is 1; it must be 2 or more"):
        Text(str(tmp_path / "a.txt"), tokenizer=chat_tokenizer, max_length=1)


def test_rows_begin_with_the_begin_token(tmp_path, plain_tokenizer):
    encoder = Encoder(plain_tokenizer)
    begin = plain_tokenizer.get_vocab()["<s>"]
    for batch in islice(loader(encoder), 8):
        assert all(row[0] == begin for row in batch["input_ids"].tolist())
        marks = batch["input_ids"] == begin
        assert torch.equal(batch["labels"] == -100, marks)
