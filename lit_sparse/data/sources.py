"""Rows of local files and Hugging Face data sets, each with the place that it came from."""

import codecs
import csv
import hashlib
import importlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.data.rows import BadRow
from lit_sparse.errors import BadInput


@dataclass(frozen=True)
class Row:
    """A row, and its place, such as "train.jsonl line 3"."""

    where: str
    data: dict[str, Any]


@contextmanager
def locate_errors(row: Row) -> Iterator[None]:
    """Turn a BadRow in the block into a BadInput that names the row's file and line."""
    try:
        yield
    except BadRow as error:
        raise BadInput(f"{row.where}: {error}.") from error


def read(name: str, config: str | None = None) -> list[Row]:
    """Read all rows of a file or of a Hugging Face data set.

    Args:
        name: Path of a .json, .jsonl, .csv or .parquet file, or name of a data set with its split, such as
            "openai/gsm8k:test"; without a split, "train".
        config: Configuration of the Hugging Face data set, if it has several.

    Raises:
        BadInput: if the file or data set does not exist, cannot be read, or is empty. The message names file and line.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() in READERS:
        rows = list(READERS[path.suffix.lower()](require_file(path)))
    elif path.exists():
        raise BadInput(f"{path} is not a data file; give one that ends in {', '.join(READERS)}.")
    else:
        rows = list(read_hub(name, config))
    if not rows:
        raise BadInput(f"{name} has no rows; give a file or a split that has some.")
    return rows


def require_file(path: Path) -> Path:
    """Return `path`; raise BadInput if there is no such file."""
    if not path.is_file():
        raise BadInput(f"There is no data file {path} (looked from {Path.cwd()}); check the path.")
    return path


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        BadInput: if there is no such file, or it is in another encoding; the message names the line.
    """
    content = require_file(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"{path} is in UTF-16; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path} line {line}: not UTF-8 (byte {content[error.start]:#x}); save it as UTF-8.") from error


def read_json(path: Path) -> Iterator[Row]:
    """Read a JSON list of objects, or one object per line: many .json files are JSON lines."""
    content = read_text(path)
    if not content.lstrip().startswith("["):
        yield from json_lines(path, content)
        return
    for number, value in enumerate(parse_json(content, str(path)), 1):
        yield make_row(f"{path} row {number}", value)


def read_json_lines(path: Path) -> Iterator[Row]:
    """Read one JSON object per line; skip empty lines."""
    return json_lines(path, read_text(path))


def json_lines(path: Path, content: str) -> Iterator[Row]:
    """Parse one JSON object per line of `content`."""
    # Not str.splitlines, which also splits at characters that may stand in a JSON text.
    for number, line in enumerate(io.StringIO(content, newline=None), 1):
        where = f"{path} line {number}"
        if line.strip():
            yield make_row(where, parse_json(line, where))


def parse_json(content: str, where: str) -> Any:
    """Parse the JSON value in `content`; raise BadInput if it is invalid, or an object has a key twice."""
    try:
        return json.loads(content, object_pairs_hook=lambda pairs: unique(pairs, where))
    except BadInput:  # a ValueError, too
        raise
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python converts
        raise BadInput(f"{where}: not valid JSON ({error}).") from error


def unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """Return a JSON object; raise BadInput if it has a key twice, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadInput(f"{where}: the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice.")
    return found


def make_row(where: str, value: Any) -> Row:
    """Return a row; raise BadInput if `value` is not an object, or a text in it is not Unicode."""
    if not isinstance(value, dict):
        raise BadInput(f"{where}: a {type(value).__name__}; give an object with keys.")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadInput(f"{where}: a text has half of a surrogate pair ({half}), which is no character.") from error
    return Row(where, value)


LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field at most; the csv module's own limit is 131,072."""


