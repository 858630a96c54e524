"""A fit that runs out of memory: its message, and what it leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_sparse import cli
from lit_sparse.callbacks import out_of_memory
from lit_sparse.modules import CausalLM
from lit_sparse_profiling.record import RunRecord

F = [
    *("--config", "lora.yaml", "--model.base", "tiny", "--data", "Instructions", "--data.train", "rows.jsonl"),
    *("--data.heldout=4", "--data.max_length=16", "--data.batch_size=2", "--samples=0", "--profile=false"),
    *("--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.enable_progress_bar=false"),
]
LIMITED = """
import resource
import sys

import psutil

from lit_sparse import cli
from lit_sparse.modules import CausalLM

load = CausalLM.configure_model


def configure_model(self):
    load(self)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 200 * 2**20,) * 2)


CausalLM.configure_model = configure_model
cli.main()
"""
"""A fit that may take 200 MiB once its model is loaded."""
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """All that the command writes about `words`, which end with status 2."""
    monkeypatch.setattr(sys, "argv", ["lit-sparse", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.partition("lit-sparse: ")[2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_real_one_names_what_was_alive_and_what_would_help(home):
    Path("limited.py").write_text(LIMITED)
    sizes = ["--data=Synthetic", "--data.vocab_size=40", "--data.max_length=4096", "--data.batch_size=8"]
    words = ["fit", "--config=full.yaml", "--model.base=tiny/config.json", *sizes, "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", "--profile=false", "--samples=0"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "limited.py", *words], env=env, capture_output=True, text=True)
    said = ended.stderr
    assert ended.returncode == 2, said
    assert "Traceback" not in said
    assert "lit-sparse: out of memory in the forward pass of step 1, asked for" in said
    alive = float(said.partition("Alive then: ")[2].split()[0])
    assert 120 < alive <= 200, "MiB: most of what there was"
    by_module = said.partition("By module:")[2].partition("The largest tensors:")[0]
    assert "model.layers.0: " in by_module
    assert "saved for backward" in by_module
    assert "(8, 4096, 64) float32: 8.0 MiB, saved for backward" in said.partition("The largest tensors:")[2]
    helps = said.partition("What would help:")[2]
    assert helps.index("--model.activation_checkpointing=true") < helps.index("lit-sparse plan")
    assert "a method that trains less" not in helps, "its weights are next to nothing"
    record = RunRecord.read("runs/full-1/record.json")
    assert (record.status, record.predicted) == ("oom", None)


def test_one_after_some_steps_leaves_the_last_checkpoint(home, capsys, monkeypatch):
    step = CausalLM.training_step

    def full(self, batch, batch_idx):
        if self.global_step == 2:
            raise torch.OutOfMemoryError(FULL)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(CausalLM, "training_step", full)
        said = told(capsys, monkeypatch, "fit", *F, "--checkpoint_steps=1", "--trainer.max_steps=4")
    assert "out of memory in the forward pass of step 3, asked for 2.00 GiB more" in said
    assert "optimizer and strategy state: " in said
    assert "frozen weights: " in said
    assert "--ckpt_path runs/lora-1/checkpoints/last.ckpt" in said
    assert RunRecord.read("runs/lora-1/record.json").status == "oom"
    cli.run(["fit", *F, "--checkpoint_steps=1", "--ckpt_path=last"])
    assert RunRecord.read("runs/lora-1/record.json").status == "ok"


def test_one_in_the_backward_pass_and_in_the_update_is_told_so(home, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    for method, place in {"backward": "backward pass", "optimizer_step": "update"}.items():
        with monkeypatch.context() as patched:
            patched.setattr(f"lightning.LightningModule.{method}", full)
            said = told(capsys, monkeypatch, "fit", *F)
        assert f"out of memory in the {place} of step 1, asked for 2.00 GiB more" in said


def test_one_in_the_selection_is_told_so_and_recomputes_nothing(home, capsys, monkeypatch):
    layers: list[str] = []

    def full(self, name, gradient):
        monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda *_: layers.append(name))
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("lit_sparse.blocks.selection.ScoreSheet.add", full)
    said = told(capsys, monkeypatch, "fit", "--config", "smt.yaml", *F[2:])
    assert "out of memory in loading or selection, before the first step, of step 1, asked for 2.00 GiB more" in said
    assert "What activation checkpointing keeps for the backward pass is not in these lists" in said
    assert "saved for backward" not in said
    assert layers == []


def test_other_verbs_say_it_in_a_sentence(home, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    cli.run(["fit", *F, "--trainer.max_steps=1"])
    monkeypatch.setattr("lit_sparse.export.generate.load_run", full)
    said = told(capsys, monkeypatch, "generate", "runs/lora-1", "1 and 2")
    assert "out of memory, asked for 2.00 GiB more; give smaller batches" in said
    assert "Alive" not in said


@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_tensors_are_found_in_the_graph_but_recomputed_for_nobody(home, checkpointing):
    module = CausalLM("tiny", activation_checkpointing=checkpointing)
    module._prepare()
    module._after_attach()
    batch = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
    calls: list[int] = []
    module.build().model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        loss = module.loss(batch)[0]
        calls.clear()
        raise MemoryError(str(loss.shape))
    except MemoryError as error:
        text = out_of_memory.describe(error, module, None, 1)
    assert calls == []
    assert ("saved for backward" in text) != checkpointing
    assert ("is not in these lists" in text) == checkpointing
    assert ("--model.activation_checkpointing=true" in text) != checkpointing
