"""Measure what a rank of several has: its memory while a model is loaded, larger than a rank's share.

`python -m benchmarks.many_ranks` writes a random model of Llama-3.2-1B's shape in bf16 (2.5 GB) into a temporary folder
and loads it under FSDP2 in four processes (gloo, CPU), once from its files and once drawn from its configuration; it
appends two lines to benchmarks/results/many_ranks.jsonl, with the resident memory of the rank that takes most before
loading, and its peak while loading. `--ranks 2` takes two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT, commit, where
from benchmarks.turns import append
from lit_sparse.data import Synthetic
from lit_sparse.modules import CausalLM
from lit_sparse.modules.hollow import build_hollow, draw_units, hollow, is_hollow
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse_profiling.devices import describe_device
from lit_sparse_profiling.memory import ResidentMemory

RESULTS = ROOT / "benchmarks" / "results" / "many_ranks.jsonl"
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)
"""The shape of Llama-3.2-1B: 1,235,814,400 weights."""


def write_model(config: LlamaConfig, folder: Path) -> dict[str, int]:
    """Write a random model in bf16 to `folder`, a unit at a time; return the bytes of it and of its largest unit."""
    config.save_pretrained(folder)
    model = build_hollow(AutoModelForCausalLM, config, {"dtype": torch.bfloat16})
    names = {parameter: name for name, parameter in model.named_parameters()}
    index: dict[str, str] = {}
    sizes: list[int] = []
    for number, unit in enumerate(draw_units(model, 0)):
        own = {names[p]: p for p in unit.parameters() if not is_hollow(p)}
        file = f"model-{number:05}.safetensors"
        save_file({name: parameter.detach() for name, parameter in own.items()}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
        sizes.append(sum(parameter.nbytes for parameter in own.values()))
        for parameter in own.values():
            parameter.data = hollow(parameter).data
    whole = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    return {"model_bytes": sum(sizes), "unit_bytes": max(sizes)}


class Loaded(CausalLM):
    """Note the resident memory before and while the model is loaded and sharded."""

    def configure_model(self) -> None:
        memory = ResidentMemory()
        self.before, self.method = memory.current(), memory.method
        memory.lap()
        super().configure_model()
        self.most = memory.lap()
        self.after = memory.current()


def load(rank: int, world: int, base: str, out: str, port: int) -> None:
    """Load the model at `base` as `fit` does, without a step, and write what this rank measured to the folder `out`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench", "GROUP_RANK": 0}
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in {**there, **mine}.items()})
    trainer = L.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=world,
        strategy=FSDP2Strategy(),
        max_steps=0,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    module = Loaded(base, precision="bfloat16")
    trainer.fit(module, datamodule=Synthetic(vocab_size=96, max_length=8, rows=16, heldout=2, batch_size=1))
    shards = sum(parameter.to_local().nbytes for parameter in module.build().parameters())  # pyright: ignore
    found = {"before": module.before, "most": module.most, "after": module.after, "shards": shards}
    (Path(out) / f"{rank}.json").write_text(json.dumps(found | {"method": module.method}))
    torch.distributed.destroy_process_group()


def measure(world: int, config: LlamaConfig = LLAMA_1B) -> list[Line]:
    """Return the lines of a model that `world` ranks load together, from its files and from its configuration."""
    with tempfile.TemporaryDirectory(prefix="lit-sparse-") as folder:
        base = Path(folder) / "base"
        sizes = write_model(config, base)
        bases = {"files": base, "drawn": base / "config.json"}
        return [line_of(source, sizes, loaded(path, world)) for source, path in bases.items()]


def loaded(base: Path, world: int) -> list[Line]:
    """Return what each of `world` ranks measured."""
    with tempfile.TemporaryDirectory(prefix="lit-sparse-") as out, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        spawn = torch.multiprocessing.spawn  # pyright: ignore[reportPrivateImportUsage]
        spawn(load, (world, str(base), out, port), nprocs=world)
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(world)]


def line_of(source: str, sizes: Line, ranks: Sequence[Line]) -> Line:
    """Return the line of the rank that takes most."""
    world = len(ranks)
    rank = max(ranks, key=lambda one: one["most"] - one["before"])
    today = datetime.now(UTC).date().isoformat()
    about = {"bench": "many_ranks", "part": "loading", "source": source, "commit": commit(), "date": today}
    device = where(describe_device(torch.device("cpu")))
    versions = {package: version(package) for package in ("torch", "transformers")}
    allowed = sizes["model_bytes"] // world + 2 * sizes["unit_bytes"]
    return {**about, "device": device, "versions": versions, "ranks": world, **sizes, "allowed_bytes": allowed, **rank}


def sentence(line: Line) -> str:
    """Say what was measured, in MB."""
    took = line["most"] - line["before"]
    megabytes = {name: f"{line[f'{name}_bytes'] / 1e6:,.0f} MB" for name in ("model", "unit", "allowed")}
    return (
        f"{line['ranks']} ranks load {megabytes['model']} ({line['source']}): a rank takes {took / 1e6:,.0f} MB more "
        f"than before, of which {line['shards'] / 1e6:,.0f} MB are shards; allowed are {megabytes['allowed']}, "
        f"the model's share and two units of {megabytes['unit']}. {line['most'] / 1e6:,.0f} MB are resident in all."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    lines = measure(parser.parse_args().ranks)
    append(RESULTS, lines)
    for line in lines:
        print(sentence(line))


if __name__ == "__main__":
    main()
