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
from lit_sparse.storage.weight_files import MARK, check_hashes
from lit_sparse.strategies import MEFT
from lit_sparse.testing import tiny_llm
from tests.storage.test_whole import flip
from tests.test_cli import DATA, SMALL, fit, refused


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


def test_a_mark_has_the_hashes_of_its_files(exported):
    for folder, names in (
        (exported, {"model.safetensors", "config.json", "tokenizer.json"}),
        (Path("adapter"), {"adapter_model.safetensors", "adapter_config.json"}),
    ):
        files = json.loads((folder / MARK).read_text())["files"]
        assert names <= files.keys()
        assert files == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
        (folder / "README.md").write_text("my own")  # which is no damage
        check_hashes(folder)
    (exported / "config.json").write_text((exported / "config.json").read_text().replace("1e-06", "1e-05"))
    with pytest.raises(BadInput, match=r"out/config\.json is damaged.*change is yours, remove its line from out/"):
        check_hashes(exported)
    (exported / MARK).write_text("{")
    with pytest.raises(BadInput, match=r"lit_sparse\.json is damaged"):
        check_hashes(exported)


def test_a_damaged_blob_of_the_hubs_cache_is_refused(home, capsys, monkeypatch):
    words = ["fit", "--config", "lora.yaml", "--model.base", "cached", *DATA, *SMALL, "--trainer.max_steps=1"]
    shutil.copytree("tiny", "cached")
    Path("blobs").mkdir()
    small = Path("cached/config.json").read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(small) + small).hexdigest()
    large = hashlib.sha256(Path("tiny/model.safetensors").read_bytes()).hexdigest()
    for name, digest in (("config.json", git), ("model.safetensors", large)):
        os.rename(f"cached/{name}", f"blobs/{digest}")
        Path("cached", name).symlink_to(f"../blobs/{digest}")
    cli.run(words)
    flip(Path("blobs", large), lowest_bit(Path("blobs", large)))
    assert "cached/model.safetensors is damaged" in refused(capsys, monkeypatch, *words)
    flip(Path("blobs", large), lowest_bit(Path("blobs", large)))
    Path("blobs", git).write_bytes(small + b" ")
    assert "cached/config.json is damaged" in refused(capsys, monkeypatch, *words)


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
