"""KLToBase: keep the model's predictions close to the base's, stacked on any way to train.

Learning without forgetting (LwF), arXiv 1606.09282, eq. 2-3, with the base as the teacher on the training data. The
penalty is on predictions, so weights may move as far as they like if these stay.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lit_sparse.anatomy import backbone, is_quantized_linear, model_inputs
from lit_sparse.errors import BadInput
from lit_sparse.loss import CHUNK_LOGITS
from lit_sparse.mlp_density import token_mask
from lit_sparse.optim import local_shard
from lit_sparse.ranks import all_reduce_mean
from lit_sparse.strategies.base import Attaches, BaseWeights, Context, Need, Probe, UpdateStrategy, call


@dataclasses.dataclass
class KLToBase(UpdateStrategy):
    """Keep predicted tokens close to the base's by a Kullback-Leibler divergence (LwF, arXiv 1606.09282).

    The penalty is weight * T^2 * KL(base || model) of the next-token distribution at temperature T, in nats per token,
    averaged over all tokens that are not padding, prompts included. The base runs on every batch too, without a graph
    (twice the step time of LoRA alone, `python -m benchmarks.forgetting_study --only cost`). It shares frozen
    weights with the model: stacked on LoRA it needs no memory for weights, on full fine-tuning a full copy. Under FSDP2
    it has a copy of its own in any case, sharded as the model is, whose weights are gathered once more for each batch.

    Args:
        weight: Factor of the penalty in the loss. At 0 the base is not run.
        temperature: T; above 1, unlikely tokens weigh more. The paper's is 2.
    """

    weight: float = 1.0
    temperature: float = 2.0

    base: ClassVar[BaseWeights] = "kept"
    needs: ClassVar[frozenset[Need]] = frozenset({"base"})
    attaches_first: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True
    attaches_to: ClassVar[Attaches] = "shapes"

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise BadInput(f"KLToBase: weight is {self.weight}; it must be at least 0.")
        if not self.temperature > 0:
            raise BadInput(f"KLToBase: temperature is {self.temperature}; it must be above 0.")
        self._base: FrozenBase | None = None
        self._divergences: list[Tensor] = []  # scalars, of the batches since the last optimizer step

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        assert isinstance(model, PreTrainedModel)
        if model.get_output_embeddings() is None:
            raise BadInput(
                f"KLToBase: {type(model).__name__} predicts no tokens; use a causal language model, or leave KLToBase "
                "out."
            )
        if self.weight:  # before any sibling attaches (`attaches_first`), so that the copy has the base's own modules
            self._base = FrozenBase(model, context.siblings, context.shard)

    def penalty(self, batch: Mapping[str, Tensor], output: Any) -> Tensor | None:
        if self._base is None:
            return None
        divergence = self._base.divergence(model_inputs(batch), output, token_mask(batch), self.temperature)
        self._divergences.append(divergence.detach())
        return self.weight * divergence

    def logged(self) -> dict[str, Tensor]:
        return {"kl_to_base": all_reduce_mean(torch.stack(self._divergences).mean())} if self._divergences else {}

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> bool:
        self._divergences.clear()
        return False

    def detach(self, model: nn.Module) -> None:
        if self._base is not None:
            self._base.close()
        self._base = None
        self._divergences.clear()

    def held(self) -> Sequence[Tensor]:
        return () if self._base is None else self._base.copies

    def describe(self) -> dict[str, Any]:
        """Return the bytes of the base's weights that this rank has copies of, since training changes the model's."""
        return {"bytes": sum(local_shard(copy).nbytes for copy in self.held())}


class FrozenBase:
    """Keep the model as it was before training, while `model` is trained.

    The modules are copies, but the weights are shared. A weight is copied, in its original dtype, just before it first
    trains, or before a checkpoint overwrites it. Of a model that will be sharded all weights are copied, and sharded.

    Args:
        model: The model before any strategy changed its modules.
        siblings: The other strategies of the run: what they write (`written`) is copied too.
        shard: Shards the copy and returns how to compute with it (`Context.shard`); None if the model is not sharded.

    Attributes:
        model: The base.
        copies: The weights that were copied.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        siblings: Sequence[UpdateStrategy],
        shard: Callable[[nn.Module], Callable[..., Any]] | None = None,
    ) -> None:
        self._model, self._siblings = model, siblings
        shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
        if shard is not None:
            shared = {key: nn.Parameter(own.detach(), requires_grad=False) for key, own in shared.items()}
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        for module in filter(is_quantized_linear, model.modules()):  # these hold bitsandbytes' scales of the weights
            shared |= {id(own): own for name in ("state", "quant_state") if (own := getattr(module, name, None))}
        self.model = copy.deepcopy(model, shared).eval()  # `shared` is deepcopy's memo: what is in it is not copied
        self._places: dict[nn.Parameter, list[tuple[dict[str, Any], str]]] = {}
        for one, own in zip(model.modules(), self.model.modules(), strict=True):
            own._buffers = one._buffers  # share the dict: moving a module replaces its buffers, but not its parameters
            for name, parameter in one._parameters.items():
                if parameter is not None:
                    self._places.setdefault(parameter, []).append((own._parameters, name))
        self._dtypes = {parameter: parameter.dtype for parameter in self._places}
        self._loading: RemovableHandle = model.register_load_state_dict_pre_hook(self._before_loading)
        self.copies: list[nn.Parameter] = []
        self._compute: Callable[..., Any] = call
        if shard is not None:
            self._compute = shard(self.model)
            self._places, self.copies = {}, list(self.model.parameters())

    def close(self) -> None:
        """Remove the hook from the model."""
        self._loading.remove()

    def _before_loading(self, model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        given = ((p, state.get(f"{prefix}{name}")) for name, p in model.named_parameters())
        self._copy(p for p, value in given if value is not None and not torch.equal(value.to(p), p))
        self._copy_trained()

    def _copy_trained(self) -> None:
        self._copy(parameter for parameter in self._model.parameters() if parameter.requires_grad)
        for sibling in self._siblings:
            self._copy(sibling.written())

    def _copy(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            places = self._places.pop(parameter, [])
            if not places:  # a parameter of an adapter, or one that was copied before
                continue
            own = nn.Parameter(parameter.detach().to(self._dtypes[parameter], copy=True), requires_grad=False)
            self.copies.append(own)
            for owner, name in places:
                owner[name] = own

    def divergence(self, inputs: dict[str, Any], output: Any, kept: Tensor, temperature: float) -> Tensor:
        """Return the mean of T^2 KL(base || model) over the tokens of a batch, an fp32 scalar, in nats.

        Args:
            inputs: Keyword inputs of the model.
            output: The model's output for them: logits (B, S, V), or last hidden states (B, S, H), from which logits
                are computed in chunks, so that the logits of all tokens never exist at once.
            kept: Mask of the tokens that count, (B, S) bool.
            temperature: T.
        """
        self._copy_trained()
        for own in self.copies:
            if not isinstance(own, DTensor):  # Lightning moves the model, and does not know of the copies
                own.data = own.data.to(kept.device)
        if "logits" in output:  # a loop that calls the whole model; CausalLM computes hidden states only
            with torch.no_grad():
                theirs = self._compute(lambda: self.model(**inputs).logits[kept])
            return kl(output.logits[kept], theirs, temperature) / kept.sum().clamp(min=1)
        with torch.no_grad():
            theirs, base = self._compute(self._hidden_and_head, inputs, kept)
        ours, mine = output.last_hidden_state[kept], self._model.get_output_embeddings()
        size = max(1, CHUNK_LOGITS // base.weight.shape[0])  # pyright: ignore
        total = ours.new_zeros((), dtype=torch.float32)
        for own, their in zip(ours.split(size), theirs.split(size), strict=True):
            parts = own, their, mine, base, temperature  # logits are recomputed in the backward pass
            total = total + checkpoint(kl_of_hidden, *parts, use_reentrant=False, preserve_rng_state=False)
        return total / kept.sum().clamp(min=1)

    def _hidden_and_head(self, inputs: dict[str, Any], kept: Tensor) -> tuple[Tensor, nn.Module]:
        """Return the base's last hidden states of the tokens that count, (T, H), and its head.

        A sharded head is copied while it is gathered, which it no longer is in the backward pass.
        """
        hidden, head = backbone(self.model)(**inputs).last_hidden_state[kept], self.model.get_output_embeddings()
        assert head is not None
        return hidden, head if self._compute is call else copy.deepcopy(head)


def kl_of_hidden(ours: Tensor, theirs: Tensor, mine: nn.Module, base: nn.Module, temperature: float) -> Tensor:
    """Return the divergence from hidden states (T, H), through both heads, summed over tokens."""
    with torch.no_grad():
        logits = base(theirs)
    return kl(mine(ours), logits, temperature)


def kl(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(theirs || ours) of logits (T, V) at temperature T, summed over tokens, an fp32 scalar.

    The factor T^2 keeps the gradient's size independent of T (arXiv 1503.02531, section 2).
    """
    own, their = ((logits.float() / temperature).log_softmax(-1) for logits in (ours, theirs))
    return temperature**2 * F.kl_div(own, their, reduction="sum", log_target=True)
