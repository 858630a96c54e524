"""Steps of GaLore, Fira and AdaLomo beside AdamW's, and what a new subspace costs.

`python -m benchmarks.subspace` takes interleaved steps of copies of one model on the same batches: by AdamW, by each
method without a refresh, and by GaLore and Fira with one at each step. It prints the median of the ratio of step times
with the range of its middle half, and the refresh divided among 200 steps, and says whether they are at most 1.10 and
5 % of AdamW's step. It times: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.zeroth_order import loss_of, seconds
from lit_sparse.places import configs_folder
from lit_sparse.strategies import AdaLomo, SubspaceAdam, Updates, UpdateStrategy
from lit_sparse.strategies.subspace_adam import Residual

WARM = 2
"""Rounds that are not counted."""
EVERY = 200
"""Steps from one refresh to the next."""
MOST, REFRESHED = 1.10, 0.05
"""The marks: a step over AdamW's, and the share of a refresh of EVERY steps."""
ADAMW, ANEW = "adamw", " with a refresh"
NEVER = 10**9


def methods() -> dict[str, UpdateStrategy | None]:
    """Return the methods by name; None is AdamW."""
    found: dict[str, UpdateStrategy | None] = {ADAMW: None}
    kinds: dict[str, Residual] = {"galore": "none", "fira": "fira"}
    for name, residual in kinds.items():
        found[name] = SubspaceAdam(residual=residual, refresh_every=NEVER)
        found[name + ANEW] = SubspaceAdam(residual=residual, refresh_every=1)
    found["galore fused"] = SubspaceAdam(refresh_every=NEVER, fused_backward=True)
    found["adalomo"] = AdaLomo()
    return found


class Trained:
    """A copy of a model that trains by a method.

    Args:
        model: It is copied.
        update: The method; None is AdamW.
    """

    def __init__(self, model: nn.Module, update: UpdateStrategy | None) -> None:
        self._model = copy.deepcopy(model).train()
        self._updates, self._step = Updates([] if update is None else [update]), 0
        self._updates.attach(self._model)
        self._optimizer = self._updates.optimizer(1e-4)

    def step(self, ids: Tensor) -> None:
        """Take one optimizer step on a batch."""
        self._step += 1
        self._updates.step(self._step, self._optimizer, lambda: loss_of(self._model, ids))


def rounds_of(model: nn.Module, batch: tuple[int, int], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a step of each method, in as many rounds, in each of which all take one step."""
    arms = {name: Trained(model, update) for name, update in methods().items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    weight: Tensor = model.get_input_embeddings().weight  # pyright: ignore
    device, vocabulary = weight.device, len(weight)
    for number in range(WARM + rounds):
        ids = torch.randint(3, vocabulary, batch, generator=torch.Generator().manual_seed(number)).to(device)
        for name in list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]:
            found[name].append(seconds(device, lambda name=name, ids=ids: arms[name].step(ids)))
    return {name: times[WARM:] for name, times in found.items()}


def verdicts(times: Mapping[str, Sequence[float]]) -> list[tuple[str, bool]]:
    """Return a sentence of each method, and whether it meets its mark."""
    said = []
    for name, own in times.items():
        if name == ADAMW:
            continue
        if name.endswith(ANEW):
            plain = times[name.removesuffix(ANEW)]
            shares = [(a - b) / EVERY / c for a, b, c in zip(own, plain, times[ADAMW], strict=True)]
            low, middle, high = statistics.quantiles(shares, n=4)
            text = f"{name}: {middle:.2%} [{low:.2%}, {high:.2%}] of AdamW's step, divided among {EVERY}"
            said.append((f"{text}, at most {REFRESHED:.0%}", middle <= REFRESHED))
        else:
            low, middle, high = statistics.quantiles([a / b for a, b in zip(own, times[ADAMW], strict=True)], n=4)
            text = f"{name}: {middle:.3f} [{low:.3f}, {high:.3f}] times AdamW's step, at most {MOST:.2f}"
            said.append((text, middle <= MOST))
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status, 1 if a mark is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="60m", help="of configs/models/llama-SIZE.json (default 60m)")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each method (default 12)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args(arguments)
    config: Any = AutoConfig.from_pretrained(configs_folder() / "models" / f"llama-{asked.size}.json")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(asked.device)
    found = verdicts(rounds_of(model, (asked.rows, asked.tokens), asked.rounds))
    for text, met in found:
        print("met   " if met else "missed", text)
    return 0 if all(met for _, met in found) else 1


if __name__ == "__main__":
    sys.exit(main())
