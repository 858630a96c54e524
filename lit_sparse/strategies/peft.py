"""PEFT: any adapter of Hugging Face's PEFT that lives inside the model's modules (LoRA, DoRA, IA3, SHiRA, ...)."""

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import classification_head, linears
from lit_sparse.checkpoints import fingerprint, run_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.strategies.base import Claim, Context, Leaves, Probe, UpdateStrategy

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""

DATA_DRIVEN = ("corda", "eva", "lora_ga", "loftq")
"""Initialisations of LoRA that PEFT leaves to programs of their own, which look at data or quantise first."""

COPIES_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
"""Tasks for which PEFT trains copies of modules that are called as a classifier's head."""

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the file of an adapter's tensors."""

Factors = dict[str, Tensor]
"""LoRA's `A` (r, in) and `B` (out, r) of one layer."""


@dataclasses.dataclass
class PEFT(UpdateStrategy):
    """Train an adapter of Hugging Face's PEFT (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; and many more).

    Args:
        config: A PEFT configuration, by `class_path` and `init_args` in YAML: peft.LoraConfig, peft.IA3Config, ...
        start_from: A run's folder or checkpoint, from whose trained adapter (and classifier's head) this one goes on,
            with an optimizer of its own; of the same configuration, on the same base. None begins anew.
    """

    config: PeftConfig
    start_from: str | None = None

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    leaves: ClassVar[Leaves] = "adapter"

    def __post_init__(self) -> None:
        name, start = type(self.config).__name__, str(getattr(self.config, "init_lora_weights", "")).lower()
        if self.config.is_prompt_learning:
            raise BadInput(
                f"{name} prepends to the input instead of changing modules, which PEFT() here cannot train; choose an "
                "adapter such as peft.LoraConfig."
            )
        if start in DATA_DRIVEN:
            raise BadInput(
                f"init_lora_weights is {start}, which needs a program of PEFT's to run before training, and PEFT() "
                "here runs none; choose true, pissa or olora."
            )
        if getattr(self.config, "kasa_config", None) is not None:
            raise BadInput(
                "kasa_config cuts the base's weights down in a way that a small checkpoint cannot repeat; leave it out."
            )
        self._wrapper: PeftModel | None = None
        self._start: dict[str, Factors] = {}

    @property
    def splits_base(self) -> bool:
        """Whether the adapter starts as a part of the base's weights, which keep the rest (PiSSA, OLoRA)."""
        return str(getattr(self.config, "init_lora_weights", "")).lower().startswith(("pissa", "olora"))

    @property
    def trains_biases(self) -> bool:
        """Whether the base's own biases are trained beside the adapter."""
        return getattr(self.config, "bias", "none") != "none"

    @property
    def base(self) -> Literal["kept", "trained", "rewritten"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.splits_base or (self.trains_biases and self.start_from is not None):
            return "rewritten"
        return "trained" if self.trains_biases else "kept"

    @property
    def supports_sharding(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True but for VeLoRA, whose projections each rank would compute from a first batch of its own."""
        return getattr(self.config, "velora_config", None) is None

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        if self.start_from is not None:
            self._go_on(model, self.start_from, context)
            return
        wrapper = self._wrap(model)
        if self.splits_base:
            self._start = {name: split(layer, self.config) for name, layer in lora_layers(wrapper).items()}

    def _go_on(self, model: nn.Module, run: str, context: Context) -> None:
        checkpoint = run_checkpoint(run)
        ours = checkpoint["lit_sparse"]
        adapters = [update["state"] for update in ours["updates"] if update["class"] == type(self).__name__]
        if not adapters or ours["base"] != fingerprint(model):
            lack = "has no adapter of PEFT's" if not adapters else "was trained on another base than this run's"
            raise BadInput(f"start_from is {run}, which {lack}; give a run of the same adapter on the same base.")
        self.restore(model, adapters[0], context)
        take_values(model, run, {name.removeprefix("model."): v for name, v in checkpoint["state_dict"].items()})
        for name, scale in self._scales().items():
            before = adapters[0].get("scales", {}).get(name, scale)  # older checkpoints do not say
            if before != scale:
                raise BadInput(
                    f"start_from is {run}, whose adapter counts {before:g} times at {name}, and would count {scale:g} "
                    "times here; give the adapter that run's configuration."
                )

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        wrapper = self._wrap(model)
        if state["fixed"]:  # PEFT takes the whole only; what was trained comes later
            with quiet():
                set_peft_model_state_dict(wrapper, self._tensors(trained=True) | state["fixed"])
        for module in wrapper.modules():  # PEFT saves VeLoRA's projections, but not that they have been computed
            for name, projection in getattr(module, "lora_velora_embed", {}).items():
                module.lora_velora_initialized[name] = bool(projection.any())  # pyright: ignore
        layers = lora_layers(wrapper)
        for name, factors in state["start"].items():
            device = layers[name].get_base_layer().weight.device
            self._start[name] = {key: value.to(device) for key, value in factors.items()}
            take_out(layers[name], self._start[name])

    def detach(self, model: nn.Module) -> None:
        if self._wrapper is not None:
            self._wrapper.merge_and_unload()  # pyright: ignore[reportCallIssue]
            self._wrapper = None
            self._start = {}

    def state_dict(self) -> dict[str, Any]:
        """What of the adapter is not trained but was drawn or computed, what a part of the base started as, and by what
        each layer scales its adapter, for a run that goes on from this one."""
        return {"fixed": self._tensors(trained=False), "start": self._start, "scales": self._scales()}

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT's own loader takes it, on the base as it was before training.

        An adapter that began as a part of the base becomes a LoRA of twice the rank: what was trained, less the start.
        """
        assert self._wrapper is not None, "there is no adapter to save: attach or restore it first"
        tensors, config = self._tensors(trained=True) | self._tensors(trained=False), copy.deepcopy(self.config)
        if self.splits_base:
            tensors, config = self._as_difference(tensors), as_difference(config)
        config.base_model_name_or_path = self._wrapper.base_model.model.name_or_path  # pyright: ignore
        config.inference_mode, config.task_type = True, config.task_type or TaskType.CAUSAL_LM
        folder.mkdir()
        config.save_pretrained(str(folder))
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / WEIGHTS)

    def _wrap(self, model: nn.Module) -> PeftModel:
        if not isinstance(model, PreTrainedModel):
            raise BadInput(f"PEFT needs a Hugging Face model; this is a {type(model).__name__}.")
        check_dora(self.config, model)
        check_head(self.config, model)
        config = copy.deepcopy(self.config)
        if getattr(config, "target_modules", None) == "all-linear" and classification_head(model):
            config.target_modules = sorted(linears(model))  # pyright: ignore[reportAttributeAccessIssue] - not the head
        if self.splits_base:
            config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue] - `split` does it by layer
        # The wrapper is kept aside: PEFT puts the adapters into `model` itself, whose forward stays the model's own.
        try:
            wrapper = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise BadInput(
                f"{type(config).__name__} was asked for, but PEFT cannot put it on {type(model).__name__} ({reason}); "
                "give other target_modules or settings, or choose another adapter, such as peft.LoraConfig."
            ) from error
        assert isinstance(wrapper, PeftModel)
        self._wrapper = wrapper
        return wrapper

    def _tensors(self, trained: bool) -> dict[str, Tensor]:
        """The tensors by which PEFT knows the adapter, by PEFT's names: those that are trained, or the others."""
        if self._wrapper is None:
            return {}
        with quiet():
            found = get_peft_model_state_dict(
                self._wrapper, self._wrapper.state_dict(keep_vars=True), save_embedding_layers=False
            )
        return {name: value.detach() for name, value in found.items() if value.requires_grad == trained}

    def _scales(self) -> dict[str, float]:
        """What each layer multiplies its adapter's update with, where it does, by the layer's name."""
        layers = [] if self._wrapper is None else self._wrapper.named_modules()
        scaling = {name: getattr(m, "scaling", None) for name, m in layers if isinstance(m, BaseTunerLayer)}
        return {name: float(s[ADAPTER]) for name, s in scaling.items() if isinstance(s, dict) and ADAPTER in s}

    def _as_difference(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """LoRA's factors of s (B A - B0 A0), B0 and A0 being the start."""
        found = dict(tensors)
        for name, start in self._start.items():
            first, second = (f"{name}.lora_{factor}.weight" for factor in "AB")
            found[first] = torch.cat([tensors[first], start["A"].to(tensors[first])], dim=0)
            found[second] = torch.cat([tensors[second], -start["B"].to(tensors[second])], dim=1)
        return found


@contextmanager
def quiet():
    """A block in which PEFT does not say that it was told to leave the embeddings out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file|Setting `save_embedding_layers`")
        yield


def take_values(model: nn.Module, run: str, values: Mapping[str, Tensor]) -> None:
    """Set what `model` trains, and a classifier's head, which the host trains anyway, to what `run` ended with.

    Raises:
        BadInput: naming the first value that has no place here, or that is missing.
    """
    heads = tuple(f"{name}." for name in classification_head(model))
    taken = [(n, p) for n, p in model.named_parameters() if p.requires_grad or n.startswith(heads)]
    for name, parameter in taken:
        value = values.get(name)
        if value is None or value.shape != parameter.shape:
            has = "lacks it" if value is None else f"has {tuple(value.shape)}"
            raise BadInput(
                f"start_from is {run}, which does not fit this adapter: {name} is {tuple(parameter.shape)} here, "
                f"and that run {has}; give the adapter that run's configuration."
            )
        parameter.data = value.to(parameter.device)  # in fp32, as it was trained: a head is not yet
    whole, own = {name for name, _ in taken}, model.state_dict()
    for name in sorted(values.keys() - whole):  # what was trained there alone, or with full_checkpoints what is frozen
        if name not in own or not torch.equal(*(v[name].to("cpu", torch.bfloat16) for v in (own, values))):
            raise BadInput(
                f"start_from is {run}, which does not fit this adapter: that run trained {name}, and this one does "
                "not; give the adapter that run's configuration."
            )


def check_dora(config: PeftConfig, model: nn.Module) -> None:
    """Refuse DoRA on an 8-bit base on a CPU, where PEFT's way of reading the weights loses their scales.

    Raises:
        BadInput: if it is that.
    """
    eight = (module for module in model.modules() if type(module).__name__ == "Linear8bitLt")
    if getattr(config, "use_dora", False) and any(m.get_parameter("weight").device.type == "cpu" for m in eight):
        raise BadInput(
            "use_dora was asked for on a base in int8 on a CPU, where PEFT loses the weights' scales; take nf4, a GPU, "
            "or LoRA without use_dora."
        )


def check_head(config: PeftConfig, model: nn.Module) -> None:
    """Refuse to have PEFT train a copy of a classifier's head, beside which the head itself would train unused.

    Raises:
        BadInput: if `config` asks for that.
    """
    heads = tuple(f"{name}." for name in classification_head(model))
    parts = [name for name, _ in model.named_modules() if f"{name}.".startswith(heads)]
    asked = [f"task_type {kind.value}" for kind in COPIES_HEAD if config.task_type == kind]
    for saved in getattr(config, "modules_to_save", None) or ():
        asked += [f"modules_to_save {saved}" for part in parts if part.endswith(saved)]
    if heads and asked:
        raise BadInput(
            f"{asked[0]} was asked for, by which PEFT trains a copy of the classifier's head, but the head trains "
            "beside the adapter here, itself; leave it out."
        )


# ---- adapters that start as a part of the base


def lora_layers(wrapper: PeftModel) -> dict[str, Any]:
    """The modules with LoRA's factors by their names in PEFT's files, except embeddings."""
    return {
        name: module
        for name, module in wrapper.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


def split(layer: Any, config: PeftConfig) -> Factors:
    """Move what the configured initialisation takes of `layer`'s weight into its adapter, and return that part.

    One layer at a time, by PEFT's own initialisation; what is left in the weight is computed from the factors as they
    are kept, so that `take_out` repeats it to the bit.

    Raises:
        BadInput: for OLoRA on a transposed weight, of which PEFT takes the wrong side.
    """
    base, how = layer.get_base_layer(), str(config.init_lora_weights)  # pyright: ignore[reportAttributeAccessIssue]
    if how.lower() == "olora" and isinstance(base, Conv1D):
        raise BadInput(
            "init_lora_weights olora was asked for on a Conv1D, whose weight is transposed, and PEFT does not turn it; "
            "choose pissa."
        )
    before = base.weight.detach().clone()
    with torch.no_grad():
        layer.olora_init(ADAPTER) if how.lower() == "olora" else layer.pissa_init(ADAPTER, how)
    base.weight.data = before
    factors = {"A": layer.lora_A[ADAPTER].weight.detach().clone(), "B": layer.lora_B[ADAPTER].weight.detach().clone()}
    take_out(layer, factors)
    return factors


def take_out(layer: Any, factors: Factors) -> None:
    """Subtract from `layer`'s weight what its adapter would add with `factors`, in fp32, and set them as its own."""
    weight = layer.get_base_layer().weight
    layer.lora_A[ADAPTER].weight.data.copy_(factors["A"])
    layer.lora_B[ADAPTER].weight.data.copy_(factors["B"])
    part = layer.scaling[ADAPTER] * (factors["B"].float() @ factors["A"].float())
    weight.data = (weight.detach().float() - (part.t() if layer.fan_in_fan_out else part)).to(weight.dtype)


def as_difference(config: PeftConfig) -> PeftConfig:
    """The configuration of a plain LoRA of twice the rank and the same scale."""
    assert isinstance(config, LoraConfig)
    scale = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, scale * config.lora_alpha  # pyright: ignore
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: scale * alpha for name, alpha in (config.alpha_pattern or {}).items()}
    return config
