"""The contract of every method under configs/: each YAML is tested as soon as it exists."""

import copy
import functools
import gc
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.calls import evaluating
from lit_sparse.data import Instructions
from lit_sparse.errors import BadInput
from lit_sparse.optim import trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module
from lit_sparse.strategies import Updates
from lit_sparse.testing import contract, tiny_llm
from lit_sparse_profiling.memory import trim_heap
from lit_sparse_profiling.reconcile import findings, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from lit_sparse_profiling.witness import alive_bytes
from tests.methods import (
    METHODS,
    ON_EACH,
    adapted,
    data,
    dropout,
    in_turn,
    module,
    over_gradients,
    settings,
    strategies,
    trained,
    trainer,
)
from tests.modules.words import word_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT puts it right itself for GPT-2
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),  # PEFT takes the next that divides the side
]


@pytest.mark.parametrize(("method", "kind"), ON_EACH)
def test_contract(method, kind):
    if adapted(method, kind) != kind:
        pytest.skip(f"PEFT cannot put {method} on {kind}")
    contract(lambda: strategies(method), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_it_trains_in_bf16_and_goes_on(method, tmp_path):
    """With a validation first, and clipped; resumed between two switches of what trains."""
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, resumed = (module(method, tmp_path / "base", lr=1e-2) for _ in range(2))
    options = {"accelerator": "cuda", "devices": 1, "num_sanity_val_steps": -1, **over_gradients(straight)}
    trainer(5, callbacks=[checkpoint], enable_checkpointing=True, **options).fit(straight, datamodule=data())
    ckpt = resumed.resume_from = tmp_path / "ckpt" / "step=3.ckpt"
    trainer(5, **options).fit(resumed, datamodule=data(), ckpt_path=ckpt)
    expected, saved = trained(straight), torch.load(ckpt, weights_only=True)["state_dict"]
    for name, value in trained(resumed).items():
        then = saved.get(f"model.{name}", tiny_llm("llama").get_parameter(name)).to(value)  # not trained by then
        assert (value - expected[name]).norm() <= 0.1 * (expected[name] - then).norm(), name
    model = straight.detach()
    with torch.no_grad(), evaluating(model):
        assert model(input_ids=torch.arange(3, 9, device=model.device)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("method", "kind"), in_turn(2))
def test_in_bf16_what_trains_is_in_fp32_and_a_detached_model_has_one_dtype(method, kind, tiny_base):
    """Also past a switch of what trains, with a checkpointed layer and an evaluation."""
    base, options = tiny_base(adapted(method, kind), dropout(method)), {"activation_checkpointing": method == "lisa"}
    task = module(method, base, precision="bfloat16", **options)
    trainer(3, val_check_interval=2).fit(task, datamodule=data())
    parameters = list(task.build().parameters())
    if task.updates.masters:
        assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in parameters if not p.requires_grad} <= {torch.bfloat16}
    else:  # forward-only methods hold no second copy; PEFT makes its adapters in fp32
        assert {p.dtype for p in parameters if p.requires_grad} <= {torch.float32, torch.bfloat16}
        assert all(p.isfinite().all() for p in parameters)
    model = task.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    own = any(f"model.{name}" in task.trained for name, _ in model.named_parameters())  # what trained is still there
    wanted = torch.float32 if own and task.updates.masters else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    with torch.no_grad(), evaluating(model):
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["lisa", "smt"])
def test_packed_rows_train_in_bf16(method, tiny_base, tmp_path):
    """With trained weights in fp32 and the rest in bf16."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "w{n} w{n + 1} w{n + 2}"}}\n' for n in range(12)))
    task = module(method, tiny_base(), precision="bfloat16")
    packed = Instructions(str(rows), heldout=2, tokenizer=word_tokenizer(), max_length=16, packing=True)
    trainer(1).fit(task, datamodule=packed)
    assert task.trainer.global_step == 1


def forget_models() -> None:
    """Free models that nothing refers to but a cycle, or a cache of PEFT's of what it has warned about."""
    parts = [vars(module) for name, module in sys.modules.items() if name.startswith("peft.")]
    for cached in chain.from_iterable(part.values() for part in parts):
        if isinstance(cached, functools._lru_cache_wrapper):
            cached.cache_clear()
    gc.collect()


def in_memory() -> int:
    """Return the bytes of all tensors in this process, but of those that the collector was told to leave alone."""
    forget_models()
    return sum(alive_bytes(torch.device("cpu")).values())


