"""Trace a training on fake tensors: the module's own model, strategies, loss and optimizer, without their weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lit_sparse import loss, pretended, quantized_plan
from lit_sparse.anatomy import dummy_forward, weights_in
from lit_sparse.data.collate import Padded, Padding
from lit_sparse.data.encoding import Example
from lit_sparse.demo import resolve
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, LitSparse
from lit_sparse.modules.building import HALF
from lit_sparse.modules.checks import check_sharding
from lit_sparse.modules.forward_only import WindowLoss
from lit_sparse.modules.hollow import Hollow
from lit_sparse.modules.loading import load_errors, quantization
from lit_sparse.optim import AdamW, trainable
from lit_sparse.ranks import average_gradients
from lit_sparse.strategies import lisa
from lit_sparse.zeroth_order.perturbed import CHUNK
from lit_sparse_kernels import (
    add_noise,
    block_adamw,
    block_delta,
    block_grad,
    glu_density,
    master_adamw,
    momentum_noise,
    pack_columns,
    philox,
)
from lit_sparse_profiling.caching import replay
from lit_sparse_profiling.trace import BOUNDARY, Moment, Trace
from lit_sparse_profiling.workspaces import cpu_workspace

SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Sizes that a model's configuration must give; families name them differently."""
Device = Literal["cuda", "cpu"]
CONTEXT = 760 * 2**20
"""Bytes of a CUDA context with its kernels, beside the allocator: as measured on an H200 (benchmarks/results/gpu.jsonl,
`nvml_process` less `reserved`)."""
CUBLAS_WORKSPACE = 32 * 2**20
"""Bytes that cuBLAS keeps for each thread that multiplies, on Hopper; 8 MiB on older cards."""
VIEWS = {
    "device",
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "expand",
    "slice",
    "alias",
    "detach",
    "unsqueeze",
    "squeeze",
}
"""Ops that a plain head may use beside its product."""
PRODUCTS = {"mm", "addmm", "bmm", "linear"}
ON_CPU = {
    value._opoverload: value._init_fn
    for part in (block_delta, block_grad, glu_density, pack_columns)
    for value in vars(part).values()
    if isinstance(value, CustomOpDef)
}
"""Functions that our own ops run on a CPU, by op: torch's ops, with temporaries that count."""


@dataclass(frozen=True)
class Setting:
    """Settings that a plan needs beside the module.

    Attributes:
        device: `cuda` or `cpu`: whose choices of dtype, kernels and chunks are followed.
        batch_size: Rows of a batch.
        length: Tokens of each row.
        micro_batches: Batches of an optimizer step.
        clip: Whether gradients are clipped by their norm.
        ranks: Processes of data-parallel training.
        sharded: Whether they shard the model (FSDP2), or each have all of it (DDP).
        replicas: Groups of ranks that each have the whole model, sharded within the group (HSDP).
    """

    device: Device = "cuda"
    batch_size: int = 4
    length: int = 512
    micro_batches: int = 1
    clip: float | None = None
    ranks: int = 1
    sharded: bool = False
    replicas: int = 1


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

    @property
    def peak(self) -> Moment:
        """The highest moment of all."""
        return max(self.phases.values(), key=lambda moment: moment.bytes)

    @property
    def needed(self) -> int:
        """Bytes that a card must have: what is reserved, and the CUDA context."""
        return self.reserved + (CONTEXT if self.setting.device == "cuda" else 0)

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
    on_cpu = setting.device == "cpu"
    _check(module, setting)
    composed = {**(ON_CPU if on_cpu else {}), **(quantized_plan.composed() if module.quantize else {})}
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
        sum(flops for phase, flops in trace.flops.items() if phase != "selection") // steps,
        perf_counter() - begin,
        module.activation_checkpointing,
        compiled,
    )


def _check(module: LitSparse, setting: Setting) -> None:
    """Refuse what is not traced, and what a fit would refuse.

    Raises:
        BadInput: naming the key to leave out.
    """
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


