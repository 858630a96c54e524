"""A base in 4 or 8 bits: adapters train on it, and strategies that would change it are refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from lit_sparse.anatomy import (
    classification_head,
    is_quantized,
    is_quantized_linear,
    linears,
    target_linears,
    weight_count,
    weights_in,
)
from lit_sparse.callbacks.recorder import Recorder
from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.export.folder import export
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.modules.loading import load_base, quantization
from lit_sparse.optim import trainable
from lit_sparse.runs import LAST
from lit_sparse.strategies import PEFT, SMT, KLToBase
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, tiny_encoder, tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.step_plan import Plan
from tests.export.test_folder import logits, lora, make_run
from tests.methods import data, module, trained, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
KINDS = ["nf4", "int8"]
LINEARS = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module", autouse=True)
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llm("llama", dropout=0.1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def packed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_floating_point()}


def decoder_classifier() -> LlamaForSequenceClassification:
    """Return a tiny Llama with a head for three classes."""
    config = tiny_llm("llama").config
    config.num_labels = 3
    return LlamaForSequenceClassification(config)  # pyright: ignore[reportArgumentType]


def labelled(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("quantize", KINDS)
def test_kl_to_base_uses_the_quantised_base(quantize: Any, base: Path, tmp_path: Path) -> None:
    """With a new adapter the divergence is 0, which needs the base's scales; no weight is copied."""
    updates = [KLToBase(), PEFT(peft.LoraConfig(**LINEARS))]  # pyright: ignore[reportArgumentType]
    model = CausalLM(str(base), updates=updates, quantize=quantize, precision="float32", lr=1e-2, full_checkpoints=True)
    seen: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            seen.append(float(trainer.callback_metrics["kl_to_base"]))

    tiny_llm("llama").save_pretrained(base)  # without dropout, which only the model in training has
    fit = trainer(4, callbacks=[Look()])
    fit.fit(model, datamodule=data())
    assert seen[0] == pytest.approx(0, abs=1e-5)
    assert seen[-1] > 1e-4
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = CausalLM(str(base), updates=[KLToBase(), PEFT(peft.LoraConfig(**LINEARS))], quantize=quantize)  # pyright: ignore
    trainer(5).fit(again, datamodule=data(), ckpt_path=tmp_path / "last.ckpt")
    assert updates[0].describe() == again.updates[0].describe() == {"bytes": 0}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("quantize", KINDS)
def test_linear_layers_are_packed_and_counted_as_weights(kind: str, quantize: Any, tmp_path: Path) -> None:
    plain = tiny_llm(kind)
    plain.save_pretrained(tmp_path / "base")
    host = CausalLM(str(tmp_path / "base"), [PEFT(peft.LoraConfig(**LINEARS))], quantize=quantize)
    model = host.build()
    assert linears(model).keys() == linears(plain).keys()
    assert all(is_quantized_linear(linear) for linear in linears(model).values())
    assert not is_quantized_linear(model.get_output_embeddings())
    assert host.base_parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert weight_count(model) == weight_count(plain)
    sizes = [(weights_in(p), p.nbytes) for p in model.parameters() if not p.is_floating_point()]
    assert sum(count for count, _ in sizes) == (2 if quantize == "nf4" else 1) * sum(size for _, size in sizes)
    assert target_linears(model, ["down"]).keys() == target_linears(plain, ["down"]).keys()


