"""Lightning's own tools beside the module: each does what it says, or is refused by name before training."""

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger

from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import SMT
from lit_sparse.testing import tiny_llm


def fitted(*tools: L.Callback, warmup_steps: float = 0, **options) -> L.Trainer:
    updates = [SMT(block_size=8, trainable_fraction=0.05)]
    task = CausalLM(tiny_llm(), updates, lr=1e-2, warmup_steps=warmup_steps)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "max_steps": 4, "log_every_n_steps": 1}
    trainer = L.Trainer(callbacks=list(tools), **{**fixed, **quiet, "logger": False, **options})
    rows = Synthetic(vocab_size=96, max_length=12, rows=18, heldout=2, batch_size=2)
    trainer.fit(task, datamodule=rows)
    return trainer


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    "tool",
    [
        callbacks.StochasticWeightAveraging(swa_lrs=1e-2),
        callbacks.EMAWeightAveraging(),
        callbacks.LearningRateFinder(),
        callbacks.BatchSizeFinder(),
    ],
    ids=lambda tool: type(tool).__name__,
)
def test_tools_that_would_do_nothing_are_refused(tool):
    with pytest.raises(
        BadInput, match=rf"trainer\.callbacks has {type(tool).__name__}, which does not work here: .*; "
    ):
        fitted(tool)


def test_early_stopping_stops():
    class Worse(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("worse", float(trainer.global_step))

    stop = callbacks.EarlyStopping("worse", patience=1, check_on_train_epoch_end=False)
    trainer = fitted(Worse(), stop, max_steps=-1, max_epochs=1, val_check_interval=1)
    assert 1 < trainer.global_step < 8


def test_learning_rates_gradients_tokens_and_accuracy_are_logged(tmp_path):
    trainer = fitted(
        callbacks.LearningRateMonitor(), logger=CSVLogger(tmp_path, name="", version="x"), accumulate_grad_batches=2
    )
    logged = trainer.logged_metrics
    assert {"train_loss", "train_accuracy", "lr", "grad_norm", "scored_tokens"} <= logged.keys()
    columns = (tmp_path / "x" / "metrics.csv").read_text().splitlines()[0]
    assert "lr-AdamW" in columns
    assert {"train_loss", "train_accuracy", "lr", "grad_norm", "scored_tokens"} <= set(columns.split(","))
    assert 0 <= float(logged["train_accuracy"]) <= 1
    assert float(logged["scored_tokens"]) == 4 * 2 * 2 * 11
    assert float(logged["grad_norm"]) > 0


def test_lightnings_profiler_sees_the_fit():
    assert "optimizer_step" in fitted(profiler="simple").profiler.summary()


def test_a_time_limit_alone_is_a_limit():
    limits = {"max_steps": -1, "max_epochs": -1, "max_time": {"seconds": 2}}
    assert fitted(**limits).global_step > 0
    with pytest.raises(BadInput, match=r"model\.warmup_steps is 0\.1, a share of all steps"):
        fitted(warmup_steps=0.1, **limits)


@pytest.mark.filterwarnings("ignore:You are trying to")
def test_barebones_trains():
    task = CausalLM(tiny_llm(), [SMT(block_size=8, trainable_fraction=0.05)], lr=1e-2)
    before = [p.detach().clone() for p in tiny_llm().parameters()]
    rows = Synthetic(vocab_size=96, max_length=12, rows=18, heldout=2, batch_size=2)
    L.Trainer(barebones=True, accelerator="cpu", max_steps=2, use_distributed_sampler=False).fit(task, datamodule=rows)
    assert any(not torch.equal(p, b) for p, b in zip(task.detach().parameters(), before, strict=True))
