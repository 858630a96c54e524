"""Resuming with the settings of the command line: what users run, stopped anywhere, goes on as if it had not been."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_sparse import cli
from lit_sparse.errors import BadInput
from lit_sparse.places import configs_folder
from lit_sparse_profiling.record import RunRecord
from tests.test_cli import SMALL

DATA = [
    *("--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4", "--data.max_length", "16"),
    *("--data.batch_size", "2", "--data.num_workers", "0", "--samples", "0"),
]


class Cut(Exception):
    """Stops a run from outside."""


class Stop(L.Callback):
    """Stops a run after an optimizer step; notes the learning rate and the rows of each step.

    Args:
        step: After which; 0 never.
        evaluating: Stop it in the evaluation after that step.
    """

    seen: list[tuple[float, list[int]]] = []

    def __init__(self, step: int = 0, evaluating: bool = False) -> None:
        self.step, self.evaluating = step, evaluating

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.evaluating and trainer.global_step == self.step:
            raise Cut

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.step and trainer.global_step >= self.step:  # here, when the step's checkpoint is written
            raise Cut
        self.seen.append((trainer.optimizers[0].param_groups[0]["lr"], batch["input_ids"].flatten().tolist()))


def fit(method: str, run: str, stop: int = 0, *words: str) -> list[tuple[float, list[int]]]:
    """Run `lit-sparse fit`, and return what each step was given."""
    Stop.seen = []
    call = ["--trainer.callbacks+=tests.test_resume.Stop", f"--trainer.callbacks.step={stop}"]
    config = ["--config", str(configs_folder() / f"{method}.yaml")]
    arguments = ["fit", *config, "--model.base", "tiny", *DATA, *SMALL, *call, "--run", run, *words]
    if stop:
        with pytest.raises(Cut):
            cli.run(arguments)
    else:
        cli.run(arguments)
    return Stop.seen


def saved(run: str) -> dict[str, torch.Tensor]:
    return torch.load(Path("runs") / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


CASES = [
    (method, stop, words)
    for method, extra in {"lora": (), "smt": (), "lisa": (), "full": ()}.items()
    for stop, words in ((4, extra), (3, (*extra, "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2")))
]
CASES += [
    ("mezo", 3, ("--trainer.max_epochs=2", "--model.updates.momentum=0.5")),
    ("galore", 4, ("--model.updates.refresh_every=3",)),  # stopped between two choices of the subspace
    ("fira", 3, ("--model.updates.refresh_every=2", "--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=2")),
    ("adalomo", 4, ()),
]


@pytest.mark.parametrize(("method", "stop", "words"), CASES)
def test_a_run_stopped_in_mid_epoch_goes_on_exactly(home, method, stop, words):
    """One epoch is the default: the loader is built before its saved position arrives."""
    straight = fit(method, "straight", 0, *words)
    begun = fit(method, "cut", stop, *words, f"--checkpoint_steps={stop}")
    resumed = fit(method, "cut", 0, *words, "--ckpt_path=last")
    assert begun + resumed == straight
    expected = saved("straight-1")
    assert saved("cut-1").keys() == expected.keys()
    for name, value in saved("cut-1").items():
        assert torch.equal(value, expected[name]), name


def test_other_data_or_another_batch_size_is_refused(home, caplog):
    fit("lora", "cut", 4, "--checkpoint_steps=4")
    with pytest.raises(BadInput, match="was written with other training data, seed or rows per step"):
        fit("lora", "cut", 0, "--ckpt_path=last", "--data.batch_size=3")
    own = "--config runs/cut-1/config.yaml instead of the other --config and --data resumes on the run's own data."
    assert own in caplog.messages


def test_the_learning_rate_is_that_of_this_runs_schedule(home):
    """Four steps were asked for, and then eight: the fifth is half-way down."""
    limits = ("--trainer.max_epochs=2", "--trainer.max_steps=8", "--model.warmup_steps=0")
    fit("lora", "cut", 0, "--model.lr=0.01", *limits, "--trainer.max_steps=4")
    resumed = fit("lora", "cut", 0, "--model.lr=0.01", *limits, "--ckpt_path=last")
    assert [lr for lr, _ in resumed] == pytest.approx([0.005, 0.00375, 0.0025, 0.00125])
    fit("lora", "other", 4, "--model.lr=0.01", *limits, "--checkpoint_steps=4")
    again = fit("lora", "other", 0, "--model.lr=0.02", *limits, "--ckpt_path=last")
    assert [lr for lr, _ in again] == pytest.approx([0.01, 0.0075, 0.005, 0.0025]), "a rate given now wins"


def test_a_setting_of_the_optimizer_is_this_runs_and_its_class_the_first_ones(home):
    adamw = ("--model.optimizer=lit_sparse.optim.AdamW", "--model.optimizer.weight_decay")
    limits = ("--trainer.max_steps=2", "--checkpoint_steps=2")
    fit("full", "cut", 0, *limits, adamw[0], f"{adamw[1]}=0.01")
    fit("full", "cut", 0, "--trainer.max_steps=4", adamw[0], f"{adamw[1]}=0.1", "--ckpt_path=last")
    (state,) = torch.load("runs/cut-1/checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    with pytest.raises(BadInput, match=r"has the state of lit_sparse.*AdamW, and this run's optimizer is torch.*SGD"):
        fit("full", "cut", 0, "--trainer.max_steps=6", "--model.optimizer=torch.optim.SGD", "--ckpt_path=last")


def scores(run: str) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without what is measured."""
    measured = ("tokens_per_second", "peak_memory_gib")
    with open(Path("runs") / run / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in measured} for row in csv.DictReader(file)]


