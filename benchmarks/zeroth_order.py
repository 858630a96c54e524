"""Measure a step of MeZO beside forward passes of the same batch: time, the bytes that it moves, and memory.

`python -m benchmarks.zeroth_order` takes interleaved pairs of a step (of all weights, in the model's dtype) and two
plain forward passes without a graph, for each kind of noise, and prints the median of the ratio with the range of its
middle half. On LoRA it takes pairs of two losses in one pass (`probes_at_once: 2`) and plain inference of as many rows,
and prints the throughput a loss. Bytes moved are of the weights that perturbations and the update read and write, in
units of the weights' own bytes; what the forward passes read anyway does not count. Memory is the highest level of the
allocator's events in a step, beside that of plain inference; a CPU's only. What has a mark is said to meet it or not.
It times: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from lit_sparse.demo import DEMO, resolve
from lit_sparse.loss import next_token_loss
from lit_sparse.modules import CausalLM
from lit_sparse.modules.forward_only import WindowLoss, repeated
from lit_sparse.strategies import HELENE, PEFT, MeZO, Updates, UpdateStrategy
from lit_sparse.zeroth_order.directions import Dense, Part
from lit_sparse.zeroth_order.optimizer import Losses
from lit_sparse.zeroth_order.perturbed import Make, Place, Rows
from lit_sparse_kernels.add_noise import Term

WARM = 2
"""Pairs that are not counted."""
MOVED, MEMORY, THROUGHPUT = 6.0, 1.05, 0.90
"""The marks: bytes that a step moves over those of the weights, memory over inference's, throughput of two losses in a
pass over plain inference's."""
STEP = {"cpu": {"rademacher": 1.10}, "cuda": {"rademacher": 1.05, "gaussian": 1.05}}
"""The marks of the time of a step over two forward passes, by kind of device and noise."""
Said = tuple[str, bool | None]
"""A sentence, and whether a mark is met; None without a mark."""


