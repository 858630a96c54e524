"""Batches in an order that depends only on (seed, epoch), and a loader that resumes at its position."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_sparse.errors import BadInput

STEPS_SORTED = 50
"""Steps whose rows are sorted by length together. More save more padding, and make epochs less random."""

Collate = Callable[[list[Any]], dict[str, Any]]


class Batches(Sampler[list[int]]):
    """Sampler of training batches without end: shuffled in every epoch, with rows of similar length together.

    Rows are shuffled, each `STEPS_SORTED` steps of them are sorted by length and cut into steps, and the steps are
    shuffled. A step is one batch on each rank. Its rows have similar lengths, so that ranks rarely wait for each other.
    The first step of all is the largest of its epoch: a run that does not fit into memory fails at once.

    With `shuffle` false, rows come in their own order, in every epoch.

    Every rank has the same number of batches, or collectives would deadlock. Each epoch covers all rows but fewer than
    `world`, which are others in each epoch.

    Args:
        lengths: Number of tokens of each row.
        batch_size: Rows in a batch on one rank.
        seed: Seed of the order.
        rank: Rank of this replica.
        world: Number of replicas that share the rows.
        shuffle: Draw a new order in every epoch.

    Attributes:
        start: Index of the batch, counted over all epochs, at which the next iteration begins. An iteration yields as
            many batches as an epoch has, wherever it begins.

    Raises:
        BadInput: if there are fewer rows than replicas.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        if len(lengths) < world:
            raise BadInput(f"{len(lengths)} training rows cannot be shared by {world} processes; use fewer of them.")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world, self.shuffle = batch_size, seed, rank, world, shuffle
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
        """Return this rank's batches of epoch `number`, as lists of row indices."""
        steps = self._shuffled(number) if self.shuffle else self._steps(np.arange(len(self.lengths)))
        return [np.array_split(step, self.world)[self.rank].tolist() for step in steps]

    def _shuffled(self, number: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, number])
        order = random.permutation(len(self.lengths))
        together = self.batch_size * self.world * STEPS_SORTED
        steps = []
        for begin in range(0, len(order), together):
            some = order[begin : begin + together]
            steps += self._steps(some[np.argsort(-self.lengths[some], kind="stable")])
        turns = random.permutation(len(steps)).tolist()
        if number == 0:
            turns.insert(0, turns.pop(turns.index(self._largest(steps))))
        return [steps[index] for index in turns]

    def _steps(self, order: np.ndarray) -> list[np.ndarray]:
        """Cut the rows in `order` into steps."""
        rows = self.batch_size * self.world
        steps = [order[first : first + rows] for first in range(0, len(order), rows)]
        return [step for step in steps if len(step) >= self.world]  # a rank without rows would have no batch

    def _largest(self, steps: Sequence[np.ndarray]) -> int:
        """Return the index of the step with the most token positions, padding included."""
        return int(np.argmax([self.lengths[step].max() * len(step) for step in steps]))

    def fingerprint(self) -> str:
        """Return a hash of everything on which the order of steps depends.

        The number of processes is not part of it, as long as a step has the same number of rows: a run may be resumed
        on two GPUs with half the batch size.
        """
        rows = self.batch_size * self.world
        short = len(self.lengths) % rows  # rows of the last step, which is dropped if a process would have none
        seed = self.seed if self.shuffle else None
        settings = repr((rows, seed, self.world if 0 < short < self.world else 1))
        return hashlib.sha256(self.lengths.tobytes() + settings.encode()).hexdigest()


class Named(Dataset[Any]):
    """Rows of which one that cannot be read is named by its place.

    Args:
        rows: A dataset with a length.
        what: What the rows are for, such as `training`.
    """

    def __init__(self, rows: Any, what: str) -> None:
        self.rows, self.what = rows, what

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.rows[index]
        except Exception as error:
            raise BadInput(
                f"row {index + 1} of the {len(self)} {self.what} rows cannot be read ({type(error).__name__}: "
                f"{error}); correct or remove it, and go on from the last checkpoint."
            ) from error


class Loader(DataLoader[Any]):
    """Training loader whose position is saved in checkpoints and restored from them.

    Each iteration continues where the last one stopped, and yields as many batches as an epoch has. A resumed run is
    therefore exact wherever it was interrupted: after an epoch, within one, or with `limit_train_batches`, under which
    the trainer's epochs are shorter than the data's.

    The position counts the batches that were yielded. Lightning fetches ahead only from loaders without a length, and
    batches that workers prefetch are not yielded yet.

    Args:
        dataset: The rows.
        batches: Their order.
        collate: Makes a batch from a list of rows.
        workers: Worker processes that prepare batches; 0 prepares them in the training process.
        epoch: Epoch at which to begin, unless a state is loaded.
    """

    def __init__(
        self, dataset: Dataset[Any], batches: Batches, collate: Collate, workers: int = 0, epoch: int = 0
    ) -> None:
        super().__init__(
            Named(dataset, "training"),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Without a generator, each new iterator draws its workers' seed from the global one: a run that resumes,
            # and makes one iterator more, would have other dropout masks.
            generator=torch.Generator(),
            worker_init_fn=ignore_interrupts,
        )
        self.batches = batches
        self.position = epoch * len(batches)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.batches.start = self.position
        with own_refusals():
            for batch in super().__iter__():
                self.position += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of batches yielded in it, and a hash of the order that they refer to."""
        epoch, batch = divmod(self.position, len(self))
        return {"epoch": epoch, "batch": batch, "order": self.batches.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state` in the next iteration.

        Raises:
            BadInput: if data, seed or rows per step differ, so that the position means other rows.
        """
        if state["order"] != self.batches.fingerprint():
            raise BadInput(
                "The checkpoint was written with other training data, seed or rows per step (batch size times "
                "processes), so that its place in the data is unknown; resume with the same ones, or start a new run "
                "from its weights."
            )
        self.position = state["epoch"] * len(self) + state["batch"]


@contextmanager
def own_refusals() -> Iterator[None]:
    """Raise the BadInput of a worker process with its sentence only: torch puts the worker's traceback before it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(str(error).strip().rpartition("BadInput: ")[2]) from error


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the training process, which saves first: a worker that dies of it ends the run with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_loader(
    dataset: Dataset[Any],
    lengths: Sequence[int],
    batch_size: int,
    collate: Collate,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader[Any]:
    """Return a loader of this rank's rows, longest first. Ranks together yield every row once.

    All ranks have the same number of batches: the forward of a sharded model is a collective, in which a rank without a
    batch would leave the others waiting. Sorting by length saves padding, and a run that does not fit into memory fails
    at the first batch.

    Args:
        dataset: The rows.
        lengths: Number of tokens of each row.
        batch_size: Maximum number of rows in a batch.
        collate: Makes a batch from a list of rows.
        rank: Rank of this replica.
        world: Number of replicas that share the rows.
        workers: Worker processes that prepare batches; 0 prepares them in the training process.

    Raises:
        BadInput: if there are fewer rows than ranks.
    """
    if len(lengths) < world:
        raise BadInput(f"{len(lengths)} evaluation rows cannot be shared by {world} processes; use fewer of them.")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    most, least = -(-len(order) // world), len(order) // world
    count = min(-(-most // batch_size), least)  # a rank with fewer rows has smaller batches, not fewer
    batches = [part.tolist() for part in np.array_split(order[rank::world], count)]
    return DataLoader(
        Named(dataset, "evaluation"),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=ignore_interrupts,
    )
