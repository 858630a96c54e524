"""The command `fit` as far as its module, of which `lit-sparse plan` predicts the memory."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lit_sparse.commands.fit import CLI, start
from lit_sparse.commands.plan import Planned
from lit_sparse.errors import BadInput
from lit_sparse.refusals import check_trainer_numbers


class Planning(CLI):
    """The command `fit` as far as its module: nothing is loaded, and no trainer made."""

    def before_instantiate_classes(self) -> None:
        """Leave out what belongs to a run: its folder, its name, its checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    def planned(self) -> Planned:
        """Return the module, and what else decides its memory.

        Raises:
            BadInput: if the ranks keep what they shard in host memory, or are no whole groups, or a number of the
                trainer makes no sense.
        """
        config, data = self.config["fit"], self.datamodule
        trainer = config.trainer
        check_trainer_numbers(trainer)
        if trainer.num_nodes < 1:
            raise BadInput(f"trainer.num_nodes is {trainer.num_nodes}, but it is a number of machines; give 1 or more.")
        ranks = devices_of(trainer.devices) * trainer.num_nodes
        options = getattr(trainer.strategy, "init_args", {})
        replicas = options.get("replicas", 1)
        if options.get("offload"):
            raise BadInput(
                "trainer.strategy has offload, whose host memory plan does not trace; leave it out for a bound: a GPU "
                "then holds its shards, too."
            )
        if replicas < 1 or ranks % replicas:
            raise BadInput(
                f"trainer.strategy has replicas {replicas}, which do not divide {ranks} ranks; give a divisor."
            )
        return Planned(
            module=self.model,  # pyright: ignore[reportArgumentType]
            batch_size=getattr(data, "batch_size", 1),
            length=getattr(data, "max_length", 512),
            accumulate=trainer.accumulate_grad_batches,
            clip=trainer.gradient_clip_val,
            ranks=ranks,
            sharded="fsdp" in str(trainer.strategy).lower(),
            replicas=replicas,
        )


def devices_of(asked: Any) -> int:
    """Return the number of devices of a machine that `trainer.devices` asks for; 1 where only that machine knows.

    Raises:
        BadInput: if it is no number of devices, no list of their indices, and neither auto nor -1.
    """
    text = str(asked).strip("[] ")
    if text in ("auto", "-1"):
        return 1
    numbers = [one.strip() for one in text.split(",") if one.strip()]
    indices = isinstance(asked, list) or "," in text
    if not numbers or not all(one.isdecimal() for one in numbers) or (not indices and int(text) == 0):
        raise BadInput(f"trainer.devices is {asked}; give a number of devices, a list of their indices, or auto.")
    return len(numbers) if indices else int(text)


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
