"""Rows of local files and Hugging Face data sets, each with the place that it came from."""

import csv
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    if path.suffix in READERS:
        rows = list(READERS[path.suffix](require_file(path)))
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


def read_json(path: Path) -> Iterator[Row]:
    """Read a JSON list of objects, or one object per line: many .json files are JSON lines."""
    content = path.read_text(encoding="utf-8")
    if not content.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    for number, value in enumerate(parse_json(content, str(path)), 1):
        yield make_row(f"{path} row {number}", value)


def read_json_lines(path: Path) -> Iterator[Row]:
    """Read one JSON object per line; skip empty lines."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path} line {number}"
            if line.strip():
                yield make_row(where, parse_json(line, where))


def parse_json(content: str, where: str) -> Any:
    """Parse the JSON value in `content`; raise BadInput if it is invalid."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not valid JSON ({error}).") from error


def make_row(where: str, value: Any) -> Row:
    """Return a row; raise BadInput if `value` is not an object."""
    if not isinstance(value, dict):
        raise BadInput(f"{where}: a {type(value).__name__}; give an object with keys.")
    return Row(where, value)


def read_csv(path: Path) -> Iterator[Row]:
    """Read a header line of keys, then one row per line. All values are texts."""
    with path.open(encoding="utf-8-sig", newline="") as lines:  # Excel writes a byte order mark before the first key
        reader = csv.DictReader(lines)
        for values in reader:
            if None in values or None in values.values():  # DictReader's marks of extra and of missing fields
                raise BadInput(
                    f"{path} line {reader.line_num}: more or fewer fields than in the header; quote fields with commas."
                )
            yield Row(f"{path} line {reader.line_num}", values)


def read_parquet(path: Path) -> Iterator[Row]:
    """Read the rows of a Parquet table."""
    table = import_extra("pyarrow.parquet", str(path)).read_table(path)
    for number, value in enumerate(table.to_pylist(), 1):
        yield Row(f"{path} row {number}", value)


def read_hub(name: str, config: str | None) -> Iterator[Row]:
    """Read the rows of a Hugging Face data set, `name` or `name:split`."""
    datasets = import_extra("datasets", name)
    where, _, split = name.partition(":")
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(where, name=config, split=split or "train")
    except (OSError, ValueError) as error:  # no such set, split or configuration; no network
        said = " ".join(str(error).split())
        raise BadInput(
            f"{name} is not a file here, and no data set of this name could be loaded ({said}); check the name."
        ) from error
    for number, value in enumerate(rows, 1):
        yield Row(f"{name} row {number}", value)


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
    if heldout >= len(distinct):
        raise BadInput(f"{name} has {len(distinct)} different rows, too few to hold out {heldout}; lower `heldout`.")
    out = set(distinct[:heldout])
    marked = list(zip(rows, hashes, strict=True))
    return [row for row, mark in marked if mark not in out], [row for row, mark in marked if mark in out]
