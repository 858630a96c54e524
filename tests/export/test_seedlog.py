"""A seed log makes a run's weights again, to the bit, from the base and kilobytes; and of nothing else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_sparse import cli
from lit_sparse.checkpoints import alike, fingerprint
from lit_sparse.errors import BadInput
from lit_sparse.export.seedlog import FORMAT, SeedLog
from lit_sparse.runs import load_run
from lit_sparse.testing import tiny_llm
from tests import test_resume as resume
from tests.conftest import make_home
from tests.test_cli import DATA, SMALL, fit, refused

OPTIONS = {
    "mezo": ["--model.updates.momentum=0.5", "--model.updates.weight_decay=0.1", "--model.schedule=cosine"],
    "lezo": ["--model.updates.queries=2"],
    "helene": ["--model.updates.h=layer", "--model.updates.refresh_every=2", "--model.updates.floors=theory"],
    "helene quantiles": [
        "--model.updates.h=tensor",
        "--model.updates.refresh_every=4",
        "--model.updates.floors=quantile",
    ],
}
WIDTHS = {"mezo": 2, "lezo": 3, "helene": 7, "helene quantiles": 3}


def without_nan(state: dict) -> dict:
    return {key: value.nan_to_num() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_log_makes_the_runs_weights_and_state_again(home, method):
    config = f"{method.partition(' ')[0]}.yaml"
    fit("--config", config, "--trainer.max_steps=6", "--model.lr=1e-3", "--run", "zo", *OPTIONS[method])
    cli.run(["export", "runs/zo-1", "--to", "seedlog"])
    file = Path("runs/zo-1/seedlog.safetensors")
    assert file.stat().st_size < 4096
    log = SeedLog.load(file)
    assert log.log.shape == (6, WIDTHS[method])
    base = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    updates, optimizer = log.replay(base)
    trained = load_run(Path("runs/zo-1"))[0].build()
    for name, p in base.named_parameters():
        assert torch.equal(p, trained.get_parameter(name)), name
    assert not all(torch.equal(p, start[name]) for name, p in base.named_parameters())
    checkpoint = torch.load("runs/zo-1/checkpoints/last.ckpt", weights_only=True)
    kept = checkpoint["optimizer_states"][0]["state"]
    for ours, theirs in zip(updates.state_dict(), checkpoint["lit_sparse"]["updates"], strict=True):
        assert alike(without_nan(ours["state"]), without_nan(theirs["state"]))
    states = optimizer.state_dict()["state"]
    assert any(kept.values()) == (method != "lezo")
    assert all(torch.equal(states[key][name], one[name]) for key, one in kept.items() for name in one)
    with pytest.raises(BadInput, match="replay it on the unchanged tiny"):
        log.apply(base)  # it is trained already
    half = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.bfloat16)
    with pytest.raises(
        BadInput, match=r"weights in float32, which this model has in bfloat16; load it with dtype=torch\.f"
    ):
        log.apply(half)


def test_a_log_is_of_the_precision_that_the_run_had(home):
    """On a GPU `auto` is bfloat16, and the machine that exports may have none; resuming in another is told."""
    words = ["--config", "mezo.yaml", "--run", "zo", "--model.lr=1e-2"]
    fit(*words, "--trainer.max_steps=2", "--model.precision=bfloat16")
    config = Path("runs/zo-1/config.yaml")
    config.write_text(config.read_text().replace("precision: bfloat16", "precision: auto", 1))
    cli.run(["export", "runs/zo-1", "--to", "seedlog"])
    log = SeedLog.load("runs/zo-1/seedlog.safetensors")
    assert log.dtype == "bfloat16"
    (card,) = (path.read_text() for path in Path("runs/zo-1").glob("seedlog*.md"))
    scope: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("FILE", "runs/zo-1/seedlog.safetensors"), scope)
    trained = load_run(Path("runs/zo-1"))[0].build()
    for name, p in scope["base"].named_parameters():
        assert torch.equal(p, trained.get_parameter(name)), name
    fit(*words, "--trainer.max_steps=4", "--ckpt_path=last", "--model.precision=float32")
    with pytest.raises(BadInput, match=r"had other settings \(model\.precision was bfloat16\)"):
        SeedLog.of(*load_run(Path("runs/zo-1")))


def test_a_damaged_log_is_refused(home, tmp_path):
    with pytest.raises(BadInput, match="there is no seed log at nowhere"):
        SeedLog.load("nowhere")
    file = tmp_path / "log.safetensors"
    SeedLog("tiny", "f" * 64, "float32", [], torch.zeros(2, 2, dtype=torch.float64)).save(file)
    assert SeedLog.load(file).base == "tiny"
    with safe_open(file, framework="pt") as read:
        header = json.loads(read.metadata()[FORMAT])
    save_file(load_file(file), file, {FORMAT: json.dumps({**header, "base": "other"})})
    with pytest.raises(BadInput, match="do not match its checksum"):
        SeedLog.load(file)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="cannot be read as a seed log"):
        SeedLog.load(file)


def test_a_run_that_is_no_log_is_refused(home, capsys, monkeypatch):
    fit("--config", "lora.yaml", "--trainer.max_steps=1", "--run", "one")
    message = refused(capsys, monkeypatch, "export", "runs/one-1", "--to", "seedlog")
    assert "PEFT trains through gradients, which a seed does not give; export it with --to delta." in message
    assert not Path("runs/one-1/seedlog.safetensors").exists()
    cli.run(["export", "runs/one-1", "--to", "delta"])
    with pytest.raises(BadInput, match=r"delta\.safetensors is a safetensors file, but no seed log; give one that"):
        SeedLog.load("runs/one-1/delta.safetensors")


# ---- going on from a log


@pytest.mark.parametrize(("method", "cut"), [("mezo", 10), ("lezo", 3), ("helene", 3)])
def test_a_run_goes_on_from_a_log_as_from_its_checkpoint(home, method, cut):
    """Ten steps are an epoch; weights, state, rates and rows are those of a run that was not stopped."""
    words = ("--trainer.max_epochs=2", "--model.lr=1e-3", "--model.schedule=linear", "--trainer.max_steps=13")
    straight = resume.fit(method, "straight", 0, *words)
    whole = SeedLog.of(*load_run(Path("runs/straight-1")))
    dataclasses.replace(whole, log=whole.log[:cut]).save("part.safetensors")
    resumed = resume.fit(method, "more", 0, *words, "--ckpt_path=part.safetensors")
    assert resumed == straight[cut:]
    expected = resume.saved("straight-1")
    for name, value in resume.saved("more-1").items():
        assert torch.equal(value, expected[name]), name
    again = SeedLog.of(*load_run(Path("runs/more-1")))
    torch.testing.assert_close(again.log, whole.log, rtol=0, atol=0, equal_nan=True)
    last = [resume.scores(run)[-1] for run in ("straight-1", "more-1")]
    assert last[0]["step"] == last[1]["step"]
    assert last[0]["epoch"] == last[1]["epoch"]


def test_a_log_of_another_run_is_refused_and_leaves_nothing(home, capsys, monkeypatch):
    fit("--config", "mezo.yaml", "--trainer.max_steps=2", "--run", "zo")
    cli.run(["export", "runs/zo-1", "--to", "seedlog"])
    file, words = "runs/zo-1/seedlog.safetensors", [*DATA, *SMALL, "--trainer.max_steps=4", "--run", "other"]
    call = ["fit", "--config", "mezo.yaml", "--model.base", "tiny", *words, "--ckpt_path", file]
    for more, sentence in (
        (["--model.updates.momentum=0.5"], "written with MeZO.momentum being 0.0, and this run has 0.5; give the conf"),
        (["--model.precision=bfloat16"], "the seed log is of weights in float32, which this model has in bfloat16"),
    ):
        assert sentence in refused(capsys, monkeypatch, *call, *more)
    lora = ["fit", "--config", "mezo_lora.yaml", "--model.base", "tiny", *words, "--ckpt_path", file]
    assert "written with the methods being MeZO, and this run has PEFT and MeZO" in refused(capsys, monkeypatch, *lora)
    make_home("second", tiny_llm("qwen2"))
    other = [*call[:4], "second", *call[5:]]
    assert "this model has other weights, or parameters of other names" in refused(capsys, monkeypatch, *other)
    call[0] = "validate"
    assert "fit goes on from a seed log, and validate takes checkp" in refused(capsys, monkeypatch, *call)
    assert not list(Path("runs").glob("other*"))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ([{"class_path": "NoSuch"}], "in the seed log, model.updates is NoSuch, and there is no such class"),
        ([{}], "in the seed log, model.updates is "),
        ([{"class_path": "MeZO", "init_args": {"epsilon": "x"}}], "epsilon is x; it must be a number"),
    ],
)
def test_a_log_of_odd_methods_is_refused(home, capsys, monkeypatch, updates, message):
    base = fingerprint(AutoModelForCausalLM.from_pretrained("tiny"))
    SeedLog("tiny", base, "float32", updates, torch.zeros(2, 2, dtype=torch.float64)).save("odd.safetensors")
    words = [*DATA, *SMALL, "--trainer.max_steps=4", "--ckpt_path=odd.safetensors"]
    assert message in refused(capsys, monkeypatch, "fit", "--config", "mezo.yaml", "--model.base", "tiny", *words)
    assert not list(Path().glob("runs/*"))


def test_a_log_of_a_run_whose_settings_changed_is_refused(home):
    resume.fit("mezo", "zo", 0, "--trainer.max_steps=2")
    resume.fit("mezo", "zo", 0, "--trainer.max_steps=4", "--model.updates.momentum=0.5", "--ckpt_path=last")
    with pytest.raises(BadInput, match=r"earlier steps of this run had other settings \(MeZO\.momentum was 0\.0\)"):
        cli.run(["export", "runs/zo-1", "--to", "seedlog"])
