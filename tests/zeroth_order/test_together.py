"""Losses computed together, on copies of a batch, are those that are computed one after the other."""

import dataclasses

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import nn

from lit_sparse.data import Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.strategies import HELENE, PEFT, MeZO, Updates, UpdateStrategy
from lit_sparse.testing import tiny_encoder, tiny_llm
from lit_sparse.zeroth_order.directions import Dense
from lit_sparse.zeroth_order.optimizer import Losses
from tests.strategies.test_mezo import loss_of, trainer


@dataclasses.dataclass
class Penalty(UpdateStrategy):
    """A penalty that needs no gradient."""

    def penalty(self, batch, output) -> torch.Tensor:
        return torch.ones(())


LORA = {"r": 4, "target_modules": "all-linear"}
DATA = {"vocab_size": 96, "max_length": 12, "rows": 14, "heldout": 2, "batch_size": 6}


def task_of(kind: str, adapter=None, **options):
    """A module with MeZO on an adapter, in training, whose B is not zero; and a batch."""
    batch = next(iter(Synthetic(**DATA).train_dataloader()))
    adapter = adapter or LoraConfig(**LORA, lora_dropout=0.3, fan_in_fan_out=kind == "gpt2")
    updates = [PEFT(adapter), MeZO(**options)]
    if kind == "bert":
        task = Classifier(tiny_encoder(), labels=["a", "b", "c"], updates=updates)
        batch = {**{k: v for k, v in batch.items() if k != "scored"}, "labels": torch.arange(6) % 3}
    else:
        task = CausalLM(tiny_llm(kind), updates=updates)
        batch["labels"][0, :9], batch["labels"][3] = -100, -100
    model = task.build()
    task.updates.attach(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return task, batch


def makes(count: int):
    directions = Dense()

    def beside(seed: int, scale: float):
        return lambda weight, place, rows: directions.perturb(weight, place, rows, seed, scale)

    return [None, *(beside(n // 2, 0.05 * (-1) ** n) for n in range(count - 1))]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_losses_together_are_those_apart(kind, micro_batch):
    """With dropout, in the model and in its attention, padding, rows without a label, and a last group of one."""
    task, batch = task_of(kind, micro_batch=micro_batch)
    task.build().train()
    for module in task.build().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    loss = WindowLoss(task, [batch])
    with torch.no_grad():
        torch.manual_seed(1)
        apart = Losses(task.build(), loss).of_rows(makes(5))
        torch.manual_seed(1)
        together = Losses(task.build(), loss, 2).of_rows(makes(5))
    values = torch.stack([value for value, _ in apart])
    assert values.unique().numel() == 5
    torch.testing.assert_close(torch.stack([value for value, _ in together]), values, rtol=2e-6, atol=0)
    for (_, ours), (_, theirs) in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_weight_of_its_own_in_every_row(monkeypatch):
    """Large weights, and those that no linear map reads, are taken a copy at a time."""
    monkeypatch.setattr("lit_sparse.zeroth_order.together.SMALL", 0)
    task, batch = task_of("llama")
    for name, parameter in task.build().named_parameters():
        parameter.requires_grad_("layers" in name)
    loss, found = WindowLoss(task, [batch]), []
    for count in (1, 4):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(torch.stack(Losses(task.build(), loss, count).of(makes(4))))
    assert found[0].unique().numel() == 4
    torch.testing.assert_close(found[1], found[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("helene", [False, True])
def test_a_fit_with_probes_at_once_is_the_same(helene):
    found = []
    for count in (1, 2):
        method = HELENE(h="layer", refresh_every=2, probes_at_once=count) if helene else MeZO(probes_at_once=count)
        task = CausalLM(tiny_llm(), updates=[PEFT(LoraConfig(**LORA)), method], lr=1e-3)
        torch.manual_seed(0)
        trainer(3).fit(task, datamodule=Synthetic(**DATA))
        found.append(dict(task.build().named_parameters()))
    start = dict(tiny_llm().named_parameters())
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=2e-4)
        assert name not in start or torch.equal(parameter, start[name])


@pytest.mark.parametrize(
    ("updates", "sentence"),
    [
        ([MeZO(probes_at_once=2)], "lm_head.weight is not read row by row of the batch"),
        ([PEFT(IA3Config(target_modules=["k_proj"], feedforward_modules=[])), MeZO(probes_at_once=2)], "ia3_l"),
        ([PEFT(LoraConfig(**LORA)), Penalty(), MeZO(probes_at_once=2)], "the penalty of Penalty is of one batch"),
    ],
)
def test_what_has_no_rows_is_refused(updates, sentence):
    task = CausalLM(tiny_llm(), updates=updates)
    with pytest.raises(BadInput, match=r"^MeZO: probes_at_once is 2, but .*set (probes_at_once|it) to 1\.") as refused:
        trainer(1).fit(task, datamodule=Synthetic(**DATA))
    assert sentence in str(refused.value)


def test_a_loss_function_of_one_batch_is_refused():
    model, updates = tiny_llm(), Updates([MeZO(probes_at_once=2)])
    updates.attach(model)
    optimizer = updates.optimizer(0.01)
    with pytest.raises(BadInput, match=r"^MeZO: probes_at_once is 2, but the given loss function takes one batch at a"):
        updates.step(1, optimizer, lambda: loss_of(model, 1))
    with pytest.raises(BadInput, match="but only losses are computed together; set it to 1, or objective to loss"):
        MeZO(probes_at_once=2, objective="accuracy")
