"""The command `fit` as far as its module, of which `lit-sparse plan` predicts the memory."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lit_sparse.fitting import CLI, start
from lit_sparse.plan import Planned


class Planning(CLI):
    """The command `fit` as far as its module: nothing is loaded, and no trainer made."""

    def before_instantiate_classes(self) -> None:
        """Leave out what belongs to a run: its folder, its name, its checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def planned(self) -> Planned:
        """Return the module, and what else decides its memory."""
        config, data = self.config["fit"], self.datamodule
        trainer = config.trainer
        devices = int(trainer.devices) if str(trainer.devices).isdigit() else 1
        return Planned(
            module=self.model,  # pyright: ignore[reportArgumentType]
            batch_size=getattr(data, "batch_size", 1),
            length=getattr(data, "max_length", 512),
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            ranks=max(1, devices) * trainer.num_nodes,
            sharded="fsdp" in str(trainer.strategy).lower(),
        )


def make_planned(argv: Sequence[str]) -> Planned:
    """Return what `fit` with the options `argv` would train."""
    with quiet():
        return start(Planning, ["fit", *argv]).planned()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's line on the seed from the screen."""
    log = logging.getLogger("lightning.fabric.utilities.seed")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
