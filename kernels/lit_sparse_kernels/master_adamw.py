"""AdamW on many tensors in one launch, in place, with an fp32 master of the weights that are kept in fewer bits.

With g the gradient, divided by `grad_scale` if there is one, and t the tensor's own step, counted from 1:

    p -= lr wd p
    m  = b1 m + (1 - b1) g
    v  = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t)  m / (sqrt(v) / sqrt(1 - b2^t) + eps)

where p is the master; a bf16 or fp16 weight is then p rounded, and an fp32 weight is itself p. arXiv 1711.05101, in the
order of torch.optim.AdamW(fused=True).

This is no torch.library op: a schema of six lists of tensors, four of them mutated, serves compilers only, and no
optimizer step is compiled here; dispatch would cost more than the kernel does where the tensors are small.

Legend: T tensors, C chunks of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_sparse_kernels.adamw_arguments import Item, Rule, check_state, items_of, scale_on
from lit_sparse_kernels.jit import enqueue, jit, on_cuda, tl

CASES = [
    # sizes, weights' dtype, gradients' dtype
    ([(64, 48), (16,), (1,), (3, 5, 7)], torch.float32, torch.float32),
    ([(64, 48), (16,), (1,), (129, 129)], torch.bfloat16, torch.bfloat16),
    ([(8192,), (8193,), (8191,), (0, 4)], torch.float16, torch.float16),
    ([(31,), (160, 128)], torch.bfloat16, torch.float32),
    ([(31,), (32,)], torch.float32, torch.bfloat16),
]
"""Shapes that the tests and the benchmark share."""
CHUNK = 8192
"""Elements that one program updates: enough to hide the look-up of its tensor, and a wave of programs for a million."""
BLOCK = 1024


def reference(item: Item, rule: Rule, grad_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    """The definition, in the master's dtype, out of place. Returns weight, master, exp_avg, exp_avg_sq."""
    weight, grad, master, m, v, step = item
    first, second = rule.betas
    grad = grad.to(master.dtype) * (-1 if rule.maximize else 1)
    grad = grad if grad_scale is None else grad / grad_scale
    m = first * m + (1 - first) * grad
    v = second * v + (1 - second) * grad * grad
    denominator = v.sqrt() / math.sqrt(1 - second**step) + rule.eps
    moved = master * (1 - rule.lr * rule.weight_decay) - rule.lr / (1 - first**step) * m / denominator
    return moved.to(weight.dtype), moved, m, v


# ---- Triton


@jit
def adamw(p, grad, m, v, scale, step_size, root, decay, beta1, rest1, beta2, rest2, eps):
    # The arithmetic, in fp32; divisions and roots round to nearest, as torch's do, which memory traffic hides.
    if scale is not None:
        grad = tl.div_rn(grad, tl.zeros_like(grad) + tl.load(scale))
    p -= decay * p
    m = beta1 * m + rest1 * grad
    v = beta2 * v + rest2 * grad * grad
    p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + root) + eps)
    return p, m, v


@jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # A pointer from a table of addresses. The hint is four elements of each dtype: with 16 bytes of bf16 a thread takes
    # eight elements, for which the fp32 tensors beside them went through shared memory (6 to 11 barriers).
    at = tl.load(address).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        at = tl.multiple_of(at, TYPE.primitive_bitwidth // 2)  # pyright: ignore[reportAttributeAccessIssue]
    return at


@jit
def _master_adamw_kernel(
    table,
    corrections,
    chunks,
    scale,
    step_size,
    root,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    OWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program updates one chunk of one tensor.
    tensor = tl.load(chunks + tl.program_id(0) * 2)
    first = tl.load(chunks + tl.program_id(0) * 2 + 1).to(tl.int64) * CHUNK  # a tensor may have 2^31 elements
    row = table + tensor * 6
    weight_T = pointer(row, WEIGHT, ALIGNED)
    grad_T = pointer(row + 1, GRAD, ALIGNED)
    master_T = pointer(row + 2, tl.float32, ALIGNED)
    m_T = pointer(row + 3, tl.float32, ALIGNED)
    v_T = pointer(row + 4, tl.float32, ALIGNED)
    count = tl.load(row + 5)
    if ALIGNED:
        count = tl.multiple_of(count, 16)  # without which the mask would forbid wide accesses
    if corrections is not None:  # the tensors' steps differ
        step_size, root = tl.load(corrections + tensor * 2), tl.load(corrections + tensor * 2 + 1)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        keep = at < count
        grad = tl.load(grad_T + at, mask=keep, other=0.0).to(tl.float32)
        p = tl.load(master_T + at, mask=keep, other=0.0)
        m = tl.load(m_T + at, mask=keep, other=0.0)
        v = tl.load(v_T + at, mask=keep, other=0.0)
        p, m, v = adamw(p, grad, m, v, scale, step_size, root, decay, beta1, rest1, beta2, rest2, eps)
        tl.store(master_T + at, p, mask=keep)
        tl.store(m_T + at, m, mask=keep)
        tl.store(v_T + at, v, mask=keep)
        if not OWN:
            tl.store(weight_T + at, p.to(WEIGHT), mask=keep)


def launch(items: Sequence[Item], rule: Rule, grad_scale: Tensor | None = None) -> None:
    """The kernel on tensors of one device: a launch for each combination of dtypes and alignment."""
    kinds: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        if item.weight.numel():
            own = item.weight is item.master
            kinds.setdefault((item.weight.dtype, item.grad.dtype, own, _aligned(item)), []).append(item)
    for (weight, grad, own, aligned), alike in kinds.items():
        _launch(alike, rule, grad_scale, WEIGHT=type_of(weight), GRAD=type_of(grad), OWN=own, ALIGNED=aligned)
    touched = {id(tensor): tensor for item in items for tensor in (item.weight, *item.moved()[2:])}
    torch.autograd.graph.increment_version(list(touched.values()))  # as an operation of torch's would


def _launch(items: Sequence[Item], rule: Rule, grad_scale: Tensor | None, **constants: Any) -> None:
    device = items[0].weight.device
    chunks_C2 = _chunks(tuple(item.weight.numel() for item in items), device)
    rows = tuple((*(tensor.data_ptr() for tensor in item.moved()), item.weight.numel()) for item in items)
    corrected, step_size, root = corrections(items, rule, device)
    enqueue(
        _master_adamw_kernel,
        (len(chunks_C2),),
        device,
        addresses(rows, device),
        corrected,
        chunks_C2,
        grad_scale,
        step_size,
        root,
        *rule.factors(),
        CHUNK=CHUNK,
        BLOCK=BLOCK,
        num_warps=4,
        **constants,
    )


def corrections(items: Sequence[Item], rule: Rule, device: torch.device) -> tuple[Tensor | None, float, float]:
    """Return step size and root of all items, in a table only where their steps differ: a copy costs 0.4 ms."""
    steps = [item.step for item in items]
    of_step = {step: rule.corrections(step) for step in set(steps)}
    if len(of_step) == 1:
        return None, *of_step[steps[0]]
    return sent([of_step[step] for step in steps], torch.float32, device), 0.0, 0.0


@lru_cache(maxsize=64)
def addresses(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the table on the device; kept while a step meets the same addresses and sizes."""
    return sent(rows, torch.int64, device)


def sent(rows: Sequence[Sequence[float]] | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device; the copy does not wait."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _chunks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """(tensor, number of the chunk in it) for all tensors of so many elements, (C, 2); kept while sizes stay."""
    each = [-(-count // CHUNK) for count in counts]
    tensors = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))
    numbers = torch.cat([torch.arange(count) for count in each])
    return torch.stack([tensors, numbers], dim=1).to(device, torch.int32)


def _aligned(item: Item) -> bool:
    """Return whether accesses may be 16 bytes wide. Fresh memory is aligned; views and odd ends need not be."""
    return item.weight.numel() % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in item.moved())


def type_of(dtype: torch.dtype) -> Any:
    """Triton's type."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


# ---- torch


def on_host(items: Sequence[Item], rule: Rule, grad_scale: Tensor | None = None) -> None:
    """The same by torch's fused AdamW; of the gradients to be cast to the master's dtype, one at a time is.

    With a `grad_scale`, a gradient that needs no cast afterwards holds the scaled values: torch writes them back.
    """
    for dtype in {item.master.dtype: None for item in items}:
        alike = [item for item in items if item.master.dtype == dtype]
        _fused([item for item in alike if item.grad.dtype == dtype], rule, grad_scale)
        for item in alike:
            if item.grad.dtype != dtype:
                _fused([item._replace(grad=item.grad.to(dtype))], rule, grad_scale)
    for item in items:
        if item.weight is not item.master:
            item.weight.copy_(item.master)


def _fused(items: Sequence[Item], rule: Rule, grad_scale: Tensor | None) -> None:
    if not items:
        return
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [item.master for item in items],
        [item.grad for item in items],
        [item.exp_avg for item in items],
        [item.exp_avg_sq for item in items],
        [],
        list(torch.tensor([float(item.step) for item in items]).unbind()),
        amsgrad=False,
        lr=rule.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        maximize=rule.maximize,
        grad_scale=grad_scale,
        found_inf=None,
    )


@torch.no_grad()
def master_adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[float],
    rule: Rule,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW step of all tensors, in place.

    Args:
        weights: In any mix of dtypes; without gaps in memory.
        grads: Of the weights' shapes and strides, in their own dtypes. Left as they are on a GPU; on the host those
            that have the master's dtype are divided by `grad_scale` in place.
        masters: The weights in fp32 (fp64 of fp64 ones, on the host); the very same tensor for a weight that is so.
        exp_avgs, exp_avg_sqs: First and second moments, as `masters`.
        steps: Of each tensor the number of this step, from 1.
        rule: The arguments of AdamW.
        grad_scale: One fp32 number that divides the gradients.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices, shapes or strides do not go together.
    """
    names = ("weights", "grads", "masters", "exp_avgs", "exp_avg_sqs", "steps")
    items = items_of(names, (weights, grads, masters, exp_avgs, exp_avg_sqs, steps))
    for number, item in enumerate(items):
        check_state(number, item, item.weight)
        if item.master.dtype == item.weight.dtype and item.master is not item.weight:
            raise ValueError(
                f"masters[{number}] is a second tensor of {item.weight.dtype}; expected the weight itself."
            )
    for device in {item.weight.device: None for item in items}:
        here, scale = [item for item in items if item.weight.device == device], scale_on(device, grad_scale)
        run = launch if on_cuda(here[0].weight) else on_host
        run(here, rule, scale)
