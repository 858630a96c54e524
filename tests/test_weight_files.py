"""Weights that were damaged: those of exports, of the Hub's cache, of adapters, and of the base under a run."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lit_sparse import cli
from lit_sparse.checkpoints import fingerprint, sums_of
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import MEFT
from lit_sparse.testing import tiny_llm
from lit_sparse.weight_files import MARK, check_weights
from tests.test_cli import DATA, SMALL, fit, refused
from tests.test_whole import flip


def lowest_bit(path: Path) -> int:
    """The place of the lowest bit of the first number in a safetensors file, which bf16 rounds away."""
    data = path.read_bytes()
    return 8 * (8 + int.from_bytes(data[:8], "little"))


@pytest.fixture
def exported(home):
    fit("--config", "lora.yaml", "--trainer.max_steps=1")
    cli.run(["export", "runs/lora-1", "--output", "out"])
    cli.run(["export", "runs/lora-1", "--to", "adapter", "--output", "adapter"])
    return Path("out")


def test_a_damaged_export_is_refused_as_a_base(exported, capsys, monkeypatch):
    words = ["fit", "--config", "lora.yaml", "--model.base", "out", *DATA, *SMALL, "--trainer.max_steps=1"]
    cli.run(words)
    flip(exported / "model.safetensors", lowest_bit(exported / "model.safetensors"))
    assert "out/model.safetensors is damaged" in refused(capsys, monkeypatch, *words, "--run=next")
    assert not Path("runs/next-1").exists()
    (exported / "model.safetensors").unlink()
    assert "out/model.safetensors is missing" in refused(capsys, monkeypatch, *words, "--run=next")


def test_a_mark_has_the_hashes_of_its_weights(exported):
    for folder, name in ((exported, "model.safetensors"), (Path("adapter"), "adapter_model.safetensors")):
        files = json.loads((folder / MARK).read_text())["files"]
        assert files == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        (folder / "README.md").write_text("my own")  # which is no damage
        check_weights(folder)
    (exported / MARK).write_text("{")
    with pytest.raises(BadInput, match=r"lit_sparse\.json is damaged"):
        check_weights(exported)


def test_a_damaged_blob_of_the_hubs_cache_is_refused(home, capsys, monkeypatch):
    words = ["fit", "--config", "lora.yaml", "--model.base", "cached", *DATA, *SMALL, "--trainer.max_steps=1"]
    shutil.copytree("tiny", "cached")
    digest = hashlib.sha256(Path("tiny/model.safetensors").read_bytes()).hexdigest()
    Path("blobs").mkdir()
    os.rename("cached/model.safetensors", f"blobs/{digest}")
    Path("cached/model.safetensors").symlink_to(f"../blobs/{digest}")
    cli.run(words)
    flip(Path("blobs", digest), lowest_bit(Path("blobs", digest)))
    assert "cached/model.safetensors is damaged" in refused(capsys, monkeypatch, *words)


@pytest.mark.parametrize("verb", ["fit", "export"])
def test_a_bit_of_the_base_under_a_run_that_rounding_hides_is_found(home, capsys, monkeypatch, verb):
    fit("--config", "lora.yaml", "--trainer.max_steps=1")
    before = fingerprint(CausalLM(base="tiny").build())
    weights = Path("tiny/model.safetensors")
    flip(weights, lowest_bit(weights))
    assert fingerprint(CausalLM(base="tiny").build()) == before
    words = [
        "--config",
        "lora.yaml",
        "--model.base",
        "tiny",
        *DATA,
        *SMALL,
        "--trainer.max_steps=2",
        "--ckpt_path=last",
    ]
    told = refused(capsys, monkeypatch, verb, *(words if verb == "fit" else ["runs/lora-1"]))
    assert "the weights of the base 'tiny' are not quite those that the run began with" in told


def test_every_bit_of_the_weights_counts():
    model = tiny_llm("llama")
    named = sorted(model.named_parameters())
    before = sums_of(named)
    for name, parameter in named:
        bits = parameter.data.view(torch.int32).flatten()
        for place, bit in ((0, 0), (len(bits) - 1, 31)):
            bits[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            assert sums_of(named) != before, name
            bits[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert sums_of(named) == before


def test_a_damaged_adapter_of_mefts_own_is_refused(home):
    fit("--config", "meft.yaml", "--trainer.max_steps=1")
    cli.run(["export", "runs/meft-1", "--to", "adapter", "--output", "adapter"])
    (weights,) = Path("adapter").glob("*.safetensors")
    MEFT.load("adapter", tiny_llm("llama"))
    flip(weights, lowest_bit(weights))
    with safe_open(weights, "pt") as file:  # which notices nothing
        assert file.keys()
    with pytest.raises(BadInput, match="is damaged: its hash"):
        MEFT.load("adapter", tiny_llm("llama"))
