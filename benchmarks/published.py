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
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config

from benchmarks.measurements import Line, read_lines
from benchmarks.provenance import ROOT, of_device
from benchmarks.turns import append
from lit_sparse.cli import make_planned
from lit_sparse.commands.plan import fit_command
from lit_sparse.demo import resolve
from lit_sparse.planning.forecast import Setting, forecast

RESULTS = ROOT / "benchmarks" / "results" / "published.jsonl"
COMMAND = "python -m benchmarks.published"
MODELS: dict[str, PreTrainedConfig] = {
    "Llama-2-7B": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000),
    "Llama-2-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128256
    ),
    "Llama-3.2-3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
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
    "OPT-13B": OPTConfig(
        hidden_size=5120,
        ffn_dim=20480,
        num_hidden_layers=40,
        num_attention_heads=40,
        vocab_size=50272,
        word_embed_proj_dim=5120,
    ),
}
SHIPPED = {"Llama-1B": "models/llama-1b.json"}
"""Models of which the configuration is among the shipped ones."""


class Source(NamedTuple):
    """A published table, and its address; None where only notes on it were at hand."""

    name: str
    address: str | None


LISA = Source("LISA, table 1", "https://arxiv.org/abs/2403.17919")
REPRODUCED = Source("a reproduction of LISA on an H100", None)
MEZO = Source("MeZO, memory on MultiRC", "https://arxiv.org/abs/2305.17333")
PEFT = Source(
    "PEFT's method comparison", "https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA/results"
)
UNSLOTH = Source(
    "Unsloth's requirements",
    "https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements",
)
FACTORY = Source("LLaMA-Factory's requirements", "https://github.com/hiyouga/LLaMA-Factory#hardware-requirement")
PRETRAINING = Source("low-rank pre-training, weights and state", "https://arxiv.org/abs/2505.22922")


class Row(NamedTuple):
    """One published figure in GB of a GPU, and what is planned beside it."""

    source: Source
    model: str
    name: str
    published: float
    method: str
    options: tuple[str, ...]
    batch_size: int
    length: int
    difference: str


