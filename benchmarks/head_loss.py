"""The loss over a frozen and a trained head at several chunks: `python -m benchmarks.head_loss` on a GPU.

Prints milliseconds of forward and backward, and the peak of memory, for 4,096 tokens of Llama-3.2-1B.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.block_grad_variants import seconds
from lit_sparse import loss
from lit_sparse_profiling.allocator import measure_allocations


def main(arguments: Sequence[str] | None = None) -> int:
    """Time each chunk, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    dry = parser.parse_args(arguments).dry
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    tokens, width, vocabulary = (64, 32, 96) if dry else (4096, 2048, 128_256)
    hidden = torch.randn(1, tokens + 1, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype).mul_(0.02)
    labels = torch.randint(0, vocabulary, (1, tokens + 1), device=device)
    flush = torch.empty(0 if dry else 2**27, dtype=torch.uint8, device=device)
    for trained in (False, True):
        weight = weight.detach().requires_grad_(trained)
        leaves = [hidden, weight] if trained else [hidden]
        for chunk in (128, 512, 1024, 2048, 4096):
            loss.chunk_tokens = lambda *_, chunk=chunk: chunk
            run = lambda weight=weight, leaves=leaves: torch.autograd.grad(  # noqa: E731
                loss.next_token_loss(hidden, weight, None, labels), leaves
            )
            run()
            taken = median(seconds(run, device, flush) for _ in range(8))
            with measure_allocations(device) as found:
                run()
            print(
                f"{'trained' if trained else 'frozen '} head, {chunk:5,} tokens a chunk: {taken * 1e3:8.2f} ms, "
                f"{found.requested / 2**20:8.0f} MiB",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