@contextmanager
def choices_of(device: Device) -> Iterator[None]:
    """Make the choices of our own code, which depend on the device of tensors, those of `device`; tensors are fake."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "_apply", _convert))
        stack.enter_context(patch.object(lisa.LISA, "_draw", _costliest))
        if device == "cuda":
            stack.enter_context(patch.object(loss, "chunk_tokens", _chunk_on_cuda))
            for kernel in (master_adamw, block_adamw, add_noise, momentum_noise):  # one launch, in place
                stack.enter_context(patch.object(kernel, "on_host", lambda *_: None))
            stack.enter_context(patch.object(philox, "on_host", _noise_on_cuda))
            stack.enter_context(patch.dict(CHUNK, cpu=CHUNK["cuda"]))
            stack.enter_context(CUDAAutocast())
        yield


def _costliest(update: lisa.LISA, number: int) -> list[int]:
    """Return the draw that takes the most, which a long training meets.

    Those of the last layers have their gradients while most is saved. The lowest one, where the embeddings are frozen,
    decides how far down the backward pass goes, and with it what is saved.
    """
    last = len(update._layers)
    first = max(0, last - update.active_layers)
    if update.train_embeddings:
        return [*range(first, last)]
    return [0, *range(first + 1, last)]


_chunk = loss.chunk_tokens


def _chunk_on_cuda(vocabulary: int, device: torch.device) -> int:
    return _chunk(vocabulary, torch.device("cuda"))


def _noise_on_cuda(firsts_R: Tensor, width: int, *_: Any) -> Tensor:
    return firsts_R.new_empty(len(firsts_R), width, dtype=torch.float32)


IN_FP32 = {
    *(F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(F.cross_entropy, F.kl_div, F.mse_loss, F.group_norm, F.softplus, torch.cumsum, Tensor.cumsum, torch.sum),
    *(Tensor.sum, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log),
    *(Tensor.log, torch.norm, Tensor.norm, torch.reciprocal, Tensor.reciprocal, F.normalize, F.cosine_similarity),
}
"""Functions that autocast runs in fp32 on a GPU, but not on a CPU, where the trace's tensors seem to be."""


