"""The record of a fit: the fields of strategies are plain values, and leaks are told from what a fit does anyway."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig

from lit_sparse import cli
from lit_sparse.callbacks.recorder import fields_of
from lit_sparse.strategies import PEFT, SMT
from lit_sparse_profiling.record import RunRecord


def test_fields_of_strategies_are_plain_values():
    adapter = fields_of(PEFT(LoraConfig(r=2, target_modules=["v_proj", "q_proj"])))
    assert json.loads(json.dumps(adapter))["config"]["target_modules"] == ["q_proj", "v_proj"]
    assert fields_of(SMT(block_size=(2, 4)))["block_size"] == [2, 4]


LEAKY = """
import lightning as L
import numpy as np


class Leaky(L.Callback):
    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, *args):
        self.kept.append(np.ones(2**18))  # 68 MiB in all: no test before this one left a container of that size
"""


@pytest.mark.parametrize(("steps", "leaky"), [(12, False), (34, False), (34, True)], ids=["short", "clean", "leaky"])
def test_a_leak_is_told_at_the_defaults_and_nothing_of_a_clean_fit(home, capsys, steps, leaky):
    Path("leaky.py").write_text(LEAKY)
    words = ["--trainer.callbacks=leaky.Leaky"] if leaky else []
    data = ["--data=rows.jsonl", "--data.batch_size=2", "--data.max_length=16", "--data.heldout=4"]
    trainer = [f"--trainer.max_steps={steps}", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    cli.run(["fit", "--config=lora.yaml", "--model.base=tiny", *data, *trainer, *words])
    record = RunRecord.read("runs/lora-1/record.json")
    printed = " ".join(capsys.readouterr().out.split())
    if leaky:
        assert record.memory.growth == pytest.approx(2**21, rel=0.2)
        assert re.search(r"Memory in use grows by (1\.9|2\.0)\d MiB", printed)
        assert f"or state that keeps growing: Leaky.kept ({steps} items)." in printed
    else:
        assert not record.memory.growth
        assert "grows by" not in printed
        assert "a leak" not in printed
