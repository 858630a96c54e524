"""Fits of the command line, stopped and resumed at random: `make fuzz METHODS="lora smt" EXAMPLES=200`.

An example is a method, settings of the trainer, and one or two stops. It runs straight through, and again with the
stops; both must end in the same checkpoint and the same metrics, bit for bit. What was done is noted in runs/fuzz/, so
that an interrupted campaign goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lit_sparse import cli
from lit_sparse.commands.shipped import methods
from lit_sparse.errors import BadInput
from lit_sparse.runs import LAST
from lit_sparse.testing import tiny_llm
from tests.conftest import make_home

ROWS, HELDOUT, PACKED = 24, 4, 7
"""Rows of the file, of which are held out, and at least as many that the others are packed into."""
METHODS = sorted(path.stem for path in methods())
BATCH = 20
"""Examples of a method between two notes of a campaign."""


class Cut(Exception):
    """Ends a fit from outside, as a kill does: nothing is saved."""


@dataclass(frozen=True)
class Stop:
    """An interruption, before the batch `batch` of a process (from 1 on; accumulated ones count).

    Args:
        how: `cut` ends the fit at once, `signal` asks it to end.
    """

    batch: int
    how: str


@dataclass(frozen=True)
class Example:
    """A fit of a method, and where it is stopped."""

    method: str
    words: tuple[str, ...]
    stops: tuple[Stop, ...]


class Stops(L.Callback):
    """Carries out the stop that is due."""

    due: Stop | None = None

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen += 1
        if self.due is None or self.seen != self.due.batch:
            return
        if self.due.how == "cut":
            raise Cut
        os.kill(os.getpid(), signal.SIGTERM)


# ---- examples


@st.composite
def examples(draw: st.DrawFn, chosen: tuple[str, ...] = tuple(METHODS)) -> Example:
    """Draw a fit that the trainer accepts, and one or two stops within it."""
    size, accumulate, packing = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 1]))
    rows = PACKED if packing else ROWS - HELDOUT
    epoch = -(-rows // size)  # batches
    words = [f"--data.batch_size={size}", f"--trainer.accumulate_grad_batches={accumulate}"]
    words += ["--data.packing=true"] * packing
    limit = draw(st.sampled_from([None, 2, 3, 5, 0.5]))
    if limit is not None:
        words.append(f"--trainer.limit_train_batches={limit}")
        epoch = min(epoch, limit) if isinstance(limit, int) else int(epoch * limit)
    words += draw(evaluations(epoch))
    most_epochs = draw(st.sampled_from([None, 1, 2, 3]))
    steps = draw(st.integers(2, 9)) if most_epochs is None else draw(st.sampled_from([None, 3, 5]))
    words += [f"--trainer.max_steps={steps}"] if steps is not None else []
    words += [f"--trainer.max_epochs={most_epochs}"] if most_epochs is not None else []
    batches = min(
        epoch * most_epochs if most_epochs is not None else 10**6,
        steps * accumulate if steps is not None else 10**6,
    )
    for key, values in SETTINGS.items():
        if (value := draw(st.sampled_from(values))) is not None:
            words.append(f"--{key}={value}")
    stops = tuple(
        Stop(draw(st.integers(1, max(1, batches - 1))), draw(st.sampled_from(["signal", "cut"])))
        for _ in range(draw(st.integers(1, 2)))
    )
    return Example(draw(st.sampled_from(chosen)), tuple(words), stops)


SETTINGS: dict[str, list[Any]] = {
    "checkpoint_steps": [1, 2, 3, 5],
    "trainer.gradient_clip_val": [None, 0.1],
    "trainer.gradient_clip_algorithm": [None, "norm", "value"],
    "trainer.log_every_n_steps": [1, 2, 3],
    "data.num_workers": [0, 0, 0, 1, 2],
    "model.precision": ["float32", "float32", "bfloat16"],
    "model.schedule": ["linear", "constant", "cosine"],
    "model.warmup_steps": [0, 2, 0.25],
    "model.full_checkpoints": [None, "true"],
    "model.activation_checkpointing": [None, "true"],
}
"""Values of the keys that go with any other; None leaves the default."""


@st.composite
def evaluations(draw: st.DrawFn, epoch: int) -> list[str]:
    """Draw when a fit evaluates, whose epochs have `epoch` batches."""
    every = draw(st.sampled_from([None, 1, 2, "null"]))
    words = [] if every is None else [f"--trainer.check_val_every_n_epoch={every}"]
    if every == "null" or draw(st.booleans()):
        most = 2 * epoch if every == "null" else epoch
        words.append(f"--trainer.val_check_interval={draw(st.integers(1, max(1, most)))}")
    return [*words, f"--trainer.limit_val_batches={draw(st.sampled_from([1, 1, 0]))}"]


# ---- running them


FIXED = [
    *("--model.base", "dropout", "--model.lr", "0.01", "--data", "Instructions", "--data.train", "rows.jsonl"),
    *(f"--data.heldout={HELDOUT}", "--data.max_length=16", "--samples=0", "--profile=false", "--profile.warmup=0"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.callbacks+=tests.fuzz.Stops"),
]


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """Work in a new folder with a tiny model with dropout, its tokenizer, rows, and YAMLs whose sets change often."""
    before, cache = os.getcwd(), os.environ.get("LIT_SPARSE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LIT_SPARSE_CACHE"] = folder
        try:
            make_home("dropout", tiny_llm("llama", dropout=0.1))
            for path in methods():
                Path(path.name).write_text(re.sub(r"interval: \d+", "interval: 2", path.read_text()))
            yield
        finally:
            os.chdir(before)
            os.environ.pop("LIT_SPARSE_CACHE")
            if cache is not None:
                os.environ["LIT_SPARSE_CACHE"] = cache


def fit(example: Example, run: str, stop: Stop | None = None, *words: str) -> bool:
    """Run the command; return whether the stop ended it."""
    Stops.due = stop
    command = ["fit", "--config", f"{example.method}.yaml", *FIXED, *example.words, "--run", run, *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run(command)
    except (Cut, cli.Stopped):
        return True
    return False


def attempt(example: Example, stop: Stop | None) -> int:
    """Begin the run that is stopped, or go on with it from its last checkpoint, as a user does.

    Returns:
        The optimizer steps that were behind it.
    """
    run = Path("runs/cut-1")
    if (run / LAST).is_file():
        steps = torch.load(run / LAST, weights_only=True)["global_step"]
        fit(example, "cut", stop, f"--ckpt_path={run / LAST}")
        return steps
    shutil.rmtree(run, ignore_errors=True)  # it was cut before the first checkpoint
    fit(example, "cut", stop)
    return 0


def check(example: Example) -> bool:
    """Check that a straight fit equals one that is stopped; return whether it was run, and not refused.

    Raises:
        AssertionError: naming the first difference.
    """
    with workplace():
        try:
            fit(example, "straight")
        except BadInput:
            return False
        resumed = [attempt(example, stop) for stop in (*example.stops, None)]
        compare(Path("runs/straight-1"), Path("runs/cut-1"), resumed)
    return True


# ---- comparing them

MEASURED = ("tokens_per_second", "peak_memory_gib")
"""Columns of metrics.csv that are as the machine has it: no two fits agree on them."""
KEPT = ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers", "lit_sparse")
"""Keys of checkpoints that must be equal, beside the loader's place."""


