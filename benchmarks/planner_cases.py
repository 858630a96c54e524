"""The trainings whose memory the planner's error is measured on: methods, tiny models, batches, ranks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lit_sparse.cli import make_planned
from lit_sparse.commands.plan import fit_command
from lit_sparse.commands.shipped import methods
from lit_sparse.demo import DEMO, resolve
from lit_sparse.modules import LitSparse
from lit_sparse.planning.forecast import Setting

VOCABULARY = 512
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "qwen2": Qwen2Config(
        hidden_size=80,
        intermediate_size=144,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=512),
    "olmo2": Olmo2Config(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    ),
    "opt": OPTConfig(hidden_size=64, ffn_dim=192, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64),
    "phi": PhiConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4),
    "qwen3": Qwen3Config(
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
    ),
}
"""Tiny models, by family; of the last two no test has any."""
SHAPES = ((2, 64), (1, 200), (5, 33))
"""Rows of a batch, and tokens of each."""
ON_GPU: dict[str, PreTrainedConfig] = {
    "llama-150m": LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4
    ),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=12, n_head=16),
}
"""Models for a GPU, of random weights."""
SHAPES_ON_GPU = ((4, 512), (1, 1024))
SHORT = {
    **dict.fromkeys(("badam", "lisa", "lisa_grad_norm", "ows"), "interval=2"),
    **{"lift": "reselect=4", "losia": "reselect=4", "spiel": "reselect=8"},
}
"""Settings of methods that change what they train every so many steps: soon, since each step's events are kept."""
PAIR, PAIRED = 2, ("llama", "gpt2", "qwen3")
"""Ranks that train together, and the families that they train."""


Way = Literal["one", "ddp", "fsdp2", "nf4", "compiled", "gpu"]
"""One process, with its base in 4 bits or compiled too, or on a GPU; or two with DDP or FSDP2."""
ALONE = ("one", "nf4", "compiled", "gpu")


class Case(NamedTuple):
    """One training to plan and to measure."""

    method: str
    family: str
    batch_size: int
    length: int
    checkpointing: bool
    way: Way = "one"

    @property
    def setting(self) -> Setting:
        """The planner's setting of it."""
        count = 1 if self.way in ALONE else PAIR
        device = "cuda" if self.way == "gpu" else "cpu"
        return Setting(device, self.batch_size, self.length, ranks=count, sharded=self.way == "fsdp2")


def cases() -> list[Case]:
    """Return all configurations of one process: methods in turn on tiny models, then the demo model."""
    found = [
        Case(path.stem, family, *shape, checkpointing)
        for path, family, shape, checkpointing in product(methods(), FAMILIES, SHAPES, (False, True))
    ]
    random.Random(0).shuffle(found)
    demo = [Case(path.stem, DEMO, *SHAPES[0], checkpointing) for path in methods() for checkpointing in (False, True)]
    return [*in_turn(found), *demo]


def in_turn(found: Sequence[Case]) -> list[Case]:
    """Return the first configuration of each method, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns: dict[Case, int] = {}
    for case in found:
        turns[case] = seen[case.method]
        seen[case.method] += 1
    return sorted(found, key=turns.__getitem__)


def cases_of_pairs() -> list[Case]:
    """Return the configurations of two ranks, in a fixed random order."""
    ways: tuple[Way, ...] = ("ddp", "fsdp2")
    found = [
        Case(path.stem, family, *SHAPES[0], checkpointing, way)
        for path, family, checkpointing, way in product(methods(), PAIRED, (False, True), ways)
    ]
    random.Random(1).shuffle(found)
    return found


def cases_on_gpu() -> list[Case]:
    """Return the configurations of a GPU, in a fixed order, in which methods take turns."""
    found = [
        Case(path.stem, family, *shape, checkpointing, "gpu")
        for path, family, shape, checkpointing in product(methods(), ON_GPU, SHAPES_ON_GPU, (False, True))
    ]
    random.Random(2).shuffle(found)
    return in_turn(found)


def config_in(folder: Path, family: str) -> Path:
    """Write the configuration of a tiny model into `folder`, and return its path; the demo model has its own."""
    if family == DEMO:
        return Path(resolve(DEMO))
    config = {**FAMILIES, **ON_GPU}[family]
    if family in FAMILIES:
        config.update({"vocab_size": VOCABULARY})
    config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    config.save_pretrained(folder / family)
    return folder / family / "config.json"


def module_of(case: Case, config: Path) -> LitSparse:
    """Return the module that `fit` would train."""
    options = [f"--model.base={config}", f"--model.activation_checkpointing={str(case.checkpointing).lower()}"]
    if case.way == "nf4":
        options += [f"--model.base={weights_of(config)}", "--model.quantize=nf4"]
    short = [f"--model.updates.{SHORT[case.method]}"] if case.method in SHORT else []
    return make_planned([*fit_command(f"{case.method}.yaml", [], options), *short, *OPTIONS.get(case.way, ())]).module


OPTIONS = {"compiled": ("--model.compile=true",)}


def weights_of(config: Path) -> Path:
    """Return a folder with random weights of a configuration: only weights can be quantised."""
    folder = config.parent.with_name(f"{config.parent.name}-weights")
    if not folder.exists():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).save_pretrained(folder)
    return folder
