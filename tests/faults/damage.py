"""Files that are damaged: each is read by its own reader, which must name the file, or give what was written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.checkpoints import alike, read_checkpoint, sums_of
from lit_sparse.data.examples import Examples
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import contents as delta_contents
from lit_sparse.export.seedlog import SeedLog
from lit_sparse.modules import CausalLM
from lit_sparse.runs import LAST
from lit_sparse.selections import read_state
from lit_sparse.storage.weight_files import CARD, MARK, check_hashes
from lit_sparse.storage.whole import damage as damage_of
from lit_sparse.strategies import MEFT
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from tests.faults.child import command
from tests.faults.fits import RUN, Bench, Found, words

Reader = Callable[[Path], Any]


def read_cache(path: Path) -> Any:
    """Read a cache of tokens as a fit does, which makes a damaged one again."""
    if (found := damage_of(path)) is not None:
        raise BadInput(f"{path} is damaged ({found})")
    examples = Examples.load(path)
    return [torch.as_tensor(one) for one in (examples.ids, examples.labels, examples.starts)]


def read_base(path: Path) -> Any:
    """Read the base under a run, as going on with the run does."""
    module = CausalLM(base=str(path.parent))
    model = module.build()
    saved = read_checkpoint(path.parent / "last.ckpt")["lit_sparse"]
    if module.base_fingerprint != saved["base"]:
        raise BadInput(f"{path}: another base")
    module._check_sums(saved)
    return sums_of(sorted(model.named_parameters()))


def read_export(path: Path) -> Any:
    """Read the files of an export, or of an adapter."""
    check_hashes(path.parent)
    return [(file.name, file.read_bytes()) for file in sorted(path.parent.iterdir()) if file.name not in (MARK, CARD)]


def read_meft(path: Path) -> Any:
    """Put MEFT's adapters on a base."""
    strategy = MEFT.load(path.parent, tiny_llm("llama"))
    return [asdict(strategy), strategy.state_dict(), {name: p.detach() for name, p in strategy._saved().items()}]


def read_choices(path: Path) -> Any:
    """Read what `lit-sparse select` wrote."""
    try:
        return read_state(path, "")
    except (OSError, ValueError, AttributeError, TypeError) as error:  # as those do who read it
        raise BadInput(f"{path}: {error}") from error


def read_log(path: Path) -> Any:
    """Read a seed log."""
    log = SeedLog.load(path)
    return [log.base, log.base_fingerprint, log.dtype, log.updates, log.log.nan_to_num(nan=-1.0)]


def read_delta(path: Path) -> Any:
    """Read a delta."""
    header, tensors = delta_contents(path)
    return [header, tensors]


