"""A fit on two ranks: its record has the tokens of both."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lit_sparse.callbacks import Profile
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.modules import CausalLM
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.ranks import note_of_one
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.pair import attempt, result, run_pair

STEPS, WIDTH = 3, 8


class Net(L.LightningModule):
    """A small regression. It fails in its third step if `fails`."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net, self.fails = nn.Linear(WIDTH, 1), fails

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.fails and batch_idx == 2:
            raise RuntimeError("a planted failure")
        return self.net(batch["input_ids"].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def trainer(steps: int, callback: L.Callback) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=steps,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        callbacks=[callback],
        **quiet,
    )


def mask_of(rank: int) -> torch.Tensor:
    """Rank 0 has 3 tokens in a batch, rank 1 has 5."""
    return (torch.arange(WIDTH) < 3 + 2 * rank).long()[None]


def fit(folder: Path, rank: int, fails: bool) -> None:
    rows = DataLoader([{"input_ids": torch.ones(1, WIDTH), "attention_mask": mask_of(rank)}] * 8, batch_size=None)
    profile = Profile(folder / ("failed" if fails else "ended"), Plan(0, False, 0))
    trainer(STEPS, profile).fit(Net(fails), rows)


def go_on(folder: Path, rank: int) -> None:
    """Train two steps, and from their checkpoint the others."""
    ids = torch.arange(WIDTH)[None]
    rows = DataLoader([{"input_ids": ids, "attention_mask": mask_of(rank), "labels": ids}] * 8, batch_size=None)
    for steps, checkpoint in ((2, None), (2 + STEPS, folder / "cut" / "checkpoints" / "last.ckpt")):
        torch.manual_seed(0)
        module = CausalLM(tiny_llm("llama"), lr=1e-3)
        module.resume_from = checkpoint
        recorder = Recorder(folder / "cut", Plan(0, False, 0, predict=False), samples=0)
        trainer(steps, recorder).fit(module, rows, ckpt_path=checkpoint)


def both(folder: Path, rank: int) -> None:
    attempt(folder, rank, "ended", lambda: fit(folder, rank, fails=False))
    attempt(folder, rank, "resumed", lambda: go_on(folder, rank))
    attempt(folder, rank, "failed", lambda: fit(folder, rank, fails=True))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    run_pair(both, folder)
    return folder


def test_tokens_are_those_of_all_ranks_and_each_ranks_are_there(pair: Path) -> None:
    for rank in range(2):
        result(pair, "ended", rank)
    record = RunRecord.read(pair / "ended" / "record.json")
    found = record.throughput
    assert (found.steps, found.tokens, found.padded_tokens) == (STEPS, STEPS * (3 + 5), STEPS * 2 * WIDTH)
    assert [(rank.rank, rank.tokens, rank.padded_tokens) for rank in record.ranks] == [
        (0, STEPS * 3, STEPS * WIDTH),
        (1, STEPS * 5, STEPS * WIDTH),
    ]
    assert record.memory.peak_resident == max(rank.peak_memory for rank in record.ranks)
    assert [note for note in record.notes if "sums over 2 ranks" in note]


def test_a_fit_that_failed_says_that_it_has_the_first_ranks_figures(pair: Path) -> None:
    record = RunRecord.read(pair / "failed" / "record.json")
    assert (record.status, record.throughput.tokens, record.ranks) == ("failed", 2 * 3, [])
    assert record.notes == [note_of_one(2)]
    assert record.notes[0].startswith("Tokens, joules and memory are those of the first of 2 ranks")


def test_a_resumed_fit_has_the_tokens_of_all_ranks_in_both_parts(pair: Path) -> None:
    for rank in range(2):
        result(pair, "resumed", rank)
    record = RunRecord.read(pair / "cut" / "record.json")
    steps = 2 + STEPS
    found = record.throughput
    assert (record.status, found.steps, found.tokens, found.padded_tokens) == (
        "ok",
        steps,
        steps * 8,
        steps * 2 * WIDTH,
    )
    assert [(rank.rank, rank.tokens, rank.padded_tokens) for rank in record.ranks] == [
        (0, steps * 3, steps * WIDTH),
        (1, steps * 5, steps * WIDTH),
    ]
