"""Adapters of PEFT that would not train as they should where their layers alone are put into the model."""

from __future__ import annotations

from peft import PeftConfig

from lit_sparse.errors import BadInput

DATA_DRIVEN = ("corda", "eva", "lora_ga", "loftq")
"""Initialisations of LoRA for which PEFT needs a separate program, which reads data or quantises first."""

BESIDE_LAYERS = {
    "AdaLoraConfig": "moves ranks between layers in a call after each step, and adds a loss",
    "ShadowConfig": "adds the loss of its shadow model",
    "alora_invocation_tokens": "finds its invocation tokens in the forward pass of PEFT's model",
    "monteclora_config": "adds losses of its distributions",
    "use_asa": "chooses its subspaces in a call after each step",
}
"""Classes and keys of adapters that do something beside their layers, which nobody would do here."""


def check_config(config: PeftConfig, is_prefix: bool) -> None:
    """Refuse an adapter that PEFT() cannot train.

    Raises:
        BadInput: naming the class or key, and saying why.
    """
    name, start = type(config).__name__, str(getattr(config, "init_lora_weights", "")).lower()
    if config.is_prompt_learning and not is_prefix:
        raise BadInput(
            f"{name} prepends to the input instead of changing modules, which PEFT() here cannot train; use "
            "peft.PrefixTuningConfig, or an adapter such as peft.LoraConfig."
        )
    if start in DATA_DRIVEN:
        raise BadInput(
            f"init_lora_weights is {start}, which needs a program of PEFT's to run before training, and PEFT() "
            "here runs none; set it to true, pissa or olora."
        )
    if getattr(config, "kasa_config", None) is not None:
        raise BadInput(
            "kasa_config truncates the base's weights in a way that a small checkpoint cannot repeat; leave it out."
        )
    for key, does in BESIDE_LAYERS.items():
        if key == name or getattr(config, key, None):
            raise BadInput(
                f"{key} {does}, and PEFT() here puts only an adapter's layers into the model; "
                + ("use peft.LoraConfig, or another adapter." if key == name else "leave it out.")
            )