@pytest.mark.parametrize(
    ("method", "quantize"),
    [("lora", "nf4"), ("lora", "int8"), ("dora", "nf4"), ("ia3", "nf4"), ("ia3", "int8"), ("shira", "nf4")],
)
@pytest.mark.parametrize("both", [True, False], ids=["resume_from", "trainer alone"])
def test_resumed_is_straight(method: str, quantize: str, both: bool, base: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    straight, resumed = (module(method, base, quantize=quantize) for _ in range(2))
    before = packed(straight.build())
    trainer(4, callbacks=[checkpoint], enable_checkpointing=True).fit(straight, datamodule=data())
    path = tmp_path / "ckpt" / "step=2.ckpt"
    resumed.resume_from = path if both else None
    trainer(4).fit(resumed, datamodule=data(), ckpt_path=path)
    start = read_checkpoint(path)["state_dict"]
    assert {f"model.{name}" for name in trained(straight)} == start.keys()
    for name, value in trained(resumed).items():
        assert torch.equal(value, trained(straight)[name]), name
        assert not torch.equal(value, start[f"model.{name}"]), name
    after = packed(straight.build())
    assert before
    assert len(after) == len(before)
    assert all(torch.equal(value, before[name.replace(".base_layer.", ".")]) for name, value in after.items())


@pytest.mark.parametrize("quantize", KINDS)
def test_the_record_counts_weights(quantize: str, base: Path, tmp_path: Path) -> None:
    (run := tmp_path / "run-1").mkdir()
    host = module("lora", base, quantize=quantize)
    trainer(7, callbacks=[Recorder(run, Plan(warmup=1, profiled=1))], num_sanity_val_steps=-1).fit(
        host, datamodule=data()
    )
    record = RunRecord.read(run / "record.json")
    plain = tiny_llm("llama")
    assert record.status == "ok"
    assert record.model.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert record.model.trainable == sum(parameter.numel() for _, parameter in trainable(host.build()))
    assert record.ledger.frozen < sum(parameter.nbytes for parameter in plain.parameters())
    saved = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert sorted(saved) == sorted(f"model.{name}" for name, _ in trainable(host.build()))


@pytest.mark.parametrize("quantize", KINDS)
def test_exports(quantize: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", lora(target_modules="all-linear"), quantize=quantize)
    folder = export(run.folder, "adapter")
    again = load_base(AutoModelForCausalLM, str(run.base), torch.float32, "sdpa", quantize)
    untrained = logits(again)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(again, folder)), run.logits, rtol=0, atol=0)
    assert not torch.allclose(untrained, run.logits, atol=1e-3)
    for to in ("hf", "delta"):
        with pytest.raises(BadInput, match=f"quantised to {quantize}, into which it cannot be merged .* --to adapter"):
            export(run.folder, to)
    assert {path.name for path in run.folder.iterdir()} == {"adapter", "config.yaml", LAST.parts[0]}


def test_a_base_is_known_by_its_bits(base: Path) -> None:
    hosts = [module("lora", base, quantize=quantize) for quantize in ("nf4", "int8", None, "nf4")]
    marks = [host.base_fingerprint for host in hosts if host.build()]
    assert len(set(marks)) == 3
    assert marks[0] == marks[3]


@pytest.mark.parametrize(("method", "who"), [("smt", "SMT"), ("full", "full fine-tuning"), ("pissa", "PEFT")])
def test_strategies_that_change_the_base_are_refused(method: str, who: str, base: Path) -> None:
    with pytest.raises(BadInput, match=f"model.quantize is nf4, but {who} changes the base's own weights"):
        module(method, base, quantize="nf4")


def test_a_quantised_model_given_as_base_is_recognised(base: Path) -> None:
    options: dict[str, Any] = {"quantization_config": quantization(str(base), "int8", torch.float32)}
    given = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map={"": "cpu"}, **options)
    assert is_quantized(given)
    with pytest.raises(BadInput, match=r"the base LlamaForCausalLM is quantised, but SMT changes"):
        CausalLM(given, [SMT()]).build()
    with pytest.raises(BadInput, match="weight of a Linear8bitLt was asked for, but it is quantised"):
        SMT(blocks="random", num_blocks=1, block_size=8).attach(given, no_probe, ALONE)
    with pytest.raises(BadInput, match="the base given is loaded already"):
        CausalLM(tiny_llm("llama"), [PEFT(peft.LoraConfig(**LINEARS))], quantize="nf4")
    trainer(1).fit(CausalLM(given, [PEFT(peft.LoraConfig(**LINEARS))]), datamodule=data())