def compare(straight: Path, stopped: Path, resumed: Sequence[int]) -> None:
    """Check that two runs ended in the same checkpoint and have the same metrics.

    An evaluation that was due right after a checkpoint may be missing where a fit went on from that checkpoint, after
    the optimizer steps in `resumed`, since Lightning does not make up for it: those are not compared.

    Raises:
        AssertionError: naming the first difference.
    """
    ours, theirs = (torch.load(run / LAST, weights_only=True) for run in (straight, stopped))
    for key in KEPT:
        compare_values(ours[key], theirs[key], key)
    place = [saved["loops"]["fit_loop"]["state_dict"] for saved in (ours, theirs)]
    compare_values(*place, "the loader's place")
    wanted, found = metrics(straight, resumed), metrics(stopped, resumed)
    assert wanted.keys() == found.keys(), f"metrics.csv has {[*wanted]} straight, and {[*found]} stopped"
    for step, values in wanted.items():
        assert values == found[step], f"metrics.csv at step {step} is {values} straight, and {found[step]} stopped"


def metrics(run: Path, resumed: Sequence[int] = ()) -> dict[int, dict[str, str]]:
    """Return what a run logged, by step (from 0 on), without evaluations after the steps in `resumed`."""
    found: dict[int, dict[str, str]] = {}
    path = run / "metrics.csv"  # a fit of few steps may log nothing
    with path.open() if path.is_file() else io.StringIO() as file:
        for row in csv.DictReader(file):
            step, evaluated = int(row["step"]), any(row[name] for name in row if name.startswith("heldout_"))
            if not (evaluated and step + 1 in resumed):
                kept = {key: value for key, value in row.items() if value and key not in MEASURED}
                found.setdefault(step, {}).update(kept)
    return found


