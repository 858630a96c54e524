"""The classification task on a tiny encoder: what trains, scores, classes and checkpoints."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_sparse import cli
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.data import Labelled, Synthetic
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.loading import draw_head
from lit_sparse.optim import trainable
from lit_sparse.places import configs_folder
from lit_sparse.runs import build_module, load_run
from lit_sparse.strategies import LISA, PEFT
from lit_sparse.testing import tiny_encoder, tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.modules.words import word_tokenizer

HEAD = {f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}
METHODS = ("full", "lora", "smt", "lisa", "deft")
WORDS = ("red", "green", "blue")

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed runs save nothing


@pytest.fixture
def base(tmp_path: Path) -> str:
    """An encoder without a head, with its tokenizer."""
    tiny_encoder(dropout=0.1).base_model.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows whose class is a word that they hold."""
    path = tmp_path / "rows.jsonl"
    made = [{"text": f"w{n % 7} {WORDS[n % 3]} w{n % 11}", "label": WORDS[n % 3]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def module(method: str, base: str, **options: Any) -> Classifier:
    """Return the module of a method's YAML."""
    config = yaml.safe_load((configs_folder() / f"{method}.yaml").read_text())["model"]
    for update in config.get("updates+", []):
        arguments = update["init_args"]
        if "interval" in arguments:
            arguments |= {"interval": 2, "active_layers": 1, "train_embeddings": False}
    made = build_module({"task": "Classifier", "model": {**config, "base": base, "lr": 1e-2, **options}})
    assert isinstance(made, Classifier)
    return made


def trainer(steps: int, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "max_steps": steps, "use_distributed_sampler": False, "enable_model_summary": False}
    return L.Trainer(**{**fixed, **quiet, **options})


def data(rows: str, base: str, **options: Any) -> Labelled:
    return Labelled(rows, **{"tokenizer": base, "heldout": 12, "max_length": 16, "batch_size": 4, **options})


@pytest.mark.parametrize("method", METHODS)
def test_the_head_trains_whatever_is_frozen(method, base, rows):
    L.seed_everything(0)
    model = module(method, base)
    before = {
        name: value.clone() for name, value in module(method, base, labels=list(WORDS)).build().named_parameters()
    }
    trainer(3).fit(model, datamodule=data(rows, base))
    now = dict(model.build().named_parameters())
    assert {name for name, _ in trainable(model.build())} >= HEAD
    for name in HEAD:
        assert not torch.equal(now[name], before[name]), name
    moved = {name for name, value in now.items() if name in before and not torch.equal(value, before[name])}
    frozen = {name for name, value in before.items() if name.startswith("bert.embeddings")}
    assert bool(moved & frozen) == (method in ("full", "deft"))
    assert {name for name in now if "classifier" in name or "pooler" in name} == HEAD  # no adapter lies on it


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_straight(method, base, rows, tmp_path):
    """Bit for bit, from the middle of an epoch, with dropout and accumulation."""
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0}
    L.seed_everything(0)
    straight = module(method, base)
    straight_fit = trainer(5, callbacks=[checkpoint], enable_checkpointing=True, **options)
    straight_fit.fit(straight, datamodule=data(rows, base))
    L.seed_everything(1)  # nothing of it may matter
    resumed = module(method, base)
    resumed.resume_from = tmp_path / "ckpt" / "step=2.ckpt"
    trainer(5, **options).fit(resumed, datamodule=data(rows, base), ckpt_path=resumed.resume_from)
    expected = dict(straight.build().named_parameters())
    for name, value in resumed.build().named_parameters():
        assert torch.equal(value, expected[name]), name


def test_loss_and_accuracy_are_those_of_the_logits(base, rows):
    model, labelled = module("full", base), data(rows, base, batch_size=5)  # 12 rows: batches of unlike sizes
    fit = trainer(1)
    fit.fit(model, datamodule=labelled)
    scores = fit.validate(model, datamodule=labelled, verbose=False)[0]
    rows_, plain = labelled.examples["heldout"], model.build().eval()
    with torch.no_grad():
        logits = torch.cat([plain(input_ids=torch.tensor([row.input_ids])).logits for row in rows_])
    labels = torch.tensor([row.label for row in rows_])
    assert scores["heldout_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["heldout_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


@pytest.mark.parametrize("method", ["lisa", "lora", "smt", "full"])
def test_it_trains_in_bf16(method, base, rows):
    """With the head in fp32, and for LISA the embeddings too, in front of LayerNorms in bf16."""
    model = module(method, base, precision="bfloat16")
    for update in model.updates:
        if isinstance(update, LISA):
            update.train_embeddings = True
    trainer(3, val_check_interval=2).fit(model, datamodule=data(rows, base))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.detach() is model.model


def test_it_learns(base, rows):
    L.seed_everything(0)
    model, labelled = module("full", base, lr=3e-3), data(rows, base)
    fit = trainer(60)
    fit.fit(model, datamodule=labelled)
    assert float(fit.logged_metrics["train_accuracy"]) == 1
    assert fit.validate(model, datamodule=labelled, verbose=False)[0]["heldout_accuracy"] == 1


def test_a_new_head_is_the_same_in_each_run_and_dtype(base):
    heads = []
    for seed, precision in ((0, "float32"), (1, "float32"), (2, "bfloat16")):
        torch.manual_seed(seed)
        heads.append(module("full", base, labels=list(WORDS), precision=precision))
        heads[-1].build()
    first, second, half = (head.build().get_parameter("classifier.weight") for head in heads)
    assert torch.equal(first, second)
    assert torch.equal(first.bfloat16(), half)
    assert len({head.base_fingerprint for head in heads}) == 1


def test_a_decoder_classifies_too(rows, tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = module("lora", str(tmp_path / "base"))
    trainer(2).fit(model, datamodule=data(rows, str(tmp_path / "base")))
    assert model.build().config.pad_token_id == word_tokenizer().pad_token_id
    assert "score.weight" in {name for name, _ in trainable(model.build())}


def test_a_run_records_and_exports_and_loads(base, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = f"--config={configs_folder()}/lora.yaml"
    words = [
        "--task=Classifier",
        f"--model.base={base}",
        "--data=Labelled",
        f"--data.train={rows}",
        "--data.heldout=12",
    ]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--profile.examine=false"]
    limits = ["--data.max_length=16", "--trainer.max_steps=9", "--trainer.val_check_interval=3"]
    cli.run(["fit", method, *words, *limits, "--profile.profiled=0", *quiet])
    outcome = RunRecord.read(tmp_path / "runs" / "lora-1" / "record.json").outcome
    assert {"heldout_loss", "heldout_accuracy"} == set(outcome["before"]) == set(outcome["after"])
    run, _ = load_run(tmp_path / "runs" / "lora-1")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = run.build()(input_ids=ids).logits
        folder = export(tmp_path / "runs" / "lora-1", to="hf")
        again = AutoModelForSequenceClassification.from_pretrained(folder)
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
    assert list(again.config.id2label.values()) == sorted(WORDS)
    with pytest.raises(BadInput, match="its head was trained too, which the adapter lacks"):
        export(tmp_path / "runs" / "lora-1", to="adapter")
    delta = export(tmp_path / "runs" / "lora-1", "delta", tmp_path / "delta")
    code = (tmp_path / "delta.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("FILE", str(delta)), scope)  # transformers would draw another head for this base
    with torch.no_grad():
        torch.testing.assert_close(scope["base"].eval()(input_ids=ids).logits, expected)


def test_a_record_of_a_fit_from_python(base, rows, tmp_path):
    recorder = Recorder(tmp_path / "run-1", Plan(warmup=0, examine=False, profiled=0), checkpoint_steps=0)
    (tmp_path / "run-1").mkdir()
    fit = trainer(12, callbacks=[recorder], num_sanity_val_steps=-1)
    fit.fit(module("smt", base), datamodule=data(rows, base))
    assert set(RunRecord.read(tmp_path / "run-1" / "record.json").outcome["after"]) == {
        "heldout_loss",
        "heldout_accuracy",
    }


def headed(tmp_path: Path, classes: int, names: tuple[str, ...] = ()) -> str:
    """A folder with a classifier whose head is trained, and its tokenizer."""
    model = tiny_encoder(classes=classes)
    model.config.id2label = dict(enumerate(names or [f"LABEL_{n}" for n in range(classes)]))
    model.save_pretrained(tmp_path / "headed")
    word_tokenizer().save_pretrained(tmp_path / "headed")
    return str(tmp_path / "headed")


def test_a_head_of_another_size_is_refused(rows, tmp_path):
    folder = headed(tmp_path, 4)
    with pytest.raises(BadInput, match="the base's head has 4 classes, but 3 were asked for; start with a new"):
        trainer(1).fit(module("full", folder), datamodule=data(rows, folder))


def test_a_heads_classes_keep_their_outputs(rows, tmp_path):
    """The data would number them blue, green, red."""
    folder = headed(tmp_path, 3, WORDS)
    model, labelled = module("lora", folder), data(rows, folder)
    trainer(1).fit(model, datamodule=labelled)
    assert model.labels == labelled.label_names == list(WORDS)
    assert model.build().config.id2label == dict(enumerate(WORDS))
    for example in labelled.examples["heldout"]:
        assert example.input_ids[1] == word_tokenizer().get_vocab()[WORDS[example.label]]
    given = AutoModelForSequenceClassification.from_pretrained(folder)
    loaded = Classifier(given)
    trainer(1).fit(loaded, datamodule=data(rows, folder))
    assert loaded.labels == list(WORDS)


def test_a_nameless_head_takes_the_datas_names(rows, tmp_path):
    folder = headed(tmp_path, 3)
    model = module("lora", folder)
    trainer(1).fit(model, datamodule=data(rows, folder))
    assert model.build().config.id2label == dict(enumerate(sorted(WORDS)))


def test_a_head_for_other_classes_is_refused_unless_they_are_told(rows, tmp_path):
    folder = headed(tmp_path, 3, ("good", "bad", "ugly"))
    with pytest.raises(
        BadInput, match=r"head has the classes good, bad, ugly \(3\), but the data has blue, green, red"
    ):
        trainer(1).fit(module("full", folder), datamodule=data(rows, folder))
    told, labelled = module("full", folder, labels=["green", "blue", "red"]), data(rows, folder)
    trainer(1).fit(told, datamodule=labelled)
    assert labelled.label_names == told.labels == ["green", "blue", "red"]


def test_random_weights_are_drawn_on_the_cpu_whatever_the_default_device(base, tmp_path):
    """Lightning makes the GPU the default device while it configures the model; meta stands for it here."""
    config = AutoConfig.from_pretrained(base)
    config.num_labels = 3
    config.save_pretrained(tmp_path / "bare")
    bare = str(tmp_path / "bare" / "config.json")
    plain = module("full", bare, labels=list(WORDS)).build()
    model = tiny_encoder()
    with torch.device("meta"):
        drawn = module("full", bare, labels=list(WORDS)).build()
        draw_head(model, ["classifier.weight"])
    values = drawn.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in plain.state_dict().items())
    expected = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    assert torch.equal(model.get_parameter("classifier.weight"), expected)


@pytest.mark.parametrize("asked", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}])
def test_peft_trains_no_copy_of_the_head(base, rows, asked):
    model = Classifier(base, updates=[PEFT(LoraConfig(target_modules=["query"], **asked))])
    with pytest.raises(BadInput, match="PEFT trains a copy of the classifier's head"):
        trainer(1).fit(model, datamodule=data(rows, base))


def test_mismatched_data_and_classes_are_refused(base, rows):
    with pytest.raises(BadInput, match="the data are Synthetic"):
        trainer(1).fit(module("full", base), datamodule=Synthetic(vocab_size=96, max_length=8, rows=8))
    with pytest.raises(BadInput, match="the data are Labelled"):
        trainer(1).fit(CausalLM(tiny_llm()), datamodule=data(rows, base))
    with pytest.raises(BadInput, match=r"the classes are a, b \(2\), but the data has blue, green, red \(3\)"):
        trainer(1).fit(module("full", base, labels=["a", "b"]), datamodule=data(rows, base))
    with pytest.raises(BadInput, match="the base's head has 4 classes, but 3 were asked for"):
        trainer(1).fit(Classifier(tiny_encoder(classes=4)), datamodule=data(rows, base))
    with pytest.raises(BadInput, match="Classifier knows no classes"):
        module("full", base).build()
    with pytest.raises(BadInput, match="the task 'Regressor' was asked for"):
        build_module({"task": "Regressor", "model": {}})


@pytest.mark.needs_demo
def test_minilm_learns_subjects():
    L.seed_everything(0)
    model, labelled = Classifier(lr=3e-4), Labelled(heldout=1000, max_length=24, batch_size=8)
    fit = trainer(10, limit_val_batches=4, num_sanity_val_steps=0)
    fit.fit(model, datamodule=labelled)
    assert len(model.labels) == 20
    score = fit.validate(model, datamodule=labelled, verbose=False)[0]
    assert score["heldout_loss"] < torch.tensor(20.0).log()  # better than guessing evenly
    assert model.base_parameters == pytest.approx(22.72e6, rel=1e-3)
