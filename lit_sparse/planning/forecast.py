"""The memory and the arithmetic of a training, predicted by a trace without weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from lit_sparse.errors import BadInput
from lit_sparse.modules import LitSparse
from lit_sparse.modules.checks import check_sharding
from lit_sparse.modules.loading import quantization
from lit_sparse.optim import trainable
from lit_sparse.planning import quantized
from lit_sparse.planning.device_choices import ON_CPU, choices_of
from lit_sparse.planning.training import MICRO_BATCHES, Setting, batch_of, trace_training
from lit_sparse_profiling.caching import replay
from lit_sparse_profiling.sections import CONTEXT_BYTES
from lit_sparse_profiling.timeline import BOUNDARY, Moment
from lit_sparse_profiling.trace import Trace
from lit_sparse_profiling.workspaces import cpu_workspace

MOST_TOKENS, MOST_RANKS = 2**23, 10**6
"""Bounds of the tokens of a batch and of the ranks: the time and the memory of a trace grow with both."""


@dataclass(frozen=True)
class Forecast:
    """The memory and the arithmetic of a training, predicted; sizes in bytes of one rank.

    Attributes:
        name: Name of the method.
        setting: What was planned.
        parameters, trainable: Number of weights.
        allocated: Peak of the allocator, as tensors request it.
        reserved: Peak of the segments that CUDA's caching allocator takes; `allocated` on a CPU.
        phases: Highest moment of each phase.
        kept: The moment before the last backward pass, or before the last step of a method without one.
        flops: Floating-point operations of an optimizer step.
        seconds: Seconds of the trace.
        checkpointing: Whether activations are recomputed layer by layer.
        compiled: Whether the model is to be compiled; it is traced as it is.
        checkpointable: Whether activation checkpointing saves memory, and the methods accept it.
    """

    name: str
    setting: Setting
    parameters: int
    trainable: int
    allocated: int
    reserved: int
    phases: Mapping[str, Moment]
    kept: Moment
    flops: int
    seconds: float
    checkpointing: bool = False
    compiled: bool = False
    checkpointable: bool = True

    @property
    def peak(self) -> Moment:
        """The highest moment of all."""
        return max(self.phases.values(), key=lambda moment: moment.bytes)

    @property
    def needed(self) -> int:
        """Bytes that a card must have: what is reserved, and the CUDA context."""
        return self.reserved + (CONTEXT_BYTES if self.setting.device == "cuda" else 0)

    @property
    def tokens(self) -> int:
        """Tokens of an optimizer step on one rank."""
        return self.setting.batch_size * self.setting.length * self.setting.micro_batches


def forecast(name: str, module: LitSparse, setting: Setting, seconds: float | None = None) -> Forecast:
    """Trace two steps of `module` and return what they would take.

    Args:
        name: Name of the method.
        module: A module that was not used yet; only the configuration of its base is read.
        setting: The device, the batch, and what else matters.
        seconds: Processor time that the trace may take; None for no limit.

    Raises:
        BadInput: if there is no such base, the strategies refuse it, or they cannot be traced.
        Overdue: if the trace takes longer than `seconds`.
    """
    _check(module, setting)
    ways = module.updates.costliest(setting.sharded)
    modules = [module, *(copy.deepcopy(module) for _ in ways[1:])]  # a trace uses one up
    for one, updates in zip(modules, ways, strict=True):
        one.updates = updates
    plans = [_traced(name, one, setting, seconds) for one in modules]
    return worst_of(plans)


def worst_of(plans: Sequence[Forecast]) -> Forecast:
    """Return the plan that takes most, with the highest moment of each phase of any: a training meets all of them."""
    worst = max(plans, key=lambda plan: (plan.reserved, plan.allocated))
    moments = [(name, moment) for plan in plans for name, moment in plan.phases.items()]
    phases = {
        name: max((moment for other, moment in moments if other == name), key=lambda moment: moment.bytes)
        for name in worst.phases
    }
    kept = max((plan.kept for plan in plans), key=lambda moment: moment.bytes)
    return replace(worst, phases=phases, kept=kept, seconds=sum(plan.seconds for plan in plans))


def _traced(name: str, module: LitSparse, setting: Setting, seconds: float | None) -> Forecast:
    """Return what `module` would take."""
    on_cpu = setting.device == "cpu"
    composed = {**(ON_CPU if on_cpu else {}), **(quantized.composed() if module.quantize else {})}
    begin, trace = perf_counter(), Trace(cpu_workspace if on_cpu else None, composed, seconds)
    if setting.device == "cuda" and module.precision == "auto":
        module.precision = "bfloat16"
    compiled, module.compile_model = module.compile_model, False
    with choices_of(setting.device), gc_paused():
        try:
            trace_training(module, batch_of(module, setting), trace, setting)
        except RuntimeError as error:
            raise BadInput(_untraced(module, error)) from error
    phases = trace.peaks()
    turn = BOUNDARY if module.updates.backward != "none" else "optimizer step"
    kept = trace.moment("forward", max(start for start, phase in trace.marks if phase == turn) - 1)
    allocated = max(moment.bytes for moment in phases.values())
    reserved = allocated
    if setting.device == "cuda":
        reserved = replay(trace.events, [block.size for block in trace.blocks]).reserved
    model = module.build()
    traced = min(setting.micro_batches, MICRO_BATCHES)
    repeated = ("optimizer step",) if module.updates.backward == "none" else ("forward", "backward")
    flops = {phase: n * setting.micro_batches // traced if phase in repeated else n for phase, n in trace.flops.items()}
    steps = max(1, sum(phase == "optimizer step" for _, phase in trace.marks) - 1)  # the last one is a repetition
    return Forecast(
        name,
        setting,
        module.base_parameters,
        sum(parameter.numel() for _, parameter in trainable(model)),
        allocated,
        reserved,
        phases,
        kept,
        sum(n for phase, n in flops.items() if phase != "selection") // steps,
        perf_counter() - begin,
        module.activation_checkpointing,
        compiled,
        module.updates.checkpointable,
    )


def _check(module: LitSparse, setting: Setting) -> None:
    """Refuse what is not traced, and what a fit would refuse.

    Raises:
        BadInput: naming the key to leave out, or a number that is too large.
    """
    if setting.batch_size * setting.length > MOST_TOKENS:
        raise BadInput(
            f"a batch of {setting.batch_size} x {setting.length} tokens was to be planned, but at most {MOST_TOKENS:,} "
            "tokens can be; set data.batch_size or data.max_length lower."
        )
    if setting.ranks > MOST_RANKS:
        raise BadInput(
            f"{setting.ranks} ranks were to be planned, but at most {MOST_RANKS:,} can be; set trainer.devices or "
            "trainer.num_nodes lower."
        )
    if module.quantize == "nf4":
        quantization("", module.quantize, torch.float32)  # refuses without bitsandbytes
    if setting.sharded:
        check_sharding(module.updates, {"quantize": module.quantize, "compile": module.compile_model})
    if module.quantize == "int8":
        raise BadInput(
            "model.quantize is int8, where what is kept of a batch depends on values; plan with nf4 for a figure that "
            "is lower by about half a byte for each weight, or without for a bound: a quantised base takes less."
        )


def _untraced(module: LitSparse, error: Exception) -> str:
    """Say that a training cannot be traced, with a bound of what needs no trace."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    bound = module.base_parameters * 4 * torch.float32.itemsize / 2**30
    return (
        f"{module.updates.names} cannot be traced without values ({type(error).__name__}: {reason}); weights, "
        f"gradients and moments of AdamW take at most {bound:.2f} GiB, those of full fine-tuning in fp32, beside "
        "activations: plan full.yaml for these."
    )


@contextmanager
def gc_paused() -> Iterator[None]:
    """Stop the garbage collector, which would walk over every block again and again."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
