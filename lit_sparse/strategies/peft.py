"""PEFT: train any adapter of Hugging Face's PEFT that changes the model's modules (LoRA, DoRA, IA3, SHiRA, ...)."""

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from peft import (
    GloraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    ShiraConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_sparse.anatomy import classification_head, experts, is_linear, unread_by_text
from lit_sparse.calls import uncalled
from lit_sparse.checkpoints import fingerprint, run_checkpoint
from lit_sparse.errors import BadInput
from lit_sparse.strategies.adapter_kinds import check_config
from lit_sparse.strategies.base import Attaches, Claim, Context, Leaves, Need, Probe, UpdateStrategy
from lit_sparse.strategies.lora_start import ADAPTER, Factors, as_difference, lora_layers, split, subtract
from lit_sparse.strategies.prefix import language_task, put_prefix

READS_NO_WEIGHT = (GloraConfig, IA3Config, LoraConfig, ShiraConfig)
"""Adapters that start from shapes and random numbers alone, unless one of `READS` is set."""
READS = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")

COPIES_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)
"""Task types for which PEFT trains copies of modules named like a classification head."""

WEIGHTS = "adapter_model.safetensors"
"""PEFT's file name for an adapter's tensors."""


@dataclasses.dataclass
class PEFT(UpdateStrategy):
    """Train an adapter of Hugging Face's PEFT (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; and many more).

    Args:
        config: A PEFT configuration by `class_path` and `init_args`: peft.LoraConfig, peft.PrefixTuningConfig, ...
        start_from: Folder or checkpoint of a run whose trained adapter (and classification head) is the start of this
            one, with a new optimizer. That run must have the same configuration and base. Null starts afresh.
    """

    config: PeftConfig
    start_from: str | None = None

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    supports_sharding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_config(self.config, self.is_prefix)
        self._placed = self.config  # with the names of the layers that all-linear stands for
        self._wrapper: PeftModel | None = None
        self._start: dict[str, Factors] = {}
        self._aligned = False  # whether ranks have the same VeLoRA projections

    @property
    def is_prefix(self) -> bool:
        """True if keys and values are trained that stand before a row's (prefix tuning); they merge into no weights."""
        return isinstance(self.config, PrefixTuningConfig)

    @property
    def leaves(self) -> Leaves:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "own_forward" if self.is_prefix else "adapter"

    @property
    def denies(self) -> frozenset[Need]:
        return super().denies - {"activations"}  # a prefix does not hide what layers compute

    @property
    def splits_base(self) -> bool:
        """True if the adapter starts as a part of the base's weights, and the base keeps the rest (PiSSA, OLoRA)."""
        return str(getattr(self.config, "init_lora_weights", "")).lower().startswith(("pissa", "olora"))

    @property
    def trains_biases(self) -> bool:
        """True if the base's own biases are trained together with the adapter."""
        return getattr(self.config, "bias", "none") != "none"

    @property
    def base(self) -> Literal["kept", "trained", "rewritten"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.splits_base or (self.trains_biases and self.start_from is not None):
            return "rewritten"
        return "trained" if self.trains_biases else "kept"

    @property
    def attaches_to(self) -> Attaches:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`shapes` for adapters that read no weight as they start; others need the `whole` model.

        LoRA reads them for DoRA's norms, MiCA's directions, a start as a part of the base, and copies of whole modules.
        """
        reads = self.splits_base or self.start_from is not None or any(getattr(self.config, n, None) for n in READS)
        reads = reads or str(getattr(self.config, "init_lora_weights", "")).lower() == "mica"
        return "shapes" if isinstance(self.config, READS_NO_WEIGHT) and not reads else "whole"

    def attach(self, model: nn.Module, probe: Probe, context: Context) -> None:
        if self.start_from is not None:
            self._attach_trained(model, self.start_from, context)
            return
        wrapper = self._wrap(model, start=True)
        if self.splits_base:
            # Kept for the checkpoint: the remainder in the base is rebuilt from these factors, since an SVD gives other
            # bits on another device.
            self._start = {name: split(layer, self.config) for name, layer in lora_layers(wrapper).items()}

    def _attach_trained(self, model: nn.Module, run: str, context: Context) -> None:
        checkpoint = run_checkpoint(run)
        ours = checkpoint["lit_sparse"]
        adapters = [update["state"] for update in ours["updates"] if update["class"] == type(self).__name__]
        if not adapters or ours["base"] != fingerprint(model):
            reason = "has no adapter of PEFT's" if not adapters else "was trained on another base than this run's"
            raise BadInput(f"start_from is {run}, which {reason}; give a run of the same adapter on the same base.")
        self.restore(model, adapters[0], context)
        load_values(model, run, {name.removeprefix("model."): v for name, v in checkpoint["state_dict"].items()})
        for name, scale in self._scales().items():
            before = adapters[0].get("scales", {}).get(name, scale)  # older checkpoints have no scales
            if before != scale:
                raise BadInput(
                    f"start_from is {run}, whose adapter has the scale {before:g} at {name}, but {scale:g} here; give "
                    "the adapter that run's configuration."
                )

    def restore(self, model: nn.Module, state: Mapping[str, Any], context: Context) -> None:
        wrapper = self._wrap(model)
        if state["fixed"]:  # PEFT loads complete adapters only; the trained values are loaded later
            with embedding_warnings_off():
                set_peft_model_state_dict(wrapper, self._tensors(trained=True) | state["fixed"])
        for module in wrapper.modules():  # PEFT saves VeLoRA's projections, but not the flag that they are computed
            for name, projection in getattr(module, "lora_velora_embed", {}).items():
                module.lora_velora_initialized[name] = bool(projection.any())  # pyright: ignore
        layers = lora_layers(wrapper)
        for name, factors in state["start"].items():
            device = layers[name].get_base_layer().weight.device
            self._start[name] = {key: value.to(device) for key, value in factors.items()}
            subtract(layers[name], self._start[name])

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Give all ranks rank 0's VeLoRA projections, which each took from its own first batch."""
        if self._aligned or not (dist.is_available() and dist.is_initialized()):
            return
        assert self._wrapper is not None
        for module in self._wrapper.modules():
            for projection in getattr(module, "lora_velora_embed", {}).values():
                dist.broadcast(projection, 0)
        self._aligned = True

    @torch.no_grad()  # else OFT's merged weights keep the graph of their rotation, and each tensor in it
    def detach(self, model: nn.Module) -> None:
        if self._wrapper is not None and not self.is_prefix:
            self._wrapper.merge_and_unload()  # pyright: ignore[reportCallIssue]
            self._wrapper, self._start = None, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's tensors that are not trained (drawn or computed), and how the adapter started.

        `start` has the initial factors of an adapter that started as a part of the base; `scales` has each layer's
        scale, which a later `start_from` compares with its own.
        """
        return {"fixed": self._tensors(trained=False), "start": self._start, "scales": self._scales()}

    def save(self, folder: Path) -> None:
        """Write the adapter so that PEFT's own loader puts it on the base as it was before training.

        An adapter that started as a part of the base becomes a LoRA of twice the rank: the trained product minus the
        initial one, since a loader has the unchanged base.
        """
        assert self._wrapper is not None, "there is no adapter to save: attach or restore it first"
        own = self._wrapper.active_peft_config if self.is_prefix else self._placed  # a prefix's has the model's sizes
        tensors, config = self._tensors(trained=True) | self._tensors(trained=False), copy.deepcopy(own)
        if self.splits_base:
            tensors, config = self._as_difference(tensors), as_difference(config)
        config.base_model_name_or_path = self._wrapper.get_base_model().name_or_path  # pyright: ignore
        config.inference_mode, config.task_type = True, config.task_type or TaskType.CAUSAL_LM
        folder.mkdir()  # fails on an existing folder: two adapters' files must not mix
        config.save_pretrained(str(folder))
        # Cloned, since safetensors refuses tensors that share memory.
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / WEIGHTS)

    def _wrap(self, model: nn.Module, start: bool = False) -> PeftModel:
        if not isinstance(model, PreTrainedModel):
            raise BadInput(f"PEFT needs a Hugging Face model; this is a {type(model).__name__}.")
        check_dora(self.config, model)
        check_head(self.config, model)
        config = self._placed = placed(self.config, model)
        config = copy.deepcopy(config)  # PEFT changes it
        wanted = {n: model.get_submodule(n) for n in all_linear(model)} if takes_all_linear(self.config) else {}
        config.task_type = language_task(model) if self.is_prefix else config.task_type
        if self.splits_base:
            config.init_lora_weights = True  # pyright: ignore[reportAttributeAccessIssue] - `split` initialises one layer at a time
        # The wrapper is used for saving and merging only. PEFT changes the modules of `model` itself, so the model is
        # still called directly.
        try:
            wrapper = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise BadInput(
                f"{type(config).__name__} was asked for, but PEFT cannot put it on {type(model).__name__} ({reason}); "
                "give other target_modules or settings, or another adapter, such as peft.LoraConfig."
            ) from error
        assert isinstance(wrapper, PeftModel)
        warn_of_missed(wanted, wrapper)
        if self.is_prefix:
            put_prefix(model, wrapper, start)
        self._wrapper = wrapper
        return wrapper

    def _tensors(self, trained: bool) -> dict[str, Tensor]:
        """Return the tensors of the adapter's state by PEFT's names: the trained ones, or all others."""
        if self._wrapper is None:
            return {}
        if self.is_prefix:
            return {"prompt_embeddings": self._wrapper.get_prompt_embedding_to_save(ADAPTER)} if trained else {}
        with embedding_warnings_off():
            found = get_peft_model_state_dict(
                self._wrapper, self._wrapper.state_dict(keep_vars=True), save_embedding_layers=False
            )
        return {name: value.detach() for name, value in found.items() if value.requires_grad == trained}

    def _scales(self) -> dict[str, float]:
        """Return the scale of each layer's adapter by the layer's name; layers without a scale are left out."""
        layers = [] if self._wrapper is None else self._wrapper.named_modules()
        scaling = {name: getattr(m, "scaling", None) for name, m in layers if isinstance(m, BaseTunerLayer)}
        return {name: float(s[ADAPTER]) for name, s in scaling.items() if isinstance(s, dict) and ADAPTER in s}

    def _as_difference(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return LoRA's factors of s (B A - B0 A0), where A0 and B0 are the initial ones: [A; A0] and [B, -B0]."""
        found = dict(tensors)
        for name, start in self._start.items():
            first, second = (f"{name}.lora_{factor}.weight" for factor in "AB")
            found[first] = torch.cat([tensors[first], start["A"].to(tensors[first])], dim=0)
            found[second] = torch.cat([tensors[second], -start["B"].to(tensors[second])], dim=1)
        return found


@contextmanager
def embedding_warnings_off():
    """Suppress PEFT's warning that `save_embedding_layers` is off, and that it found no configuration file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file|Setting `save_embedding_layers`")
        yield


def load_values(model: nn.Module, run: str, values: Mapping[str, Tensor]) -> None:
    """Set the trainable parameters and the classification head of `model` to the final values of `run`.

    The head is named separately: the host makes it trainable only later.

    Raises:
        BadInput: naming the first parameter whose value is missing or has another shape, or the first value that `run`
            trained and `model` does not.
    """
    heads = tuple(f"{name}." for name in classification_head(model))
    taken = [(n, p) for n, p in model.named_parameters() if p.requires_grad or n.startswith(heads)]
    for name, parameter in taken:
        value = values.get(name)
        if value is None or value.shape != parameter.shape:
            theirs = "has none" if value is None else f"has {tuple(value.shape)}"
            raise BadInput(
                f"start_from is {run}, which does not fit this adapter: {name} is {tuple(parameter.shape)} here, "
                f"and that run {theirs}; give the adapter that run's configuration."
            )
        parameter.data = value.to(parameter.device)  # keeps the saved fp32: the head is still in the base's dtype here
    names, own = {name for name, _ in taken}, model.state_dict()
    for name in sorted(values.keys() - names):  # trained in that run only; with full_checkpoints also frozen weights
        if name not in own or not torch.equal(*(v[name].to("cpu", torch.bfloat16) for v in (own, values))):
            raise BadInput(
                f"start_from is {run}, which does not fit this adapter: that run trained {name}, and this one does "
                "not; give the adapter that run's configuration."
            )


def takes_all_linear(config: PeftConfig) -> bool:
    """Return true if the configuration adapts every linear layer but the head."""
    return str(getattr(config, "target_modules", None)).lower() == "all-linear"


def placed(config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
    """Return a copy of `config` in which all-linear stands for the layers that text reaches, and for fused experts.

    PEFT's own all-linear takes a classification head along (unless with task_type SEQ_CLS, which `check_head` refuses:
    the host trains the head itself), a vision tower, and routers that return more than a tensor (Llama 4's); and it
    knows of the experts of some models only.

    Raises:
        BadInput: if the adapter would leave the experts out in silence: PEFT adapts parameters with LoRA only.
    """
    config = copy.deepcopy(config)
    if not takes_all_linear(config):
        return config
    fused = sorted(experts(model))
    ours, theirs = all_linear(model), [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    head = model.get_output_embeddings()
    if set(ours) != {name for name in theirs if model.get_submodule(name) is not head}:
        config.target_modules = ours  # pyright: ignore[reportAttributeAccessIssue]
    if not fused:
        return config
    if not isinstance(config, LoraConfig):
        raise BadInput(
            f"{type(config).__name__} with target_modules all-linear does not reach the experts of "
            f"{type(model).__name__} ({fused[0]} and {len(fused) - 1} more), which PEFT adapts with LoRA only; give "
            "the names of linear layers as target_modules, such as [q_proj, v_proj], or use peft.LoraConfig."
        )
    config.target_parameters = sorted({*fused, *(config.target_parameters or ())})
    return config


def all_linear(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of `model` that text reaches through a call, except for its head."""
    unread, head = set(unread_by_text(model)), model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    heads = tuple(f"{name}." for name in classification_head(model))
    found = [
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and not f"{name}.".startswith(heads)
        and next(module.parameters()) not in unread
    ]
    direct = uncalled(model, found)
    return [name for name in found if name not in direct]


def warn_of_missed(wanted: Mapping[str, nn.Module], wrapper: PeftModel) -> None:
    """Warn of layers of all-linear that PEFT left out, as it does beside the experts of DeepSeek-V3."""
    adapted = {id(module.get_base_layer()) for module in wrapper.modules() if isinstance(module, BaseTunerLayer)}
    missed = [name for name, module in wanted.items() if id(module) not in adapted]
    if missed:
        warnings.warn(
            f"PEFT puts no adapter on {len(missed)} layers of target_modules all-linear, of which the first is "
            f"{missed[0]}: it takes their names for those of experts.",
            stacklevel=2,
        )


def check_dora(config: PeftConfig, model: nn.Module) -> None:
    """Refuse DoRA on an int8 base on a CPU, where PEFT reads the weights without their scales.

    Raises:
        BadInput: if the configuration uses DoRA on such a base.
    """
    eight = (module for module in model.modules() if type(module).__name__ == "Linear8bitLt")
    if getattr(config, "use_dora", False) and any(m.get_parameter("weight").device.type == "cpu" for m in eight):
        raise BadInput(
            "use_dora was asked for on a base in int8 on a CPU, where PEFT loses the weights' scales; use nf4, a GPU, "
            "or LoRA without use_dora."
        )


def check_head(config: PeftConfig, model: nn.Module) -> None:
    """Refuse a configuration with which PEFT trains a copy of the classification head.

    The host trains the head itself. With PEFT's copy in the forward pass, the original would train without any effect.

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
            f"{asked[0]} was asked for, with which PEFT trains a copy of the classifier's head, but here the head "
            "itself always trains with the adapter; leave it out."
        )
