"""KLToBase: value and gradient by brute force, a base that no method changes, and refusals."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from lit_sparse.errors import BadInput
from lit_sparse.runs import build_module
from lit_sparse.strategies import LISA, PEFT, SMT, KLToBase, compose
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.strategies.kl_to_base import FrozenBase, kl
from lit_sparse.testing import tiny_encoder, tiny_llm
from lit_sparse_profiling.ledger import ledger
from tests.methods import data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
LORA = {
    "class_path": "PEFT",
    "init_args": {"config": {"class_path": "peft.LoraConfig", "init_args": {"target_modules": "all-linear"}}},
}
METHODS = {
    "lora": [LORA],
    "full": [],
    "smt": [{"class_path": "SMT", "init_args": {"blocks": "random", "block_size": 8, "num_blocks": 4}}],
    "delta": [
        {"class_path": "SMT", "init_args": {"blocks": "random", "block_size": 8, "num_blocks": 4, "mode": "delta"}}
    ],
    "lisa": [{"class_path": "LISA", "init_args": {"active_layers": 1, "interval": 1}}],
}


def module_of(base, method, **options):
    updates = [*METHODS[method], {"class_path": "KLToBase", "init_args": options}]
    return build_module({"model": {"base": str(base), "lr": 1e-2, "updates": updates}})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llm("qwen2", dropout=0.1).save_pretrained(folder)  # embeddings and head are one
    return folder


def batch_of(rows=2, length=7):
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_value_and_gradient_by_brute_force():
    ours, theirs = (torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    ours.requires_grad_()
    for temperature in (1.0, 2.0):
        value = kl(ours, theirs, temperature)
        by_hand = 0.0
        for row in range(3):
            p, q = (
                [torch.tensor(z / temperature).exp().item() for z in logits[row].tolist()] for logits in (theirs, ours)
            )
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            by_hand += temperature**2 * sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True))
        assert value.item() == pytest.approx(by_hand, rel=1e-5)
        (gradient,) = torch.autograd.grad(value, ours)
        student, teacher = ((logits / temperature).softmax(-1) for logits in (ours, theirs))
        torch.testing.assert_close(gradient, temperature * (student - teacher), rtol=1e-5, atol=1e-6)


def test_the_divergence_from_the_base_itself_is_zero():
    model = tiny_llm()
    base, batch = FrozenBase(model.eval(), []), batch_of()
    value = base.divergence(batch, model(**batch), batch["attention_mask"].bool(), 2.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-6


def test_chunks_of_hidden_states_give_the_loss_of_full_logits(monkeypatch):
    """And both leave padding out."""
    monkeypatch.setattr("lit_sparse.strategies.kl_to_base.CHUNK_LOGITS", 3 * 96)
    model, batch = tiny_llm("qwen2").eval(), batch_of()
    update, kept = KLToBase(weight=0.5), batch["attention_mask"].bool()
    update.attach(model, no_probe, ALONE)
    with torch.no_grad():
        theirs = model(**batch).logits
    first = next(iter(model.parameters()))
    update.penalty(batch, model.base_model(**batch))  # copies are taken before training only
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    values, gradients = [], []
    for output in (model.base_model(**batch), model(**batch)):
        values.append(update.penalty(batch, output))
        gradients.append(torch.autograd.grad(values[-1], first)[0])
    expected = 0.5 * kl(model(**batch).logits[kept], theirs[kept], 2.0) / kept.sum()
    for value in values:
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert update.describe()["bytes"] == sum(p.nbytes for p in model.parameters())
    update.after_step(1, None)
    assert update.logged() == {}


@pytest.mark.parametrize("method", METHODS)
def test_the_base_stays_as_it_came(method, base, tmp_path):
    """During training and after resuming, which gives the bits of the straight run."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed = module_of(base, method), module_of(base, method)
    fit = trainer(4, callbacks=[checkpoint], enable_checkpointing=True)
    fit.fit(straight, datamodule=data())
    assert fit.callback_metrics["kl_to_base"] > 0
    resumed.resume_from = tmp_path / "step=2.ckpt"
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=resumed.resume_from)
    plain = tiny_llm("qwen2", dropout=0.1)
    for module in (straight, resumed):
        kept, by_name = module.updates[0]._base, dict(plain.named_parameters())
        now = dict(kept.model.named_parameters())
        assert now.keys() == by_name.keys()
        assert all(torch.equal(now[name], value) for name, value in by_name.items())
        assert sum(copy.nbytes for copy in kept.copies) <= sum(value.nbytes for value in by_name.values())
    sizes = straight.updates[0].describe()["bytes"], resumed.updates[0].describe()["bytes"]
    assert (sizes == (0, 0)) == (method in ("lora", "delta"))
    ours, theirs = (dict(module.build().named_parameters()) for module in (straight, resumed))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_the_base_is_kept_in_the_type_it_came_in(base):
    module = build_module(
        {"model": {"base": str(base), "precision": "bfloat16", "updates": [{"class_path": "KLToBase"}]}}
    )
    trainer(1).fit(module, datamodule=data())
    kept = module.updates[0]._base
    assert {p.dtype for p in module.build().parameters()} == {torch.float32}
    assert {p.dtype for p in kept.model.parameters()} == {torch.bfloat16}
    plain = tiny_llm("qwen2").bfloat16()
    for (name, value), own in zip(plain.named_parameters(), kept.model.parameters(), strict=True):
        assert torch.equal(own, value), name


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_a_checkpoint_given_to_the_trainer_alone_finds_the_base_as_it_came(method, base, tmp_path):
    config = {"base": str(base), "precision": "bfloat16", "lr": 1e-2}
    updates = [*METHODS[method], {"class_path": "KLToBase"}]
    straight, resumed = (build_module({"model": {**config, "updates": updates}}) for _ in range(2))
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(straight, datamodule=data())
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=tmp_path / "step=2.ckpt")
    plain = list(tiny_llm("qwen2").bfloat16().parameters())
    for module in (straight, resumed):
        kept = list(module.updates[0]._base.model.parameters())
        assert all(torch.equal(own, value) and own.dtype == value.dtype for own, value in zip(kept, plain, strict=True))


