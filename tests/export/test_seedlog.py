"""A seed log makes a run's weights again, to the bit, from the base and kilobytes; and of nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_sparse import cli
from lit_sparse.errors import BadInput
from lit_sparse.export.seedlog import FORMAT, SeedLog
from lit_sparse.runs import load_run
from tests.test_cli import fit, refused

OPTIONS = {
    "mezo": ["--model.updates.momentum=0.5", "--model.updates.weight_decay=0.1", "--model.schedule=cosine"],
    "lezo": ["--model.updates.queries=2"],
}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_log_makes_the_runs_weights_and_state_again(home, method):
    fit("--config", f"{method}.yaml", "--trainer.max_steps=6", "--model.lr=1e-3", "--run", "zo", *OPTIONS[method])
    cli.run(["export", "runs/zo-1", "--to", "seedlog"])
    file = Path("runs/zo-1/seedlog.safetensors")
    assert file.stat().st_size < 4096
    log = SeedLog.load(file)
    assert log.log.shape == (6, 2 if method == "mezo" else 3)
    base = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    start = {name: p.detach().clone() for name, p in base.named_parameters()}
    _, optimizer = log.replay(base)
    trained = load_run(Path("runs/zo-1"))[0].build()
    for name, p in base.named_parameters():
        assert torch.equal(p, trained.get_parameter(name)), name
    assert not all(torch.equal(p, start[name]) for name, p in base.named_parameters())
    kept = torch.load("runs/zo-1/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    ours = optimizer.state_dict()["state"]
    assert any(kept.values()) == (method == "mezo")
    assert all(torch.equal(ours[key]["momentum"], one["momentum"]) for key, one in kept.items() if one)
    with pytest.raises(BadInput, match="replay it on the unchanged tiny"):
        log.apply(base)  # it is trained already
    half = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.bfloat16)
    with pytest.raises(
        BadInput, match=r"weights in float32, which this model has in bfloat16; load it with dtype=torch\.f"
    ):
        log.apply(half)


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
