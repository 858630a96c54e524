"""Stable-SPAM: tame spikes of the gradients before the optimizer sees them.

"Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", arXiv 2502.17055. For the gradient g of each tensor,
with `hat` for the correction of a mean that starts at zero:

    T <- c T + (1 - c) max|g|             where |g| > hat T:  g <- g * hat T / max|g|          (AdaClip)
    m <- a m + (1 - a) |g|,  v <- b v + (1 - b) |g|^2         g <- g / |g| * hat m / (sqrt(hat v) + eps)     (AdaGN)

Its third part is a reset of the moments, the strategy `MomentumReset`: `stable_spam.yaml` has both. Written from the
text; the published code has no licence, and its reset loses the gradient of the step that it happens in. Ours: the
means are kept by the parameter's name and saved, a parameter without a gradient leaves its own alone, and nothing waits
for the device.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_sparse.errors import BadInput
from lit_sparse.optim import local_shard, sum_over_shards
from lit_sparse.strategies.base import Attaches, BaseWeights, Context, Gradients, Need, UpdateStrategy

EPS = 1e-8


@dataclasses.dataclass
class StableSPAM(UpdateStrategy):
    """Clip spikes of each tensor's gradient, and normalise it by its past norms (Stable-SPAM, arXiv 2502.17055).

    It tames the gradients of whatever the stacked method trains; of all weights if used alone. Gradients then have a
    norm of about 1 a tensor, so leave trainer.gradient_clip_val out.

    Args:
        norm_decay: Decay of the mean of a gradient's norm (the paper's gamma 1).
        square_decay: Decay of the mean of the squared norm (gamma 2).
        clip_decay: Decay of the mean of the largest magnitude, at which spikes are clipped (gamma 3).

    Raises:
        BadInput: if a decay is not from 0 to below 1.
    """

    norm_decay: float = 0.7
    square_decay: float = 0.9
    clip_decay: float = 0.999

    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "either"
    gradients: ClassVar[Gradients] = "scales"

    def __post_init__(self) -> None:
        for name in ("norm_decay", "square_decay", "clip_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"StableSPAM: {name} is {getattr(self, name)}; it must be from 0 to below 1.")
        self._rows: dict[str, Tensor] = {}  # of each parameter, in fp64: steps, T, m, v
        self._numbers: dict[str, Tensor] = {}

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        self._rows = dict(zip(state["names"], state["rows"].unbind(), strict=True))

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        found = [
            (name, parameter.grad)
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            if parameter.grad is not None
        ]
        clipped = [
            self._tame([(name, grad) for name, grad in found if isinstance(grad, DTensor) == sharded])
            for sharded in (False, True)
        ]
        if found:
            self._numbers = {
                "stable_spam_clipped": torch.stack([one for one in clipped if one is not None]).sum().float()
            }

    def _tame(self, named: Sequence[tuple[str, Tensor]]) -> Tensor | None:
        """Tame gradients that are all sharded alike, or none of them; return how many tensors had a spike."""
        if not named:
            return None
        grads = [local_shard(grad) for _, grad in named]
        largest = torch.stack([_largest(grad) for grad in grads])
        largest = sum_over_shards(largest, named[0][1], "max").to(grads[0].device)
        rows = torch.stack([self._rows.get(name, largest.new_zeros(4)).to(largest.device) for name, _ in named])
        steps = rows[:, 0] + 1
        means = self._means(rows[:, 1], largest, self.clip_decay)
        bound = means / (1 - self.clip_decay**steps)
        shrink = torch.where(largest > bound, bound / largest, 1)
        for grad, limit, factor in zip(grads, bound, shrink, strict=True):
            grad.mul_(torch.where(grad.abs() > limit, factor.to(grad.dtype), 1))
        squares = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32).double().square() for grad in grads])
        squares = sum_over_shards(squares, named[0][1]).to(largest.device)
        norms = self._means(rows[:, 2], squares.sqrt(), self.norm_decay)
        powers = self._means(rows[:, 3], squares, self.square_decay)
        wanted = norms / (1 - self.norm_decay**steps) / ((powers / (1 - self.square_decay**steps)).sqrt() + EPS)
        scale = torch.where(squares > 0, wanted / squares.sqrt(), 1)
        for grad, factor in zip(grads, scale, strict=True):
            grad.mul_(factor.to(grad.dtype))
        new = torch.stack([steps, means, norms, powers], 1)
        self._rows |= {name: row for (name, _), row in zip(named, new.unbind(), strict=True)}
        return (largest > bound * (1 + 1e-6)).sum()

    @staticmethod
    def _means(mean: Tensor, value: Tensor, decay: float) -> Tensor:
        return decay * mean + (1 - decay) * value

    def logged(self) -> Mapping[str, Tensor]:
        """Return in how many tensors the last step clipped a spike."""
        return self._numbers

    def state_dict(self) -> dict[str, Any]:
        rows = [row.detach().cpu() for row in self._rows.values()]
        return {
            "names": list(self._rows),
            "rows": torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64),
        }

    def held(self) -> Any:
        """Return the means, four numbers a tensor."""
        return self._rows


def _largest(grad: Tensor) -> Tensor:
    """Return the largest magnitude of this rank's shard, which may be empty, in fp64: means of it are compared."""
    return grad.abs().amax().double() if grad.numel() else grad.new_zeros((), dtype=torch.float64)
