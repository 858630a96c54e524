"""Try every method of configs/ on a tiny random model of each family: fit, resume, export and shard.

Each cell is a line of results/families.jsonl on one rank (fit, resume, export), and another on two if its method claims
to shard. It has the errors that were measured, or the sentence of a refusal. Cells that have a line of the same
versions are skipped, so that a run can be cut off and go on, and those that failed are tried again.
`python -m benchmarks.families` runs what is missing, `python -m benchmarks.families Mixtral BART` those families only;
benchmarks/readme.py writes the table into docs/models.md.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedModel

from benchmarks.measurements import read_lines
from benchmarks.provenance import commit, where
from benchmarks.tiny_models import CLASSES, FAMILIES, VOCABULARY, Family, Sizes, word_tokenizer
from lit_sparse.calls import dummy_forward
from lit_sparse.checkpoints import LAST, read_checkpoint
from lit_sparse.data import Labelled, Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.export.card import own_loader
from lit_sparse.export.folder import export
from lit_sparse.modules import LitSparse
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.optim import trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module, load_run
from lit_sparse_profiling.devices import describe_device

RESULTS = Path(__file__).parent / "results" / "families.jsonl"
COMMAND = "python -m benchmarks.families"
LENGTH = 12
TOLERANCE = 1e-4
"""Largest difference of logits between a run and its export, relative to the largest logit: both are in fp32."""

SMOOTH = {"class_path": "lit_sparse.optim.AdamW", "init_args": {"eps": 1e-3}}
"""An AdamW whose update is a smooth function of the gradient, so that rounding does not flip its sign."""
SHARD_TOLERANCE = 1e-5
"""Largest difference between the weights of two ranks and of one, after three steps with a learning rate of 0.01."""
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}

# ---- methods

OFTEN = {"interval": 2, "active_layers": 1}
EXTRA: dict[str, tuple[str, Sizes]] = {
    "smt all": ("smt", {"targets": ["all"], "trainable_fraction": 0.1}),
    "smt all, delta": ("smt", {"targets": ["all"], "trainable_fraction": 0.1, "mode": "delta"}),
}
"""Further columns: a YAML, and other values of its last update."""


def methods() -> list[str]:
    """Return the columns of the table: every YAML of configs/, and `EXTRA`."""
    return [*sorted(path.stem for path in configs_folder().glob("*.yaml")), *EXTRA]


def model_keys(method: str) -> dict[str, Any]:
    """Return the keys of `model` in a method's YAML, with sets of layers that change every two steps."""
    stem, values = EXTRA.get(method, (method, {}))
    keys = yaml.safe_load((configs_folder() / f"{stem}.yaml").read_text())["model"]
    updates = keys.pop("updates+", keys.pop("updates", []))
    if updates:
        updates[-1].setdefault("init_args", {}).update(values)
    for update in updates:
        if update["class_path"] == "LISA":
            update["init_args"].update(OFTEN)
    return {**keys, "warmup_steps": 0, "updates": updates}


# ---- the stages of a cell