RANK, TARGETS = "--model.updates.config.init_args.r", "--model.updates.config.init_args.target_modules"
QUERY_AND_VALUE = f"{TARGETS}=[q_proj,v_proj]"
LAYERS = "--model.updates.active_layers"
CHECKPOINTING, NF4 = "--model.activation_checkpointing=true", "--model.quantize=nf4"
FOUR_GPUS = ("--trainer.devices=4", "--trainer.strategy=fsdp2")
IN_16_BITS = "theirs is 8 bytes a weight, wholly in 16 bits; ours is 16, with fp32 masters, gradients and moments"
UNKNOWN_BATCH = "their batch and library are not known"
DIVIDED = "theirs divides the model over 4 GPUs in a way not told; planned as FSDP2's shards, of one GPU"
LEAST = "their absolute minimum, at a batch not told, with kernels and checkpointing of their own"
RULE = "their estimate by a rule of bytes a weight, without activations"
ROWS_OF_TEXT = (
    "rows of at most 1,300 characters, planned as 512 tokens; theirs is the 99th percentile of what was reserved"
)
GIB = 2**30 / 1e9
ROWS = (
    Row(LISA, "Llama-2-7B", "full", 59, "full", (), 1, 1024, IN_16_BITS),
    Row(LISA, "Llama-2-7B", "LoRA, rank 128", 23, "lora", (f"{RANK}=128",), 1, 1024, "quoted from notes"),
    Row(LISA, "Llama-2-7B", "LISA, 2 layers", 23, "lisa", (f"{LAYERS}=2",), 1, 1024, "quoted from notes"),
    Row(LISA, "Llama-2-70B", "LoRA, rank 128", 79, "lora", (f"{RANK}=128", *FOUR_GPUS), 1, 1024, DIVIDED),
    Row(LISA, "Llama-2-70B", "LISA, 2 layers", 75, "lisa", (f"{LAYERS}=2", *FOUR_GPUS), 1, 1024, DIVIDED),
    Row(REPRODUCED, "Llama-3.1-8B", "LoRA, rank 16", 34.56, "lora", (f"{RANK}=16",), 1, 1024, UNKNOWN_BATCH),
    Row(REPRODUCED, "Llama-3.1-8B", "LISA, 2 layers", 52.14, "lisa", (f"{LAYERS}=2",), 1, 1024, UNKNOWN_BATCH),
    Row(REPRODUCED, "Qwen2.5-3B", "full", 57.60, "full", (), 1, 1024, UNKNOWN_BATCH),
    Row(REPRODUCED, "Qwen2.5-3B", "LoRA, rank 16", 15.93, "lora", (f"{RANK}=16",), 1, 1024, UNKNOWN_BATCH),
    Row(MEZO, "OPT-13B", "MeZO", 26, "mezo", (), 1, 400, "rows of about 400 tokens; the weights alone are 25.7 GB"),
    Row(
        MEZO,
        "OPT-13B",
        "full, 4 GPUs",
        316 / 4,
        "full",
        FOUR_GPUS,
        1,
        400,
        "a quarter of their 316 GB; how their model is divided is not told, ours are FSDP2's shards",
    ),
    Row(PEFT, "Llama-3.2-3B", "full", 34.78 * GIB, "full", (), 4, 512, f"{ROWS_OF_TEXT}; {IN_16_BITS}"),
    Row(
        PEFT,
        "Llama-3.2-3B",
        "LoRA, rank 32, q and v",
        18.74 * GIB,
        "lora",
        (f"{RANK}=32", QUERY_AND_VALUE),
        4,
        512,
        ROWS_OF_TEXT,
    ),
    Row(
        PEFT,
        "Llama-3.2-3B",
        "rsLoRA, rank 64, q and v",
        18.97 * GIB,
        "rslora",
        (f"{RANK}=64", QUERY_AND_VALUE),
        4,
        512,
        ROWS_OF_TEXT,
    ),
    Row(
        PEFT,
        "Llama-3.2-3B",
        "DoRA, rank 32, q and v",
        20.66 * GIB,
        "dora",
        (f"{RANK}=32", QUERY_AND_VALUE),
        4,
        512,
        ROWS_OF_TEXT,
    ),
    Row(
        PEFT,
        "Llama-3.2-3B",
        "SHiRA, rank 32, q and v",
        18.46 * GIB,
        "shira",
        (f"{RANK}=32", QUERY_AND_VALUE),
        4,
        512,
        ROWS_OF_TEXT,
    ),
    Row(PEFT, "Llama-3.2-3B", "IA3", 19.49 * GIB, "ia3", (), 4, 512, ROWS_OF_TEXT),
    Row(UNSLOTH, "Llama-3.2-3B", "LoRA", 8, "lora", (CHECKPOINTING,), 1, 1024, LEAST),
    Row(UNSLOTH, "Llama-3.2-3B", "QLoRA, 4 bits", 3.5, "lora", (CHECKPOINTING, NF4), 1, 1024, LEAST),
    Row(UNSLOTH, "Llama-3.1-8B", "LoRA", 22, "lora", (CHECKPOINTING,), 1, 1024, LEAST),
    Row(UNSLOTH, "Llama-3.1-8B", "QLoRA, 4 bits", 6, "lora", (CHECKPOINTING, NF4), 1, 1024, LEAST),
    Row(FACTORY, "Llama-2-7B", "full, mixed precision", 120, "full", (), 1, 1024, RULE),
    Row(FACTORY, "Llama-2-7B", "full, wholly in bf16", 60, "full", (), 1, 1024, f"{RULE}; {IN_16_BITS}"),
    Row(FACTORY, "Llama-2-7B", "LoRA", 16, "lora", (CHECKPOINTING,), 1, 1024, RULE),
    Row(FACTORY, "Llama-2-7B", "QLoRA, 4 bits", 6, "lora", (CHECKPOINTING, NF4), 1, 1024, RULE),
    Row(
        PRETRAINING,
        "Llama-1B",
        "AdamW",
        8.04,
        "full",
        (),
        1,
        256,
        "bf16 throughout: half of our 16.07 of these in fp32",
    ),
    Row(
        PRETRAINING,
        "Llama-1B",
        "GaLore and Fira, rank 512",
        4.76,
        "galore",
        (),
        1,
        256,
        "bf16 throughout: half of our 9.53; with gradients 7.44, half of our 14.88",
    ),
    Row(
        PRETRAINING,
        "Llama-1B",
        "low rank, 512",
        3.66,
        "low_rank",
        (),
        1,
        256,
        "bf16 throughout: half of our 7.31; with gradients 4.87, half of our 9.75",
    ),
)


def line_of(row: Row, config: Path) -> Line:
    """Plan a row for a GPU."""
    made = make_planned([*fit_command(f"{row.method}.yaml", [], [f"--model.base={config}"]), *row.options])
    setting = Setting("cuda", row.batch_size, row.length, ranks=made.ranks, sharded=made.sharded)
    plan = forecast(row.method, made.module, setting)
    about: dict[str, Any] = {**row._asdict(), "source": row.source.name, "address": row.source.address}
    sizes = {"allocated": plan.allocated, "reserved": plan.reserved, "needed": plan.needed, "seconds": plan.seconds}
    made_of = {"options": list(row.options), "ranks": made.ranks, "categories": dict(plan.peak.categories)}
    return {**of_device("published", torch.device("cpu")), **about, **made_of, **sizes}


def main() -> int:
    """Plan what is missing; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    done = read_lines(asked.results, COMMAND) if asked.results.exists() else []
    known = {(line["source"], line["model"], line["name"]) for line in done}
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            if (row.source.name, row.model, row.name) in known:
                continue
            if row.model in SHIPPED:
                config = Path(resolve(SHIPPED[row.model]))
            else:
                MODELS[row.model].save_pretrained(Path(folder) / row.model)
                config = Path(folder) / row.model / "config.json"
            line = line_of(row, config)
            append(asked.results, [line])
            print(row.model, row.name, f"{line['needed'] / 1e9:.1f} GB", f"published {row.published}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
