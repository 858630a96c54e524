"""MeZO's step beside two forward passes of the same batch, and the bytes that it moves.

`python -m benchmarks.zeroth_order` takes interleaved pairs of a step (of all weights, in the model's dtype) and two
plain forward passes without a graph, for each kind of noise, and prints the median of the ratio with the range of its
middle half. Bytes are of the weights that perturbations and the update read and write, in units of the weights' own
bytes; what the forward passes read anyway does not count. It times: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_sparse.demo import DEMO, resolve
from lit_sparse.loss import next_token_loss
from lit_sparse.strategies import MeZO, Updates
from lit_sparse.zeroth_order.directions import Dense, Part
from lit_sparse.zeroth_order.perturbed import Place, Rows
from lit_sparse_kernels.add_noise import Term

WARM = 2
"""Pairs that are not counted."""


@dataclass
class Counted(Dense):
    """Dense directions that add up the bytes of weights that they read and write.

    Attributes:
        moved: Bytes so far.
    """

    moved: int = 0

    def perturb(self, weight: Tensor, place: Place, rows: Rows, seed: int, scale: float) -> Tensor:
        out = super().perturb(weight, place, rows, seed, scale)
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


def bytes_moved(model: nn.Module, ids: Tensor) -> float:
    """Return the bytes that a step moves over the weights, in units of theirs."""
    direction = Counted()
    updates = Updates([MeZO(direction=direction)])
    updates.attach(model)
    updates.step(1, updates.optimizer(0.0), lambda: loss_of(model, ids))
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=DEMO, help="a model's folder or name (default the demo model)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default 8)")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of a row (default 40)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of a step and two forward passes (default 20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(resolve(asked.base), dtype=getattr(torch, asked.dtype))
    model = model.to(asked.device).eval()
    ids = torch.randint(3, model.config.vocab_size, (asked.rows, asked.tokens), device=asked.device)
    print(f"a step moves {bytes_moved(model, ids):.2f} times the bytes of the weights (the published code: 37)")
    for kind in ("rademacher", "gaussian"):
        low, middle, high = statistics.quantiles(ratios(model, ids, kind, asked.pairs), n=4)
        print(f"{kind}: a step takes {middle:.3f} [{low:.3f}, {high:.3f}] times two forward passes")


if __name__ == "__main__":
    main()
