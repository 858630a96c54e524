"""Compare LISA with full fine-tuning and LoRA: step time, memory, state at each switch, and displacement of layers.

`python -m benchmarks.lisa_costs` measures three things on the demo model and appends to benchmarks/results/lisa.jsonl:
`time`: steps of LISA and LoRA interleaved with full fine-tuning's, 4 x 256 random tokens (needs a quiet machine);
`state`: optimizer and strategy state over twenty switches, for each policy of LISA's;
`norms`: norms of each layer's weights, and of their change, after fine-tuning on grade-school problems: the premise of
LISA's paper (arXiv 2403.17919, section 3.1) is that LoRA moves embeddings and head most.
A part that is measured again is appended again; tables and figures show the newest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.measurements import Line
from benchmarks.provenance import ROOT, provenance
from benchmarks.quality import QUIET, checkpointed, fitted
from benchmarks.trials import digest
from benchmarks.turns import append, lines_of, measure, newest
from lit_sparse.anatomy import decoder_layers
from lit_sparse.commands.configs import found
from lit_sparse.export.merge import Merge
from lit_sparse.modules.loading import load_base
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.runner import Job, hash_sources

HERE = ROOT / "benchmarks" / "lisa"
RESULTS = ROOT / "benchmarks" / "results" / "lisa.jsonl"
PARTS = ("time", "state", "norms")
FULL, LORA = "full.yaml", str(ROOT / "benchmarks" / "peers" / "lora_all.yaml")
EMBEDDINGS, FROZEN = str(HERE / "embeddings.yaml"), str(HERE / "frozen.yaml")
POLICIES = {"reset": FROZEN, "offload": str(HERE / "offload.yaml"), "keep": str(HERE / "keep.yaml")}
SWITCHES = 20
MOST = 0.75
"""Target: step time with frozen embeddings, relative to full fine-tuning's, on a CPU."""
TRAINED = {
    "full": (FULL, 6e-5),
    "lora": (LORA, 5e-4),
    "lisa": (EMBEDDINGS, 2e-4),
}
"""YAMLs and peak learning rates of the runs whose norms are measured.

LoRA adapts the decoder layers alone: the demo model ties embeddings and head, and an adapter of tied weights cannot be
merged."""
STEPS = 32
"""Optimizer steps after which norms are measured."""


# ---- step time and memory


def time(into: Path, rounds: int) -> Iterator[Line]:
    """Interleave steps of LISA and LoRA with full fine-tuning's; return their lines."""
    common = [f"--config={ROOT / 'benchmarks' / 'peers' / 'workload.yaml'}", f"--steps={rounds}"]
    measure([FULL, f"--into={into / 'alone'}", *common])
    measure([EMBEDDINGS, FROZEN, LORA, f"--against={FULL}", f"--into={into / 'turns'}", *common])
    yield from lines_of("lisa", into / "alone")
    yield from lines_of("lisa", into / "turns")


# ---- state from switch to switch


def state(into: Path) -> Iterator[Line]:
    """Measure the state of each policy from the first interval to the twentieth switch, and full fine-tuning's."""
    steps = 2 * (SWITCHES + 1)  # two in each interval
    common = [f"--config={HERE / 'states.yaml'}", f"--steps={steps}", f"--into={into / 'state'}"]
    measure([FULL, *POLICIES.values(), *common])
    records = newest(into / "state")
    for policy, yaml in POLICIES.items():
        record = records[Path(yaml).stem]
        yield provenance("lisa", record) | state_line(policy, record, records["full"])


def state_line(policy: str, record: RunRecord, full: RunRecord) -> Line:
    assert record.model is not None
    assert full.ledger is not None
    noted = [(at.step, at.optimizer, at.strategy) for at in record.states[: SWITCHES + 1]]
    return {
        "policy": policy,
        "trainable": record.model.trainable,
        "states": noted,
        "full_state": full.ledger.optimizer,
        "peak_rss": next(phase.peak_rss for phase in record.phases if phase.name == "training"),
    }


# ---- how far layers move


def norms(into: Path) -> Iterator[Line]:
    """Measure the norms of each layer before training, and of its change."""
    for name, (yaml, rate) in TRAINED.items():
        folder = trained(name, yaml, rate, into / "norms")
        merge = Merge.of(folder)
        base = load_base(merge.module.auto_class, merge.module.base, "auto", merge.module.attention)
        record = RunRecord.read(folder / "record.json")
        yield provenance("lisa", record) | {
            "norms": name,
            "lr": rate,
            "steps": STEPS,
            "after": record.outcome["after"],
            "layers": moved(base, merge.model),
        }


def trained(name: str, yaml: str, rate: float, into: Path) -> Path:
    """Return the folder of a fit on grade-school problems; an earlier one is used again."""
    files = [found(yaml), str(ROOT / "benchmarks" / "quality" / "workloads" / "demo.yaml")]
    config = [f"--config={file}" for file in files]
    ends = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}", "--trainer.num_sanity_val_steps=0"]
    place = [f"--run={name}", f"--trainer.default_root_dir={into}", f"--checkpoint_steps={STEPS}"]
    command = [sys.executable, "-m", "lit_sparse", "fit", *config, f"--model.lr={rate}", *ends, *place, *QUIET]
    code = hash_sources([ROOT / folder for folder in ("lit_sparse", "kernels")])
    job = Job(name, command, {"lr": f"{rate:g}", "steps": str(STEPS), "made": digest({"files": files}, {"code": code})})
    return checkpointed(into, job) or fitted(into, job)


@torch.no_grad()
def moved(base: nn.Module, model: nn.Module) -> list[Line]:
    """Return norms of the weights and of their change, for embeddings, each decoder layer, final norm and head."""
    return [
        {"layer": name, "norm": norm(before), "change": norm([b - a for a, b in zip(before, after, strict=True)])}
        for (name, before), (_, after) in zip(parts(base), parts(model), strict=True)
    ]


def parts(model: nn.Module) -> list[tuple[str, list[torch.Tensor]]]:
    """Return parameters in fp32 by part, in model order: those of a decoder layer together, others one by one."""
    layers = enumerate(decoder_layers(model))
    layer_of = {id(parameter): str(number) for number, layer in layers for parameter in layer.parameters()}
    grouped: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        grouped.setdefault(layer_of.get(id(parameter), name), []).append(parameter.float())
    return list(grouped.items())


def norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


# ---- the command


def verdict(lines: Sequence[Line]) -> str | None:
    """Compare the step time with its target, if it was measured."""
    for line in lines:
        if line.get("pair") == ["frozen", "full"]:
            met = "met   " if line["ratio_median"] <= MOST else "missed"
            return f"{met} frozen: step time {line['ratio_median']:.3f} of full fine-tuning's, at most {MOST}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and append it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[], help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each pair (default 30)")
    parser.add_argument("--into", type=Path, default=Path("runs/lisa"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines to append to")
    asked = parser.parse_args(arguments)
    os.chdir(ROOT)
    measures = {"time": lambda: time(asked.into, asked.rounds), "state": lambda: state(asked.into)}
    measures["norms"] = lambda: norms(asked.into)
    for part in asked.parts or PARTS:
        found = list(measures[part]())
        append(asked.results, found)
        if (said := verdict(found)) is not None:
            print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
