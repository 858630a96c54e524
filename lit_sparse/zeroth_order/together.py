"""Several losses in one forward pass: each on a copy of the batch of its own, under weights perturbed its own way.

The rows of the batch are repeated, and what reads a perturbed weight sees each copy's rows beside that copy's values:
a small linear map, as an adapter's, in one batched product, any other operation a copy at a time. All else, such as the
frozen weights, is read once for all copies. A copy's dropout masks are those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_sparse.errors import BadInput
from lit_sparse.zeroth_order.perturbed import CASTS, Make, Perturbed, Place

RandomState = tuple[Tensor, Tensor | None]
"""Random states of the CPU and, if that is one, of the GPU."""
SMALL = 2**20
"""Elements of a weight up to which the values of all copies are held at once."""


def random_state(device: torch.device) -> RandomState:
    """Return the random state of the CPU and of a device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore what `random_state` returned."""
    here, there = state
    torch.set_rng_state(here)
    if there is not None:
        torch.cuda.set_rng_state(there, device)


class Together(TorchFunctionMode):
    """Within this context, rows of copy k see the weights in `places` as `makes[k]` perturbs them.

    Args:
        model: The model.
        places: Of the weights that are perturbed, by name.
        makes: How, for each copy; None leaves the weights.

    Attributes:
        rows: Rows of one copy in the pass that is going on; whoever repeats a batch sets it.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], makes: Sequence[Make | None]) -> None:
        super().__init__()
        known: dict[Tensor, str | None] = {}
        self._copies = [Perturbed(model, places, make or _leave, known) for make in makes]
        self.rows = 0

    @property
    def count(self) -> int:
        """How many copies there are."""
        return len(self._copies)

    @property
    def read(self) -> set[str]:
        """Names of the weights that were read."""
        return self._copies[0].read

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _drops(*args, **kwargs):
            return self._with_same_masks(func, args, kwargs)
        if not self._copies[0].perturbs(func, args, kwargs):
            return func(*args, **kwargs)
        if func.__name__ in CASTS and (same := func(*args, **kwargs)) is args[0]:
            return same
        out = self._linear(*args, **kwargs) if func is F.linear else None
        return self._apart(lambda copy, *a, **k: copy.apply(func, a, k), args, kwargs) if out is None else out

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Map the rows of all copies in one batched product; None for a large weight, or for other tensors."""
        if not self._is_rows(x) or weight.numel() > SMALL or x.ndim < 2:
            return None
        weights = torch.stack([copy.whole(weight) for copy in self._copies])
        flat = x.reshape(self.count, -1, x.shape[-1])
        out = torch.bmm(flat, weights.mT)
        if bias is not None:
            out = out + torch.stack([copy.whole(bias) for copy in self._copies])[:, None].to(out.dtype)
        return out.view(*x.shape[:-1], weight.shape[0])

    def _apart(self, call: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Call it for each copy with that copy's rows of all tensors that have such, and put the results together."""
        found, sliced = list[Any](), False
        for number, copy in enumerate(self._copies):
            rows = slice(number * self.rows, (number + 1) * self.rows)
            own = [value[rows] if self._is_rows(value) else value for value in args]
            named = {name: value[rows] if self._is_rows(value) else value for name, value in kwargs.items()}
            sliced |= any(map(self._is_rows, (*args, *kwargs.values())))
            found.append(call(copy, *own, **named))
        if not sliced or not all(isinstance(one, Tensor) and one.shape[:1] == (self.rows,) for one in found):
            raise BadInput(
                f"probes_at_once is {self.count}, but {self._unlike(args, kwargs)} is not read row by row of the "
                "batch, so that losses cannot be computed together; set probes_at_once to 1."
            )
        return torch.cat(found)

    def _is_rows(self, value: Any) -> bool:
        """Return whether a value has the rows of all copies; a parameter does not, whatever its shape is."""
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.ndim:
            return False
        return value.shape[0] == self.count * self.rows

    def _unlike(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        names = [self._copies[0].name(value) for value in (*args, *kwargs.values())]
        return next((name for name in names if name is not None), "a weight")

    # ---- dropout

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return F.dropout(input, p, training, inplace)
        if not self._is_rows(input):
            raise BadInput(
                f"probes_at_once is {self.count}, but dropout is on values that are not row by row of the batch, and "
                "copies would have other masks; set probes_at_once to 1."
            )
        mask = F.dropout(torch.ones_like(input[: self.rows]), p)
        return input * mask.repeat(self.count, *[1] * (input.ndim - 1))

    def _with_same_masks(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        device = args[0].device
        state = random_state(device)

        def call(copy: Perturbed, *own: Any, **named: Any) -> Tensor:
            set_random_state(state, device)
            return func(*own, **named)

        return self._apart(call, args, kwargs)


def _leave(weight: Tensor, place: Place, rows: Any) -> Tensor:
    return weight


def _drops(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, **__: Any
) -> bool:
    return dropout_p > 0
