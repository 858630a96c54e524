"""One mode of benchmarks/peers.py, in this process: `python benchmarks/peer.py MODE`.

It reads commands, a line each, and answers with a line of JSON: `step` does a training step and tells its seconds,
`measure` tells what the mode trains and takes. It ends with its input. All else that is printed goes to stderr.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TextIO

import peft
import torch
from torch import Tensor, nn

from lit_sparse.anatomy import decoder_layers, linears, role
from lit_sparse.modules import CausalLM
from lit_sparse.optim import trainable
from lit_sparse.strategies import PEFT, SMT
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.strategies.smt import BlockLinear
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.ledger import saved_for_backward


@dataclass(frozen=True)
class Workload:
    """A model, a batch (rows, and tokens of a row), SMT's block size, and the adapters' rank."""

    model: str
    batch: int
    length: int
    block_size: int
    rank: int

    def tokens(self, seed: int, vocabulary: int) -> dict[str, Tensor]:
        """A batch of random tokens, each of them a label too."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (self.batch, self.length), generator=generator)
        return {"input_ids": ids, "labels": ids}


WORKLOADS = {"demo": Workload("demo", 4, 256, 64, 16), "tiny": Workload("tiny", 2, 32, 8, 2)}
QKV = ["q_proj", "k_proj", "v_proj"]
LINEARS = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]


def smt(work: Workload, **choice: Any) -> UpdateStrategy:
    return SMT(blocks="gradient", block_size=work.block_size, targets=["q", "k", "v"], selection_batches=2, **choice)


def smt_as_lora(work: Workload, model: nn.Module) -> UpdateStrategy:
    """SMT with as many trained weights as LoRA on q, k and v."""
    weights = [linear.weight for name, linear in linears(model).items() if name.rpartition(".")[2] in QKV]
    return smt(work, num_blocks=work.rank * sum(sum(weight.shape) for weight in weights) // work.block_size**2)


def lora(work: Workload, targets: list[str], **options: Any) -> UpdateStrategy:
    return PEFT(peft.LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules=targets, **options))


def shira(work: Workload) -> UpdateStrategy:
    return PEFT(peft.ShiraConfig(r=work.rank, target_modules=QKV, random_seed=0))


MODES: dict[str, Callable[[Workload, nn.Module], list[UpdateStrategy]]] = {
    "floor": lambda work, model: [],
    "SMT 0.84 %": lambda work, model: [smt(work, trainable_fraction=0.0084)],
    "SMT 5 %": lambda work, model: [smt(work, trainable_fraction=0.05)],
    "SMT as LoRA q,k,v": lambda work, model: [smt_as_lora(work, model)],
    "LoRA q,k,v": lambda work, model: [lora(work, QKV)],
    "LoRA all linears": lambda work, model: [lora(work, LINEARS)],
    "DoRA all linears": lambda work, model: [lora(work, LINEARS, use_dora=True)],
    "SHiRA q,k,v": lambda work, model: [shira(work)],
    "full fine-tuning": lambda work, model: [],
}
WARMUP = 2
"""Steps before any that count: the optimizer's state is made in the first."""


class Training:
    """A mode's training: the model with its strategies attached, the optimizer, the batch."""

    def __init__(self, mode: str, work: Workload) -> None:
        self.mode, self.work, self.steps = mode, work, 0
        self.task = CausalLM(base=work.model if work.model == "demo" else tiny_llm(), precision="float32")
        self.model = self.task.build().train()
        self.weights = sum(parameter.numel() for parameter in self.model.parameters())
        self.batch = work.tokens(0, self.model.config.vocab_size)
        self.updates = MODES[mode](work, self.model)
        self._attach()
        self.trained = [parameter for _, parameter in trainable(self.model)]
        self.optimizer = torch.optim.AdamW([{"params": self.trained}], lr=1e-4)

    def _attach(self) -> None:
        if self.mode == "floor":
            make_floor(self.model, [name for name in linears_of_layer(self.model, 0) if role(name) in ("q", "k", "v")])
        with self.task.phases("selection"):
            for update in self.updates:
                update.attach(self.model, self.probe)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.task.loss(batch)[0]

    def probe(self, steps: int) -> Iterator[Tensor]:
        for seed in range(1, steps + 1):
            yield self.loss(self.work.tokens(seed, self.model.config.vocab_size))

    def step(self) -> float:
        """Seconds of one step."""
        gc.collect()
        start = perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.batch).backward()
        if self.trained:
            self.optimizer.step()
        self.steps += 1
        for update in self.updates:
            update.after_step(self.steps, self.optimizer)
        return perf_counter() - start

    def measure(self) -> dict[str, Any]:
        """What the mode trains and takes. To be asked for once, at last: a formula is worked out on the bare model."""
        resting = self.task.phases.memory.current()
        with self.task.phases("steps"):
            seconds = [self.step() for _ in range(WARMUP + 3)][WARMUP:]
        phases = {phase.name: phase for phase in self.task.phases.to_list()}
        count = sum(parameter.numel() for parameter in self.trained)
        return {
            "trainable": count,
            "trainable_share": count / self.weights,
            "selection_seconds": phases["selection"].seconds,
            "selection_peak_rss": phases["selection"].peak_rss,
            "rss_before": resting,
            "peak_rss": phases["steps"].peak_rss,
            "memory_method": self.task.phases.memory.method,
            "step_seconds_median": statistics.median(seconds),
            "saved_bytes": self.saved(),
            **self.formula(),
        }

    def saved(self) -> int:
        """Bytes that a forward pass saves for backward, parameters not counted."""
        with saved_for_backward(self.model) as counter:
            self.loss(self.batch)
        return counter.peak

    def formula(self) -> dict[str, Any]:
        """SMT's saved bytes by formula: what the floor of its lowest layer saves, and the packed columns."""
        smts = [update for update in self.updates if isinstance(update, SMT)]
        if not smts:
            return {"saved_formula": None, "lowest_layer": None}
        trained, packed = list(smts[0].choice), packed_bytes(self.model, self.batch["input_ids"].numel())
        smts[0].detach(self.model)
        layers = range(len(decoder_layers(self.model)))
        lowest = next(layer for layer in layers if linears_of_layer(self.model, layer) & set(trained))
        make_floor(self.model, sorted(linears_of_layer(self.model, lowest) & set(trained)))
        return {"saved_formula": self.saved() + packed, "lowest_layer": lowest}


def make_floor(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze `model` and let gradients flow from the outputs of the linear layers `names` on."""
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: output.detach().requires_grad_())


def linears_of_layer(model: nn.Module, layer: int) -> set[str]:
    inside = set(decoder_layers(model)[layer].modules())
    return {name for name, linear in linears(model).items() if linear in inside}


def packed_bytes(model: nn.Module, tokens: int) -> int:
    """Tokens x kept columns x 4 bytes, once for all linear layers that read the same input."""
    groups = {module.shared for module in model.modules() if isinstance(module, BlockLinear)}
    return sum(tokens * len(group.columns) * group.width * 4 for group in groups)


def serve(training: Training, commands: TextIO, answers: TextIO) -> None:
    """Answer each command, to the end of their file."""
    known: dict[str, Callable[[], Any]] = {"step": training.step, "measure": training.measure}
    for command in commands:
        print(json.dumps(known[command.strip()]()), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Do training steps of one mode, and measure them.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", choices=WORKLOADS, default="demo")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print what they like, but not among the answers
    torch.set_num_threads(asked.threads)
    serve(Training(asked.mode, WORKLOADS[asked.model]), sys.stdin, answers)


if __name__ == "__main__":
    main()