class CUDAAutocast(TorchFunctionMode):
    """Casts the arguments of such functions to fp32 wherever autocast is on."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _in_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _in_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def trace_training(module: LitSparse, batch: Mapping[str, Tensor], trace: Trace, setting: Setting) -> Optimizer:
    """Run loading, selection and steps of `module` under `trace`, and one more step as a repetition of the last."""
    with ExitStack() as stack:
        if setting.ranks > 1 or setting.sharded:
            stack.enter_context(pretended.ranks(setting.ranks))
        if setting.sharded:
            mesh = pretended.mesh_of(setting.ranks, setting.replicas)
            stack.enter_context(pretended.sharding(module, mesh, trace))
        stack.enter_context(trace)
        if setting.device == "cpu":  # activation checkpointing keeps one for each layer; on a GPU they are on the host
            stack.enter_context(
                patch.object(torch, "get_rng_state", lambda: _recorded(trace, "rng state", rng_state()))
            )
        _load(module, trace, setting)
        model = module.build()
        batch = dict(batch)
        trace.add("batch", batch.values())
        trace.label("batch", batch.items())
        trace.label("buffers", model.named_buffers())
        stack.enter_context(trace.naming(model))
        trace.phase("selection")
        module._prepare()
        probe = _probe_of(module, batch, trace, setting.device)
        module._attach_and_shard(lambda kinds: module.updates.attach(model, probe, module._context, kinds))
        module._after_attach()
        stack.enter_context(trace.naming(model))
        optimizer = module.updates.optimizer(module.lr, module.make_optimizer)
        if setting.device == "cuda":
            _take_foreach(optimizer)
        reduces = setting.ranks > 1 and module.updates.backward != "none"
        if reduces and not _averages(module, setting):  # DDP reduces gradients in buckets of its own
            size = sum(parameter.numel() * parameter.itemsize for _, parameter in trainable(model))
            trace.label("DDP buckets", [("buckets", buckets := trace.fake_bytes(size))])
            stack.callback(lambda: buckets)
        if setting.device == "cuda":
            workspaces = [trace.fake_bytes(CUBLAS_WORKSPACE) for _ in range(2)]
            trace.label("workspaces", [("cuBLAS", workspace) for workspace in workspaces])
            stack.callback(workspaces.clear)
        _label(trace, module, optimizer)
        since = trace.now
        for step in steps_of(module):
            since = trace.now
            _step(module, optimizer, step, batch, setting, trace)
        trace.repeat(since)
    return optimizer


def _averages(module: LitSparse, setting: Setting) -> bool:
    """Return whether the host averages gradients over ranks: those beside a sharded model, or of a set that changes."""
    return setting.sharded or (setting.ranks > 1 and any(update.period is not None for update in module.updates))


rng_state = torch.get_rng_state


def _recorded(trace: Trace, name: str, tensor: Tensor) -> Tensor:
    trace.add(name, [tensor])
    return tensor


def steps_of(module: LitSparse) -> list[int]:
    """Return the numbers of the steps to trace: the first, or those around the first change of the trainable set.

    Two come before the change: the second finds the state of the first, beside the gradients.
    """
    last = max((update.period for update in module.updates if update.period is not None), default=None)
    return [1] if last is None else [*range(max(1, last - 1), last + 2)]


def batch_of(module: LitSparse, setting: Setting) -> dict[str, Tensor]:
    """Return a batch of full rows, all of whose tokens are scored; a classifier has a label for each row."""
    row = [1 + number % 7 for number in range(setting.length)]
    batch = Padded(Padding())([Example(row, row)] * setting.batch_size)
    if isinstance(module, CausalLM):
        return batch
    names = ("input_ids", "attention_mask")
    return {**{name: batch[name] for name in names}, "labels": torch.zeros(setting.batch_size, dtype=torch.int64)}


# ---- the model


def _load(module: LitSparse, trace: Trace, setting: Setting) -> None:
    """Give `module` its base model with fake weights.

    A model to be sharded has memory for its shards only; on a CPU only if no strategy has to see it whole before.
    """
    model = meta_model(module)
    if module.quantize is not None:
        quantized_plan.quantize_shapes(model, module.quantize, module.frozen_dtype)
        quantized_plan.pack(model, module.frozen_dtype, trace)
    hollow = setting.sharded and (setting.device == "cuda" or pretended.fits_hollow(module))
    shape = pretended.hollow_like if hollow else Tensor.detach
    made: dict[Tensor, Tensor] = {}
    for part in model.modules():
        for name, value in list(part._parameters.items()):
            if value is not None and not isinstance(value, FakeTensor):
                if value not in made:
                    made[value] = nn.Parameter(trace.empty(shape(value)), requires_grad=value.requires_grad)
                part._parameters[name] = made[value]  # pyright: ignore[reportArgumentType]
        for name, value in list(part._buffers.items()):
            if value is not None:
                part._buffers[name] = made.setdefault(value, trace.empty(value))
    module.model = model
    module._hollow = Hollow(model, lambda: iter(())) if setting.sharded and pretended.fits_hollow(module) else None
    module.base_parameters = sum(weights_in(parameter) for parameter in model.parameters())
    if isinstance(module, CausalLM):
        module._head_is_plain = head_is_plain(model)


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module's tensors as `nn.Module._apply` does, which cannot swap fake ones that someone refers to."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    with torch.no_grad():
        for name, value in list(module._parameters.items()):
            if value is not None and (out := function(value)) is not value:
                module._parameters[name] = nn.Parameter(out, requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = function(value)
    return module


def meta_model(module: LitSparse) -> PreTrainedModel:
    """Return the base of `module` on the meta device.

    Raises:
        BadInput: if there is no such base, or its configuration lacks sizes.
    """
    if not isinstance(module.base, str):
        raise BadInput(f"model.base is {module.base!r}; it must be a name, a folder, or a config.json.")
    with load_errors(module.base):
        config = AutoConfig.from_pretrained(resolve(module.base), trust_remote_code=False, **module.config_options)
        _check_sizes(module.base, config)
        with torch.device("meta"):
            return module.auto_class.from_config(
                config, dtype=module.frozen_dtype, attn_implementation=module.attention
            )


def _check_sizes(base: str, config: PreTrainedConfig) -> None:
    """Refuse a configuration that leaves sizes to the defaults of its family.

    Raises:
        BadInput: naming the sizes that it lacks.
    """
    given, _ = PreTrainedConfig.get_config_dict(resolve(base))
    names = {name for part in (given, *given.values()) if isinstance(part, dict) for name in part}
    missing = [size for size in SIZES if not {size, config.attribute_map.get(size)} & names]
    if missing:
        raise BadInput(
            f"the configuration of {base} gives no {' and no '.join(missing)}, so that its memory cannot be predicted; "
            "add them, or give another model."
        )


class _Ops(TorchDispatchMode):
    """Lists the names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def head_is_plain(model: PreTrainedModel) -> bool:
    """Return whether logits are one product of the last hidden states with the head, judged by the ops that run."""
    if model.get_output_embeddings() is None:
        return False
    whole, base = _Ops(), _Ops()
    with whole:
        dummy_forward(model)
    with base:
        dummy_forward(model.base_model, "last_hidden_state")
    added = [name for name in whole.names[len(base.names) :] if name not in VIEWS]
    return len(added) == 1 and added[0] in PRODUCTS