def attach_and_detach(updates: Updates, kind: str) -> None:
    """Attach strategies to a tiny model, compute gradients, and detach them; nothing refers to it afterwards."""
    model, ids = tiny_llm(kind).train(), torch.arange(3, 9)[None]
    updates.attach(model, lambda steps: (model(input_ids=ids, labels=ids).loss for _ in range(steps)))
    model(input_ids=ids, labels=ids).loss.backward()
    updates.detach(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_attached_and_detached_leaves_nothing_in_memory(method):
    kind, updates = adapted(method, "llama"), strategies(method)
    before = in_memory()
    attach_and_detach(updates, kind)
    del updates
    assert in_memory() <= before


@pytest.mark.parametrize(("method", "kind"), in_turn())
def test_a_fit_writes_a_record_and_a_small_checkpoint(method, kind, tiny_base, tmp_path):
    run = tmp_path / "run-1"
    run.mkdir()
    model = module(method, tiny_base(adapted(method, kind), dropout(method)))
    others = in_memory()  # earlier tests' models, and what their sessions hold
    trim_heap()  # and what they left to malloc would be taken for the warm-up's
    recorder = Recorder(run, Plan(warmup=1, profiled=1))  # and two examined ones, before three that are timed
    steps = 7 + max((update.period or 0 for update in model.updates), default=0)
    limits = {"num_sanity_val_steps": -1, "val_check_interval": 7}
    trainer(steps, callbacks=[recorder], **limits).fit(model, datamodule=data())
    record = RunRecord.read(run / "record.json")
    assert record.status == "ok"
    assert {phase.name for phase in record.phases} >= {"selection", "training", "evaluation"}
    assert record.throughput.tokens == 3 * 2 * 12
    assert abs(residue(record)) < 0.05
    held = record.memory.held
    own = replace(record.memory, held=replace(held, before=max(held.before - others, 0)))
    assert findings(replace(record, memory=own)) == []
    assert held.ledger.frozen == record.ledger.frozen
    assert record.kernels.top
    sizes = [parameter.numel() * parameter.element_size() for _, parameter in trainable(model.build())]
    assert record.ledger.trainable == sum(sizes)
    formulas = [bytes for update in model.updates if (bytes := update.optimizer_bytes(model.build())) is not None]
    moments, scalars = (formulas or [2 * sum(sizes)])[0], 64 * len(sizes)
    assert moments <= record.ledger.optimizer <= moments + scalars or model.updates.backward == "none"
    assert set(record.outcome) == {"before", "after"}
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == model.trained >= {f"model.{name}" for name, _ in trainable(model.build())}


@pytest.mark.parametrize("method", METHODS)
def test_yaml_to_object_to_yaml(method):
    first, keys = module(method, "unused"), settings(method)
    assert first.lr == pytest.approx(float(keys.get("lr", 2e-5)))
    given = keys.get("updates+", keys.get("updates", []))
    made = [type(update).__name__ for update in first.updates]  # in the order in which they attach
    assert sorted(made) == sorted(entry["class_path"] for entry in given)


@pytest.mark.parametrize("method", ["full", "lora", "smt", "mezo", "adalomo"])
def test_a_precision_of_the_trainer_is_refused(method, tiny_base):
    with pytest.raises(BadInput, match=r"leave it at 32-true and set model\.precision"):
        trainer(1, precision="bf16-true").fit(module(method, tiny_base()), datamodule=data())


def test_checkpoints_of_others_are_refused(tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    tiny_llm("llama", seed=1).save_pretrained(tmp_path / "other")
    model = module("smt", tmp_path / "base")
    fit = trainer(1)
    fit.fit(model, datamodule=data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(BadInput, match="was trained on another base"):
        module("smt", tmp_path / "other").restore(checkpoint)
    with pytest.raises(BadInput, match=r"was trained with \['SMT'\], this run has \['PEFT'\]"):
        module("lora", tmp_path / "base").restore(checkpoint)
    broken = copy.deepcopy(checkpoint)
    broken["state_dict"].popitem()
    torch.save(broken, tmp_path / "broken.ckpt")
    with pytest.raises(BadInput, match="lacks 1 trained parameters"):
        trainer(2).fit(module("smt", tmp_path / "base"), datamodule=data(), ckpt_path=tmp_path / "broken.ckpt")


@pytest.mark.parametrize(("given", "size"), [(16, 16), ("auto", "auto"), ([16, 8], (16, 8))])
def test_a_block_size_is_a_number_two_numbers_or_auto(given, size):
    update = {"class_path": "SMT", "init_args": {"block_size": given}}
    assert build_module({"model": {"updates": [update]}}).updates[0].block_size == size


def test_every_method_is_here():
    assert {"full", "smt", "lora", "dora"} <= set(METHODS)
    assert Path(configs_folder()).is_dir()
