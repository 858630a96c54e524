"""The accumulation window: one loss for all batches of an optimizer step, on all ranks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_sparse.ranks import all_reduce_sum, world_size


class Window:
    """Weighs the losses of an optimizer step's batches by their scored tokens.

    The step's loss is that of one batch with all its rows: the sum over scored tokens, of all micro-batches and ranks,
    divided by their number. A mean of means would give a batch with one scored token as much weight as one with a
    thousand. Frameworks divide by the number of micro-batches and ranks; `scale` undoes that.

    Without accumulation the ranks exchange their counts before the backward pass, and nothing is left to scale. With
    it, the number of tokens is known only when the last micro-batch has come: losses are summed, and the gradients are
    divided before the optimizer step.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of losses, tokens and right ones, which fp32 counts exactly up to 2^24

    def weigh(self, loss: Tensor, penalized: Tensor, count: Tensor, hits: Tensor, micro_batches: int) -> Tensor:
        """Return what to call backward on for one micro-batch.

        Args:
            loss: Mean loss of its scored tokens, for the step's value.
            penalized: The same with penalties, a scalar with a graph.
            count: Number of its scored tokens.
            hits: Number of those that were predicted right.
            micro_batches: How many a full window has, by which the trainer divides.
        """
        parts = torch.stack([loss.detach().float() * count, count.float(), hits.float()])
        self._sums = parts if self._sums is None else self._sums + parts
        if micro_batches > 1:
            return penalized * count
        return weighed_by_rank(penalized, count)

    def close(self, micro_batches: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """End the window.

        Returns:
            The step's mean loss and its accuracy over all ranks, its scored tokens, and the factor of its gradients;
            None leaves them.
        """
        assert self._sums is not None, "the window has no batch"
        loss, tokens, hits = all_reduce_sum(self._sums)
        self._sums = None
        tokens = tokens.clamp(min=1)
        scale = None if micro_batches == 1 else world_size() * micro_batches / tokens
        return loss / tokens, hits / tokens, tokens, scale


def weighed_by_rank(loss: Tensor, count: Tensor) -> Tensor:
    """Return the mean loss of `count` scored tokens, weighed: its mean over ranks is that of all ranks' tokens."""
    return loss if world_size() == 1 else loss * (count * world_size() / all_reduce_sum(count.float())).to(loss.dtype)


def weigh_batches(
    batches: Iterable[Any], count: Callable[[Any], Tensor], device: torch.device
) -> Iterator[tuple[Any, float]]:
    """Yield each batch with its number of scored tokens (`count`), over their mean of all batches on all ranks."""
    read = [(batch, int(count(batch))) for batch in batches]
    tokens, number = all_reduce_sum(torch.tensor([sum(n for _, n in read), len(read)], device=device)).tolist()
    for batch, scored in read:
        yield batch, scored * number / max(tokens, 1)