def test_a_full_checkpoint_takes_no_copy_of_what_is_frozen(base, tmp_path):
    config = {"base": str(base), "lr": 1e-2, "full_checkpoints": True}
    updates = [*METHODS["lora"], {"class_path": "KLToBase"}]
    first, second = (build_module({"model": {**config, "updates": updates}}) for _ in range(2))
    fit = trainer(2)
    fit.fit(first, datamodule=data())
    fit.save_checkpoint(tmp_path / "full.ckpt")
    trainer(4).fit(second, datamodule=data(), ckpt_path=tmp_path / "full.ckpt")
    assert second.updates[0].describe() == {"bytes": 0}


def test_the_copies_are_in_the_ledger(base):
    module = module_of(base, "full")
    trainer(1).fit(module, datamodule=data())
    held = ledger(module, None, [update.held() for update in module.updates])
    assert held.strategy == module.updates[0].describe()["bytes"] == sum(p.nbytes for p in module.build().parameters())


def test_predictions_stay_closer_to_the_base(base):
    """More with a larger weight; with weight 0 the run has the bits of one without the strategy."""
    without = build_module({"model": {"base": str(base), "lr": 1e-2, "updates": METHODS["lora"]}})
    modules = [without, *(module_of(base, "lora", weight=weight) for weight in (0.0, 1.0, 100.0))]
    for module in modules:
        torch.manual_seed(0)
        trainer(4).fit(module, datamodule=data())
    values = [dict(module.build().named_parameters()) for module in modules[:2]]
    assert all(torch.equal(values[1][name], value) for name, value in values[0].items())
    plain, batch, moved = tiny_llm("qwen2").eval(), batch_of(8), []
    for module in modules[1:]:
        with torch.no_grad():
            moved.append(kl(module.build().eval()(**batch).logits, plain(**batch).logits, 1.0).item())
    assert moved[0] > moved[1] > moved[2]


def test_invalid_settings_and_models_are_refused():
    with pytest.raises(BadInput, match="weight is -1; it must be at least 0"):
        KLToBase(weight=-1)
    with pytest.raises(BadInput, match="temperature is 0; it must be above 0"):
        KLToBase(temperature=0)
    with pytest.raises(BadInput, match="BertForSequenceClassification predicts no tokens"):
        KLToBase().attach(tiny_encoder(), no_probe, ALONE)
    biases = PEFT(LoraConfig(bias="all"), start_from="runs/general-1")
    for other in (PEFT(LoraConfig(init_lora_weights="pissa")), SMT(warmup="update"), biases):
        with pytest.raises(BadInput, match=f"KLToBase and {type(other).__name__} cannot be combined: KLToBase needs"):
            compose([other, KLToBase()])
    assert [type(one) for one in compose([LISA(), KLToBase()])] == [KLToBase, LISA]
