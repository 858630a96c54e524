"""Odd input: YAML, rows and headers of deltas, which a sentence refuses or which are taken; no traceback, no hang."""

from __future__ import annotations

import json
import random
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lit_sparse.commands.configs import read_document
from lit_sparse.data.rows import BadRow, parse
from lit_sparse.data.sources import locate_errors, read
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import FORMAT, Delta, checksum
from lit_sparse.export.seedlog import FORMAT as SEEDLOG
from lit_sparse.export.seedlog import SeedLog
from lit_sparse_profiling.record import RunRecord
from tests.faults.fits import Found
from tests.fuzz import UNHURRIED

SECONDS = 20
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\x1b[2J", "a.B"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "prompt",
        "completion",
        "messages",
        "role",
        "content",
        "text",
        "question",
        "choices",
        "label",
        "input_ids",
        "labels",
    ]
)
ROWS = st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=4)
SECTIONS = st.sampled_from(["model", "data", "trainer", "profile", "task", "run"])
HEADERS = st.dictionaries(
    st.sampled_from(["version", "base", "base_fingerprint", "updates", "block_sizes", "dtype"]), VALUES, max_size=6
)
DTYPES = (torch.float32, torch.int32, torch.float64, torch.bool, torch.complex64, torch.bfloat16, torch.int64)


@contextmanager
def in_time() -> Iterator[None]:
    """Raise TimeoutError where the block takes longer than SECONDS."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def yaml_file(draw: st.DataObject, folder: Path) -> object:
    """Read a YAML of odd sections, or of any text."""
    text = draw.draw(st.text(max_size=60) | st.dictionaries(SECTIONS, VALUES, max_size=3).map(json.dumps))
    path = folder / "odd.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read_document(str(path))


def rows(draw: st.DataObject, folder: Path) -> object:
    """Read rows of odd values, in any format, or cut off, and parse them."""
    suffix = draw.draw(st.sampled_from([".jsonl", ".json", ".csv"]))
    content = "\n".join(json.dumps(row) for row in draw.draw(st.lists(ROWS, min_size=1, max_size=3))).encode()
    content = draw.draw(st.sampled_from([content, content[: len(content) // 2]]) | st.binary(max_size=60))
    path = folder / f"odd{suffix}"
    path.write_bytes(content)
    found = []
    for row in read(str(path)):
        with locate_errors(row):
            found.append(parse(row.data))
    return found


def parquet(draw: st.DataObject, folder: Path) -> object:
    """Read a Parquet table with bytes that are not its own."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 20, "n": list(range(40))}), path)
    data = bytearray(path.read_bytes())
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    path.write_bytes(data[: draw.draw(st.sampled_from([len(data), len(data), len(data) // 2]))])
    return read(str(path))


def delta(draw: st.DataObject, folder: Path) -> object:
    """Load a delta or a seed log with an odd header and odd tensors, signed as a forger signs it."""
    header, form = draw.draw(HEADERS), draw.draw(st.sampled_from([FORMAT, SEEDLOG]))
    whole = {"version": 1, "base": "b", "base_fingerprint": "0", "updates": []}
    header = {**whole, **({"block_sizes": {}} if form == FORMAT else {"dtype": "float32"}), **header}
    names = draw.draw(
        st.lists(st.sampled_from(["index/a", "values/a", "whole/b", "log", "x"]), max_size=3, unique=True)
    )
    tensors = {
        name: torch.zeros(draw.draw(st.lists(st.integers(0, 3), max_size=3)), dtype=draw.draw(st.sampled_from(DTYPES)))
        for name in names
    }
    header = json.loads(json.dumps(header))
    signed = header | {
        "sha256": checksum(header, tensors if form == FORMAT else {"log": tensors.get("log", torch.ones(1))})
    }
    path = folder / "odd.safetensors"
    save_file(tensors, path, {form: json.dumps(signed)})
    return Delta.load(path) if form == FORMAT else SeedLog.load(path)


def record(draw: st.DataObject, folder: Path) -> object:
    """Read a record with odd fields."""
    fields = st.sampled_from(["name", "status", "phases", "ledger", "outcome", "samples", "settings", "sha256"])
    document = {"schema": 1, "name": "x", **draw.draw(st.dictionaries(fields, VALUES, max_size=3))}
    path = folder / "record.json"
    path.write_text(json.dumps(document))
    return RunRecord.read(path)


READERS = (yaml_file, rows, parquet, delta, record)


def odd(draw: random.Random, count: int = 4) -> Found:
    """Give odd inputs to a reader, simple ones first; return what it made of the worst, or of the last."""
    reader = draw.choice(READERS)
    found: list[Found] = []

    @seed(draw.randrange(2**32))
    @settings(max_examples=count, **UNHURRIED)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        about = {"reader": reader.__name__}
        with tempfile.TemporaryDirectory() as folder:
            try:
                with in_time():
                    reader(data, Path(folder))
                found.append(Found("survived", about=about))
            except (BadInput, BadRow) as error:
                found.append(told(str(error), about))
            except ValueError as error:
                kind = Found("failed", why=f"ValueError: {error}", about=about)
                found.append(told(str(error), about) if reader is record else kind)
            except Exception as error:
                if type(error).__module__.startswith("hypothesis"):
                    raise
                found.append(Found("failed", why=f"{type(error).__name__}: {error}", about=about))

    one()
    return next((each for each in found if each.how == "failed"), found[-1])


def told(sentence: str, about: dict[str, Any]) -> Found:
    """Return a refusal, which must have something to say."""
    return Found("refused" if len(sentence) > 10 else "failed", why="" if len(sentence) > 10 else sentence, about=about)
