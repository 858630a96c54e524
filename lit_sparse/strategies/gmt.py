"""GMT: at every optimizer step, update only the weights with the largest gradients.

Gradient-Mask Tuning, arXiv 2406.15330 (AAAI 2025: "Enhancing LLM Performance with Gradient-Based Parameter Selection").
With G the accumulated gradient and T the magnitude that the share k of its entries reaches, the paper has

    w <- w - lr * (G where |G| >= T, else 0)

It regularises: memory and time are those of training without a mask, or more. The authors published no code. Choices of
ours, where the paper leaves them open:

- Under AdamW a zero gradient still moves a weight, by momentum and weight decay. `update_mask` puts masked entries and
  their moments back, which is what the equation says. `grad_mask` masks the gradient alone, as public ports do.
- Entries equal to T are all kept, so that a mask may have more than the share. An entry whose gradient is zero is kept
  only if the share is 1: else an embedding, most of whose rows have no gradient, would be trained whole.
- Vectors (norms, biases) train without a mask: a share of so few entries is none.
- The mask comes before clipping, which therefore sees the norm of what is kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.anatomy import decoder_layers
from lit_sparse.errors import BadInput
from lit_sparse.optim import AdamW, local_shard, sum_over_shards, trainable
from lit_sparse.strategies.base import Attaches, BaseWeights, Context, Gradients, Need, Probe, UpdateStrategy

Scope = Literal["per_tensor", "global"]
DIGITS = ((20, 11), (10, 10), (0, 10))
"""Position and number of the bits that each pass counts: in all the 31 of an fp32 magnitude, the highest first."""


@dataclasses.dataclass
class GMT(UpdateStrategy):
    """Update only the weights with the largest gradients, chosen anew at every step (GMT, arXiv 2406.15330).

    It masks whatever the stacked method trains; all weights if used alone.

    Args:
        kept_share: Share of a tensor's entries that are updated in a step, of 0 to 1 (the paper's k).
        scope: Where the largest are looked for: in each tensor by itself (`per_tensor`), or in all at once (`global`).
        mode: `update_mask`: masked weights and their moments do not move; for `lit_sparse.optim.AdamW`, the default.
            `grad_mask`: masked gradients are zero; for any optimizer, whose momentum and weight decay still move masked
            weights.
        mask_embeddings: Whether to mask what lies outside the decoder layers too: embeddings and head. If false, they
            are trained without a mask and have no part in a `global` threshold.
    """

    kept_share: float = 0.2
    scope: Scope = "per_tensor"
    mode: Literal["update_mask", "grad_mask"] = "update_mask"
    mask_embeddings: bool = True

    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"
    gradients: ClassVar[Gradients] = "masks"

    def __post_init__(self) -> None:
        if not 0 <= self.kept_share <= 1:
            raise BadInput(f"GMT: kept_share is {self.kept_share}; it must be between 0 and 1.")
        self._layers: list[nn.Module] = []
        self._masked = self._dense = 0  # weights
        self._numbers: dict[str, Tensor] = {}

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        self._layers = [] if self.mask_embeddings else decoder_layers(model)
        if not self._maskable([parameter for _, parameter in trainable(model)]):
            raise BadInput(
                "GMT: there is no matrix to mask among what is trained, and vectors are trained without a mask; leave "
                "GMT out, or train matrices (with mask_embeddings: false, some within the decoder layers)."
            )

    def _maskable(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        inside = {parameter for layer in self._layers for parameter in layer.parameters()}
        return [one for one in parameters if one.ndim >= 2 and (self.mask_embeddings or one in inside)]

    # ---- training

    def regrouped(self, optimizer: Optimizer) -> None:
        if self.mode == "update_mask":
            check_optimizer(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._masked = sum(parameter.numel() for parameter in self._maskable(parameters))
        self._dense = sum(parameter.numel() for parameter in parameters) - self._masked

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        parameters = self._maskable(trained)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return
        chosen = masks(gradients, self.kept_share, self.scope)
        before = [_energy(gradient) for gradient in gradients]
        for gradient, mask in zip(gradients, chosen, strict=True):
            local_shard(gradient).masked_fill_(~mask, 0)
        after = [torch.stack([mask.sum(), _energy(gradient)]) for gradient, mask in zip(gradients, chosen, strict=True)]
        found = torch.cat([torch.stack(after), torch.stack(before)[:, None]], 1)
        sharded = torch.tensor([isinstance(gradient, DTensor) for gradient in gradients], device=found.device)
        sums = _over_ranks(found[~sharded].sum(0), found[sharded].sum(0), gradients)
        weights = sum(gradient.numel() for gradient in gradients)
        self._numbers = {
            "gmt_kept_share": sums[0] / weights,
            "gmt_kept_energy": sums[1] / sums[2].clamp(min=torch.finfo(sums.dtype).tiny),
        }
        if self.mode == "update_mask":
            assert isinstance(optimizer, AdamW)  # see regrouped
            optimizer.masks = dict(zip(parameters, chosen, strict=True))

    def logged(self) -> dict[str, Tensor]:
        """Return the share of entries that is kept, ties included, and their share of the squared gradients."""
        return self._numbers

    def detach(self, model: nn.Module) -> None:
        self._layers = []

    def describe(self) -> dict[str, Any]:
        """Return how many weights are in masked tensors, and how many are trained without a mask."""
        return {"masked_weights": self._masked, "dense_weights": self._dense}


# ---- the masks


def masks(gradients: Sequence[Tensor], share: float, scope: Scope = "per_tensor") -> list[Tensor]:
    """Return for each gradient which of its entries (for a DTensor, of its local shard) are among the largest.

    Of n entries, `round(share * n)` are kept, but at least one, and those equal to the smallest of them, but no zeros
    unless `share` is 1. Magnitudes are compared in fp32. The same on all ranks.

    Args:
        gradients: Gradients of any shapes on one device.
        share: From 0 to 1.
        scope: Whether n entries are those of each tensor, or of all together.
    """
    if share == 0:
        return [torch.zeros_like(local_shard(gradient), dtype=torch.bool) for gradient in gradients]
    rows = [0 if scope == "global" else number for number in range(len(gradients))]
    least = _thresholds(gradients, rows, share).clamp(min=1 if share < 1 else 0)
    return [_bits(gradient) >= least[row] for gradient, row in zip(gradients, rows, strict=True)]


def _thresholds(gradients: Sequence[Tensor], rows: Sequence[int], share: float) -> Tensor:
    """Return for each row the magnitude, as an integer, that the share of the row's entries reaches: exact, unsorted.

    Positive floats are ordered as their bits are, so that counting the highest bits, then the next of those entries
    that have the threshold's, finds it in three reads. Counts add up over ranks, which a threshold of shards would not.
    """
    sizes = [0] * (max(rows) + 1)
    for row, gradient in zip(rows, gradients, strict=True):
        sizes[row] += gradient.numel()
    left = torch.tensor([max(1, round(share * size)) for size in sizes], device=local_shard(gradients[0]).device)
    found = torch.zeros_like(left)
    for shift, width in DIGITS:
        plain, sharded = found.new_zeros(2, len(sizes), 2**width)
        for row, gradient in zip(rows, gradients, strict=True):
            own = sharded if isinstance(gradient, DTensor) else plain
            own[row] += _counts(_bits(gradient), found[row], shift, width)
        counts = _over_ranks(plain, sharded, gradients)
        reach = counts.flip(1).cumsum(1).flip(1)  # entries with this digit or a larger one
        digit = (reach >= left[:, None]).sum(1, keepdim=True) - 1
        left = left - (reach - counts).gather(1, digit).squeeze(1)
        found = found * 2**width + digit.squeeze(1)
    return found


def _over_ranks(plain: Tensor, sharded: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Return `plain`, of gradients that ranks have whole, plus the sum over ranks of `sharded`, of the others' parts.

    Under FSDP2 masters of blocks and entries are whole beside the shards of a classifier's head.
    """
    like = next((gradient for gradient in gradients if isinstance(gradient, DTensor)), gradients[0])
    return plain + sum_over_shards(sharded, like).to(plain.device)


def _counts(bits: Tensor, found: Tensor, shift: int, width: int) -> Tensor:
    """Count, by the `width` bits at `shift`, the entries whose higher bits are those found; (2^width,).

    All others count in a bin below and one above: to select entries first would take memory that depends on values.
    """
    digit = (bits >> shift).sub_(found * 2**width).clamp_(-1, 2**width).add_(1)
    return torch.bincount(digit.flatten(), minlength=2**width + 2)[1:-1]


def _bits(gradient: Tensor) -> Tensor:
    """Return the magnitudes in fp32 of this rank's shard as integers, which are ordered alike."""
    return local_shard(gradient).float().abs().view(torch.int32)


def _energy(gradient: Tensor) -> Tensor:
    """Return the sum of the squares of this rank's shard."""
    return local_shard(gradient).float().square().sum()


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot leave masked entries as they are.

    Raises:
        BadInput: if it is not `lit_sparse.optim.AdamW`.
    """
    if not isinstance(optimizer, AdamW):
        raise BadInput(
            f"GMT: mode update_mask works within lit_sparse.optim.AdamW, but the optimizer is "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}; set model.optimizer to "
            "lit_sparse.optim.AdamW, or mode to grad_mask."
        )