@pytest.mark.parametrize("method", ["glora", "velora"])
def test_adapters_that_peft_has_for_plain_layers_alone_are_refused(method: str, base: Path) -> None:
    with pytest.raises(BadInput, match=r"Config was asked for, but PEFT cannot put it on .*Linear4bit"):
        trainer(1).fit(module(method, base, quantize="nf4"), datamodule=data())


def test_without_bitsandbytes_the_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_sparse.modules.loading.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs bitsandbytes, and that is not installed; .*lit-sparse\[quant\]"):
        module("lora", base, quantize="nf4").build()


def test_a_bare_configuration_is_refused(base: Path) -> None:
    with pytest.raises(BadInput, match="is a bare configuration"):
        module("lora", base / "config.json", quantize="nf4").build()


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", KINDS)
def test_a_run_on_a_gpu_is_read_on_the_cpu(quantize: str, tmp_path: Path) -> None:
    """The packed bytes, and so the base's fingerprint, must not depend on where it was quantised."""
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    host = module("lora", tmp_path / "base", quantize=quantize)
    trainer(2, accelerator="cuda", devices=1).fit(host, datamodule=data())
    assert {parameter.device.type for parameter in host.build().parameters()} <= {"cuda", "cpu"}
    elsewhere = module("lora", tmp_path / "base", quantize=quantize)
    elsewhere.build()
    assert elsewhere.base_fingerprint == host.base_fingerprint


def test_dora_in_eight_bits_on_a_cpu_is_refused(base: Path) -> None:
    with pytest.raises(BadInput, match="use_dora was asked for on a base in int8 on a CPU"):
        trainer(1).fit(module("dora", base, quantize="int8"), datamodule=data())


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("blocks", ["gradient", "slab"])
def test_blocks_beside_a_quantised_base_learn_and_leave_it_alone(quantize: Any, blocks: str, base: Path) -> None:
    settings: dict[str, Any] = {"trainable_fraction": 0.05, "block_size": 8, "selection_batches": 2, "targets": ["all"]}
    host = CausalLM(str(base), [SMT(blocks=blocks, mode="delta", **settings)], lr=1e-2, quantize=quantize)
    before = packed(host.build())
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:  # pyright: ignore
            losses.append(float(outputs["loss"]))

    trainer(20, callbacks=[Losses()]).fit(host, datamodule=data(rows=2))
    after = packed(host.build())
    assert all(torch.equal(after[name], before[name.replace(".base.", ".")]) for name in after)
    assert all(name.endswith(".blocks") and parameter.abs().any() for name, parameter in trainable(host.build()))
    assert losses[-1] < losses[0] - 0.15
    with pytest.raises(BadInput, match="quantised and cannot be trained in place"):
        host.detach()  # there is no plain matrix to merge into


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("make", [tiny_encoder, decoder_classifier], ids=["encoder", "decoder"])
def test_a_classifiers_head_is_not_quantised_and_trains(make: Any, quantize: Any, tmp_path: Path) -> None:
    plain = make()
    plain.base_model.save_pretrained(tmp_path / "base")
    host = Classifier(
        str(tmp_path / "base"), list("abc"), updates=[PEFT(peft.LoraConfig(**LINEARS))], quantize=quantize, lr=1e-2
    )
    model = host.build()
    heads = [f"{name}." for name in classification_head(model)]
    own = {name: p for name, p in model.named_parameters() if name.startswith(tuple(heads))}
    assert own
    assert all(parameter.is_floating_point() for parameter in own.values())
    assert all(is_quantized_linear(linear) for linear in linears(model).values())
    model.config.pad_token_id = 0
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    train, heldout = (DataLoader([labelled(n) for n in seeds], batch_size=None) for seeds in ((0, 1), (2,)))  # pyright: ignore
    trainer(2).fit(host, train, heldout)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in own.items())
