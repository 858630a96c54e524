"""Published memory of trainings beside what `lit-sparse plan` says of them, from bare configurations.

`python -m benchmarks.published` plans what tables name, and appends to benchmarks/results/published.jsonl.
It takes about half a minute each, and neither a GPU nor weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.measurements import Line, read_lines
from benchmarks.provenance import ROOT, of_device
from benchmarks.turns import append
from lit_sparse.cli import make_planned
from lit_sparse.commands.plan import fit_command
from lit_sparse.planning.forecast import Setting, forecast

RESULTS = ROOT / "benchmarks" / "results" / "published.jsonl"
COMMAND = "python -m benchmarks.published"
MODELS: dict[str, PreTrainedConfig] = {
    "Llama-2-7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
    ),
    "Qwen2.5-3B": Qwen2Config(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
LISA_TABLE, REPRODUCED = "LISA (arXiv 2403.17919), table 1", "a reproduction of LISA on an H100"


class Row(NamedTuple):
    """One published figure in GB, and what is planned beside it."""

    source: str
    model: str
    name: str
    published: float
    method: str
    options: tuple[str, ...]
    batch_size: int
    length: int
    difference: str


RANK = "--model.updates.config.init_args.r"
ROWS = (
    Row(LISA_TABLE, "Llama-2-7B", "full", 59, "full", (), 1, 1024, "59 GB are 8 bytes a weight, ours takes 16"),
    Row(LISA_TABLE, "Llama-2-7B", "LoRA, rank 128", 23, "lora", (f"{RANK}=128",), 1, 1024, ""),
    Row(LISA_TABLE, "Llama-2-7B", "LISA, 2 layers", 23, "lisa", ("--model.updates.active_layers=2",), 1, 1024, ""),
    Row(REPRODUCED, "Llama-3.1-8B", "LoRA, rank 16", 34.56, "lora", (f"{RANK}=16",), 1, 1024, "batch not known"),
    Row(
        REPRODUCED,
        "Llama-3.1-8B",
        "LISA, 2 layers",
        52.14,
        "lisa",
        ("--model.updates.active_layers=2",),
        1,
        1024,
        "batch not known",
    ),
    Row(REPRODUCED, "Qwen2.5-3B", "full", 57.60, "full", (), 1, 1024, "batch not known"),
    Row(REPRODUCED, "Qwen2.5-3B", "LoRA, rank 16", 15.93, "lora", (f"{RANK}=16",), 1, 1024, "batch not known"),
)


def line_of(row: Row, config: Path) -> Line:
    """Plan a row for a GPU."""
    made = make_planned([*fit_command(f"{row.method}.yaml", [], [f"--model.base={config}"]), *row.options])
    plan = forecast(row.method, made.module, Setting("cuda", row.batch_size, row.length))
    about: dict[str, Any] = {**row._asdict(), "options": list(row.options)}
    sizes = {"allocated": plan.allocated, "reserved": plan.reserved, "needed": plan.needed, "seconds": plan.seconds}
    return {**of_device("published", torch.device("cpu")), **about, **sizes, "categories": dict(plan.peak.categories)}


def main() -> int:
    """Plan what is missing; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    done = read_lines(asked.results, COMMAND) if asked.results.exists() else []
    known = {(line["source"], line["model"], line["name"]) for line in done}
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            if (row.source, row.model, row.name) in known:
                continue
            MODELS[row.model].save_pretrained(Path(folder) / row.model)
            line = line_of(row, Path(folder) / row.model / "config.json")
            append(asked.results, [line])
            print(row.model, row.name, f"{line['needed'] / 1e9:.1f} GB", f"published {row.published}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
