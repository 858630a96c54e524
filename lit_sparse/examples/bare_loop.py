"""Block-sparse tuning in a custom training loop, without Lightning: `python -m lit_sparse.examples.bare_loop`.

A loop makes four calls to `Updates`: `attach` before the optimizer exists, `optimizer`, `step` once per optimizer step,
and `detach` at the end, which leaves a plain model. The example trains the demo model on a few sentences; pass the name
or folder of another model as the first argument.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_sparse.demo import DEMO, resolve
from lit_sparse.strategies import SMT, Updates

SENTENCES = (
    "A block of a weight matrix is a sub-matrix of a fixed size.",
    "Only the blocks with the largest gradients are trained.",
    "Everything else stays as it was before training.",
)


def main(name: str = DEMO, steps: int = 20) -> list[float]:
    """Train for `steps` optimizer steps, and return the loss of each (nats per token)."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    model = AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).train()
    texts = [tokenizer(sentence, return_tensors="pt")["input_ids"] for sentence in SENTENCES]

    def loss_on(step: int) -> Tensor:
        ids = texts[step % len(texts)]
        return model(input_ids=ids, labels=ids).loss

    def probe(batches: int, /, weighed: bool = True) -> Iterator[Tensor]:  # the sentences are about as long
        return (loss_on(step) for step in range(batches))

    updates = Updates([SMT(trainable_fraction=0.0084, selection_batches=len(texts))])
    updates.attach(model, probe)
    optimizer, losses = updates.optimizer(lr=2e-3), []
    for step in range(1, steps + 1):
        losses.append(float(updates.step(step, optimizer, lambda step=step: loss_on(step))))
        print(f"step {step}: loss {losses[-1]:.3f}")
    updates.detach(model)  # `model` is a plain Hugging Face model again: model.save_pretrained("tuned")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else DEMO)