def _probe_of(module: LitSparse, batch: Mapping[str, Tensor], trace: Trace, device: Device) -> Any:
    count = 2 if any(update.base == "moved" for update in module.updates) else 1
    size = sum(tensor.nbytes for tensor in batch.values())

    def probe(steps: int, /, weighed: bool = True) -> Iterator[Tensor]:
        read = []
        if weighed and device == "cpu":  # the host reads all of them before, to weigh them; a GPU has one
            read = [trace.fake_bytes(size) for _ in range(steps - 1)]
            trace.label("batch", [("batches of the selection", one) for one in read])
        for _ in range(min(steps, count)):
            with module.autocast():
                yield module.compute(module.loss, batch)[0]
        del read

    return probe


# ---- a step


def _step(
    module: LitSparse, optimizer: Optimizer, step: int, batch: Mapping[str, Tensor], setting: Setting, trace: Trace
) -> None:
    """Take an optimizer step as the host does."""
    updates, micro_batches = module.updates, setting.micro_batches
    if updates.backward == "none":
        trace.phase("optimizer step")
        updates.before_step(step, optimizer)
        with torch.no_grad():
            optimizer.step(WindowLoss(module, [batch] * micro_batches))  # pyright: ignore[reportArgumentType, reportCallIssue]
    else:
        if updates.backward == "fused":
            updates.before_step(step, optimizer)
        loss: Tensor | None = None
        for _ in range(min(micro_batches, 2)):
            trace.phase("forward")
            loss = module.weighed_loss(batch, micro_batches)
            trace.phase("backward")
            loss.backward()
        if _averages(module, setting):
            average_gradients(parameter for _, parameter in updates.named if not isinstance(parameter, DTensor))
        scale = module._window.close(micro_batches)[-1]
        if scale is not None:
            updates.scale_gradients(scale)
        _label(trace, module, optimizer)
        trace.phase("optimizer step")
        if updates.backward == "autograd":
            updates.before_step(step, optimizer)
        if setting.clip:
            _clip(optimizer, setting.clip)
        optimizer.step()
        del loss
    _label(trace, module, optimizer)
    if updates.after_step(step, optimizer):
        module._upcast()
        updates.regroup(optimizer)
    optimizer.zero_grad()
    _label(trace, module, optimizer)


def _clip(optimizer: Optimizer, norm: float) -> None:
    if isinstance(optimizer, AdamW):
        optimizer.clip_norm(norm)
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, norm)


def _take_foreach(optimizer: Optimizer) -> None:
    """Make torch's own optimizers take lists of tensors, as they do by default on a GPU."""
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True


def _label(trace: Trace, module: LitSparse, optimizer: Optimizer | None) -> None:
    """Name weights, gradients and state as they are now."""
    model = module.build()
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    trace.label("buffers", model.named_buffers())
    for update in module.updates:
        trace.label("strategy state", _nested(type(update).__name__, update.held()))
    for parameter, name in names.items():
        trace.label("trained weights" if parameter.requires_grad else "frozen weights", [(name, parameter)])
        if parameter.grad is not None:
            trace.label("gradients", [(f"{name}.grad", parameter.grad)])
    states: Mapping[Any, Any] = {} if optimizer is None else optimizer.state
    for parameter, state in states.items():
        trace.label("optimizer state", _nested(names.get(parameter, "weight"), state))


def _nested(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors nested in a value, with dotted names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(f"{name}.{key}", item)
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from _nested(f"{name}.{number}", item)