class Files:
    """Files of all kinds that runs leave, made once, with what their readers give.

    Attributes:
        kinds: For each kind, the file to give to its reader, the files that may be damaged, and the reader.
    """

    def __init__(self, bench: Bench, folder: Path, ranks: bool = True) -> None:
        self.folder = folder
        self.kinds: dict[str, tuple[Path, list[Path], Reader]] = {}
        with bench.place() as place:
            self._fit(place, "lora")
            self._copy(place / RUN / LAST, "checkpoint", read_checkpoint)
            self._copy(place / RUN / "record.json", "record", RunRecord.read)
            (cache, *_) = sorted((bench.home / "cache" / "tokens").glob("*.npz"))
            self._copy(cache, "token cache", read_cache)
            for to, file in (("hf", "model"), ("adapter", "adapter_model")):
                self._export(place, to, f"export ({to})", file, read_export)
            base = folder / "base"
            shutil.copytree((place / "dropout").resolve(), base)
            shutil.copy(place / RUN / LAST, base / "last.ckpt")
            path = base / "model.safetensors"
            self.kinds["base under a run"] = path, [path], read_base
        with bench.place() as place:
            self._fit(place, "meft")
            self._export(place, "adapter", "export (meft)", "meft", read_meft)
        for method, own in (("smt", "blocks"), ("lift", "entries"), ("losia", None)):
            with bench.place() as place:
                self._fit(place, method)
                self._run(["export", str(RUN), "--to", "delta", "--output", "delta"], place)
                self._copy(place / "delta", f"delta ({method})", read_delta)
                if own is not None:
                    self._run(["select", *words(method, 1)[1:], "--output", "selection.json"], place)
                    self._copy(place / "selection.json", f"selection of {own}", read_choices)
        with bench.place() as place:
            self._fit(place, "mezo")
            self._run(["export", str(RUN), "--to", "seedlog", "--output", "log"], place)
            self._copy(place / "log", "seed log", read_log)
        if ranks:
            with bench.place() as place:
                self._fit(place, "lora", 2, "--trainer.devices=2", "--trainer.strategy=fsdp2")
                shutil.copytree(place / RUN / "checkpoints", folder / "sharded")
                files = [path for path in (folder / "sharded").rglob("*") if path.is_file()]
                self.kinds["sharded checkpoint"] = folder / "sharded" / LAST.name, files, read_checkpoint
        self._values = {kind: reader(path) for kind, (path, _, reader) in self.kinds.items()}

    def _fit(self, place: Path, method: str, ranks: int = 1, *more: str) -> None:
        self._run([*words(method, 1), "--trainer.max_steps=2", *more], place, ranks)

    def _run(self, line: list[str], place: Path, ranks: int = 1) -> None:
        for ended in command(line, place, ranks=ranks):
            assert ended.status == 0, ended.told

    def _export(self, place: Path, to: str, kind: str, file: str, reader: Reader) -> None:
        """Export a run; its weights are what the reader reads, and any of its files but the card may be damaged."""
        self._run(["export", str(RUN), "--to", to, "--output", to], place)
        folder = self.folder / kind.replace(" ", "-")
        shutil.copytree(place / to, folder)
        files = [path for path in sorted(folder.iterdir()) if path.name != CARD]
        self.kinds[kind] = folder / f"{file}.safetensors", files, reader

    def _copy(self, path: Path, kind: str, reader: Reader) -> None:
        copy = self.folder / f"{kind.replace(' ', '-')}-{path.name}"
        shutil.copy(path, copy)
        self.kinds[kind] = copy, [copy], reader

    def load(self, draw: random.Random) -> Found:
        """Read a file that is as it was written: a refusal is a false alarm."""
        kind = draw.choice([*self.kinds])
        path, _, reader = self.kinds[kind]
        try:
            same = equal(reader(path), self._values[kind])
        except (BadInput, ValueError) as error:
            return Found("failed", why=f"a false alarm: {error}", about={"kind": kind})
        return Found("survived" if same else "failed", about={"kind": kind})

    def damage(self, draw: random.Random) -> Found:
        """Damage a file: its reader must name it, or give the very values that were written."""
        kind, how = draw.choice([*self.kinds]), draw.choice([*DAMAGE])
        path, files, reader = self.kinds[kind]
        file = draw.choice(files)
        about = {"kind": kind, "damage": how}
        with restored(file):
            DAMAGE[how](file, draw)
            if file.stat().st_size == len(_bytes(file)) and _bytes(file) == self._original:
                return Found("nothing", about=about)
            try:
                value = reader(path)
            except (BadInput, ValueError) as error:
                named = any(part in str(error) for part in (file.name, path.name, path.parent.name, str(path)))
                return Found("refused" if named else "failed", why="" if named else str(error), about=about)
            except Exception as error:
                return Found("failed", why=f"{type(error).__name__}: {error}", about=about)
            if equal(value, self._values[kind]):
                return Found("survived", about=about)
            return Found("failed", why="believed", about=about)

    _original = b""


@contextmanager
def restored(file: Path) -> Iterator[None]:
    """Give a file its contents back at the end of the block."""
    Files._original = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(Files._original)


def _bytes(file: Path) -> bytes:
    return file.read_bytes()


def equal(one: Any, other: Any) -> bool:
    """Return whether two values that readers gave are equal."""
    if isinstance(one, Tensor | list | tuple | dict):
        return alike(one, other)
    return type(one) is type(other) and one == other


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def lose(file: Path, draw: random.Random) -> None:
    """Replace the end of a file by zeros: it was renamed, and its last writes did not reach the disk."""
    data = file.read_bytes()
    kept = draw.choice([0, draw.randrange(len(data)), 4096 * draw.randint(0, len(data) // 4096)])
    file.write_bytes(data[:kept] + bytes(len(data) - kept))


def lose_a_page(file: Path, draw: random.Random) -> None:
    """Replace 512 bytes in a file by zeros, as a bad sector does."""
    data = bytearray(file.read_bytes())
    start = 512 * draw.randrange(len(data) // 512 + 1)
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "a flipped bit": flip,
    "cut off": truncate,
    "a lost write": lose,
    "a lost sector": lose_a_page,
}
