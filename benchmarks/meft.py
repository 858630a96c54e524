"""MEFT beside activation checkpointing: bytes that are kept for the backward pass, memory, and time.

`python -m benchmarks.meft` measures two things and appends to benchmarks/results/meft.jsonl:
`curve`: bytes that a graph keeps against depth, 4 to 32 layers of Llama-3.2-1B's proportions (counted: any machine);
`pairs`: steps of MEFT, of LoRA and of MEFT's adapters without recomputation, interleaved with those of the same
adapters with every layer recomputed, on the demo model, 4 x 256 random tokens, or on `--workload` (needs a quiet
machine; runs that a first call has made are not made again).
What a part measures again is appended again; tables show the newest. Losses and forgetting: `python -m
benchmarks.quality meft`. Lengths on a GPU: `python -m benchmarks.gpu --stages meft`.
"""

from __future__ import annotations

import argparse
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.adapters import PlainAdapters
from benchmarks.measurements import Line
from benchmarks.provenance import ROOT, of_device
from benchmarks.turns import append, lines_of, measure
from lit_sparse.strategies import MEFT, Updates
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.testing import next_token_cross_entropy

HERE = ROOT / "benchmarks" / "meft"
WORKLOAD = ROOT / "benchmarks" / "peers" / "workload.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "meft.jsonl"
PARTS = ("curve", "pairs")
RIVAL = "adapters_every_1"
TIMED = ("exact_2", "exact_3", "segments", "adapters", "adapters_every_6", "lora", "lora_checkpointed")
"""YAMLs of benchmarks/meft that are timed beside the rival, after meft.yaml."""
DEPTHS = (4, 8, 16, 32)
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
"""Llama-3.2-1B's proportions, an eighth as wide."""
ROWS, TOKENS, VOCABULARY = 1, 512, 512
ARMS: dict[str, Callable[[], list[UpdateStrategy]]] = {
    "full fine-tuning": list,
    "frozen layers, adapters": lambda: [PlainAdapters()],
    "adapters, every layer recomputed": lambda: [PlainAdapters(every=1)],
    "adapters, six layers recomputed": lambda: [PlainAdapters(every=6)],
    "MEFT 1, exact": lambda: [MEFT(variant=1)],
    "MEFT 2, exact": lambda: [MEFT(variant=2)],
    "MEFT 3, exact": lambda: [MEFT(variant=3)],
    "MEFT 1, stored every 4 layers": lambda: [MEFT(exact=False, checkpoint_every=4, max_error=1e9)],
}
"""Variants that the curve is measured of; full fine-tuning stores what its layers' own gradients need as well."""
SLOPE, SHARE = 0.05, 0.16
"""Targets: bytes a layer, of a frozen layer's; bytes at depth 32, of full fine-tuning's (the paper's 84 % less)."""


# ---- bytes against depth


@dataclass(eq=False)
class Kept:
    """A tensor that a graph keeps for its backward pass."""

    tensor: Tensor


def bytes_kept(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Return the bytes that live graphs keep after `run`: each storage once, without parameters and buffers."""
    alive: list[weakref.ref[Kept]] = []

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor.detach())  # an output with its graph would keep itself
        alive.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = run()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {k.tensor.untyped_storage() for ref in alive if (k := ref()) is not None}
    found = {storage.data_ptr(): storage.nbytes() for storage in kept if storage.data_ptr() not in own}
    loss.backward()  # the graph lives until here
    return sum(found.values())


def kept_at(depth: int, strategies: list[UpdateStrategy], sizes: dict[str, int], rows: int, tokens: int) -> int:
    """Return the bytes that a training step of a Llama of that depth keeps for its backward pass."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": depth, **sizes}
    model = LlamaForCausalLM(LlamaConfig(**options)).train()
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return next_token_cross_entropy(model(input_ids=ids).logits, ids)

    Updates(strategies).attach(model, lambda steps, weighed=True: (loss() for _ in range(steps)))
    return bytes_kept(model, loss)


def curve() -> Iterator[Line]:
    """Count the bytes that each arm keeps at each depth."""
    about = of_device("meft", torch.device("cpu"))
    about["versions"] = {package: version(package) for package in ("torch", "transformers")}
    for arm, strategies in ARMS.items():
        kept = [kept_at(depth, strategies(), SIZES, ROWS, TOKENS) for depth in DEPTHS]
        yield {**about, "curve": arm, "depths": DEPTHS, "bytes": kept, "tokens": ROWS * TOKENS, **SIZES}


def slope(line: Line) -> float:
    """Return the bytes that each further layer adds, between the first depth and the last."""
    depths, kept = line["depths"], line["bytes"]
    return (kept[-1] - kept[0]) / (depths[-1] - depths[0])


def verdicts(lines: Sequence[Line]) -> Iterator[str]:
    """Compare the curve of exact MEFT with its targets, if it was measured."""
    curves = {line["curve"]: line for line in lines if "curve" in line}
    for name, line in curves.items():
        if name.endswith("exact"):
            layer = slope(line) / slope(curves["frozen layers, adapters"])
            share = line["bytes"][-1] / curves["full fine-tuning"]["bytes"][-1]
            yield judged(f"{name}: a further layer keeps {layer:.2%} of a frozen one's bytes", layer, SLOPE)
            yield judged(f"{name}: 32 layers keep {share:.2%} of full fine-tuning's bytes", share, SHARE)


def judged(what: str, got: float, most: float) -> str:
    return f"{'met   ' if got <= most else 'missed'} {what}, at most {most:.0%}"


# ---- memory and time


def pairs(into: Path, rounds: int, workload: Path) -> Iterator[Line]:
    """Interleave steps of each arm with those of the rival; yield their lines."""
    common = [f"--config={workload}", f"--steps={rounds}"]
    rival = str(HERE / f"{RIVAL}.yaml")
    measure([rival, f"--into={into / 'alone'}", *common])
    others = ["meft.yaml", *(str(HERE / f"{name}.yaml") for name in TIMED)]
    measure([*others, f"--against={rival}", f"--into={into / 'turns'}", *common])
    yield from lines_of("meft", into / "alone")
    yield from lines_of("meft", into / "turns")


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and append it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each pair (default 20)")
    parser.add_argument("--workload", type=Path, default=WORKLOAD, help="YAML of the pairs' model, data and trainer")
    parser.add_argument("--into", type=Path, default=Path("runs/meft"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    os.chdir(ROOT)
    measures: dict[str, Callable[[], Iterator[Line]]] = {
        "curve": curve,
        "pairs": lambda: pairs(asked.into, asked.rounds, asked.workload),
    }
    for part in asked.parts or PARTS:
        found = list(measures[part]())
        append(asked.results, found)
        for said in verdicts(found):
            print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
