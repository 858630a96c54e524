"""Batches in an order that depends on nothing but (seed, epoch), and a loader that knows where it stopped."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_sparse.errors import BadInput

STEPS_SORTED = 50
"""Steps whose rows are sorted by length together: long enough to save padding, short enough to keep epochs random."""

Collate = Callable[[list[Any]], dict[str, Any]]


class Batches(Sampler[list[int]]):
    """Indices of training batches, for ever: shuffled anew in every epoch, rows of like length together.

    Rows are shuffled, every `STEPS_SORTED` steps of them sorted by length and cut into steps, and the steps shuffled.
    A step is one batch on each rank, so that ranks wait for each other as little as possible; every rank has as many.
    The very first step is the largest of its epoch, so that what does not fit into memory shows at once.
    All rows come once an epoch, but for fewer than `world` of them, others in each epoch.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch on one rank.
        seed: Of the order.
        rank: This replica's number.
        world: How many replicas share the rows.

    Attributes:
        start: Number of the batch, counted over all epochs, at which the next iteration begins. An iteration gives as
            many batches as an epoch has, wherever it begins.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if len(lengths) < world:
            raise BadInput(f"{len(lengths)} training rows cannot be shared by {world} processes; use fewer of them.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.start = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size * self.world)
        return whole + (rest >= self.world)

    def __iter__(self) -> Iterator[list[int]]:
        return self._stream(self.start)

    def _stream(self, start: int) -> Iterator[list[int]]:
        epoch, batches = -1, []
        for number in range(start, start + len(self)):
            if number // len(self) != epoch:
                epoch = number // len(self)
                batches = self.epoch(epoch)
            yield batches[number % len(self)]

    def epoch(self, number: int) -> list[list[int]]:
        """This rank's batches of that epoch."""
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        rows = self.batch_size * self.world  # of a step
        steps = []
        for begin in range(0, len(order), rows * STEPS_SORTED):
            some = order[begin : begin + rows * STEPS_SORTED]
            some = some[np.argsort(-self.lengths[some], kind="stable")]
            steps += [some[first : first + rows] for first in range(0, len(some), rows)]
        steps = [step for step in steps if len(step) >= self.world]
        turns = random.permutation(len(steps)).tolist()
        if number == 0:
            turns.insert(0, turns.pop(turns.index(self._largest(steps))))
        return [np.array_split(steps[index], self.world)[self.rank].tolist() for index in turns]

    def _largest(self, steps: Sequence[np.ndarray]) -> int:
        """Index of the step with the most token positions, padding included."""
        return int(np.argmax([self.lengths[step].max() * len(step) for step in steps]))

    def fingerprint(self) -> str:
        """A hash of everything that decides the order of steps, by whatever number of processes each is shared."""
        rows = self.batch_size * self.world
        short = len(self.lengths) % rows  # rows of the last step: too few for each process to have one, it is left out
        settings = repr((rows, self.seed, self.world if 0 < short < self.world else 1))
        return hashlib.sha256(self.lengths.tobytes() + settings.encode()).hexdigest()


class Loader(DataLoader[Any]):
    """A training loader whose position is stored in checkpoints and restored from them.

    Each iteration goes on where the last one stopped, and gives as many batches as an epoch has. That makes runs exact
    however they were interrupted: after the last batch of an epoch, in its midst, or with `limit_train_batches`, where
    an epoch of the trainer's is shorter than one of the data's. The position counts batches handed out; Lightning asks
    for one only when it trains on it, as the loader has a length, and what workers prefetch does not count.

    Args:
        dataset: Of the rows.
        batches: The order.
        collate: Makes a batch of rows.
        workers: Processes that prepare batches; 0 prepares them in the training process.
        epoch: Where to begin, unless a state is loaded.
    """

    def __init__(
        self, dataset: Dataset[Any], batches: Batches, collate: Collate, workers: int = 0, epoch: int = 0
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else iterating draws from the global one, and dropout differs on resume
        )
        self.batches = batches
        self.position = epoch * len(batches)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.batches.start = self.position
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it, and a hash of the order they refer to."""
        epoch, batch = divmod(self.position, len(self))
        return {"epoch": epoch, "batch": batch, "order": self.batches.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues, at the next iteration, where `state` was taken.

        Raises:
            BadInput: other data, seed or rows a step: the position would mean other rows.
        """
        if state["order"] != self.batches.fingerprint():
            raise BadInput(
                "The checkpoint was written with other training data, seed or rows a step (batch size times "
                "processes), so its place in the data is unknown; resume with the same ones, or start a new run from "
                "its weights."
            )
        self.position = state["epoch"] * len(self) + state["batch"]


def evaluation_loader(
    dataset: Dataset[Any],
    lengths: Sequence[int],
    batch_size: int,
    collate: Collate,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[Any]:
    """A loader that gives every row once, longest first, on one of the ranks; all ranks have equally many batches.

    Raises:
        BadInput: there are fewer rows than ranks.
    """
    if len(lengths) < world:
        raise BadInput(f"{len(lengths)} evaluation rows cannot be shared by {world} processes; use fewer of them.")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    most, least = -(-len(order) // world), len(order) // world
    count = min(-(-most // batch_size), least)  # a rank with fewer rows gets smaller batches, never fewer
    batches = [part.tolist() for part in np.array_split(order[rank::world], count)]
    return DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
