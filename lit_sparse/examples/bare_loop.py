"""Block-sparse tuning in a loop of one's own, without Lightning: `python -m lit_sparse.examples.bare_loop`.

A strategy needs four things of a loop: `attach` before the optimizer exists, `before_step` and `after_step` around each
optimizer step, and `detach` at the end, which leaves a plain model. It trains the demo model on a few sentences; give
the name or folder of another model as first argument.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_sparse.demo import DEMO, resolve
from lit_sparse.optim import parameter_groups, regroup, trainable
from lit_sparse.strategies import SMT

SENTENCES = (
    "A block of a weight matrix is a sub-matrix of a fixed size.",
    "Only the blocks with the largest gradients are trained.",
    "Everything else stays as it was before training.",
)


def main(name: str = DEMO, steps: int = 20) -> list[float]:
    """Train, and return the loss of each step."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).train()
    texts = [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in SENTENCES]

    def loss_on(step: int) -> Tensor:
        ids = texts[step % len(texts)]
        return model(input_ids=ids, labels=ids).loss

    def probe(batches: int) -> Iterator[Tensor]:
        return (loss_on(step) for step in range(batches))

    strategy = SMT(trainable_fraction=0.0084, selection_batches=len(texts))
    strategy.attach(model, probe)
    optimizer = torch.optim.AdamW(parameter_groups(trainable(model)), lr=2e-3)
    losses = []
    for step in range(1, steps + 1):
        loss = loss_on(step)
        loss.backward()
        strategy.before_step(step, optimizer)
        optimizer.step()
        if strategy.after_step(step, optimizer):  # another set of parameters is trained from here on (not with SMT)
            regroup(optimizer, trainable(model))
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}")
    strategy.detach(model)  # `model` is a plain Hugging Face model again: model.save_pretrained("tuned")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEMO)