@dataclass
class Counted(Dense):
    """Dense directions that add up the bytes of weights that they read and write.

    Rows that an embedding gathers for tokens do not count: a plain pass reads them once, as this does, and what it
    writes are activations, to which the noise is added in place.

    Attributes:
        moved: Bytes so far.
    """

    moved: int = 0

    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        out = super().perturb(weight, place, rows, seed, scale)
        if isinstance(rows, slice):
            self.moved += weight.nbytes + out.nbytes
        return out

    def move(self, parts: Sequence[Part], terms: Sequence[Term], lr: float, momentum: float) -> None:
        super().move(parts, terms, lr, momentum)
        self.moved += sum(2 * part.tensor.nbytes for part in parts)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean loss of the next token without all logits, as training computes it."""
    hidden = model.model(input_ids=ids).last_hidden_state  # pyright: ignore[reportCallIssue]
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    return next_token_loss(hidden, head.weight, head.bias, ids)


def seconds(device: torch.device, act: Callable[[], object]) -> float:
    """Return the wall time of `act`, its work on a GPU included."""
    for wait in (True, False):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if wait:
            begin = time.perf_counter()
            act()
    return time.perf_counter() - begin  # pyright: ignore[reportPossiblyUnboundVariable]


def bytes_moved(model: nn.Module, ids: Tensor, loss: Callable[[], Tensor] | None = None) -> float:
    """Return the bytes that a step moves over the weights, in units of theirs."""
    direction = Counted()
    updates = Updates([MeZO(direction=direction)])
    updates.attach(model)
    updates.step(1, updates.optimizer(0.0), loss or (lambda: loss_of(model, ids)))
    return direction.moved / sum(p.nbytes for p in model.parameters())


def ratios(model: nn.Module, ids: Tensor, kind: str, pairs: int) -> list[float]:
    """Return the time of a step over that of two forward passes, of interleaved pairs."""
    updates = Updates([MeZO(direction=kind)])
    updates.attach(model)
    optimizer, found = updates.optimizer(1e-7), list[float]()

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2):
            loss_of(model, ids)

    for number in range(1, WARM + pairs + 1):
        step = seconds(ids.device, lambda n=number: updates.step(n, optimizer, lambda: loss_of(model, ids)))
        found.append(step / seconds(ids.device, forwards))
    return found[WARM:]


def throughputs(task: CausalLM, batch: Mapping[str, Tensor], count: int, pairs: int) -> list[float]:
    """Return the throughput a loss of `count` losses in one pass over that of plain inference of as many rows."""
    model, direction = task.build(), Dense()
    together = Losses(model, WindowLoss(task, [batch]), count)
    plain, found = WindowLoss(task, [repeated(batch, count)]), list[float]()

    def beside(scale: float) -> Make:
        return lambda weight, place, rows: direction.perturb(weight, place, rows, 1, scale)

    makes = [beside(1e-2 * (-1) ** number) for number in range(count)]
    with torch.no_grad():
        for _ in range(WARM + pairs):
            ours = seconds(batch["labels"].device, lambda: together.of(makes))
            found.append(seconds(batch["labels"].device, plain) / ours)
    return found[WARM:]


def highest(act: Callable[[], object]) -> int:
    """Return the most bytes that `act` has from the CPU's allocator at a time, beside those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        act()
    assert traced.profiler is not None
    assert traced.profiler.kineto_results is not None
    events: list[Any] = [one for one in traced.profiler.kineto_results.events() if one.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


@dataclass
class Peaks:
    """Bytes of a step of a method, and of inference of the same batch.

    Attributes:
        weights: Of all weights.
        state: Of the optimizer's state.
        step: The most that a step has beside them.
        inference: The most that a plain pass has beside the weights.
        trained: Number of trained weights.
    """

    weights: int
    state: int
    step: int
    inference: int
    trained: int

    @property
    def ratio(self) -> float:
        """The whole of a step over the whole of inference."""
        return (self.weights + self.state + self.step) / (self.weights + self.inference)


def peaks(task: CausalLM, batch: Mapping[str, Tensor]) -> Peaks:
    """Measure the third step of a module whose strategies are not attached yet; the first makes the state."""
    loss = WindowLoss(task, [batch])
    task.updates.attach(task.build())
    optimizer = task.updates.optimizer(1e-6)
    with torch.no_grad():
        for step in (1, 2, 3):
            task.updates.before_step(step, optimizer)
            if step < 3:
                optimizer.step(loss)  # pyright: ignore[reportArgumentType, reportCallIssue]
        plain = highest(loss)
        taken = highest(lambda: optimizer.step(loss))  # pyright: ignore[reportArgumentType, reportCallIssue]
    weights = sum(p.nbytes for p in task.build().parameters())
    state = sum(value.nbytes for one in optimizer.state.values() for value in one.values())
    return Peaks(weights, state, taken, plain, sum(p.numel() for _, p in task.updates.named))


def adapted(base: str, dtype: str, *updates: UpdateStrategy) -> CausalLM:
    """Return a module with LoRA of rank 8 on all linear layers, beside the given strategies."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return CausalLM(base, [PEFT(config), *updates], precision=dtype)  # pyright: ignore[reportArgumentType]


def steps(base: str, dtype: str, device: torch.device, batch: tuple[int, int], pairs: int) -> Iterator[Said]:
    """Measure steps of all weights: the bytes that they move, and their time for each kind of noise."""
    model = AutoModelForCausalLM.from_pretrained(resolve(base), dtype=getattr(torch, dtype))
    model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
    ids = torch.randint(3, model.config.vocab_size, batch, device=device)
    moved = bytes_moved(model, ids)
    yield (
        f"a step moves {moved:.2f} times the bytes of the weights, at most {MOVED:.0f} (the published code: 37)",
        moved <= MOVED,
    )
    for kind in ("rademacher", "gaussian"):
        low, middle, high = statistics.quantiles(ratios(model, ids, kind, pairs), n=4)
        most = STEP[device.type].get(kind)
        text = f"{kind}: a step takes {middle:.3f} [{low:.3f}, {high:.3f}] times two forward passes"
        yield (text, None) if most is None else (f"{text}, at most {most:.2f}", middle <= most)


def together(base: str, dtype: str, batch: Mapping[str, Tensor], pairs: int) -> Iterator[Said]:
    """Measure two losses of LoRA in one pass."""
    task = adapted(base, dtype, MeZO())
    task.build().to(batch["labels"].device).eval()  # pyright: ignore[reportArgumentType]
    task.updates.attach(task.build())
    low, middle, high = statistics.quantiles(throughputs(task, batch, 2, pairs), n=4)
    yield (
        f"LoRA, two losses in one pass: {middle:.3f} [{low:.3f}, {high:.3f}] of the throughput of plain inference, at "
        f"least {THROUGHPUT:.2f}",
        middle >= THROUGHPUT,
    )


def memory(base: str, dtype: str, batch: Mapping[str, Tensor]) -> Iterator[Said]:
    """Measure the memory of steps on a CPU."""
    for name, made in {
        "MeZO": CausalLM(base, [MeZO()], precision=dtype),  # pyright: ignore[reportArgumentType]
        "MeZO on LoRA": adapted(base, dtype, MeZO()),
        "HELENE on LoRA": adapted(base, dtype, HELENE(refresh_every=1)),
        "HELENE": CausalLM(base, [HELENE(refresh_every=1)], precision=dtype),  # pyright: ignore[reportArgumentType]
        "HELENE, h: tensor": CausalLM(base, [HELENE(refresh_every=1, h="tensor")], precision=dtype),  # pyright: ignore
    }.items():
        found = peaks(made, batch)
        each = found.state / found.trained
        text = f"{name}: {found.ratio:.3f} times inference's memory, with {each:.0f} bytes a trained weight of state"
        stateful = each > 0 and found.trained * 4 == found.weights  # HELENE of all weights: its state is its formula
        yield (text, None) if stateful else (f"{text}, at most {MEMORY:.2f}", found.ratio <= MEMORY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status, 1 if a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEMO, help="a model's folder or name (default the demo model)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default 8)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of a row (default 40)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of a step and two forward passes (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args(arguments)
    device, size = torch.device(asked.device), (asked.rows, asked.tokens)
    found = list(shown(steps(asked.base, asked.dtype, device, size, asked.pairs)))
    ids = torch.randint(3, 90, size, device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found += shown(together(asked.base, asked.dtype, batch, asked.pairs))
    if device.type == "cpu":
        found += shown(memory(asked.base, asked.dtype, batch))
    return 1 if False in found else 0


def shown(said: Iterator[Said]) -> Iterator[bool | None]:
    """Print each sentence as it is known, and yield whether its mark is met."""
    for text, met in said:
        print({True: "met   ", False: "missed", None: "      "}[met], text, flush=True)
        yield met


if __name__ == "__main__":
    sys.exit(main())
