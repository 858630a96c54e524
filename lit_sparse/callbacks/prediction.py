"""Say before a fit loads its model what memory it is predicted to take, and whether the device has as much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, PreTrainedConfig

from lit_sparse.checkpoints import forked_rng
from lit_sparse.data import TokenData
from lit_sparse.data.loader import Loader
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse
from lit_sparse.modules.loading import load_errors
from lit_sparse.modules.sharding import FSDP2Strategy
from lit_sparse.planning.forecast import Forecast, Setting, forecast
from lit_sparse.planning.levers import levers
from lit_sparse.runs import build_module
from lit_sparse_profiling.budget import Budget, Cost
from lit_sparse_profiling.devices import free_of_host
from lit_sparse_profiling.memory import trim_heap
from lit_sparse_profiling.sections import CONTEXT_BYTES, Predicted
from lit_sparse_profiling.trace import Overdue

SECONDS = 60.0
"""Processor seconds that a prediction may take in any fit; what takes longer is left to `lit-sparse plan`."""
START, LAYER, WITH_STRATEGIES = 0.2, 0.05, 2
"""Seconds that one is expected to take: of any model, and of each of its layers, and how much longer these take where
strategies choose what trains. On one core, of 30 layers: 1.7 s for full fine-tuning, 3.5 s for SMT, 5.3 s for LIFT."""
LONGER = 3
"""How many times as long one may take: a mixture of experts has many more tensors in a layer."""
ALWAYS = 1.0
"""Expected seconds of one that is made in any fit: a tenth of what the shortest takes, of which most are imports."""
FLOPS = {"cpu": 1e11, "cuda": 5e14}
"""FLOP/s of a core and of a GPU, which few trainings reach."""
OVERDUE = "that takes over {:.0f} s here; lit-sparse plan does it"
NAMED = 0.02
"""Share of the peak below which a category is not told."""


def predict(trainer: L.Trainer, settings: Mapping[str, Any], seconds: float) -> Predicted | str:
    """Say and return what a fit is predicted to take; if it cannot be predicted, say and return why not.

    Args:
        trainer: The trainer of the fit, whose data are set up.
        settings: The configuration of the fit, of which another module is made.
        seconds: Processor seconds that it may take.
    """
    try:
        setting = setting_of(trainer)
        with torch.device("cpu"), forked_rng(trainer.strategy.root_device):
            module = build_module(deepcopy(dict(settings)))
            found = forecast("", module, setting, seconds)
    except Overdue:
        return refused(OVERDUE.format(seconds))
    except Exception as error:  # of any strategy's or model's own code: no reason not to train
        reason = error if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        return refused(" ".join(str(reason).split()).removesuffix("."))
    finally:
        trim_heap()  # else what the trace has freed would count as the training's memory
    predicted = section_of(found, free_bytes(trainer.strategy.root_device))
    rank_zero_info(in_words(predicted, setting.device))
    if not predicted.fits:
        rank_zero_info(warning(predicted, module, setting))
    return predicted


def refused(reason: str) -> str:
    """Say and return why nothing is predicted."""
    told = f"Memory is not predicted: {reason}."
    rank_zero_info(told)
    return told


def seconds_for(trainer: L.Trainer, module: LitSparse, budget_of: Callable[[float], Budget]) -> float | str:
    """Return the processor seconds that a prediction may take; if they are too much of the fit, say and return why.

    Args:
        trainer: The trainer of the fit, whose data are set up.
        module: Its module, whose model is not loaded yet.
        budget_of: Returns what measuring may take of a fit of so many steps.
    """
    try:
        setting, budget = setting_of(trainer), budget_of(steps_ahead(trainer))
        with load_errors(module.base):
            config = AutoConfig.from_pretrained(resolve(module.base), trust_remote_code=False).get_text_config()
        each = LAYER * (WITH_STRATEGIES if list(module.updates) else 1)
        cost = Cost(0, START + each * config.num_hidden_layers)
        budget.step_seconds = least_seconds(config, positions(trainer, setting), setting.device)
    except (BadInput, AttributeError):  # no size of a batch, no model, or no sizes of it: the prediction says it better
        return SECONDS
    if cost.seconds > SECONDS:
        return refused(OVERDUE.format(SECONDS))
    if cost.seconds <= ALWAYS or budget.allows(cost):
        return min(SECONDS, LONGER * cost.seconds)
    return refused(f"{budget.refusal(cost)}; --profile.predict=true does it nevertheless")


def least_seconds(config: PreTrainedConfig, tokens: float, device: str) -> float:
    """Return the seconds that a step of so many tokens takes at least: its products, forward and backward.

    Gradients of weights are left out, which most methods have few of, and so are experts beyond one.
    """
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    weights = width * (2 * config.num_hidden_layers * (width + inner) + config.vocab_size)
    return 4 * weights * tokens / (FLOPS[device] * (torch.get_num_threads() if device == "cpu" else 1))


def positions(trainer: L.Trainer, setting: Setting) -> float:
    """Return the token positions of a mean step of this rank."""
    loader = trainer.fit_loop._data_source.dataloader()
    mean = float(loader.batches.lengths.mean()) if isinstance(loader, Loader) else setting.length
    return setting.batch_size * mean * setting.micro_batches


def steps_ahead(trainer: L.Trainer) -> float:
    """Return the optimizer steps of a fit, as far as anything limits them.

    It asks no other rank, unlike the trainer's own estimate.
    """
    steps = float("inf") if trainer.max_steps == -1 else trainer.max_steps
    loader = trainer.fit_loop._data_source.dataloader()
    if trainer.max_epochs in (None, -1) or not isinstance(loader, Loader):
        return steps
    limit = trainer.limit_train_batches  # pyright: ignore[reportAttributeAccessIssue] - set in a function
    batches = min(len(loader), limit) if isinstance(limit, int) else len(loader) * limit
    return min(steps, trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))


def setting_of(trainer: L.Trainer) -> Setting:
    """Return what a fit trains with: its device and ranks, and the largest batch of its data.

    Raises:
        BadInput: if that is not known, or not traced.
    """
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDP2Strategy)
    if sharded and strategy.offload:
        raise BadInput("trainer.strategy has offload, whose host memory is not traced.")
    rows, length = largest_batch(trainer)
    return Setting(
        "cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
        rows,
        length,
        trainer.accumulate_grad_batches,
        trainer.gradient_clip_val,  # pyright: ignore[reportAttributeAccessIssue]
        trainer.world_size,
        sharded,
        strategy.replicas if sharded else 1,
    )


def largest_batch(trainer: L.Trainer) -> tuple[int, int]:
    """Return the rows of the largest batch of the training data, and the tokens of its rows.

    Raises:
        BadInput: if the data do not tell.
    """
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue] - Lightning sets it in a function
    loader = trainer.fit_loop._data_source.dataloader()
    if isinstance(data, TokenData) and isinstance(loader, Loader):
        lengths, multiple = loader.batches.lengths, data.pad_to_multiple_of
        return min(loader.batches.batch_size, len(lengths)), -(-int(lengths.max()) // multiple) * multiple
    sizes = getattr(data, "batch_size", None), getattr(data, "max_length", None)
    if not all(isinstance(size, int) for size in sizes):
        raise BadInput("the size of the batches is known only as they come.")
    return sizes  # pyright: ignore[reportReturnType]


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device that nobody uses; of a GPU with this process's CUDA context counted as free."""
    if device.type != "cuda":
        return free_of_host()
    return torch.cuda.mem_get_info(device)[0] + CONTEXT_BYTES