def compare_values(ours: Any, theirs: Any, name: str) -> None:
    """Compare nested values, tensors bit for bit.

    Raises:
        AssertionError: with the name of the first that differs.
    """
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), f"{name} has other keys: {ours.keys() ^ theirs.keys()}"
        for key, value in ours.items():
            compare_values(value, theirs[key], f"{name}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), f"{name} has {len(ours)} entries straight, and {len(theirs)} stopped"
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            compare_values(*pair, f"{name}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, f"{name} is {ours.dtype} straight, and {theirs.dtype} stopped"
        assert ours.shape == theirs.shape, f"{name} is {ours.shape} straight, and {theirs.shape} stopped"
        bits = (tensor.detach().flatten().view(torch.uint8) for tensor in (ours, theirs))  # so that NaN is NaN
        assert torch.equal(*bits), f"{name} differs"
    else:
        assert ours == theirs, f"{name} is {ours} straight, and {theirs} stopped"


# ---- a campaign

UNHURRIED: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],  # an example is short, and takes seconds: a smaller one is not worth minutes
    "suppress_health_check": list(HealthCheck),
}
"""Settings of hypothesis for examples that take seconds."""


def campaign(method: str, count: int, notes: Path) -> bool:
    """Run `count` examples of a method less those that are noted; return whether none has failed."""
    notes.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
    for number in range(len(done), -(-count // BATCH)):
        begun = time.monotonic()
        found = {"batch": number, **batch(method, number), "seconds": round(time.monotonic() - begun)}
        done.append(found)
        with notes.open("a") as file:
            file.write(json.dumps(found) + "\n")
        total = {key: sum(each[key] for each in done) for key in ("equal", "refused")}
        failures = [each["failure"] for each in done if each["failure"]]
        print(f"{method}: {total['equal']} equal, {total['refused']} refused, {len(failures)} failed", flush=True)
    for each in done:
        if each["failure"]:
            print(f"{method}, batch {each['batch']}: {each['failure']}", flush=True)
    return not any(each["failure"] for each in done)


def batch(method: str, number: int) -> dict[str, Any]:
    """Run examples of a method until one fails; return the counts, and the failure with its example."""
    counts = {"equal": 0, "refused": 0}
    last: list[Example] = []

    @seed(number)
    @settings(max_examples=BATCH, **UNHURRIED)
    @given(examples((method,)))
    def run(example: Example) -> None:
        last[:] = [example]
        counts["equal" if check(example) else "refused"] += 1

    try:
        run()
    except Exception as error:
        return {**counts, "failure": f"{type(error).__name__}: {error} in {last[0]}"}
    return {**counts, "failure": None}


def main() -> None:
    """Run a campaign; exit with status 1 if a resumed fit differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("methods", nargs="*", help="names of YAMLs under configs/ (default: all)")
    parser.add_argument("--examples", type=int, default=200, help="of each method (default 200)")
    parser.add_argument("--into", type=Path, default=Path("runs/fuzz"), help="folder of the notes (default runs/fuzz)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    into = asked.into.resolve()
    ended_well = [campaign(name, asked.examples, into / f"{name}.jsonl") for name in asked.methods or METHODS]
    sys.exit(not all(ended_well))


if __name__ == "__main__":
    main()
