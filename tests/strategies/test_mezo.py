"""MeZO: its steps are those of two plain forward passes; LeZO, FZOO, other objectives, and steps that are skipped."""

import copy
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassConfusionMatrix

from lit_sparse import cli
from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.strategies import LISA, SMT, MeZO, Updates, UpdateStrategy
from lit_sparse.testing import contract, next_token_cross_entropy, tiny_encoder, tiny_llm
from lit_sparse.zeroth_order.directions import Cone, LowRank
from lit_sparse_kernels.philox import row_noise, step_seed
from tests.test_cli import fit, refused

LR, EPSILON = 0.01, 1e-3


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(step))
    return next_token_cross_entropy(model(input_ids=ids).logits.float(), ids)


def trained(*strategies: UpdateStrategy, model: nn.Module | None = None, steps: int = 3, loss=loss_of) -> nn.Module:
    """A model after steps with the strategies."""
    model = tiny_llm() if model is None else model
    updates = Updates(strategies)
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    for step in range(1, steps + 1):
        updates.step(step, optimizer, lambda step=step: loss(model, step))
    return model


def noise_of(model: nn.Module, seed: int, kind: str = "rademacher") -> list[torch.Tensor]:
    """The direction at each parameter, numbered as the sorted names are."""
    numbers = {name: number for number, name in enumerate(sorted(name for name, _ in model.named_parameters()))}
    return [
        row_noise(torch.arange(len(p)), p[0].numel(), seed, numbers[name], kind=kind).view(p.shape)
        for name, p in model.named_parameters()
    ]


def textbook(
    steps: int = 3, queries: int = 1, decay: float = 0.0, momentum: float = 0.0, sides: str = "two",
    deviation: bool = False, kind: str = "rademacher", active=lambda step, name: True,
) -> nn.Module:  # fmt: skip
    """The papers' algorithms written plainly: perturb in place, measure, put back, step."""
    model = tiny_llm()
    named = list(model.named_parameters())
    means = [torch.zeros_like(p) for _, p in named]
    with torch.no_grad():
        for step in range(1, steps + 1):
            chosen = [float(active(step, name)) for name, _ in named]
            start, gradient = copy.deepcopy(model.state_dict()), [torch.zeros_like(p) for _, p in named]
            here, slopes = loss_of(model, step), []
            noises = [noise_of(model, step_seed(0, step, query), kind) for query in range(queries)]

            def at(noise, scale, step=step, start=start, chosen=chosen):
                for (_, p), z, on in zip(named, noise, chosen, strict=True):
                    p.add_(scale * on * z)
                value = loss_of(model, step)
                model.load_state_dict(start)
                return value

            above = [at(noise, EPSILON) for noise in noises]
            if sides == "two":
                slopes = [(a - at(z, -EPSILON)) / (2 * EPSILON) for a, z in zip(above, noises, strict=True)]
            else:
                spread = torch.stack(above).std(correction=0) if deviation else EPSILON
                slopes = [(a - here) / spread for a in above]
            for slope, noise in zip(slopes, noises, strict=True):
                for g, z in zip(gradient, noise, strict=True):
                    g.add_(slope * z / queries)
            for (_, p), g, m, on in zip(named, gradient, means, chosen, strict=True):
                m.mul_(momentum).add_((1 - momentum) * g)
                if on:
                    p.mul_(1 - LR * decay * (p.ndim > 1)).sub_(LR * (m if momentum else g))
    return model


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    """Within what fp32's losses leave of a slope: 1e-7 of a loss of 4.6, divided by the distance, times lr."""
    theirs, moved = dict(other.named_parameters()), dict(tiny_llm().named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert (p - moved[name]).norm() > 20 * (p - theirs[name]).norm() or torch.equal(p, theirs[name]), name


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"queries": 3}, {"queries": 3}),
        ({"direction": "gaussian"}, {"kind": "gaussian"}),
        ({"weight_decay": 0.5}, {"decay": 0.5}),
        ({"momentum": 0.8, "queries": 2}, {"momentum": 0.8, "queries": 2}),
        ({"sides": "one"}, {"sides": "one"}),
        (
            {"sides": "one", "scale": "deviation", "queries": 4},
            {"sides": "one", "deviation": True, "queries": 4},
        ),
    ],
)
def test_a_step_is_the_textbooks(options, theirs):
    assert_alike(trained(MeZO(epsilon=EPSILON, **options)), textbook(**theirs))