def read_csv(path: Path) -> Iterator[Row]:
    """Read a header line of keys, then one row per line. All values are texts."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield from csv_rows(path, reader)
    except csv.Error as error:
        raise BadInput(f"{path} line {reader.line_num}: not valid CSV ({error}).") from error
    finally:
        csv.field_size_limit(before)


def csv_rows(path: Path, reader: Any) -> Iterator[Row]:
    """Make rows of the lines after the header; raise BadInput if one does not fit it."""
    lines = (line for line in reader if line)
    header = next(lines, [])
    if twice := [key for key in header if header.count(key) > 1]:
        raise BadInput(
            f"{path} line {reader.line_num}: the header has {twice[0]!r} twice; give each column its own name."
        )
    for values in lines:
        where = f"{path} line {reader.line_num}"
        if len(values) != len(header):
            raise BadInput(f"{where}: more or fewer fields than in the header; quote fields with commas.")
        if values == header:
            raise BadInput(f"{where}: the header again; remove the line.")
        yield Row(where, dict(zip(header, values, strict=True)))


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet table."""
    parquet, arrow = (import_extra(name, str(path)) for name in ("pyarrow.parquet", "pyarrow"))
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:
        said = " ".join(str(error).split())
        raise BadInput(f"{path} cannot be read as Parquet ({said}); is it complete?") from error
    for number, value in enumerate(rows, 1):
        yield Row(f"{path} row {number}", value)


def read_hub(name: str, config: str | None) -> Iterator[Row]:
    """Read the rows of a Hugging Face data set, `name` or `name:split`."""
    rows: Iterable[dict[str, Any]] = load_hub(name, config, "is not a file here")
    for number, value in enumerate(rows, 1):
        yield Row(f"{name} row {number}", value)


def load_hub(name: str, config: str | None, absent: str, **options: Any) -> Any:
    """Return the split of a Hugging Face data set that `name`, or `name:split`, stands for.

    Args:
        absent: What `name` is not, for the message, such as "is not a file here".
        options: Of `datasets.load_dataset`.

    Raises:
        BadInput: if there is none.
    """
    datasets = import_extra("datasets", name)
    where, _, split = name.partition(":")
    try:
        return datasets.load_dataset(where, name=config, split=split or "train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # none such; no network; unlike files
        said = " ".join(str(error).split())
        raise BadInput(
            f"{name} {absent}, and no data set of this name could be loaded ({said}); check the name, and `config` if "
            "it has several configurations."
        ) from error


def import_extra(module: str, wanted_for: str) -> Any:
    """Import a module of the extra `data`; raise BadInput if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"{wanted_for} is not a local json, jsonl or csv file, and anything else needs the extra `data`; "
            "run `pip install 'lit-sparse[data]'` or check the path."
        ) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def row_digest(row: Row) -> str:
    """Return a hash of the row's content, which depends neither on its place nor on the machine."""
    return hashlib.sha256(json.dumps(row.data, sort_keys=True, default=str).encode()).hexdigest()


def split(rows: list[Row], heldout: int, name: str) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows. Rows with the `heldout` smallest hashes are held out, with all their copies.

    The split depends only on the rows' contents: it is the same in every run, and after reordering. A copy of a
    held-out row in training would leak it.

    Raises:
        BadInput: if no row is left to train on.
    """
    hashes = [row_digest(row) for row in rows]
    distinct = sorted(set(hashes))
    out = set(distinct[: heldout_count(heldout, len(distinct), f"{name} has", "different rows")])
    marked = list(zip(rows, hashes, strict=True))
    return [row for row, mark in marked if mark not in out], [row for row, mark in marked if mark in out]


def heldout_count(asked: int, there: int, name: str, what: str) -> int:
    """Return how many of the `there` rows are held out: those `asked` for, or a quarter if that were all.

    It is printed if most rows are.

    Args:
        name: Beginning of the message, such as "rows.jsonl has".
        what: What is counted, such as "different rows".

    Raises:
        BadInput: if one row is all there is.
    """
    if asked and there < 2:
        raise BadInput(f"{name} {there} {what}, too few to hold out {asked}; set `heldout` to 0.")
    kept = asked if asked < there else max(1, there // 4)
    if kept < asked:
        rank_zero_info(f"{name} {there} {what}, too few to hold out {asked}: {kept} are held out.")
    elif 2 * kept > there:
        rank_zero_info(f"{name} {there} {what}, of which {kept} are held out; lower `heldout` to train on more.")
    return kept
