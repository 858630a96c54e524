"""The contract of every method under configs/: each YAML is tested as soon as it exists."""

import copy
import dataclasses
import re
from functools import cache
from itertools import combinations, islice, permutations
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.calls import evaluating
from lit_sparse.data import Instructions, Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.optim import trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module
from lit_sparse.testing import TINY, contract, tiny_llm
from lit_sparse_profiling.memory import trim_heap
from lit_sparse_profiling.reconcile import findings, residue
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.modules.words import word_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT puts it right itself for GPT-2
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the resumed runs save nothing
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`"),  # PEFT takes the next that divides the side
]
METHODS = sorted(path.stem for path in configs_folder().glob("*.yaml"))
VARIANTS = {
    *("fira", "fzoo", "helene_lora", "lezo", "mezo_lora"),
    *("badam", "diablo", "oft", "ows", "sparse_entries", "supertuning"),
}
"""Methods whose strategies stand in other files, too: they are tried on one model, and in no pair."""


def module(method: str, base: object, **options: object) -> LitSparse:
    """Return the module of a method's YAML, or of several as in `smt+deft`, on a tiny model; sets change often."""
    configs = [yaml.safe_load((configs_folder() / f"{name}.yaml").read_text())["model"] for name in method.split("+")]
    keys = {key: value for config in configs for key, value in config.items() if not key.startswith("updates")}
    updates = [update for config in configs for update in config.get("updates+", [])]
    made = build_module({"model": {**keys, "updates": updates, "base": str(base), **options}})
    for update in made.updates:
        for field in dataclasses.fields(update) if update.cycle is not None else ():
            if getattr(update, field.name) == update.cycle:
                setattr(update, field.name, 2)
    return made


@cache
def refusal(method: str, kind: str) -> str | None:
    """Return why a method does not fit a tiny model: PEFT has some adapters for nn.Linear only."""
    try:
        model, ids = tiny_llm(kind).train(), torch.arange(3, 9)[None]
        losses = (model(input_ids=ids, labels=ids).loss for _ in range(100))
        module(method, "unused").updates.attach(model, lambda steps: islice(losses, steps))
    except BadInput as refused:
        return str(refused) if "cannot put it on" in str(refused) else None
    return None


IN_TURN = [(method, [*TINY][number % len(TINY)]) for number, method in enumerate(METHODS)]
"""Each method on one of the models, for what hardly depends on the model and takes seconds."""
PAIRS = [(method, kind) for method in METHODS for kind in TINY if method not in VARIANTS or (method, kind) in IN_TURN]


@pytest.fixture(autouse=True)
def adapted(request):
    """Skip a method on a model for which PEFT has no such adapter; a Llama takes all of them."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    method, kind = given.get("method"), given.get("kind")
    why = refusal(method, kind) if method and kind else None
    if why is not None:
        assert kind != "llama", why
        assert re.search(r"asked for, but PEFT cannot put it on \w+ \(.*\); give other target_modules", why), why
        pytest.skip(why)


@pytest.fixture
def folder(kind, tmp_path, request):
    exact = request.node.callspec.params.get("method") == "meft"  # which excludes dropout
    tiny_llm(kind, dropout=0.0 if exact else 0.1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trainer(steps: int, **options) -> L.Trainer:
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False}
    return L.Trainer(**{**fixed, **defaults, **options})


def data(**options) -> Synthetic:
    return Synthetic(**{"vocab_size": 96, "max_length": 12, "rows": 14, "heldout": 2, "batch_size": 2, **options})


def trained(model: LitSparse) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model.build())}


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_contract(method, kind):
    contract(lambda: module(method, "unused").updates, kind)


@pytest.mark.parametrize("pair", ["+".join(pair) for pair in combinations(sorted({*METHODS} - VARIANTS), 2)])
def test_a_pair_has_both_effects_or_is_refused(pair):
    """The contract sees the effect of each strategy; a refusal names both strategies and a way out."""
    refused = ""
    try:
        contract(lambda: module(pair, "unused").updates, steps=3)
    except BadInput as error:
        refused = str(error)
    names = [type(update).__name__ for method in pair.split("+") for update in module(method, "unused").updates]
    begins = [f"{a} and {b} cannot be combined: " for a, b in permutations(names, 2)] + [f"{name}: " for name in names]
    assert not refused or (refused.startswith(tuple(begins)) and "; " in refused), refused


def over_gradients(task: LitSparse, accumulate: int = 1) -> dict[str, object]:
    """The trainer's options for gradients, where there are any at the optimizer step."""
    if task.updates.backward != "autograd":
        return {}
    return {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}


@pytest.mark.parametrize(
    ("method", "kind", "workers", "accumulate"),
    [(*pair, 0, 1) for pair in PAIRS] + [(*pair, 2, 2) for pair in IN_TURN],
)
def test_resumed_is_straight(method, kind, folder, tmp_path, workers, accumulate):
    """Bit for bit, from the middle of an epoch, with dropout, clipping, workers and accumulation."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    L.seed_everything(0)
    straight = module(method, folder)
    options = {"num_sanity_val_steps": 0, **over_gradients(straight, accumulate)}
    trainer(5, callbacks=[checkpoint], enable_checkpointing=True, **options).fit(
        straight, datamodule=data(num_workers=workers)
    )
    L.seed_everything(1)  # nothing of it may matter
    resumed = module(method, folder)
    resumed.resume_from = tmp_path / "ckpt" / "step=2.ckpt"
    trainer(5, **options).fit(resumed, datamodule=data(num_workers=workers), ckpt_path=resumed.resume_from)
    expected = trained(straight)
    assert expected.keys() == trained(resumed).keys()
    for name, value in trained(resumed).items():
        assert torch.equal(value, expected[name]), name


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


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_detached_bf16_model_has_one_dtype(method, kind, folder):
    task = module(method, folder, precision="bfloat16")
    trainer(1).fit(task, datamodule=data())
    model = task.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    own = any(f"model.{name}" in task.trained for name, _ in model.named_parameters())  # what trained is still there
    wanted = torch.float32 if own and task.updates.masters else torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    with torch.no_grad(), evaluating(model):
        assert model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("method", ["lisa", "smt"])
def test_packed_rows_train_in_bf16(method, tmp_path):
    """With trained weights in fp32 and the rest in bf16."""
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "w{n} w{n + 1} w{n + 2}"}}\n' for n in range(12)))
    task = module(method, tmp_path / "base", precision="bfloat16")
    packed = Instructions(str(rows), heldout=2, tokenizer=word_tokenizer(), max_length=16, packing=True)
    trainer(1).fit(task, datamodule=packed)
    assert task.trainer.global_step == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_given_to_the_trainer_alone_resumes_too(method, tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed = module(method, tmp_path / "base"), module(method, tmp_path / "base")
    trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(straight, datamodule=data())
    ckpt, wanted = tmp_path / "ckpt" / "step=2.ckpt", trained(straight)
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=ckpt)
    for name, value in trained(resumed).items():
        assert torch.equal(value, wanted[name]), name
    fresh, batch = module(method, tmp_path / "base"), {"input_ids": torch.arange(3, 9)[None]}
    logits = []
    for one in (straight, fresh):  # also to one that went on training since: nothing of that is left
        trainer(4).validate(one, datamodule=data(), ckpt_path=ckpt, verbose=False)
        with torch.no_grad(), evaluating(one.build()):
            logits.append(one.build()(**batch).logits)
    assert torch.equal(*logits)
    trainer(4).fit(straight, datamodule=data(), ckpt_path=ckpt)
    for name, value in trained(straight).items():
        assert torch.equal(value, wanted[name]), name
    straight.detach()
    trainer(4).validate(straight, datamodule=data(), ckpt_path=ckpt, verbose=False)
    with torch.no_grad(), evaluating(straight.build()):
        assert torch.equal(straight.build()(**batch).logits, logits[0])


@pytest.mark.parametrize("method", ["full", "lora", "smt", "pissa", "lisa"])
def test_a_model_given_goes_back_to_a_checkpoint(method, tmp_path):
    """The checkpoint replaces all that was trained since, or is refused."""
    task, batch = module(method, "unused"), {"input_ids": torch.arange(3, 9)[None]}
    task = CausalLM(tiny_llm("llama"), updates=task.updates, lr=1e-2)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(3, callbacks=[checkpoint], enable_checkpointing=True).fit(task, datamodule=data())
    if method == "lisa":
        names = set(task.trained)
        for _ in range(2):  # also once it is detached, when what was trained is in the base's own weights
            with pytest.raises(BadInput, match="make a new module of the model loaded anew"):
                trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
            assert task.trained == names
            task.detach()
        return
    with torch.no_grad(), evaluating(task.build()):
        wanted = task.build()(**batch).logits
    before = {name: value.clone() for name, value in task.build().state_dict().items()}
    trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert not all(torch.equal(value, before[name]) for name, value in task.build().state_dict().items())
    trainer(3).validate(task, datamodule=data(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    with torch.no_grad(), evaluating(task.build()):
        assert torch.equal(task.build()(**batch).logits, wanted)
    assert all(torch.equal(value, before[name]) for name, value in task.build().state_dict().items())


@pytest.mark.parametrize(("method", "kind"), IN_TURN)
def test_a_fit_writes_a_record_and_a_small_checkpoint(method, kind, folder, tmp_path):
    run = tmp_path / "run-1"
    run.mkdir()
    model = module(method, folder)
    trim_heap()  # what an earlier test left to malloc would be taken for the warm-up's
    recorder = Recorder(run, Plan(warmup=1, profiled=1))  # and two examined ones, before three that are timed
    steps = 7 + max((update.period or 0 for update in model.updates), default=0)
    limits = {"num_sanity_val_steps": -1, "val_check_interval": 7}
    trainer(steps, callbacks=[recorder], **limits).fit(model, datamodule=data())
    record = RunRecord.read(run / "record.json")
    assert record.status == "ok"
    assert {phase.name for phase in record.phases} >= {"selection", "training", "evaluation"}
    assert record.throughput.tokens == 3 * 2 * 12
    assert abs(residue(record)) < 0.05
    assert findings(record) == []
    assert record.memory.held.ledger.frozen == record.ledger.frozen
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
    first = module(method, "unused")
    text = (configs_folder() / f"{method}.yaml").read_text()
    keys = yaml.safe_load(text)["model"]
    assert first.lr == pytest.approx(float(keys.get("lr", 2e-5)))
    given = keys.get("updates+", keys.get("updates", []))
    assert [type(update).__name__ for update in first.updates] == [entry["class_path"] for entry in given]


@pytest.mark.parametrize("method", METHODS)
def test_a_precision_of_the_trainer_is_refused(method, tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(BadInput, match=r"leave it at 32-true and set model\.precision"):
        trainer(1, precision="bf16-true").fit(module(method, tmp_path / "base"), datamodule=data())


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_bf16_keeps_what_is_trained_in_fp32(method, kind, folder):
    """Also past a switch of what trains, with a checkpointed layer and an evaluation."""
    model = module(method, folder, precision="bfloat16", activation_checkpointing=method == "lisa")
    trainer(3, val_check_interval=2).fit(model, datamodule=data())
    parameters = list(model.build().parameters())
    if not model.updates.masters:  # forward-only methods hold no second copy; PEFT makes its adapters in fp32
        assert {p.dtype for p in parameters if p.requires_grad} <= {torch.float32, torch.bfloat16}
        assert all(p.isfinite().all() for p in parameters)
        return
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} <= {torch.bfloat16}


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
