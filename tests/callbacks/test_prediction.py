"""A fit says before it loads its model what memory it will take, and trains the same whether it does or not."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_sparse import cli
from lit_sparse.callbacks import prediction, recorder
from lit_sparse.data.loader import Batches, Loader
from lit_sparse.planning.forecast import Setting
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Predicted

F = [
    *("--model.base", "tiny", "--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout=4"),
    *("--data.max_length=16", "--data.batch_size=2", "--samples=0", "--trainer.accelerator=cpu"),
    *("--trainer.max_steps=4", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
    *("--profile.warmup=1", "--profile.examine=true", "--profile.profiled=0"),
]


@pytest.fixture(autouse=True)
def patient(monkeypatch, unpredicted):
    monkeypatch.setattr(recorder, "predict", prediction.predict)
    monkeypatch.setattr(prediction, "LONGER", 100)  # on a busy machine


def fit(method: str, *words: str) -> RunRecord:
    cli.run(["fit", "--config", f"{method}.yaml", *F, *words])
    return RunRecord.read(max(Path("runs").glob(f"{method}-*/record.json")))


@pytest.mark.parametrize(
    ("method", "words"),
    [("lora", []), ("smt", ["--model.updates.blocks=random"])],  # a plan has no gradients, and draws blocks
)
def test_what_is_said_first_is_what_is_measured_then(home, caplog, capsys, method, words):
    record = fit(method, *words)
    said, loading = caplog.text.find("Predicted peak of memory"), caplog.text.find("Loading tiny")
    assert 0 <= said < loading
    assert "this will not fit" not in caplog.text
    assert record.predicted is not None
    assert record.memory is not None
    assert record.memory.held is not None
    held = record.memory.held  # less what other tests of this process have left
    assert record.predicted.peak_bytes == pytest.approx(held.total - held.before, rel=0.05)
    assert record.predicted.batch_size * record.predicted.length == record.memory.examined_positions
    printed = capsys.readouterr().out
    assert printed.index("peak of tensors, predicted") < printed.index("peak of tensors, measured")


def test_what_will_not_fit_is_warned_of_with_what_to_change(home, caplog, monkeypatch):
    monkeypatch.setattr(prediction, "free_bytes", lambda _: 300_000)
    record = fit("lora")
    assert record.predicted is not None
    assert not record.predicted.fits
    assert "Warning: this will not fit. 0.5 MiB are needed, and 0.3 MiB are free; try " in caplog.text
    assert "--model.activation_checkpointing=true, or --data.batch_size=1" in caplog.text
    assert "--trainer.accumulate_grad_batches=2" in caplog.text
    assert "--model.quantize=nf4" in caplog.text


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("meft", "--data.batch_size=1 --trainer.accumulate_grad_batches=2, or --model.quantize=nf4, or --model.prec"),
        ("mezo", "--model.updates.micro_batch=1, or --model.precision=bfloat16, or a method"),
        ("adalomo", "--model.activation_checkpointing=true, or --data.batch_size=1, or --model.precision=bfloat16, or"),
    ],
)
def test_a_warning_names_what_the_method_accepts(home, method, told):
    module = cli.make_planned(["--config", f"{method}.yaml", "--model.base=tiny"]).module
    predicted = Predicted(2**30, 2**30, 2**30, 2**20, "forward", {}, 2, 16, 0.1)
    assert f"try {told}" in prediction.warning(predicted, module, Setting("cpu", 2, 16))


def test_what_takes_too_long_is_left_to_plan(home, caplog, monkeypatch):
    monkeypatch.setattr(prediction, "SECONDS", 0.01)
    assert fit("lora").predicted is None
    assert "lit-sparse plan does it" in caplog.text


def test_a_prediction_takes_a_tenth_of_a_fit_or_is_left_out(home, caplog, monkeypatch):
    monkeypatch.setattr(prediction, "START", 3.0)
    record = fit("lora")
    assert record.predicted is None
    assert "prediction" in {phase.name for phase in record.phases}
    (note,) = [note for note in record.notes if "predicted" in note]
    assert note == (
        "Memory is not predicted: that takes about 3.3 s, and measuring at most 10% of the fit; "
        "--profile.predict=true does it nevertheless."
    )
    assert note in caplog.text
    assert fit("lora", "--profile.predict=true").predicted is not None
    monkeypatch.setattr(prediction, "FLOPS", {"cpu": 1.0})  # each step takes hours
    assert fit("lora").predicted is not None
    monkeypatch.setattr(prediction, "START", 100.0)
    assert "over 60 s here; lit-sparse plan does it." in fit("lora").notes[0]


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"max_steps": -1, "max_epochs": -1}, float("inf")),
        ({"max_steps": -1, "max_epochs": 3}, 3 * 4),
        ({"max_steps": 11, "max_epochs": 3}, 11),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 4}, 2 * 2),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.5}, 2 * 2),
    ],
)
def test_the_steps_of_a_fit_are_known_without_asking_other_ranks(trainer, steps):
    loader = Loader([], Batches([1] * 16, 2), list)  # 8 batches, 2 accumulated
    source = SimpleNamespace(fit_loop=SimpleNamespace(_data_source=SimpleNamespace(dataloader=lambda: loader)))
    given = {"accumulate_grad_batches": 2, "limit_train_batches": 1.0, **trainer}
    assert prediction.steps_ahead(SimpleNamespace(**vars(source), **given)) == steps


def test_what_cannot_be_traced_is_said_and_trained(home, caplog, monkeypatch):
    def broken(*_):
        raise KeyError("a value of a tensor")

    monkeypatch.setattr(prediction, "forecast", broken)
    assert fit("lora").predicted is None
    assert "Memory is not predicted: KeyError: 'a value of a tensor'" in caplog.text


def test_training_is_the_same_without(home, caplog):
    def losses(run: str) -> list[str]:
        with Path("runs", run, "metrics.csv").open() as file:
            return [row["train_loss"] for row in csv.DictReader(file) if row["train_loss"]]

    fit("lora")
    caplog.clear()
    assert fit("lora", "--profile=false").predicted is None
    assert "redicted" not in caplog.text
    assert losses("lora-1") == losses("lora-2") != []