def test_on_lisas_layers_it_is_lezo():
    """LeZO's update: the direction is zero outside of the layers that were drawn, whose weights keep their bits."""
    updates, model = Updates([LISA(active_layers=1, interval=1), MeZO(epsilon=EPSILON)]), tiny_llm()
    updates.attach(model)
    optimizer, drawn = updates.optimizer(LR), []
    for step in range(1, 5):
        drawn.append({name for name, p in model.named_parameters() if p.requires_grad})
        updates.step(step, optimizer, lambda step=step: loss_of(model, step))
    assert len({frozenset(names) for names in drawn}) > 1
    assert_alike(model, textbook(4, active=lambda step, name: name in drawn[step - 1]))


def test_all_layers_at_a_time_are_mezo():
    lezo = trained(LISA(active_layers=3, interval=1), MeZO(epsilon=EPSILON))
    for name, p in trained(MeZO(epsilon=EPSILON)).named_parameters():
        assert torch.equal(p, lezo.get_parameter(name)), name


def test_two_sides_measure_a_quadratics_slope_exactly():
    """The even orders cancel, whatever the distance."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(50, dtype=torch.float64))
            self.curve = torch.randn(50, 50, dtype=torch.float64)

        def loss(self) -> torch.Tensor:
            return (self.curve @ self.weight).square().sum() / 2

    for epsilon in (1e-3, 0.5):
        model = Quadratic()
        z = row_noise(torch.arange(50), 1, step_seed(0, 1), 0).view(50).double()
        wanted = z @ (model.curve.T @ model.curve @ model.weight.detach())
        before = model.weight.detach().clone()
        trained(MeZO(epsilon=epsilon), model=model, steps=1, loss=lambda model, step: model.loss())
        torch.testing.assert_close((before - model.weight) / LR, wanted * z, rtol=1e-6, atol=1e-6)


def test_fzoo_is_the_same_for_a_loss_in_other_units():
    """On a loss that is linear in the weights it does not see L -> a L + b."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, dtype=torch.float64))

    slope = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"sides": "one", "scale": "deviation", "queries": 8}
    found = [
        trained(MeZO(**options), model=Linear(), steps=2, loss=lambda m, step, a=a, b=b: a * (m.weight @ slope) + b)
        for a, b in ((1.0, 0.0), (30.0, -2.0))
    ]
    torch.testing.assert_close(found[0].weight, found[1].weight)
    assert found[0].weight.abs().max() > 0


# ---- losses that are no numbers


def test_a_step_without_a_loss_is_skipped_and_too_many_end_the_run():
    mezo = MeZO(max_skipped=2, momentum=0.5, weight_decay=0.1)
    model, updates = tiny_llm(), Updates([mezo])
    updates.attach(model)
    optimizer, before = updates.optimizer(LR), None
    for step in range(1, 4):
        if step == 2:
            before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        bad = math.nan if step == 2 else math.inf
        updates.step(step, optimizer, lambda step=step, bad=bad: loss_of(model, step) * (1 if step == 1 else bad))
    assert before is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert all(
        torch.equal(v["momentum"], before[1]["state"][k]["momentum"])
        for k, v in optimizer.state_dict()["state"].items()
    )
    assert mezo.describe()["skipped_steps"] == 2
    assert mezo.logged()["mezo_skipped"] == 2
    with pytest.raises(
        BadInput, match=r"the losses of 3 steps in a row are not finite, and were skipped; lower model\.lr"
    ):
        updates.step(4, optimizer, lambda: loss_of(model, 4) * math.nan)


