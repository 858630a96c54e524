"""Data that the model cannot read are refused before anything is computed."""

import json
from pathlib import Path

import lightning as L
import pytest
from lightning.fabric.plugins.io import CheckpointIO
from transformers import AutoModelForCausalLM

from lit_sparse import cli
from lit_sparse.errors import BadInput
from lit_sparse.modules.checks import check_async_save
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.testing import tiny_llm

WORDS = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data", "Instructions", "--data.train=rows.jsonl"]


@pytest.mark.parametrize("config", ["full.yaml", "smt.yaml"])  # smt computes gradients before the first step
def test_tokens_without_embeddings_are_refused(home: Path, config: str) -> None:
    model = AutoModelForCausalLM.from_pretrained("tiny")
    model.resize_token_embeddings(10)
    model.save_pretrained("tiny")
    with pytest.raises(
        BadInput, match=r"rows have the token \d+ \('\d+'\), but the model has embeddings for 10 tokens"
    ):
        cli.run(["fit", "--config", config, "--model.base=tiny", *WORDS])
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_longer_than_the_positions_are_refused(home: Path, kind: str) -> None:
    tiny_llm(kind).save_pretrained("tiny")
    row = {"prompt": "1", "completion": "2 " * 300}
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "prompt": str(n)}) + "\n" for n in range(8)))
    message = r"has 30\d tokens, but the model has 256 positions .* set data.max_length to 256"
    with pytest.raises(BadInput, match=message):
        cli.run(["fit", "--config", "full.yaml", "--model.base=tiny", "--data.max_length=400", *WORDS])
    assert not list(Path("runs").glob("*"))


class Elsewhere(CheckpointIO):
    """A plugin of the user's."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        raise NotImplementedError

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        raise NotImplementedError

    def remove_checkpoint(self, path) -> None:
        raise NotImplementedError


def test_checkpoints_in_the_background_go_to_a_folder() -> None:
    here = {"accelerator": "cpu", "devices": 1, "logger": False}
    message = "trainer.strategy has async_save, .* but checkpoints {}; leave async_save out"
    trainer = L.Trainer(**here, strategy=FSDP2Strategy(async_save=True), default_root_dir="s3://runs")
    with pytest.raises(BadInput, match=message.format("go to s3://runs")):
        check_async_save(trainer)
    trainer = L.Trainer(**here, strategy=FSDP2Strategy(async_save=True), plugins=[Elsewhere()])
    with pytest.raises(BadInput, match=message.format("are written by Elsewhere")):
        check_async_save(trainer)
    check_async_save(L.Trainer(**here, strategy=FSDP2Strategy(async_save=True)))
    check_async_save(L.Trainer(**here, strategy=FSDP2Strategy(), default_root_dir="s3://runs"))
