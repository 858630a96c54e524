"""`lit-sparse plan`: the memory of each way to train, predicted in seconds, without a GPU and without the weights."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lit_sparse.commands.bench import existing, has_data, label_of, parts_of, take
from lit_sparse.commands.shipped import methods
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse
from lit_sparse.places import configs_folder
from lit_sparse.planning.forecast import MOST_TOKENS, Forecast, Setting, forecast
from lit_sparse.planning.levers import CHECKPOINTING, NF4, ONE_ROW, SHARDED
from lit_sparse.storage.whole import replace_text
from lit_sparse_profiling.drafts import begins, check_replaceable

CARDS = {8: 8188, 12: 12282, 16: 15360, 24: 23028, 40: 40448, 48: 46068, 80: 81251, 141: 143771}
"""MiB that the driver reports for cards sold with that many GB; of several cards the least (T4, A10G, A40, A100)."""
UTILISATION = 0.4
"""Share of a card's dense bf16 rate that a training step is taken to reach, for the estimated time."""
GIB = 2**30
SMALLEST_SHOWN = 1e-4
"""Share of the peak below which a category has no line."""
COMPILED = (
    "model.compile is set: weights, gradients and state are exact; what is saved and temporary is that of the model as "
    "it is, an estimate and no bound."
)
BEGINNING = r'^\s*\[\s*\{\s*"name":\s*"(\\.|[^"\\])*",\s*"setting":\s*\{'
"""How a file of --json begins."""
WIDTH = 150
"""Characters of a line where there is no terminal."""
OWN = ("--device", "--card", "--json", "--largest", "--tflops", "--config", "-c", "-h", "--help")


class Planned(NamedTuple):
    """A configuration of `fit` that was instantiated, but for its trainer: the module, and what decides its memory."""

    module: LitSparse
    batch_size: int
    length: int
    accumulate: int
    clip: float | None
    ranks: int
    sharded: bool
    replicas: int = 1


Make = Callable[[Sequence[str]], Planned]
"""Returns what the command line of `fit` describes."""


def parser() -> argparse.ArgumentParser:
    """Return the command line of the verb; options that it does not know are keys of `fit`."""
    out = argparse.ArgumentParser(prog="lit-sparse plan", description=__doc__, allow_abbrev=False)
    out.add_argument("yamls", nargs="*", help="methods to plan; a.yaml+b.yaml is both at once (default: all)")
    out.add_argument("-c", "--config", action="append", default=[], help="a YAML that is common to all of them")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the training is to run")
    out.add_argument("--card", metavar="GB", help=f"a card to fit: {', '.join(map(str, CARDS))}")
    out.add_argument("--largest", action="store_true", help="find the largest batch for the card")
    out.add_argument("--tflops", type=float, help="the card's dense bf16 TFLOP/s, for an estimated time")
    out.add_argument("--json", metavar="FILE", help="write the plans, with all of their parts, to a file")
    out.epilog = (
        "Any key of `lit-sparse fit` goes to all plans, as in --model.base NAME, --data.batch_size 8, "
        "--data.max_length 2048 or --model.activation_checkpointing true. No weights are loaded."
    )
    return out


def plan(argv: Sequence[str], make: Make) -> int:
    """Plan the methods in `argv`, print a table, and return the exit status: 1 if none could be planned.

    Raises:
        BadInput: if an option is invalid, or the only method asked for cannot be planned.
    """
    own, passed = take(argv, OWN, switches=("--largest",))
    asked = parser().parse_intermixed_args(own)
    card = card_of(asked.card)
    if asked.largest and card is None:
        raise BadInput("--largest was asked for without a card; add --card 24, or another size in GB.")
    if asked.tflops is not None and not 0 < asked.tflops < math.inf:
        raise BadInput(f"--tflops is {asked.tflops}; give the card's dense bf16 TFLOP/s, such as 312 for an A100.")
    if asked.json is not None:
        check_json(Path(asked.json))
    console, found = Console(), []
    if not console.is_terminal:
        console = Console(width=WIDTH)
    names = asked.yamls or [path.name for path in methods()]
    for number, name in enumerate(names, 1):
        command = fit_command(name, asked.config, passed)
        if len(names) > 1:
            tell(f"{number} of {len(names)}: {name} ...")
        try:
            found.append(planned(name, make, command, asked.device, card if asked.largest else None))
        except BadInput as error:
            if len(names) == 1:
                raise
            tell(" cannot be planned\n")
            console.print(f"{name}: {error}", highlight=False, markup=False)
            continue
        if len(names) > 1:
            tell(f" {found[-1].forecast.needed / GIB:.2f} GiB\n")
    if not found:
        return 1
    show(console, found, asked.tflops)
    if len(found) == 1:
        show_parts(console, found[0].forecast)
    if card is not None:
        advise(console, found, card, make, asked.device)
    if asked.json is not None:
        write(Path(asked.json), found)
    return 0


def tell(text: str) -> None:
    """Print progress at once, beside the tables and not among them: a plan of all methods takes minutes."""
    print(text, end="", file=sys.stderr, flush=True)


