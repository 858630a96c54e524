"""The loss that methods without a backward pass train on: of a step's batches, on all ranks, as often as they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_sparse.errors import BadInput
from lit_sparse.modules.building import BuiltModel
from lit_sparse.ranks import all_reduce_mean, largest_of_ranks
from lit_sparse.strategies.base import UpdateStrategy
from lit_sparse.zeroth_order.together import Together


class WindowLoss:
    """Computes what a forward-only method minimizes, without a graph: the same number on all ranks.

    A call is a forward pass of the step's batches, some rows at a time (`rows_at_once`). Ranks exchange three numbers.

    Args:
        task: The module whose model trains, with its strategies attached.
        batches: Of the step.

    Attributes:
        accuracy: Share of right predictions in the last call.
    """

    def __init__(self, task: BuiltModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._task, self._batches = task, batches
        self.accuracy = torch.zeros(())
        self._passes = 0  # that each rank makes
        if task.to_shard and task.updates.rows_at_once is not None:
            self._passes = int(largest_of_ranks([len(list(self._own_parts()))]))

    def __call__(self) -> Tensor:
        """Return the loss with penalties, over all scored tokens; or 1 - the objective, with penalties; fp32 scalar."""
        objective = self._task.updates.objective
        if isinstance(objective, Metric):
            objective.to(self._task.device).reset()
        sums = [self._sums(batch, objective) for batch in self._own_parts()]
        self._keep_pace(lambda batch: self._sums(batch, "loss"))
        loss = self._mean(sums)
        return loss + lost(objective) if isinstance(objective, Metric) else loss

    def of_rows(self) -> tuple[Tensor, Tensor]:
        """Return the loss with penalties, and from the same passes the mean loss of each row of this rank's, (N,) fp32.

        Penalties are not in the rows' losses, and rows without a scored token are left out.
        """
        found = [self._row_losses(batch) for batch in self._own_parts()]
        self._keep_pace(self._row_losses)
        return self._mean([sums for sums, _ in found]), torch.cat([rows for _, rows in found])

    def of_probes(self, probes: Together) -> tuple[Tensor, Tensor]:
        """Return the losses of copies of the batches (n,), and those of this rank's rows (n, N); fp32.

        Args:
            probes: The copies, whose context its forward passes are in.

        Raises:
            BadInput: if there is a penalty, which is of a whole batch.
        """
        penalizing = [type(u).__name__ for u in self._task.updates if type(u).penalty is not UpdateStrategy.penalty]
        if penalizing:
            raise BadInput(
                f"probes_at_once is {probes.count}, but the penalty of {penalizing[0]} is of one batch at a time; set "
                "it to 1."
            )
        self._task.compute(self._task.look_at_head)
        found = [self._probe_losses(batch, probes) for batch in self._own_parts()]
        self._keep_pace(lambda batch: self._probe_losses(batch, probes))
        return self._mean([sums for sums, _ in found]), torch.cat([rows for _, rows in found], 1)

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the losses of all ranks' scored tokens, of sums over those of this one; see `_sums`."""
        total, tokens, right = all_reduce_mean(torch.stack([*parts]).sum(0)).unbind(-1)
        tokens = tokens.clamp(min=torch.finfo(tokens.dtype).tiny)  # a mean over ranks, below 1 only where it is 0
        self.accuracy = (right / tokens).mean()
        return total / tokens

    def _own_parts(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in self._batches:
            yield from split_rows(batch, self._task.updates.rows_at_once)

    def _keep_pace(self, run: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Make passes for nothing until this rank has made as many as the others: a sharded model's are collectives.

        The last step of an epoch may have a row more on one rank than on another.
        """
        if not self._passes:
            return
        first, *others = self._own_parts()
        for _ in range(self._passes - 1 - len(others)):
            run(first)

    def _sums(self, batch: Mapping[str, Tensor], objective: Any) -> Tensor:
        """Return sums over scored tokens: of losses with penalties, of tokens, of right ones; (3,) fp32."""
        with self._task.autocast():
            return self._task.compute(self._sums_of, batch, objective)  # also for penalties, which use the model

    def _sums_of(self, batch: Mapping[str, Tensor], objective: Any) -> Tensor:
        task, count = self._task, self._task.scored_count(batch)
        if isinstance(objective, Metric):
            predicted, wanted, output = task.predictions(batch)
            objective.update(predicted, wanted)
            loss, right = torch.zeros((), device=count.device), (predicted == wanted).sum()
        else:
            loss, output, right = task.graded_loss(batch)
            loss = 1 - right / count.clamp(min=1) if objective == "accuracy" else loss
        penalized = task.updates.penalized(loss, batch, output)
        return torch.stack([penalized.float() * count, count.float(), right.float()])

    def _row_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self._task.autocast():
            return self._task.compute(self._row_losses_of, batch)

    def _row_losses_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total_B, count_B, right, output = self._task.row_losses(batch)
        count, scored_B = count_B.sum(), count_B > 0
        penalized = self._task.updates.penalized(total_B.sum() / count.clamp(min=1), batch, output)
        return torch.stack([penalized.float() * count, count.float(), right.float()]), (total_B / count_B)[scored_B]

    def _probe_losses(self, batch: Mapping[str, Tensor], probes: Together) -> tuple[Tensor, Tensor]:
        probes.rows = len(batch["labels"])
        with self._task.autocast(), probes:
            return self._task.compute(self._probe_losses_of, repeated(batch, probes.count), probes.count)

    def _probe_losses_of(self, batch: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Return sums for each copy as `_sums` does, (n, 3), and the mean losses of its rows with a scored token."""
        total_B, tokens_B, right, _ = self._task.row_losses(batch)
        total, tokens = total_B.view(count, -1), tokens_B.view(count, -1)
        sums = torch.stack([total.sum(1), tokens.sum(1).float(), (right.float() / count).expand(count)], 1)
        return sums, (total / tokens)[:, tokens[0] > 0]


def lost(metric: Metric) -> Tensor:
    """Return 1 - the metric, or the metric where lower is better: a scalar, the same on all ranks.

    Raises:
        BadInput: if it is not one number.
    """
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadInput(
            f"the objective {type(metric).__name__} returns {found}, but a step needs one number to compare; give the "
            "metric an average (for torchmetrics' classification, average: macro)."
        )
    value = value.float().reshape(())
    return 1 - value if metric.higher_is_better else value


def repeated(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a batch whose rows are those of `batch`, so many times over; without the places of scored tokens."""
    rows = len(batch["labels"])
    return {
        key: value.repeat(count, *[1] * (value.ndim - 1))
        for key, value in batch.items()
        if key != "scored" and len(value) == rows
    }


def split_rows(batch: Mapping[str, Any], rows: int | None) -> Iterator[Mapping[str, Any]]:
    """Yield the batch, some rows at a time; None is all at once.

    What a batch has beside its rows are the places of its scored tokens (`scored`), which only save time: left out.
    """
    count = len(batch["labels"])
    if rows is None or rows >= count:
        yield batch
        return
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        yield {key: value[part] for key, value in batch.items() if key != "scored" and len(value) == count}
