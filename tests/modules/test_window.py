"""An accumulation window is one batch: its loss and its gradients are those of all its rows at once, on all ranks."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lit_sparse.data import Instructions
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import UpdateStrategy
from lit_sparse.testing import tiny_llm
from tests.modules.words import word_tokenizer
from tests.pair import attempt, result, run_pair

ANSWERS = (2, 56, 3, 2)
"""Answer tokens of the four rows, of unlike weight; the fifth is like the first."""


def rows(folder: Path, count: int = 4, answers: tuple[int, ...] = ANSWERS) -> Path:
    path = folder / f"rows-{count}.jsonl"
    made = [
        {
            "prompt": "w1 w2",
            "completion": " ".join(f"w{(row + n) % 20}" for n in range(answers[row % len(answers)] - 1)),
        }
        for row in range(count)
    ]
    held = {"prompt": "w1", "completion": "w2"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*made, held]))
    return path


class Norms(L.Callback):
    """Notes the gradients' norm, the loss and the accuracy of each optimizer step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.accuracies: list[float] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if "train_loss" in trainer.logged_metrics and trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.logged_metrics["train_loss"]))
            self.accuracies.append(float(trainer.logged_metrics["train_accuracy"]))


def fitted(path: Path, batch: int, accumulate: int, steps: int = 1, updates=(), **options):
    data = Instructions(
        str(path), heldout=1, tokenizer=word_tokenizer(), max_length=80, batch_size=batch, template="plain"
    )
    task = CausalLM(tiny_llm(), list(updates), lr=0.1, optimizer=torch.optim.SGD, schedule="constant")
    seen, limits = Norms(), {"max_epochs": 1, "max_steps": steps, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fixed = {"accelerator": "cpu", "use_distributed_sampler": False, "log_every_n_steps": 1, "logger": False}
    given = {**limits, **quiet, **fixed, "callbacks": [seen], **options}
    trainer = L.Trainer(accumulate_grad_batches=accumulate, **given)
    trainer.fit(task, datamodule=data)
    return task, seen


def values(task) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.build().parameters()])


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 2), (1, 4)])
def test_accumulation_is_a_larger_batch(batch, accumulate, tmp_path):
    path, start = rows(tmp_path), torch.cat([p.detach().flatten() for p in tiny_llm().parameters()])
    (whole, one), (parts, other) = fitted(path, 4, 1), fitted(path, batch, accumulate)
    step, error = (values(whole) - start).norm(), (values(parts) - values(whole)).norm()
    assert error < 1e-5 * step
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    assert other.norms == pytest.approx(one.norms, rel=1e-5)
    assert other.accuracies == one.accuracies
    assert int(parts.tokens_seen) == int(whole.tokens_seen) >= sum(ANSWERS) - 1


class Asked(Norms):
    """Notes also what the accuracy of each batch is by its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            right = pl_module.build()(**inputs).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
        self.expected.append(float(right.sum() / (batch["labels"][:, 1:] != -100).sum()))


def test_the_accuracy_is_that_of_the_likeliest_tokens(tmp_path):
    asked = Asked()
    fitted(rows(tmp_path), 4, 1, steps=12, max_epochs=12, callbacks=[asked])
    assert asked.accuracies == pytest.approx(asked.expected)
    assert asked.accuracies[-1] > 0.1


def test_the_last_window_may_be_short(tmp_path):
    """Five equal rows, four a window: two steps of gradients of one size."""
    task, seen = fitted(rows(tmp_path, 5, (6,)), 1, 4, steps=-1, gradient_clip_val=0.0)
    single, first = fitted(rows(tmp_path, 5, (6,)), 1, 1, steps=5)
    assert len(seen.norms) == 2
    assert seen.norms[0] == pytest.approx(first.norms[0], rel=0.5)  # not a quarter: other rows, of one form
    assert seen.norms[1] == pytest.approx(seen.norms[0], rel=0.5)
    assert int(task.tokens_seen) == int(single.tokens_seen)


class Forward(UpdateStrategy):
    """Asks for the loss of a window, and moves nothing."""

    backward = "none"
    claims = frozenset({"optimizer", "backward"})

    def optimizer(self, groups, lr):
        class Asks(torch.optim.SGD):
            def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
                return closure()  # pyright: ignore[reportOptionalCall]

        return Asks(groups, lr)


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_a_forward_only_method_sees_the_same_loss(batch, accumulate, tmp_path):
    path = rows(tmp_path)
    options = {"optimizer": None}
    data = Instructions(str(path), heldout=1, tokenizer=word_tokenizer(), max_length=80, batch_size=batch)
    task = CausalLM(tiny_llm(), [Forward()], lr=0.1, **options)
    trainer = L.Trainer(
        accumulate_grad_batches=accumulate, max_steps=1, accelerator="cpu", logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    plain = fitted(path, 4, 1)[1].losses[0]
    assert float(trainer.logged_metrics["train_loss"]) == pytest.approx(plain, rel=1e-5)
    assert float(trainer.logged_metrics["train_accuracy"]) == fitted(path, 4, 1)[1].accuracies[0]


class Looks(UpdateStrategy):
    """Keeps the mean gradient over the probe's batches, and their number of tokens where they are not weighed."""

    def __init__(self, batches: int, weighed: bool = True) -> None:
        super().__init__()
        self.batches, self.weighed, self.losses = batches, weighed, []

    def attach(self, model, probe, context):
        for loss in probe(self.batches, weighed=self.weighed):
            loss.backward()
            self.losses.append(loss.item())
        grads = [p.grad.flatten() / len(self.losses) for p in model.parameters() if p.grad is not None]
        self.gradient = torch.cat(grads)
        model.zero_grad()


