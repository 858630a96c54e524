"""Measure the density of MLP activations on held-out data: what a sparse product could skip (arXiv 2402.01911)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import Metric

from lit_sparse.anatomy import mlps
from lit_sparse.errors import BadInput
from lit_sparse.mlp_density import token_mask

GROUPS = (16, 32)
"""Sizes of groups of neighbouring activations, which hardware can skip if all of them are zero."""
HALVINGS = 20
"""Bisection steps of the search for a threshold: its resolution is 2^-20 of the interval that is searched."""
SEARCHED = 64
"""Most tokens of a batch, evenly spaced, used to search a threshold: all of them would take longer than the model."""


class DensityMetric(Metric):
    """Shares of activations that are not zero, above each threshold, and of groups that are not all zero.

    Args:
        taus: The thresholds.

    Raises:
        BadInput: if a threshold is not above 0.
    """

    full_state_update = False
    counts: Tensor
    groups: Tensor
    tokens: Tensor

    def __init__(self, taus: Sequence[float] = ()) -> None:
        super().__init__()
        if not all(tau > 0 for tau in taus):
            raise BadInput(f"DensityMetric: taus are {list(taus)}; they must be above 0, and exact zeros count always.")
        self.taus = (0.0, *taus)
        self.add_state("counts", torch.zeros(len(self.taus), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("groups", torch.zeros(len(self.taus), len(GROUPS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, h_TI: Tensor) -> None:
        """Add activations (T, I), without padding. A ragged last group counts as one group; nan is not zero."""
        for number, tau in enumerate(self.taus):
            dense = ~(h_TI.abs() <= tau)  # and not `>`, which is false for nan
            self.counts[number] += dense.sum() / h_TI.shape[1]
            for place, size in enumerate(GROUPS):
                padded = nn.functional.pad(dense, (0, -h_TI.shape[1] % size))
                some = padded.unflatten(1, (-1, size)).any(-1)
                self.groups[number, place] += some.sum() / some.shape[1]
        self.tokens += len(h_TI)

    def compute(self) -> dict[str, Tensor]:
        """Return the shares as fp64 scalars by name, those of exact zeros first; nan if there was no token."""
        shares: dict[str, Tensor] = {}
        for number, tau in enumerate(self.taus):
            above = f"_above_{tau:g}" if tau else ""
            shares[f"density{above}"] = self.counts[number] / self.tokens
            for place, size in enumerate(GROUPS):
                shares[f"density_groups_{size}{above}"] = self.groups[number, place] / self.tokens
        return shares


def tolerable_tau(down: Callable[[Tensor], Tensor], h_TI: Tensor, error: float) -> float:
    """Return the largest tau at which dropping all |h| <= tau changes `down` by at most `error`, relatively.

    The search bisects the logarithm between 2^-24 of the largest |h| and the largest; it returns 0 if no tau fits.

    Args:
        down: The down projection; its bias is subtracted.
        h_TI: Its inputs, (T, I).
        error: Tolerated norm of the difference over norm of the output, over all tokens.
    """
    bias = down(torch.zeros_like(h_TI[:1]))
    whole = (down(h_TI) - bias).float()
    allowed, largest = error * whole.norm(), float(h_TI.abs().max())

    def fits(exponent: float) -> bool:
        kept = torch.where(h_TI.abs() > largest * 2**exponent, h_TI, 0)
        return bool(((down(kept) - bias).float() - whole).norm() <= allowed)

    low, high = -24.0, 0.0
    if not fits(low):
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return largest * 2**low


class DensityMonitor(Callback):
    """Logs the density of MLP activations at each validation, with or without `ActivationDensity`.

    It counts the inputs of the down projections without padding, and logs means over the layers: `density` (the share
    that is not exactly zero), `density_above_<tau>`, and for groups of neighbours `density_groups_<size>`, also above
    each tau. `tau_within_error` is the largest threshold of a layer that keeps the error of its down projection below
    `error`, searched on some tokens of each batch. It is the median over batches and layers, since a layer with huge
    activations tolerates a huge threshold. `density_within_error` is the share above each layer's own threshold. With
    several validation sets the first is counted, the task's own. The record of a fit has the scores of the first and
    the last validation: a fit that ends by `max_steps` has one after training only if `val_check_interval` divides it.

    Args:
        taus: Thresholds.
        error: Tolerated relative error of a down projection for `tau_within_error`.

    Raises:
        BadInput: if a threshold is not above 0, or the error not between 0 and 1.
    """

    def __init__(self, taus: Sequence[float] = (1e-3, 1e-2, 1e-1), error: float = 0.01) -> None:
        if not 0 < error < 1:
            raise BadInput(f"DensityMonitor: error is {error}; it must be between 0 and 1.")
        DensityMetric(taus)  # rejects bad ones before anything is loaded
        self.taus, self.error = tuple(taus), error
        self._metrics: list[DensityMetric] = []
        self._within: list[tuple[float, Tensor]] = []  # tau and the share above it, for each batch and layer
        self._handles: list[Any] = []
        self._counted: Tensor | None = None  # mask (T,) of tokens to count; None: count nothing

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = pl_module.model
        assert isinstance(model, nn.Module)
        downs = [model.get_submodule(mlp.down) for mlp in mlps(model)]
        self._metrics = [DensityMetric(self.taus).to(pl_module.device) for _ in downs]
        self._within = []
        self._handles = [
            down.register_forward_pre_hook(self._watcher(metric))
            for down, metric in zip(downs, self._metrics, strict=True)
        ]

    def _watcher(self, metric: DensityMetric) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._see(module, args[0], metric)

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._counted = token_mask(batch).flatten() if dataloader_idx == 0 else None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._counted = None

    @torch.no_grad()
    def _see(self, down: nn.Module, h: Tensor, metric: DensityMetric) -> None:
        h_TI, counted = h.flatten(0, -2), self._counted
        if counted is None or len(h_TI) != len(counted):  # a pass over dummy tokens
            return
        h_TI = h_TI[counted]
        metric.update(h_TI)
        if len(h_TI):
            some_TI = h_TI[:: -(-len(h_TI) // SEARCHED)]
            self._counted = None  # the search calls the projection, and so this hook, again
            tau = tolerable_tau(down, some_TI, self.error)
            self._counted = counted
            self._within.append((tau, (~(h_TI.abs() <= tau)).double().mean()))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        layers = [metric.compute() for metric in self._metrics]
        scores = {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}
        if self._within:
            taus, shares = zip(*self._within, strict=True)
            scores["tau_within_error"] = torch.tensor(taus, device=pl_module.device).median()
            scores["density_within_error"] = torch.stack(shares).mean()
        for name, value in scores.items():
            pl_module.log(name, value.float(), sync_dist=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