def section_of(found: Forecast, free: int) -> Predicted:
    """Return a forecast as a section of the record."""
    return Predicted(
        peak_bytes=found.allocated,
        reserved_bytes=found.reserved,
        needed_bytes=found.needed,
        free_bytes=free,
        phase=found.peak.phase,
        categories=dict(found.peak.categories),
        batch_size=found.setting.batch_size,
        length=found.setting.length,
        seconds=found.seconds,
    )


def in_words(predicted: Predicted, device: str) -> str:
    """Return a prediction as a sentence."""
    parts = sorted(predicted.categories.items(), key=lambda part: -part[1])
    named = [f"{name} {amount(size)}" for name, size in parts if size > NAMED * predicted.peak_bytes]
    reserved = ""
    if device == "cuda":
        reserved = f"; {amount(predicted.needed_bytes)} of the GPU, with what is reserved and its context"
    return (
        f"Predicted peak of memory: {amount(predicted.peak_bytes)} of tensors in {predicted.phase}, at "
        f"{predicted.batch_size} x {predicted.length} tokens ({', '.join(named)}){reserved}."
    )


def warning(predicted: Predicted, module: LitSparse, setting: Setting) -> str:
    """Return a warning that the training of `module`, which was traced, will not fit, with what to change."""
    accepted = levers(module, setting.batch_size, setting.micro_batches, setting.sharded)
    ways = [one.options for one in accepted if one.acts_on != "trained"]
    ways.append("a method that takes less (lit-sparse plan tells the memory of each)")
    return (
        f"Warning: this will not fit. {amount(predicted.needed_bytes)} are needed, and "
        f"{amount(predicted.free_bytes)} are free; try {', or '.join(ways)}."
    )


def amount(size: int) -> str:
    """Return bytes as text, in GiB, or in MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
