"""Plain text, for pre-training from scratch or continued: cut into blocks before, or as training goes on."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerFast

from lit_sparse import demo
from lit_sparse.data.collate import Padded
from lit_sparse.data.encoding import Encoder, Example, load_tokenizer
from lit_sparse.data.examples import Examples, load_or_make
from lit_sparse.data.loader import Loader
from lit_sparse.data.module import HELDOUT, TRAIN, TokenData, rank_and_world, require_at_least
from lit_sparse.data.pieces import Cut, HubPieces, LocalPieces, Pieces, cut_file
from lit_sparse.data.rows import IGNORED
from lit_sparse.data.sources import READERS, Row, heldout_count, read, read_text, row_digest
from lit_sparse.data.stream import Rows, StreamLoader, without_marks
from lit_sparse.data.vocabulary import trained_vocabulary
from lit_sparse.errors import BadInput

EMBEDDED = "embedded"
"""Name of the demo data's prose."""

TEXTS = (".txt", ".text", ".md", ".rst")
"""Endings of the files that are read in a folder."""

PIECE_CHARACTERS = 1 << 20
"""Characters tokenised at once, up to the next line break. A tokenizer takes many times the memory of its text."""


class Text(TokenData):
    """Data module of plain text, cut into blocks of `max_length` tokens. The loss is on every token.

    Args:
        train: What to train on, or several: a text file; a folder, whose .txt, .md and .rst files are read, also in
            folders below; a .jsonl, .csv or .parquet file, or a Hugging Face name, with a `text` in each row; or
            `embedded`, 5 MB of English prose out of the demo data. Each document ends with the end token, and a block
            may continue into the next one. Documents and blocks begin with the begin token, if the tokenizer adds one.
        validation: The same for validation. Without it, blocks of the training text are held out: the last ones, of
            a stream the first of an order that is drawn once.
        heldout: Number of held-out blocks.
        vocabulary: In place of the base's tokenizer, train one of so many tokens on the training text (byte-level BPE),
            or take that of a folder or Hugging Face name; for a bare config.json. It is kept with the run and exported.
        stream: Tokenise as training goes on, without end: for text that is large, or on the Hub. It needs
            trainer.max_steps. With false, all text is tokenised before, and an epoch has every block once.
        config: Configuration of the Hugging Face data sets.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        heldout: int = 64,
        vocabulary: int | str | None = None,
        stream: bool = False,
        config: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        require_at_least(0, heldout=heldout)
        require_at_least(2, max_length=self.max_length)  # the first token of a block is not predicted
        self.train, self.validation, self.heldout = train, validation, heldout
        self.vocabulary, self.stream, self.config = vocabulary, stream, config
        self.val_names = [HELDOUT] if heldout or validation else []
        if stream and self.packing:
            raise BadInput("`stream` fills every row already; set `packing` to false.")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer, or the one that `vocabulary` asks for."""
        if isinstance(self.vocabulary, str):
            return load_tokenizer(self.vocabulary)
        if self.vocabulary is not None:
            return trained_vocabulary(self._texts(), self.vocabulary)
        if isinstance(self.tokenizer_name, str) and self.tokenizer_name.endswith(".json"):
            raise BadInput(
                f"{self.tokenizer_name} is a bare configuration without a tokenizer; set data.vocabulary to a number "
                "of tokens, to train one on the text, or to a folder or name that has one."
            )
        return load_tokenizer(self.tokenizer_name)

    def _texts(self) -> Iterator[str]:
        """Yield the training text, a file, row or piece at a time."""
        if self.stream:
            yield from self._pieces(0).held_out()
        else:
            yield from (row.data["text"] for row in self.rows[TRAIN])

    def read_rows(self) -> dict[str, list[Row]]:
        """Return one row per file or row of data; of a stream, those for validation only."""
        rows = {} if self.stream else {TRAIN: read_texts(self.train, self.config)}
        return rows | {HELDOUT: read_texts(self.validation, self.config)} if self.validation is not None else rows

    def setup(self, stage: str) -> None:
        """Load the blocks from the cache.

        Raises:
            BadInput: if a stream is to be fitted without a number of steps, or begun again in each epoch.
        """
        if self.stream and stage == "fit" and self.trainer is not None:
            self._check_stream(self.trainer)
        super().setup(stage)

    @staticmethod
    def _check_stream(trainer: L.Trainer) -> None:
        if trainer.max_steps == -1:
            raise BadInput("data.stream has no end; set trainer.max_steps to the number of optimizer steps to train.")
        if trainer.reload_dataloaders_every_n_epochs:  # pyright: ignore[reportAttributeAccessIssue]
            raise BadInput(
                "data.stream goes on from epoch to epoch, but trainer.reload_dataloaders_every_n_epochs would begin it "
                "again; leave that out."
            )

    def tokenise(self) -> dict[str, Examples]:
        """Return the blocks of the training text, unless that is a stream, and of the held-out text."""
        sets = {name: self._blocks(rows) for name, rows in self.rows.items()}
        if self.validation is not None or not self.heldout:
            return sets
        if self.stream:
            return {HELDOUT: self._held_blocks}
        blocks = sets[TRAIN]
        what = f"block{'s' * (len(blocks) != 1)} of {self.max_length} tokens"
        cut = len(blocks) - heldout_count(self.heldout, len(blocks), "The text makes", what)
        return {TRAIN: blocks.take(0, cut), HELDOUT: blocks.take(cut, len(blocks))}

    def _blocks(self, rows: list[Row]) -> Examples:
        texts = [hashlib.sha256(row.data["text"].encode()).hexdigest() for row in rows]
        settings = ["blocks", self.encoder.fingerprint(), self.max_length, texts]
        return load_or_make(settings, lambda: cut_blocks(rows, self.encoder, self.max_length), len(rows))

    # ---- a stream

    def train_dataloader(self) -> Loader | StreamLoader:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return training batches; checkpoints hold their position."""
        if not self.stream:
            return super().train_dataloader()
        rank, world = rank_and_world(self.trainer)
        lanes = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        rows = Rows(self._pieces(self._held_pieces), self.encoder, self.max_length, lanes, self.batch_size * world)
        return StreamLoader(rows, Padded(self.padding), self.num_workers)

    def extremes(self) -> list[tuple[str, int, int]]:
        """Return what the base class does; of a stream, whose rows are not known yet, what they may have."""
        if not self.stream:
            return super().extremes()
        own = set(self.tokenizer.get_vocab().values()) - self.encoder.added  # T5 has 100 added ones that no text has
        return [*super().extremes(), (TRAIN, max(own | {self.encoder.text_end}), self.max_length)]

    def _pieces(self, held: int) -> Pieces:
        """Return where the training text comes from, but for its first `held` pieces."""
        seed = self.seed if self.shuffle else None
        names = [self.train] if isinstance(self.train, str) else self.train
        if on_hub := [name for name in names if is_hub_name(name)]:
            if len(names) > 1:
                raise BadInput(
                    f"data.stream reads a Hugging Face data set by itself, but data.train names {on_hub[0]} among "
                    f"{len(names)} sources; give it alone, or set data.stream to false."
                )
            return HubPieces(names[0], self.config, seed, held)
        return LocalPieces([piece for name in names for piece in cut_source(name)], seed, held)

    @cached_property
    def _held_pieces(self) -> int:
        return 0 if self.validation is not None or not self.heldout else self._held[1]

    @property
    def _held_blocks(self) -> Examples:
        return self._held[0]

    @cached_property
    def _held(self) -> tuple[Examples, int]:
        """The held-out blocks of a stream, and the pieces that they were cut from: at most a quarter of those here."""
        rows: list[Row] = []
        pieces, tokens, read = self._pieces(0), 0, 0
        most = max(1, len(pieces.pieces) // 4) if isinstance(pieces, LocalPieces) else None
        for read, text in enumerate(islice(pieces.held_out(), most), 1):
            if not text.strip():
                continue
            rows.append(Row(f"piece {read}", {"text": text}))
            tokens += len(self.encoder.encode_text(text)) + 1
            if tokens >= self.heldout * self.max_length:
                break
        blocks = cut_blocks(rows, self.encoder, self.max_length)
        return blocks.take(0, min(self.heldout, len(blocks))), read


def is_hub_name(name: str) -> bool:
    """Return whether a source is neither the embedded text nor a file or folder, and is looked for on the Hub."""
    there = Path(name).expanduser().exists() or Path(name).suffix.lower() in (*TEXTS, *READERS)
    return name != EMBEDDED and not there


def cut_source(name: str) -> Sequence[Cut | str]:
    """Return the pieces of a source that is here: of text files without reading them, else one for each row.

    Raises:
        BadInput: if it has no text.
    """
    path = Path(name).expanduser()
    if name != EMBEDDED and path.suffix.lower() not in READERS and not is_hub_name(name):
        files = text_files(path) if path.is_dir() else [path]
        if not path.exists():
            read_text(path)  # which says so
        if pieces := [cut for file in files for cut in cut_file(file)]:
            return pieces
        raise BadInput(f"The text file {path} is empty; give one that has text.")
    return [row.data["text"] for row in read_source(name)]


def read_texts(names: str | list[str], config: str | None = None) -> list[Row]:
    """Read text sources into rows with a `text`; raise BadInput if one is missing or has none."""
    return [row for name in ([names] if isinstance(names, str) else names) for row in read_source(name, config)]


def read_source(name: str, config: str | None = None) -> list[Row]:
    """Read a source of text: a file, a folder, rows of data with a `text`, or `embedded`.

    Args:
        config: Configuration of a Hugging Face data set, if it has several.

    Raises:
        BadInput: if it is missing, or has no text.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED:
        return embedded_text()
    if path.is_dir():
        return [row for file in text_files(path) for row in read_file(file)]
    if path.suffix.lower() in READERS or is_hub_name(name):
        rows = read(name, config)
        for row in rows:
            if not isinstance(row.data.get("text"), str):
                raise BadInput(f"{row.where} has {', '.join(row.data)} and no `text`; give rows with a text.")
        return [row for row in rows if row.data["text"].strip()]
    found = read_file(path)
    if not found:
        raise BadInput(f"The text file {name} is empty; give one that has text.")
    return found