def looked(path: Path, batch: int, **options) -> torch.Tensor:
    looks = Looks(4 // batch // options.get("devices", 1))
    fitted(path, batch, 1, updates=[looks], **options)
    return looks.gradient


@pytest.mark.parametrize("batch", [2, 1])
def test_probed_batches_are_one_batch(batch, tmp_path):
    """Strategies see the gradient of all rows at once before training, too."""
    whole, parts = looked(rows(tmp_path), 4), looked(rows(tmp_path), batch)
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_a_probe_gives_each_batch_its_own_mean_where_it_is_asked_for(tmp_path):
    weighed, plain = Looks(4), Looks(4, weighed=False)
    for looks in (weighed, plain):
        fitted(rows(tmp_path), 1, 1, updates=[looks])
    assert max(plain.losses) < 1.5 * min(plain.losses)  # of a random model: each is about the same
    assert max(weighed.losses) > 10 * min(weighed.losses)  # 56 tokens beside 2
    assert sum(weighed.losses) / 4 == pytest.approx(sum(plain.losses) / 4, rel=0.1)


def two_ranks(folder: Path, rank: int) -> None:
    attempt(
        folder,
        rank,
        "probe",
        lambda: torch.save(looked(rows(folder), 1, devices=2, strategy="ddp"), folder / f"probe-{rank}.pt"),
    )
    for name, batch, accumulate in (("batch", 2, 1), ("window", 1, 2)):
        act = lambda batch=batch, accumulate=accumulate: on_ranks(folder, batch, accumulate)  # noqa: E731
        attempt(folder, rank, name, act)


def on_ranks(folder: Path, batch: int, accumulate: int):
    task, seen = fitted(rows(folder), batch, accumulate, devices=2, strategy="ddp")
    torch.save(values(task), folder / f"{batch}-{accumulate}.pt")
    return {"losses": seen.losses, "norms": seen.norms, "accuracies": seen.accuracies}


def test_ranks_are_one_batch(tmp_path):
    wanted, seen = fitted(rows(tmp_path), 4, 1)
    start = torch.cat([p.detach().flatten() for p in tiny_llm().parameters()])
    run_pair(two_ranks, tmp_path)
    for name, batch, accumulate in (("batch", 2, 1), ("window", 1, 2)):
        for rank in range(2):
            found = result(tmp_path, name, rank)
            assert found["losses"] == pytest.approx(seen.losses, rel=1e-5)
            assert found["norms"] == pytest.approx(seen.norms, rel=1e-5)
            assert found["accuracies"] == seen.accuracies
        step = (values(wanted) - start).norm()
        assert (torch.load(tmp_path / f"{batch}-{accumulate}.pt") - values(wanted)).norm() < 1e-5 * step
    whole = looked(rows(tmp_path), 4)
    assert [result(tmp_path, "probe", rank) for rank in range(2)] == [None, None]
    mean = sum(torch.load(tmp_path / f"probe-{rank}.pt") for rank in range(2)) / 2
    assert (mean - whole).norm() < 1e-5 * whole.norm()