def outcome(run: str) -> dict[str, dict[str, float]]:
    record = RunRecord.read(Path("runs") / run / "record.json")
    assert record.status == "ok"
    return record.outcome


LIMITS = ("--trainer.max_epochs=2", "--trainer.val_check_interval=4")


@pytest.mark.parametrize("stop", [4, 10])  # within an epoch, and after its last batch
def test_an_evaluation_that_was_cut_off_runs_before_the_next_step(home, stop):
    every = f"--trainer.val_check_interval={stop}"
    fit("lora", "straight", 0, *LIMITS, every)
    fit("lora", "cut", stop, *LIMITS, every, f"--checkpoint_steps={stop}", "--trainer.callbacks.evaluating=true")
    fit("lora", "cut", 0, *LIMITS, every, "--ckpt_path=last")
    assert scores("cut-1") == scores("straight-1")
    assert outcome("cut-1") == outcome("straight-1")


@pytest.mark.parametrize(("last", "limit"), [(6, "--trainer.max_steps=6"), (10, "--trainer.val_check_interval=5")])
def test_the_evaluation_after_the_last_step_is_made_up_for(home, capsys, last, limit):
    words = ("--trainer.val_check_interval=4", limit)  # of one epoch
    fit("lora", "straight", 0, *words)
    fit("lora", "cut", last, *words, "--trainer.callbacks.evaluating=true")
    checkpoint = Path("runs/cut-1/checkpoints/last.ckpt")
    before = checkpoint.read_bytes()
    assert fit("lora", "cut", 0, *words, "--ckpt_path=last") == []
    assert scores("cut-1") == scores("straight-1")
    assert outcome("cut-1") == outcome("straight-1")
    assert checkpoint.read_bytes() == before
    kept = Path("runs/cut-1/record.json").read_bytes()
    fit("lora", "cut", 0, *words, "--ckpt_path=last")
    assert "Nothing was left to do" in capsys.readouterr().err
    assert Path("runs/cut-1/record.json").read_bytes() == kept


def test_an_evaluation_that_was_made_is_in_the_scores_once(home):
    """The fit ends before the next checkpoint: callbacks such as EarlyStopping have to see the scores again."""
    fit("lora", "straight", 0, *LIMITS)
    fit("lora", "cut", 6, *LIMITS, "--checkpoint_steps=4")
    fit("lora", "cut", 0, *LIMITS, "--ckpt_path=last")
    assert scores("cut-1") == scores("straight-1")