def card_of(text: str | None) -> int | None:
    """Return the size in GB of the card that was asked for.

    Raises:
        BadInput: if it is none of those known.
    """
    if text is None:
        return None
    sizes = {str(size): size for size in CARDS}
    size = sizes.get(text.upper().removesuffix("GB").strip())
    if size is None:
        raise BadInput(f"--card {text} was asked for; the known sizes in GB are {', '.join(sizes)}.")
    return size


def fit_command(name: str, common: Sequence[str], passed: Sequence[str]) -> list[str]:
    """Return the options of `fit` for a method, or several joined by +."""
    files = [*map(existing, common), *map(existing, parts_of(name))]
    if not has_data(files, passed):
        files.insert(0, configs_folder() / "data" / "synthetic.yaml")
    return [*(f"--config={path}" for path in files), *passed]


class Found(NamedTuple):
    """A method's plan, the options of `fit` that it is of, and the largest batch for the card, if it was searched."""

    forecast: Forecast
    command: Sequence[str]
    largest: int | None


def planned(name: str, make: Make, command: Sequence[str], device: str, card: int | None) -> Found:
    """Plan one method; with a card, search the largest batch, too."""
    label = label_of(name)

    def at(batch_size: int | None) -> Forecast:
        made = make(command)
        setting = Setting(
            "cpu" if device == "cpu" else "cuda",
            batch_size or made.batch_size,
            made.length,
            made.accumulate,
            made.clip,
            made.ranks,
            made.sharded,
            made.replicas,
        )
        return forecast(label, made.module, setting)

    first = at(None)
    return Found(first, command, None if card is None else largest_batch(first, at, card))