def test_skipped_steps_are_counted_on_after_a_resume():
    mezo, model = MeZO(max_skipped=1), tiny_llm()
    updates = Updates([mezo])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    updates.step(1, optimizer, lambda: loss_of(model, 1) * math.nan)
    resumed = Updates([MeZO(max_skipped=1)])
    resumed.restore(model, updates.state_dict())
    optimizer = resumed.optimizer(LR)
    with pytest.raises(BadInput, match="2 steps in a row"):
        resumed.step(2, optimizer, lambda: loss_of(model, 1) * math.nan)


# ---- objectives without a gradient


def trainer(steps: int, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "max_steps": steps, "enable_model_summary": False, "limit_val_batches": 0}
    return L.Trainer(**fixed, **quiet, use_distributed_sampler=False, **options)


class Texts(torch.utils.data.Dataset):
    """Texts whose class is their first token's parity."""

    def __len__(self) -> int:
        return 32 * 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 96, (6,), generator=torch.Generator().manual_seed(index % 32))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}


@pytest.mark.parametrize("objective", ["accuracy", BinaryF1Score()])
def test_an_objective_without_a_gradient_gets_better(objective):
    """And what is minimized is its distance from 1."""
    model = tiny_encoder(classes=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("classifier", "bert.pooler")))
    mezo = MeZO(objective=objective, epsilon=0.05, queries=4)
    task = Classifier(model, labels=["even", "odd"], lr=1e-2, schedule="constant", updates=[mezo])
    loader = torch.utils.data.DataLoader(Texts(), batch_size=32)
    first = WindowLoss(task, [next(iter(loader))])
    with torch.no_grad():
        before = float(first())
    trainer(20).fit(task, loader, loader)
    with torch.no_grad():
        after = float(first())
    assert 0 <= after < before - 0.1
    if isinstance(objective, str):
        assert after == pytest.approx(1 - float(first.accuracy), abs=1e-6)


def test_the_objective_of_a_language_model_is_of_its_scored_tokens():
    """Accuracy, and the same by torchmetrics, in parts and as a whole."""
    data = Synthetic(vocab_size=96, max_length=12, rows=14, heldout=2, batch_size=6)
    values = []
    for options in (
        {"objective": "accuracy"},
        {"objective": MulticlassAccuracy(num_classes=96, average="micro"), "micro_batch": 4},
    ):
        task = CausalLM(tiny_llm(), updates=[MeZO(**options)])
        trainer(1).fit(task, datamodule=data)
        batch = next(iter(data.train_dataloader()))
        loss = WindowLoss(CausalLM(tiny_llm("qwen2"), updates=[MeZO(**options)]), [batch])
        with torch.no_grad():
            values.append(float(loss()))
        assert values[-1] == pytest.approx(1 - float(loss.accuracy), abs=1e-6)
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_a_metric_of_several_numbers_is_refused():
    with pytest.raises(BadInput, match="MulticlassConfusionMatrix, which does not say whether higher is better"):
        MeZO(objective=MulticlassConfusionMatrix(num_classes=96))
    task = CausalLM(tiny_llm(), updates=[MeZO(objective=MulticlassAccuracy(num_classes=96, average="none"))])
    data = Synthetic(vocab_size=96, max_length=12, rows=14, heldout=2, batch_size=6)
    with pytest.raises(BadInput, match=r"MulticlassAccuracy returns a tensor of shape \(96,\), but a step needs one"):
        trainer(1).fit(task, datamodule=data)


# ---- batches