class Cell:
    """One method on one family, in a folder of its own."""

    def __init__(self, family: Family, method: str, base: Path, folder: Path) -> None:
        self.family, self.run = family, folder / "run-1"
        self.config = {"task": family.task, "model": {**model_keys(method), "base": str(base)}}
        self.base, self.folder = base, folder

    def module(self) -> LitSparse:
        """Return a fresh module of the method."""
        return build_module(self.config)

    def data(self, batch: int = 2) -> L.LightningDataModule:
        """Return the family's data: random tokens, or labelled words."""
        if self.family.task == "CausalLM":
            return Synthetic(vocab_size=VOCABULARY - 1, max_length=LENGTH, rows=14, heldout=2, batch_size=batch)
        rows = self.folder / "rows.jsonl"
        if not rows.exists():
            texts = [{"text": f"w{n} w{3 * n % 80} w{7 * n % 80}", "label": CLASSES[n % 3]} for n in range(24)]
            rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
        return Labelled(str(rows), heldout=6, tokenizer=word_tokenizer(), max_length=LENGTH, batch_size=batch)

    def fit(self, steps: int, resume_from: Path | None = None, **options: Any) -> L.Trainer:
        """Train for `steps` steps; return the trainer."""
        fixed = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
        trainer = L.Trainer(max_steps=steps, **{**QUIET, **fixed, **options})
        module = self.module()
        module.resume_from = resume_from
        L.seed_everything(0 if resume_from is None else 1, verbose=False)  # a resumed run must not depend on it
        trainer.fit(module, datamodule=self.data(), ckpt_path=resume_from)
        return trainer

    def fit_and_resume(self) -> dict[str, Any]:
        """Train four steps, and again from the checkpoint of the second; return what was trained.

        Raises:
            AssertionError: if the two differ in a bit.
        """
        saving = ModelCheckpoint(self.run / LAST.parent, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        straight = self.fit(4, callbacks=[saving], enable_checkpointing=True)
        straight.save_checkpoint(self.run / LAST)
        (self.run / "config.yaml").write_text(yaml.safe_dump(self.config))
        resumed = self.fit(4, self.run / LAST.parent / "step=2.ckpt")
        wanted, got = (dict(trainable(trainer.lightning_module)) for trainer in (straight, resumed))
        assert wanted.keys() == got.keys(), "the resumed run trains other weights"
        for name, value in wanted.items():
            assert torch.equal(value, got[name]), f"the resumed run has another {name}"
        module: Any = straight.lightning_module
        trained = sum(parameter.numel() for parameter in wanted.values())
        return {"trained_share": trained / module.base_parameters}

    def export(self) -> dict[str, Any]:
        """Export the run as a Hugging Face folder, or as its method's own, and compare logits with the run's.

        Raises:
            AssertionError: if they differ by more than rounding, or training changed nothing.
        """
        module, _ = load_run(self.run)
        ours = dummy_forward(module.build())
        with redirect_stdout(io.StringIO()):
            again = self.exported(module)
        base = module.auto_class.from_pretrained(self.base)
        error, change = (float((dummy_forward(one) - ours).abs().max() / ours.abs().max()) for one in (again, base))
        assert error <= TOLERANCE, f"the export's logits differ by {error:.1e}"
        assert change > error, "training did not change the logits"
        return {"error": error, "change": change}

    def exported(self, module: LitSparse) -> PreTrainedModel:
        """Return the model that users load from the run's export."""
        if (own := own_loader(module)) is None:
            return module.auto_class.from_pretrained(export(self.run, "hf"))
        base = module.auto_class.from_pretrained(self.base)
        own.load(export(self.run, "adapter"), base)
        return base

    def sharded(self, ranks: int) -> L.Trainer:
        """Train three steps of two rows each with fsdp2 on this and other ranks, or on one device if `ranks` is 1."""
        strategy = FSDP2Strategy(timeout=timedelta(seconds=60)) if ranks > 1 else "auto"
        self.config["model"] |= {"lr": 1e-2, "optimizer": SMOOTH}
        fixed = {"accelerator": "cpu", "devices": ranks, "strategy": strategy, "use_distributed_sampler": False}
        trainer = L.Trainer(max_steps=3, limit_val_batches=0, **fixed, **QUIET)
        L.seed_everything(0, verbose=False)
        trainer.fit(self.module(), datamodule=self.data(2 // ranks))
        return trainer


def outcome(stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a stage returned, or the sentence with which it was refused, or the error with which it failed."""
    try:
        return {"ok": True, **stage()}
    except BadInput as refusal:
        return {"ok": False, "refused": str(refusal)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return {"ok": False, "failed": f"{type(error).__name__} at {place}: {str(error).strip().splitlines()[:1]}"}


# ---- two ranks


def on_two_ranks(family: Family, names: Sequence[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train each method on two ranks and on one, without dropout; yield its name and the outcome."""
    base = family.write(folder / "still", dropout=False)
    for name, found in _spawned(family, names, base, folder).items():
        yield name, outcome(lambda n=name: compare(family, n, base, folder)) if found["ok"] else found


def _spawned(family: Family, names: Sequence[str], base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Train in two processes. One that dies takes the methods after it along: they are tried again without it."""
    found: dict[str, dict[str, Any]] = {}
    while rest := [name for name in names if name not in found]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            given = (family.name, rest, str(base), str(folder), port)
            torch.multiprocessing.spawn(_rank, given, nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
            reason = "a rank left no result"
        except torch.multiprocessing.ProcessExitedException as crash:  # pyright: ignore[reportPrivateImportUsage]
            reason = f"a rank died of {crash.signal_name}"
        for name in rest:
            files = [folder / f"{slug(name)}-{rank}.json" for rank in (0, 1)]
            if not all(file.exists() for file in files):
                found[name] = {"ok": False, "failed": reason}
                break
            ranks = [json.loads(file.read_text()) for file in files]
            found[name] = next((one for one in ranks if not one["ok"]), ranks[0])
    return found


def _rank(rank: int, family: str, names: Sequence[str], base: str, folder: str, port: int) -> None:
    quiet()
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "families", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in {**there, **mine}.items()})
    for name in names:
        found = outcome(lambda n=name: _sharded(FAMILIES[family], n, Path(base), Path(folder)))
        Path(folder, f"{slug(name)}-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _sharded(family: Family, name: str, base: Path, folder: Path) -> dict[str, Any]:
    here = folder / slug(name)
    here.mkdir(exist_ok=True)
    Cell(family, name, base, here).sharded(2).save_checkpoint(here / "two.ckpt")
    return {}


def compare(family: Family, name: str, base: Path, folder: Path) -> dict[str, Any]:
    """Train on one rank, and compare with the checkpoint of two.

    Raises:
        AssertionError: if weights differ by more than orders of summation explain.
    """
    here = folder / slug(name)
    Cell(family, name, base, here).sharded(1).save_checkpoint(here / "one.ckpt")
    one, two = (read_checkpoint(here / f"{ranks}.ckpt")["state_dict"] for ranks in ("one", "two"))
    assert one.keys() == two.keys(), "two ranks train other weights than one"
    error = max((float((value - two[key]).abs().max()) for key, value in one.items()), default=0.0)
    assert error <= SHARD_TOLERANCE, f"two ranks' weights differ by {error:.1e} from one's"
    return {"error": error}


# ---- the campaign


def on_one_rank(family: Family, names: Sequence[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each method, and the outcomes of fitting, resuming and exporting."""
    base = family.write(folder / "base")
    for name in names:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield name, one_cell(Cell(family, name, base, Path(own)))


def one_cell(cell: Cell) -> dict[str, Any]:
    """Return the outcome of fitting and resuming; with that of the export if the fit held."""
    found = outcome(cell.fit_and_resume)
    return {**found, **outcome(cell.export)} if found["ok"] else found


def supports_sharding(method: str) -> bool:
    """Return true if every strategy of the method claims to work under FSDP2."""
    return all(update.supports_sharding for update in build_module({"model": model_keys(method)}).updates)


def slug(name: str) -> str:
    """Return a name for a folder."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def quiet() -> None:
    """Silence what a tiny run says about itself."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def done(results: Path, versions: Mapping[str, str]) -> set[tuple[str, str, int]]:
    """Return the cells that have a line of these versions that did not fail."""
    lines = read_lines(results, COMMAND) if results.exists() else []
    good = [line for line in lines if line["versions"] == versions and "failed" not in line]
    return {(line["family"], line["method"], line["ranks"]) for line in good}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that are missing; return the exit status: 1 if one of them failed."""
    parser = argparse.ArgumentParser(description="Try every method on a tiny model of each family.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families to try; all by default")
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods(), metavar="METHOD")
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that lines are appended to")
    parser.add_argument("--again", action="store_true", help="run cells anew that have a line")
    given = parser.parse_args(arguments)
    for name in given.families:
        if name not in FAMILIES:
            parser.error(f"there is no family {name!r}; known are {', '.join(FAMILIES)}.")
    quiet()
    versions = {package: version(package) for package in ("torch", "transformers", "peft")}
    stamp = {"bench": "families", "device": where(describe_device(torch.device("cpu"))), "versions": versions}
    present, failed = set() if given.again else done(given.results, versions), False
    for ranks in given.ranks:
        claimed = [method for method in given.methods if ranks == 1 or supports_sharding(method)]
        for name in given.families or FAMILIES:
            missing = [method for method in claimed if (name, method, ranks) not in present]
            for method, found in cells(FAMILIES[name], missing, ranks):
                when = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
                line = {**stamp, **when, "family": name, "method": method, "ranks": ranks, **found}
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                failed |= "failed" in found
                said = "ok" if found["ok"] else found.get("refused") or f"FAILED: {found['failed']}"
                print(f"{name}, {method}, {ranks}: {said}", flush=True)
    return int(failed)


def cells(family: Family, names: Sequence[str], ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the outcome of each method on a family, on one rank or two."""
    if names:
        with tempfile.TemporaryDirectory() as folder:
            yield from (on_one_rank if ranks == 1 else on_two_ranks)(family, names, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
