"""KLToBase: hold what the model predicts at what the base predicts, beside any way to train.

Learning without forgetting (LwF), arXiv 1606.09282, eq. 2-3, with the base as teacher on the data being learned: the
distance is between predictions, so weights may go where they like as long as these stay.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_sparse.anatomy import is_quantized_linear, model_inputs
from lit_sparse.errors import BadInput
from lit_sparse.loss import CHUNK_LOGITS
from lit_sparse.mlp_density import token_mask
from lit_sparse.strategies.base import BaseWeights, Context, Need, Probe, UpdateStrategy


@dataclasses.dataclass
class KLToBase(UpdateStrategy):
    """Hold the predicted tokens at the base's by a Kullback-Leibler divergence (LwF, arXiv 1606.09282).

    The penalty is weight * T^2 * KL(base || model) of the next token's distribution at temperature T, in nats a token,
    the mean over all tokens that are no padding, prompts too. The base runs once more on every batch, without a graph.
    It shares the weights that stay as they are: beside LoRA it takes no memory, beside full fine-tuning a copy.

    Args:
        weight: Of the penalty in the loss. 0 changes nothing at all.
        temperature: T, above 1 to weigh unlikely tokens more; 2 is the paper's.
    """

    weight: float = 1.0
    temperature: float = 2.0

    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"base"})
    attaches_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise BadInput(f"KLToBase: weight is {self.weight}; it must be at least 0.")
        if not self.temperature > 0:
            raise BadInput(f"KLToBase: temperature is {self.temperature}; it must be above 0.")
        self._base: Base | None = None
        self._seen: list[Tensor] = []  # divergences of the batches since the last optimizer step

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        assert isinstance(model, PreTrainedModel)
        if model.get_output_embeddings() is None:
            raise BadInput(
                f"KLToBase: {type(model).__name__} predicts no tokens; take a causal language model, or leave KLToBase "
                "out."
            )
        if self.weight:
            self._base = Base(model, context.siblings)

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if self._base is None:
            return None
        divergence = self._base.divergence(model_inputs(batch), output, token_mask(batch), self.temperature)
        self._seen.append(divergence.detach())
        return self.weight * divergence

    def logged(self) -> dict[str, Tensor]:
        return {"kl_to_base": torch.stack(self._seen).mean()} if self._seen else {}

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        self._seen.clear()
        return False

    def detach(self, model: nn.Module) -> None:
        if self._base is not None:
            self._base.close()
        self._base = None
        self._seen.clear()

    def held(self) -> Sequence[Tensor]:
        return () if self._base is None else self._base.copies

    def describe(self) -> dict[str, Any]:
        """Bytes of the base's weights that are kept apart, since training changes the model's own."""
        return {"bytes": sum(copy.nbytes for copy in self.held())}


class Base:
    """`model` as it came, while `model` is trained.

    Its modules are its own, but not its weights: a copy of one is taken before it first trains, or before a checkpoint
    gives it another value, and has the dtype that it came in.

    Attributes:
        model: The base.
        copies: Those of its weights that are its own.
    """

    def __init__(self, model: PreTrainedModel, siblings: Sequence[UpdateStrategy]) -> None:
        self._model, self._siblings = model, siblings
        shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        for module in filter(is_quantized_linear, model.modules()):  # bitsandbytes keeps the weights' scales in these
            shared |= {id(own): own for name in ("state", "quant_state") if (own := getattr(module, name, None))}
        self.model = copy.deepcopy(model, shared).eval()
        self._places: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
        for one, own in zip(model.modules(), self.model.modules(), strict=True):
            own._buffers = one._buffers  # these are replaced when the model moves to another device, weights are not
            for name, parameter in one._parameters.items():
                if parameter is not None:
                    self._places.setdefault(parameter, []).append((own._parameters, name))
        self._dtypes = {parameter: parameter.dtype for parameter in self._places}
        self._loading: RemovableHandle = model.register_load_state_dict_pre_hook(self._before_loading)
        self.copies: list[nn.Parameter] = []

    def close(self) -> None:
        """Take the hook off."""
        self._loading.remove()

    def _before_loading(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        given = ((p, state.get(f"{prefix}{name}")) for name, p in model.named_parameters())
        self._keep(p for p, value in given if value is not None and not torch.equal(value.to(p), p))
        self._keep_trained()

    def _keep_trained(self) -> None:
        self._keep(parameter for parameter in self._model.parameters() if parameter.requires_grad)
        for sibling in self._siblings:
            self._keep(sibling.written())

    def _keep(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            places = self._places.pop(parameter, [])
            if not places:  # an adapter's, or one that has its copy
                continue
            own = nn.Parameter(parameter.detach().to(self._dtypes[parameter], copy=True), requires_grad=False)
            self.copies.append(own)
            for owner, name in places:
                owner[name] = own

    def divergence(self, inputs: dict[str, Any], output: Any, kept: Tensor, temperature: float) -> Tensor:
        """Mean of T^2 KL(base || model) over the `kept` tokens (B, S) of `inputs`, of which `model` made `output`.

        `output` has logits (B, S, V), or the last hidden states (B, S, H), of which logits are made a part at a time.
        """
        self._keep_trained()
        for own in self.copies:
            own.data = own.data.to(kept.device)  # the model's own weights are there already
        if "logits" in output:
            with torch.no_grad():
                theirs = self.model(**inputs).logits
            return kl(output.logits[kept], theirs[kept], temperature) / kept.sum().clamp(min=1)
        with torch.no_grad():
            theirs = self.model.base_model(**inputs).last_hidden_state[kept]
        ours, heads = output.last_hidden_state[kept], (self._model, self.model)
        mine, base = (model.get_output_embeddings() for model in heads)
        size = max(1, CHUNK_LOGITS // base.weight.shape[0])  # pyright: ignore
        total = ours.new_zeros((), dtype=torch.float32)
        for own, their in zip(ours.split(size), theirs.split(size), strict=True):
            parts = own, their, mine, base, temperature  # whose logits are made again in the backward
            total = total + checkpoint(kl_of_hidden, *parts, use_reentrant=False, preserve_rng_state=False)
        return total / kept.sum().clamp(min=1)


def kl_of_hidden(ours: Tensor, theirs: Tensor, mine: nn.Module, base: nn.Module, temperature: float) -> Tensor:
    """The divergence of the tokens that the heads make of hidden states (T, H), summed."""
    with torch.no_grad():
        logits = base(theirs)
    return kl(mine(ours), logits, temperature)


def kl(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """T^2 KL(theirs || ours) of logits (T, V) at a temperature, summed over tokens, fp32."""
    own, their = ((logits.float() / temperature).log_softmax(-1) for logits in (ours, theirs))
    return temperature**2 * F.kl_div(own, their, reduction="sum", log_target=True)
