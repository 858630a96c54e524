"""Order of batches and resuming: an interrupted run sees the batches of an uninterrupted one."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.data.examples import Examples
from lit_sparse.data.loader import Batches, Loader, evaluation_loader
from lit_sparse.errors import BadInput

LENGTHS = [1 + (index * 7) % 13 for index in range(103)]


def rows_of(count: int) -> Examples:
    """Make rows that begin with their own index."""
    return Examples.of([Example([index] * (2 + index % 3), [index] * (2 + index % 3)) for index in range(count)])


def loader(count: int = 18, size: int = 4, workers: int = 0, seed: int = 0) -> Loader:
    rows = rows_of(count)
    return Loader(rows, Batches(rows.lengths, size, seed), Padded(Padding()), workers)


def contents(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


# ---- order


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    first, again = Batches(LENGTHS, 4, seed=3), Batches(LENGTHS, 4, seed=3)
    assert [again.epoch(2), again.epoch(0)] == [first.epoch(2), first.epoch(0)]
    assert first.epoch(0) != first.epoch(1)
    assert first.epoch(0) != Batches(LENGTHS, 4, seed=4).epoch(0)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_share_all_rows_once_an_epoch(world, epoch):
    ranks = [Batches(LENGTHS, 4, 0, rank, world) for rank in range(world)]
    batches = [rank.epoch(epoch) for rank in ranks]
    assert {len(own) for own in batches} == {len(ranks[0])}
    seen = Counter(row for own in batches for batch in own for row in batch)
    assert set(seen.values()) == {1}
    assert len(LENGTHS) - len(seen) < world
    assert max(len(batch) for own in batches for batch in own) == 4


@pytest.mark.parametrize("world", [1, 2])
def test_rows_may_keep_their_order(world):
    ranks = [Batches(LENGTHS, 4, 0, rank, world, shuffle=False) for rank in range(world)]
    steps = [[row for part in parts for row in part] for parts in zip(*(rank.epoch(0) for rank in ranks), strict=True)]
    assert [row for step in steps for row in step] == list(range(len(LENGTHS)))
    assert {len(step) for step in steps[:-1]} == {4 * world}
    assert ranks[0].epoch(1) == ranks[0].epoch(0) == Batches(LENGTHS, 4, 7, 0, world, shuffle=False).epoch(0)
    assert ranks[0].fingerprint() != Batches(LENGTHS, 4, 0, 0, world).fingerprint()


def test_too_few_rows_for_the_ranks():
    with pytest.raises(BadInput, match="3 training rows cannot be shared by 4"):
        Batches([1, 1, 1], 4, 0, 0, 4)


def test_rows_of_like_length_share_a_batch():
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[row] for row in batch) - LENGTHS[one] for batch in batches for one in batch)

    random = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0)).split(4)
    assert padding(Batches(LENGTHS, 4).epoch(0)) < 0.2 * padding([batch.tolist() for batch in random])


def test_batches_do_not_come_sorted():
    longest = [max(LENGTHS[row] for row in batch) for batch in Batches(LENGTHS, 4).epoch(0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


# ---- position


def test_iterations_continue_where_the_last_one_stopped():
    straight, broken = loader(), loader()
    whole = [contents(batch) for _ in range(2) for batch in straight]
    assert len(whole) == 10
    part = [contents(batch) for batch, _ in zip(broken, range(3), strict=False)]
    assert part == whole[:3]
    # zip took a fourth batch to find out that it has enough
    assert [contents(batch) for batch in broken][:5] == whole[4:9]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 2, 5, 7])
def test_a_restored_loader_yields_what_the_saved_one_would(workers, taken):
    straight = loader(workers=workers)
    seen = iter_for_ever(straight)
    for _ in range(taken):
        next(seen)
    restored = loader(workers=workers)
    restored.load_state_dict(straight.state_dict())
    assert [contents(next(seen)) for _ in range(7)] == [
        contents(b) for b, _ in zip(iter_for_ever(restored), range(7), strict=False)
    ]


def iter_for_ever(loader: Loader):
    while True:
        yield from loader


def test_iterating_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(loader(workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [loader(seed=1), loader(size=3), loader(count=19)])
def test_state_of_another_order_is_refused(other):
    with pytest.raises(BadInput, match="place in the data is unknown"):
        loader().load_state_dict(other.state_dict())


# ---- under Lightning


class Recorder(L.LightningModule):
    """A module with dropout that records the rows of every batch and the order of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(contents(batch))
        return self.layer(batch["input_ids"][:, :1].float() / 100).square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("loss", float(batch_idx), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


class AtEnds(L.Callback):
    """A checkpoint callback that saves when `ModelCheckpoint` does by default."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"validation-{trainer.global_step}.ckpt")


def fit(folder: Any, workers: int, steps: int, resume: Any = None, **settings: Any) -> Recorder:
    at_steps = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[at_steps, AtEnds(folder)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    torch.manual_seed(0)
    recorder = Recorder()
    validation = DataLoader(rows_of(3), batch_size=2, collate_fn=Padded(Padding()))
    trainer.fit(recorder, loader(workers=workers), validation, ckpt_path=resume, weights_only=True)
    return recorder


QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*exists and is not empty", "ignore:The dirpath has changed"
)


@QUIET
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 2},
        {"limit_train_batches": 3},
        {"limit_train_batches": 4, "accumulate_grad_batches": 2},
        # not together with accumulation: resumed from the end of an epoch without validation, Lightning 2.6 makes the
        # next batch an epoch, and a step, of its own; the batches come in the right order even then
        {"limit_val_batches": 0},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()) or "plain",
)
def test_resumed_run_equals_the_straight_one(tmp_path, workers, settings):
    straight = fit(tmp_path, workers, 10, **settings)
    batches_a_step = settings.get("accumulate_grad_batches", 1)
    assert len(straight.seen) >= 10 * batches_a_step - 3  # the last step of an epoch may accumulate fewer
    steps = (2, 3, 5) if workers else range(1, 10)  # in mid-epoch, and at its end: an epoch has 5 batches
    saved = [tmp_path / f"{when}{step}.ckpt" for when in ("step=", "epoch-", "validation-") for step in steps]
    for path in filter(Path.exists, saved):
        resumed = fit(tmp_path / "resumed", workers, 10, path, **settings)
        assert resumed.seen == straight.seen[len(straight.seen) - len(resumed.seen) :], path
        assert 0 < len(resumed.seen) < len(straight.seen)
        assert torch.equal(resumed.layer.weight, straight.layer.weight), path


# ---- evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("count", [3, 9, 64])
def test_evaluation_gives_every_row_once_and_ranks_equally_many_batches(world, size, count):
    rows = rows_of(count)
    loaders = [evaluation_loader(rows, rows.lengths, size, Padded(Padding()), rank, world) for rank in range(world)]
    assert len({len(one) for one in loaders}) == 1
    assert sorted(row for one in loaders for batch in one for row in contents(batch)) == list(range(count))
    assert max(len(batch["labels"]) for one in loaders for batch in one) <= size + 1


def test_evaluation_needs_a_row_for_each_rank():
    with pytest.raises(BadInput, match="1 evaluation rows cannot be shared by 2"):
        evaluation_loader(rows_of(1), [2], 4, Padded(Padding()), 0, 2)


def test_the_position_holds_for_any_number_of_processes_with_the_same_steps():
    one = Batches([8] * 14, 4)
    for rank in range(2):
        assert Batches([8] * 14, 2, rank=rank, world=2).fingerprint() == one.fingerprint()
    assert Batches([8] * 14, 4, rank=0, world=2).fingerprint() != one.fingerprint()
    # A row is left over: one process trains on it, two cannot share it.
    assert Batches([8] * 13, 2, rank=0, world=2).fingerprint() != Batches([8] * 13, 4).fingerprint()


class Torn(Examples):
    """Rows of which one cannot be read."""

    def __getitem__(self, index: int) -> Example:
        if index == 4:
            raise ValueError("torn")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_breaks_in_mid_epoch_is_named(workers: int):
    rows = rows_of(9)
    torn = Torn(rows.ids, rows.labels, rows.starts)
    batches = Batches(rows.lengths, 2, shuffle=False)
    found = []
    with pytest.raises(BadInput) as refusal:
        found.extend(Loader(torn, batches, Padded(Padding()), workers))
    assert str(refusal.value).startswith("row 5 of the 9 training rows cannot be read (ValueError: torn); correct")
    assert "\n" not in str(refusal.value)
