"""Four ranks under FSDP2: they train what one does, each has a quarter, and what they send follows a formula.

docs/many-gpus.md has the formulas as a table.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lit_sparse.anatomy import decoder_layers
from lit_sparse.checkpoints import read_checkpoint
from lit_sparse.data import Synthetic
from lit_sparse.modules import LitSparse
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.ledger import ledger
from tests.methods import module
from tests.modules.test_sharding import ATOL, FULL, lisa, refusal, smt
from tests.pair import attempt, result, run_pair

RANKS, STEPS = 4, 2
KINDS = {
    "c10d._allgather_base_.default": "gather",
    "c10d._reduce_scatter_base_.default": "scatter",
    "c10d.allreduce_.default": "reduce",
}
"""Collectives by the name of torch's op."""
SCALARS = 64
"""All-reduces of at most that many bytes are of losses, tokens and norms."""

SIZES = {"vocab_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}

MADE: dict[str, Callable[[Path], LitSparse]] = {
    **{name: lambda folder, name=name: module(name, folder / "llama", **FULL) for name in ("full", "lora", "l2sp")},
    "gmt": lambda folder: module("gmt", folder / "llama", **FULL),
    "kl": lambda folder: module("full", folder / "llama", **FULL, updates=[{"class_path": "KLToBase"}]),
    "smt": smt,
    "lisa": lambda folder: lisa(folder, schedule="constant"),  # so that a run of two steps can go on
}


class Sent(TorchDispatchMode):
    """Record the kind of each collective, and the bytes of the whole tensor that it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[list[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in KINDS:
            sizes = [one.nbytes for one in tree_leaves(args) if isinstance(one, torch.Tensor)]
            self.all.append([KINDS[str(func)], max(sizes)])
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Record what the last step sends, and the bytes that this rank has in it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.sent = Sent()
        self.sent.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        found = ledger(pl_module.build(), optimizer)
        self.bytes = {"weights": found.trainable + found.frozen, "gradients": found.gradients, "state": found.optimizer}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.sent.__exit__(None, None, None)


def fit(made: LitSparse, ranks: int, ckpt_path: Path | None = None, steps: int = STEPS, **options: Any) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    way = {"strategy": FSDP2Strategy(timeout=timedelta(seconds=60))} if ranks > 1 else {}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "devices": ranks, "use_distributed_sampler": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **quiet, **fixed, max_steps=steps, num_sanity_val_steps=0, limit_val_batches=0, **way, **options
    )
    made.resume_from = ckpt_path
    rows = Synthetic(vocab_size=96, max_length=12, rows=32, heldout=4, batch_size=4 // ranks)
    trainer.fit(made, datamodule=rows, ckpt_path=ckpt_path)
    return trainer


def work(folder: Path, rank: int) -> None:
    def train(name: str) -> dict[str, Any]:
        watch = Watch()
        trainer = fit(MADE[name](folder), RANKS, callbacks=[watch])
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        return {"sent": watch.sent.all, "bytes": watch.bytes}

    for name in MADE:
        attempt(folder, rank, name, lambda name=name: train(name))
    attempt(folder, rank, "rows", lambda: refusal(lambda: fit(module("full", folder / "two", **FULL), RANKS)))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    tiny_llm("llama").save_pretrained(folder / "llama")
    two = LlamaConfig(**dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 2), **SIZES)
    LlamaForCausalLM(two).save_pretrained(folder / "two")
    run_pair(work, folder, RANKS)
    return folder


@pytest.fixture(scope="module")
def alone(four) -> dict[str, L.Trainer]:
    """The trainers of one process on the same rows."""
    return {name: fit(make(four), 1) for name, make in MADE.items()}


@pytest.mark.parametrize("name", MADE)
def test_four_ranks_train_what_one_does(name, four, alone):
    result(four, name)
    own = dict(alone[name].lightning_module.named_parameters())
    found = read_checkpoint(four / f"{name}.ckpt")["state_dict"]
    assert found
    for key, value in found.items():
        torch.testing.assert_close(value, own[key].detach(), rtol=0, atol=ATOL, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["full", "l2sp", "gmt", "lora"])
def test_each_of_four_ranks_has_a_quarter(name, four, alone):
    """Every dimension that is cut can be divided by four."""
    made = alone[name].lightning_module
    whole = sum(parameter.nbytes for parameter in made.build().parameters())
    trained = sum(parameter.nbytes for parameter in made.build().parameters() if parameter.requires_grad)
    for rank in range(RANKS):
        found = result(four, name, rank)["bytes"]
        assert found["weights"] == whole / RANKS
        assert found["gradients"] == trained / RANKS
        steps = len([p for p in made.build().parameters() if p.requires_grad])
        assert 0 <= found["state"] - 2 * trained / RANKS <= 8 * steps  # two moments, and a count for each parameter


@pytest.mark.parametrize("name", MADE)
def test_a_step_sends_what_the_formula_says(name, four, alone):
    """Each layer is gathered twice, the rest once; what trains is reduced by unit; SMT's masters all at once."""
    made = alone[name].lightning_module
    layers, sent = decoder_layers(made.build()), result(four, name)["sent"]
    masters = {id(p) for n, p in made.build().named_parameters() if n.endswith(".blocks")}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    units: list[list[nn.Parameter]] = [list(layer.parameters()) for layer in layers]
    units.append([p for p in made.build().parameters() if id(p) not in inside])
    units = [[p for p in unit if id(p) not in masters] for unit in units]
    sizes = [sum(p.nbytes for p in unit) for unit in units]
    trained = [sum(p.nbytes for p in unit if p.requires_grad) for unit in units]
    found = {kind: sorted(size for what, size in sent if what == kind) for kind in KINDS.values()}
    base = sizes if name == "kl" else []  # which runs on shards of its own
    assert found["gather"] == sorted(2 * sizes[:-1] + sizes[-1:] + base)
    if name != "lisa":  # of which one layer trains, another in either run after a switch
        assert found["scatter"] == sorted(size for size in trained if size)
    else:
        assert len(found["scatter"]) == 2
    large = [size for size in found["reduce"] if size > SCALARS]
    if name == "smt":
        (size,) = large
        blocks = [p for p in made.build().parameters() if id(p) in masters]
        assert size == sum(p.nbytes for p in blocks) + 4 * len(blocks)  # and whether each has a gradient
    elif name != "gmt":  # which counts entries by their magnitude
        assert not large


def test_more_ranks_than_rows_are_refused(four):
    wanted = (
        "BadInput: trainer.strategy is fsdp2, which shards rows over 4 ranks, but no matrix of layer 0 has more than"
    )
    for rank in range(RANKS):
        assert result(four, "rows", rank).startswith(f"{wanted} 2 rows; train on at most 2 ranks")


def test_a_run_of_four_ranks_goes_on_on_one(four):
    result(four, "lisa")
    straight = fit(MADE["lisa"](four), 1, steps=4)
    resumed = fit(MADE["lisa"](four), 1, four / "lisa.ckpt", steps=4)
    own = dict(straight.lightning_module.named_parameters())
    for key, value in resumed.lightning_module.named_parameters():
        torch.testing.assert_close(value.detach(), own[key].detach(), rtol=0, atol=ATOL)