def read_file(path: Path) -> list[Row]:
    """Read a text file into one row, or none if it is empty."""
    content = read_text(path)
    return [Row(str(path), {"text": content})] if content.strip() else []


def text_files(folder: Path) -> list[Path]:
    """Return the text files in a folder and those below it, sorted.

    Raises:
        BadInput: if there is none with text in it.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TEXTS and path.is_file())
    if not any(path.stat().st_size for path in found):
        told = "those that end so are empty" if found else "there is none in it or below it"
        raise BadInput(f"The folder {folder} has no text: files that end in {', '.join(TEXTS)} are read, and {told}.")
    return found


def embedded_text() -> list[Row]:
    """Return the prose of the demo data in a fixed, mixed order: passages of novels, and how-to articles and captions.

    They are LAMBADA's passages, and HellaSwag's contexts, each with its right ending.
    """
    novels = read(str(demo.dataset_file("text")))
    articles = read(str(demo.dataset_file("hellaswag")))
    endings = [f"{row.data['question']} {row.data['choices'][row.data['label']]}" for row in articles]
    rows = novels + [Row(row.where, {"text": text}) for row, text in zip(articles, endings, strict=True)]
    return sorted(rows, key=row_digest)


# ---- blocks


def cut_blocks(rows: list[Row], encoder: Encoder, size: int) -> Examples:
    """Join all texts into one stream of tokens, and cut it into blocks of `size` tokens.

    If the tokenizer adds a begin token to a text, every text and every block begins with one, which is not learnt: some
    models (Gemma) are far worse without. A last block of one token is dropped: it has nothing to predict.
    """
    begin = encoder.encode_text(encoder.begin)
    ids: list[int] = []
    labels: list[int] = []
    for row in rows:
        text = without_marks(row.data["text"], encoder)
        tokens = [token for piece in split_pieces(text) for token in encoder.encode_text(piece)] + [encoder.text_end]
        lead = begin if ids[-1:] != begin else []  # a token that ends a text may also begin one
        ids += lead + tokens
        labels += [IGNORED] * len(lead) + tokens
    blocks, start = [], 0
    while start < len(ids):
        lead = begin if ids[start : start + 1] != begin else []
        stop = start + max(1, size - len(lead))
        blocks.append(Example(lead + ids[start:stop], [IGNORED] * len(lead) + labels[start:stop]))
        start = stop
    return Examples.of([block for block in blocks if len(block.input_ids) > 1])


def split_pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of about `PIECE_CHARACTERS` characters, each of whole lines."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + PIECE_CHARACTERS) + 1 or len(text)  # find gives -1 without a further line break
        yield text[begin:end]
        begin = end