def largest_batch(first: Forecast, at: Callable[[int], Forecast], card: int) -> int:
    """Return the largest batch that fits a card, 0 if none does.

    A second plan gives the slope in the batch size. Segments of the allocator make it a rough one, so that a batch that
    was found gives a better one, for another try. The result is planned itself, and reduced until it fits. It has at
    most `MOST_TOKENS`.
    """
    size, room = first.setting.batch_size, CARDS[card] * 2**20
    known, best = at(2 * size), 0
    for _ in range(2):
        slope = max(1.0, (known.needed - first.needed) / (known.setting.batch_size - size))
        guess = min(int(size + (room - first.needed) / slope), MOST_TOKENS // first.setting.length)
        while guess > best:
            plan = at(guess)
            if plan.needed <= room:
                known, best = plan, guess
                break
            guess -= max(1, guess // 25)
        if best <= size:
            break
    return best


# ---- what is printed


def show(console: Console, found: Sequence[Found], tflops: float | None) -> None:
    """Print a row for each plan."""
    first = found[0].forecast
    setting = first.setting
    about = (
        f"Predicted for {setting.device}, {setting.batch_size} x {setting.length} tokens"
        + (f" x {setting.micro_batches} micro-batches" if setting.micro_batches > 1 else "")
        + (f", {setting.ranks} ranks of {'FSDP2' if setting.sharded else 'DDP'}" if setting.ranks > 1 else "")
        + f"; {first.parameters / 1e6:,.1f} M weights. Sizes in GiB of one rank."
    )
    console.print(about, highlight=False, markup=False)
    if any(one.forecast.compiled for one in found):
        console.print(COMPILED, highlight=False, markup=False, soft_wrap=True)
    table = Table(
        "method", *["trains", "allocated", "reserved", "with context"], "peak in", "weights", "state", "saved"
    )
    table.add_column("fits GB")
    if any(one.largest is not None for one in found):
        table.add_column("largest batch")
    table.add_column("TFLOP/step")
    if tflops is not None:
        table.add_column("us/token, estimated")
    for one in sorted(found, key=lambda one: one.forecast.needed):
        table.add_row(*row(one, tflops))
    console.print(table)


def row(one: Found, tflops: float | None) -> list[str]:
    """Return the cells of a plan."""
    plan, parts = one.forecast, one.forecast.peak.categories
    cells = [
        plan.name,
        f"{plan.trainable / plan.parameters:.2%}",
        *(f"{size / GIB:.2f}" for size in (plan.allocated, plan.reserved, plan.needed)),
        plan.peak.phase,
        f"{(parts.get('frozen weights', 0) + parts.get('trained weights', 0)) / GIB:.2f}",
        f"{(parts.get('gradients', 0) + parts.get('optimizer state', 0) + parts.get('strategy state', 0)) / GIB:.2f}",
        f"{parts.get('saved for backward', 0) / GIB:.2f}",
        smallest_card(plan),
    ]
    if one.largest is not None:
        cells.append(str(one.largest) if one.largest else "none")
    cells.append(f"{plan.flops / 1e12:.2f}")
    if tflops is not None:
        cells.append(f"{plan.flops / plan.tokens / (tflops * 1e12 * UTILISATION) * 1e6:.2f}")
    return cells


def smallest_card(plan: Forecast) -> str:
    """Return the size of the smallest card that the plan fits, as `24+`."""
    return next((f"{size}+" for size, room in CARDS.items() if plan.needed <= room * 2**20), "none")


def show_parts(console: Console, plan: Forecast) -> None:
    """Print the peak of each phase by category, and the largest tensors at the highest."""
    table = Table("GiB at the peak of", *plan.phases)
    for category in dict.fromkeys(name for moment in plan.phases.values() for name in moment.categories):
        sizes = [moment.categories.get(category, 0) for moment in plan.phases.values()]
        if max(sizes) >= SMALLEST_SHOWN * plan.allocated:
            table.add_row(category, *(f"{size / GIB:.3f}" for size in sizes))
    table.add_row("all", *(f"{moment.bytes / GIB:.3f}" for moment in plan.phases.values()))
    console.print(table)
    largest = Table(f"alive at the peak, in {plan.peak.phase}", "category", "MiB")
    for size, category, name in plan.peak.largest[:10]:
        largest.add_row(name, category, f"{size / 2**20:,.1f}")
    console.print(largest)


GPUS = (2, 4, 8)
"""Numbers of GPUs that a model is sharded over where one is too small for it."""
SPLIT = ("frozen weights", "trained weights", "gradients", "optimizer state")
"""Categories of which each of several ranks has a part."""


def advise(console: Console, found: Sequence[Found], card: int, make: Make, device: str) -> None:
    """Say which plans fit the card, and plan what would make the others fit.

    What costs more than time, a base in 4 bits and more GPUs, is planned for a single method only, if nothing else
    makes it fit.
    """
    room = CARDS[card] * 2**20
    for plan, command, _ in found:
        if plan.needed <= room:
            text = f"{plan.name} fits {card} GB, with {(room - plan.needed) / GIB:.2f} GiB to spare."
        else:
            text = f"{plan.name} does not fit {card} GB: it needs {plan.needed / GIB:.2f} GiB."
            fits = False
            for options in levers(plan):
                other = planned(plan.name, make, [*command, *options], device, None).forecast
                text, fits = text + verdict(options, other, room), fits or other.needed <= room
            if not fits and len(found) == 1:
                text += "".join(tried(plan, command, room, make, device))
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def verdict(options: Sequence[str], other: Forecast, room: int) -> str:
    """Return whether a plan with more options fits, as a sentence."""
    fits = "fits" if other.needed <= room else "does not fit either"
    return f" With {' '.join(options)} it needs {other.needed / GIB:.2f} GiB, which {fits}."


def levers(plan: Forecast) -> list[list[str]]:
    """Return the options that may make a plan fit: each that is accepted and not taken yet, then both."""
    ways = [[CHECKPOINTING]] if plan.checkpointable and not plan.checkpointing else []
    ways += [] if plan.setting.batch_size == 1 else [[ONE_ROW]]
    return [*ways, [CHECKPOINTING, ONE_ROW]] if len(ways) == 2 else ways


def tried(plan: Forecast, command: Sequence[str], room: int, make: Make, device: str) -> Iterator[str]:
    """Yield a sentence for each further option that the method takes: a base in 4 bits, GPUs that share the model."""
    least = [*(levers(plan) or [[]])[-1]]
    shared = sum(plan.peak.categories.get(name, 0) for name in SPLIT)
    count = next((count for count in GPUS if plan.needed - shared + shared / count <= room), GPUS[-1])
    for more in ([NF4], [f"--trainer.devices={count}", SHARDED] if plan.setting.ranks == 1 else []):
        if not more or set(more) & set(command):
            continue
        try:
            other = planned(plan.name, make, [*command, *least, *more], device, None).forecast
        except BadInput:
            continue  # the method, or this installation, does not have this option
        yield verdict([*least, *more], other, room)


def write(path: Path, found: Sequence[Found]) -> None:
    """Write the plans as JSON.

    Raises:
        BadInput: if the file cannot be written.
    """
    plans: list[dict[str, Any]] = [
        {**dataclasses.asdict(one.forecast), "needed": one.forecast.needed, "largest_batch": one.largest}
        for one in found
    ]
    try:
        replace_text(json.dumps(plans, indent=1) + "\n", path)
    except OSError as error:
        raise not_written(path, error) from error


def check_json(path: Path) -> None:
    """Refuse a file for --json that may not be replaced or has no folder, before the plans, which take minutes.

    Raises:
        BadInput: if anything but an earlier file of --json is at `path`, or its folder is missing.
    """
    if not path.absolute().parent.is_dir():
        raise not_written(path, FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}"))
    try:
        check_replaceable(path, "plan", lambda file: begins(file, BEGINNING))
    except OSError as error:
        raise not_written(path, error) from error
    except ValueError as error:
        raise BadInput(str(error)) from error


def not_written(path: Path, error: OSError) -> BadInput:
    """Return the error of a file for --json that cannot be written."""
    return BadInput(f"--json {path} cannot be written: {error.strerror or error}; give another file.")