def test_a_batch_in_parts_has_the_loss_of_the_whole():
    """In fp32, whatever the weights are in."""
    batch = next(iter(Synthetic(vocab_size=96, max_length=12, rows=14, heldout=2, batch_size=6).train_dataloader()))
    batch["labels"][0, :9] = -100
    values = []
    for rows in (None, 4, 1):
        task = CausalLM(tiny_llm(), updates=[MeZO(micro_batch=rows)])
        with torch.no_grad():
            values.append(WindowLoss(task, [batch])())
    assert values[0].dtype == torch.float32
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.5},
        {"direction": "gaussian", "sides": "one"},
        {"direction": LowRank(period=2)},
        {"direction": Cone(warmup=0)},
    ],
)
def test_contract(options):
    contract(lambda: [MeZO(**options)], steps=3)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": 0}, "epsilon is 0; it must be above 0."),
        ({"queries": 0}, "queries is 0; it must be at least 1."),
        ({"micro_batch": 0}, "micro_batch is 0; it must be at least 1."),
        ({"weight_decay": -1}, "weight_decay is -1; it must be at least 0."),
        ({"max_skipped": -1}, "max_skipped is -1; it must be at least 0."),
        ({"momentum": 1}, "momentum is 1; it must be from 0 to below 1."),
        ({"scale": "deviation"}, "so set sides to one and queries to 2 or more."),
        ({"direction": "low_rank", "momentum": 0.5}, "momentum is 0.5, which LowRank directions do not have"),
        ({"direction": "cone", "queries": 2}, "queries is 2, but Cone directions take one a step; set it to 1."),
        ({"objective": "f1"}, "objective is 'f1'; give loss, accuracy, or a metric of torchmetrics by its class,"),
    ],
)
def test_settings_that_are_none_are_refused(options, sentence):
    with pytest.raises(BadInput, match=r"^MeZO: ") as refusal:
        MeZO(**options)
    assert sentence in str(refusal.value)


def test_blocks_in_place_are_refused():
    with pytest.raises(BadInput, match="SMT trains through gradients, and MeZO computes losses without a graph; "):
        Updates([SMT(), MeZO()])


def test_half_precision_and_compiled_graphs_are_refused():
    model = tiny_llm().half()
    updates = Updates([MeZO()])
    updates.attach(model)
    with pytest.raises(BadInput, match="is in float16, whose range loses updates"):
        updates.optimizer(LR)
    model.float()._compiled_call_impl = object()
    with pytest.raises(BadInput, match="a compiled graph hides which weights it reads"):
        updates.optimizer(LR)


@pytest.mark.filterwarnings("ignore:You passed `Trainer")  # fp16 on a CPU
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trainer.gradient_clip_val=1"], "so trainer.gradient_clip_val has no effect; remove"),
        (["--trainer.accumulate_grad_batches=2"], "give data.batch_size the rows of a step, and micro_batch those of"),
        (["--trainer.precision=16-mixed"], "leave it at 32-true and set model.precision"),
        (["--model.optimizer=torch.optim.SGD"], "MeZO brings its own optimizer; remove model.optimizer."),
    ],
)
def test_settings_of_gradients_are_refused_and_leave_nothing(home, capsys, monkeypatch, words, sentence):
    data = ["--data", "Instructions", "--data.train", "rows.jsonl", "--data.heldout", "4"]
    call = ["fit", "--config", "mezo.yaml", "--model.base", "tiny", *data, "--trainer.accelerator=cpu", *words]
    assert sentence in refused(capsys, monkeypatch, *call)
    assert not list(Path("runs").glob("*"))


# ---- whole runs


def test_a_run_trains_exports_and_writes_a_record(home, capsys, caplog):
    metric = ["--model.updates.objective=torchmetrics.classification.MulticlassAccuracy"]
    metric += ["--model.updates.objective.num_classes=96", "--model.updates.objective.average=micro"]
    idle = "--model.activation_checkpointing=true"
    fit("--config", "mezo_lora.yaml", "--trainer.max_steps=4", "--model.lr=0.01", "--run", "zo", idle, *metric)
    assert "model.activation_checkpointing has no effect: MeZO computes losses without a graph." in caplog.text
    record = json.loads(Path("runs/zo-1/record.json").read_text())
    assert record["status"] == "ok"
    assert record["updates"][1]["chosen"] == {"forwards_per_step": 2, "skipped_steps": 0}
    assert record["ledger"]["gradients"] == record["ledger"]["optimizer"] == 0
    columns = Path("runs/zo-1/metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"mezo_slope", "mezo_skipped", "train_loss"} <= set(columns)
    cli.run(["export", "runs/zo-1", "--to", "hf", "--output", "out"])
    assert (Path("out") / "model.safetensors").exists()
    cli.run(["generate", "runs/zo-1", "0 and 0"])
    assert capsys.readouterr().out
