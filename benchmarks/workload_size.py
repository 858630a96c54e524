"""Count what a quality table scores, and estimate its hours: `python -m benchmarks.workload_size TABLE`.

A trial is taken to last as long as the median one of `blocks_0.84` on this kind of device, in proportion to its tokens:
each one that is trained on counts as three that are scored (forward, and a backward pass of two).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from benchmarks.quality import RESULTS, left, stack_of
from benchmarks.ranking import Results, belonging
from benchmarks.trials import Config, Table, read_table
from lit_sparse.data import TokenData
from lit_sparse.data.examples import Examples
from lit_sparse.errors import BadInput
from lit_sparse.loss import IGNORED

LIKE = "blocks_0.84"


def sets(workload: Config) -> dict[str, tuple[int, int, int]]:
    """Return rows, tokens and scored tokens of a workload's training set and of each of its validation sets."""
    module, _, kind = workload["data"]["class_path"].rpartition(".")
    arguments = {"tokenizer": workload["model"].get("base", "demo"), **workload["data"].get("init_args", {})}
    data = getattr(import_module(module), kind)(**arguments)
    if not isinstance(data, TokenData):
        raise BadInput(f"the data are {kind}, of which tokens are not counted; give a table on rows of text.")
    data.prepare_data()
    data.setup("fit")
    found = {name: data.examples[name] for name in ("train", *data.val_names)}
    return {name: (len(rows), sum(rows.lengths), scored(rows)) for name, rows in found.items()}


def scored(rows: Examples) -> int:
    """Return how many tokens of rows are scored: those with a label, but never the first of a row."""
    labelled = rows.labels != IGNORED
    labelled[rows.starts[:-1]] = False
    return int(labelled.sum())


def work_of(workload: Config, found: Mapping[str, tuple[int, int, int]]) -> float:
    """Return the tokens of a trial: those trained on three times, and those scored at its end."""
    rows, tokens, _ = found["train"]
    batch, trainer = workload["data"].get("init_args", {}).get("batch_size", 4), workload["trainer"]
    trained = trainer["max_steps"] * trainer.get("accumulate_grad_batches", 1) * batch * tokens / rows
    return 3 * trained + sum(tokens for name, (_, tokens, _) in found.items() if name != "train")


def hours(made: Table, results: Results, found: Mapping[str, tuple[int, int, int]]) -> float | None:
    """Return the estimated hours of what is left of a table; None where nothing is known of this kind of device."""
    like = read_table(LIKE)
    seconds = [line["seconds"] for line in belonging(like, results)]
    if not seconds:
        return None
    share = work_of(made.workload, found) / work_of(like.workload, sets(like.workload))
    # The median: a few of them shared their core with other processes.
    return left(made, results)[0] * statistics.median(seconds) * share / 3600


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sizes and the estimate; return the exit status, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload_size", description=__doc__)
    parser.add_argument("table", help="name of a table in benchmarks/quality, or a YAML file")
    try:
        made = read_table(parser.parse_args(arguments).table)
        results = Results(RESULTS, stack_of(made.workload))
        found = sets(made.workload)
    except BadInput as error:
        print(f"workload_size: {error}", file=sys.stderr)
        return 2
    for name, (rows, tokens, count) in found.items():
        print(f"{name}: {rows:,} rows, {tokens:,} tokens, {count:,} of them scored")
    needed = hours(made, results, found)
    told = f"not known, since {LIKE} was not measured here" if needed is None else f"{needed:.1f} (one process)"
    print(f"{left(made, results)[0]} trainings left, hours: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
