"""PEFT: any adapter of Hugging Face's PEFT that lives inside the model's modules (LoRA, DoRA, IA3, SHiRA, ...)."""

import copy
import dataclasses
from typing import ClassVar, Literal

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lit_sparse.errors import BadInput
from lit_sparse.strategies.base import Claim, Probe, UpdateStrategy


@dataclasses.dataclass
class PEFT(UpdateStrategy):
    """Train an adapter of Hugging Face's PEFT (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; and many more).

    Args:
        config: A PEFT configuration, by `class_path` and `init_args` in YAML: peft.LoraConfig, peft.IA3Config, ...
    """

    config: PeftConfig

    claims: ClassVar[frozenset[Claim]] = frozenset({"modules", "trainable"})
    leaves: ClassVar[Literal["plain", "adapter", "own_forward"]] = "adapter"

    def __post_init__(self) -> None:
        if self.config.is_prompt_learning:
            raise BadInput(
                f"{type(self.config).__name__} prepends to the input instead of changing modules, which PEFT() here "
                "cannot train; choose an adapter such as peft.LoraConfig."
            )
        self._wrapper: PeftModel | None = None

    def attach(self, model: nn.Module, probe: Probe) -> None:
        if not isinstance(model, PreTrainedModel):
            raise BadInput(f"PEFT needs a Hugging Face model; this is a {type(model).__name__}.")
        # The wrapper is kept aside: PEFT puts the adapters into `model` itself, whose forward stays the model's own.
        wrapper = get_peft_model(model, copy.deepcopy(self.config))
        assert isinstance(wrapper, PeftModel)
        self._wrapper = wrapper

    def detach(self, model: nn.Module) -> None:
        if self._wrapper is not None:
            self._wrapper.merge_and_unload()  # pyright: ignore[reportCallIssue]
            self._wrapper = None
