"""The verb `select`: what a method chooses before training, in a file that `fit` reads."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from lit_sparse.callbacks.rank_watch import RankWatch
from lit_sparse.commands.bench import take
from lit_sparse.commands.fit import CLI, start
from lit_sparse.errors import BadInput
from lit_sparse.selections import write_selection
from lit_sparse.strategies import UpdateStrategy


def select_parser() -> argparse.ArgumentParser:
    """Return the command line of `select`; options that it does not know are keys of `fit`."""
    parser = argparse.ArgumentParser(
        prog="lit-sparse select",
        description="Choose what a method trains (blocks, entries) as fit does, but train nothing: write it to a file.",
        epilog="Any option of `lit-sparse fit` describes the run, as in --config smt.yaml --trainer.devices 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="selection.json", help="the file to write (default selection.json)")
    return parser


def select(argv: Sequence[str]) -> int:
    """Run the verb `select`; return its exit status.

    Raises:
        BadInput: if no method of the run selects, or the file is there already.
    """
    own, passed = take(argv, ("--output", "-h", "--help"))
    Selecting.output, Selecting.argv = Path(select_parser().parse_args(own).output), ["select", *argv]
    start(Selecting, ["fit", *passed])
    return 0


class Selecting(CLI):
    """The command `fit` up to its first step: what a method has selected by then goes to a file.

    Attributes:
        output: The file.
        argv: The words of the command, with which Lightning starts other ranks.
    """

    output: Path
    argv: Sequence[str]

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        if config.ckpt_path is not None:
            raise BadInput("select chooses anew, but --ckpt_path was given; leave it out.")
        if self.output.exists():
            raise BadInput(f"{self.output} is there already; give --output another name, or remove it.")
        config.trainer.max_steps, config.trainer.num_sanity_val_steps = 0, 0
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        sys.argv[1:] = self.argv
        self.folder = None
        return LightningCLI.instantiate_trainer(self, logger=False, callbacks=[RankWatch()], enable_checkpointing=False)

    def fit(self, **arguments: Any) -> None:
        selecting = [update for update in self.model.updates if update.selects]
        if len(selecting) != 1:
            raise BadInput(
                f"select writes what one method selects before training, and {self.model.updates.names} has "
                f"{len(selecting)} that do; give smt.yaml or lift.yaml."
            )
        self.trainer.fit(**{**arguments, "weights_only": True})
        state = selecting[0].state_dict()
        if self.trainer.is_global_zero:
            write_selection(state, self.output)
            own = selecting[0].selects
            key = f"--model.updates.{own}" if len(self.model.updates) == 1 else own
            more = caveat(selecting[0], self.output)
            print(f"Wrote {self.output}: fit with {key} {self.output} trains what it names.{more}")


def caveat(update: UpdateStrategy, path: Path) -> str:
    """Return what else has to change in a method's keys for it to read the file, as the end of a line; or nothing."""
    try:
        dataclasses.replace(update, **{update.selects: str(path)})  # pyright: ignore[reportArgumentType]
    except BadInput as error:
        return f" But {error}"
    return ""
