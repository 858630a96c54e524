"""An MLP's activation, times its other branch, with how dense it is: a smooth count of the non-zeros of each token.

For the MLP's pre-activations G (gate) and U (up; left out where the MLP is not gated),

    o = act(G),  h = o * U  (or o),  rows_t = sum over i of proxy(x_ti),  x = o (`gate_act`) or h (`product`)
    dG = (dh * U + p'(o)) act'(G),  dU = dh * o,  p' = drows_t * proxy'(x)  (added to dh where x is h)

with proxy(x) = x^2 / (x^2 + s) (`rational`, arXiv 2402.01911) or tanh(s |x|) (`tanh`), s the sharpness. All of it is in
fp32 (fp16 would make x^2 zero) and rounded once. The backward needs G and U alone: o is computed again, where separate
operations would keep it. Sums are by token, so that which tokens count is decided afterwards, by whoever has the mask.

Legend: T tokens, I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse_kernels.jit import check_matrix, enqueue, jit, on_cuda, power_of_2, tl

ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
PROXIES = {"rational": 0, "tanh": 1}
WHERES = {"gate_act": 0, "product": 1}
CHUNK = 2**17
"""Elements that the torch path takes at a time: its temporaries then stay in the cores' caches."""

CASES = [
    # tokens, intermediate size, gated, activation, proxy, where, sharpness, dtype
    (64, 96, True, "silu", "rational", "gate_act", 1e-3, torch.float32),
    (17, 1100, True, "silu", "tanh", "product", 10.0, torch.float32),  # several pieces a row, the last one ragged
    (33, 40, True, "gelu", "rational", "product", 1e-2, torch.float32),
    (33, 40, True, "gelu_tanh", "tanh", "gate_act", 3.0, torch.float32),
    (5, 72, False, "gelu", "rational", "gate_act", 1e-3, torch.float32),
    (5, 72, False, "relu", "tanh", "gate_act", 2.0, torch.float32),
    (31, 130, True, "silu", "rational", "gate_act", 1e-7, torch.float16),
    (64, 96, True, "silu", "tanh", "product", 10.0, torch.bfloat16),
]
"""Shapes that the test and the benchmark share."""


def reference(
    gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
) -> tuple[Tensor, Tensor]:
    """The definition, in plain operations that autograd can follow: h (T, I) and rows (T,)."""
    o_TI = activation(gate_TI, act)
    h_TI = o_TI if up_TI is None else o_TI * up_TI
    return h_TI, proxied(h_TI if where == "product" else o_TI, sharpness, proxy).sum(-1)


def activation(x: Tensor, act: str) -> Tensor:
    """Return the activation called `act` of `x`."""
    if act == "silu":
        return F.silu(x)
    return F.relu(x) if act == "relu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def proxied(x: Tensor, sharpness: Tensor | float, proxy: str) -> Tensor:
    """The smooth stand-in for `x != 0`, elementwise."""
    return x.square() / (x.square() + sharpness) if proxy == "rational" else torch.tanh(x.abs() * sharpness)


@jit
def _activated(x, ACT: tl.constexpr):
    # The activation and its derivative.
    if ACT == 0:
        gate = tl.sigmoid(x)
        value, slope = x * gate, gate * (1 + x * (1 - gate))
    elif ACT == 1:
        half = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value, slope = x * half, half + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:
        # 1/2 (1 + tanh(u)) is sigmoid(2 u), without what the sum would cancel
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1 + 0.134145 * x * x)
        value, slope = x * gate, gate + x * inner * gate * (1 - gate)
    else:
        value, slope = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    return value, slope


@jit
def _counted(x, sharpness, PROXY: tl.constexpr):
    # The proxy and its derivative.
    if PROXY == 0:
        below = 1 / (x * x + sharpness)
        value, slope = x * x * below, 2 * x * (sharpness * below) * below
    else:
        tail = tl.exp(-2 * sharpness * tl.abs(x))
        value = (1 - tail) / (1 + tail)
        slope = 4 * sharpness * tail / ((1 + tail) * (1 + tail)) * tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    return value, slope


@jit
def _glu_density_kernel(
    gate,
    up,
    sharpness,
    h,
    rows,
    width,
    stride_gate,
    stride_up,
    I: tl.constexpr,  # noqa: E741 - the legend's
    ACT: tl.constexpr,
    PROXY: tl.constexpr,
    WHERE: tl.constexpr,
):
    # A program makes a token's row, in pieces of I.
    token = tl.program_id(0).to(tl.int64)  # tokens x columns may pass 2^31
    sharp = tl.load(sharpness)
    sum_I = tl.full((I,), 0.0, tl.float32)
    for start in range(0, width, I):
        i = start + tl.arange(0, I)
        keep = i < width
        o_I, _ = _activated(tl.load(gate + token * stride_gate + i, mask=keep, other=0.0).to(tl.float32), ACT)
        h_I = o_I
        if up is not None:
            h_I = o_I * tl.load(up + token * stride_up + i, mask=keep, other=0.0).to(tl.float32)
        tl.store(h + token * width + i, h_I.to(h.dtype.element_ty), mask=keep)
        value_I, _ = _counted(h_I if WHERE == 1 else o_I, sharp, PROXY)
        sum_I += tl.where(keep, value_I, 0.0)
    tl.store(rows + token, tl.sum(sum_I))


@jit
def _glu_density_grad_kernel(
    dh,
    drows,
    gate,
    up,
    sharpness,
    dgate,
    dup,
    width,
    stride_dh,
    stride_gate,
    stride_up,
    I: tl.constexpr,  # noqa: E741 - the legend's
    ACT: tl.constexpr,
    PROXY: tl.constexpr,
    WHERE: tl.constexpr,
):
    # A program makes a piece of a token's row.
    pieces = tl.cdiv(width, I)
    token = (tl.program_id(0) // pieces).to(tl.int64)
    i = tl.program_id(0) % pieces * I + tl.arange(0, I)
    keep = i < width
    sharp, drow = tl.load(sharpness), tl.load(drows + token)
    dh_I = tl.load(dh + token * stride_dh + i, mask=keep, other=0.0).to(tl.float32)
    o_I, slope_I = _activated(tl.load(gate + token * stride_gate + i, mask=keep, other=0.0).to(tl.float32), ACT)
    up_I = 1.0
    if up is not None:
        up_I = tl.load(up + token * stride_up + i, mask=keep, other=0.0).to(tl.float32)
    if WHERE == 1:
        _, push_I = _counted(o_I * up_I, sharp, PROXY)
        dh_I += drow * push_I
        do_I = dh_I * up_I
    else:
        _, push_I = _counted(o_I, sharp, PROXY)
        do_I = dh_I * up_I + drow * push_I
    tl.store(dgate + token * width + i, (do_I * slope_I).to(dgate.dtype.element_ty), mask=keep)
    if up is not None:
        tl.store(dup + token * width + i, (dh_I * o_I).to(dup.dtype.element_ty), mask=keep)


def launch(
    gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
) -> tuple[Tensor, Tensor]:
    """The kernel's h (T, I) and rows (T,)."""
    gate_TI, up_TI = _unit_stride(gate_TI), None if up_TI is None else _unit_stride(up_TI)
    h_TI = gate_TI.new_empty(gate_TI.shape)
    rows_T = gate_TI.new_empty(len(gate_TI), dtype=torch.float32)
    enqueue(
        _glu_density_kernel,
        (len(gate_TI),),
        gate_TI.device,
        *(gate_TI, up_TI, sharpness, h_TI, rows_T),
        gate_TI.shape[1],
        gate_TI.stride(0),
        0 if up_TI is None else up_TI.stride(0),
        **_constants(gate_TI.shape[1], act, proxy, where),
    )
    return h_TI, rows_T


def launch_grad(
    dh_TI: Tensor,
    drows_T: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor | None,
    sharpness: Tensor,
    act: str,
    proxy: str,
    where: str,
) -> tuple[Tensor, Tensor]:
    """The kernel's gradients of gate and up, each (T, I); the latter empty where there is no up."""
    dh_TI, gate_TI = _unit_stride(dh_TI), _unit_stride(gate_TI)
    up_TI = None if up_TI is None else _unit_stride(up_TI)
    dgate_TI = gate_TI.new_empty(gate_TI.shape)
    dup_TI = gate_TI.new_empty(0 if up_TI is None else gate_TI.shape)
    constants = _constants(gate_TI.shape[1], act, proxy, where)
    enqueue(
        _glu_density_grad_kernel,
        (len(gate_TI) * -(-gate_TI.shape[1] // constants["I"]),),
        gate_TI.device,
        *(dh_TI, drows_T.contiguous(), gate_TI, up_TI, sharpness, dgate_TI, dup_TI),
        gate_TI.shape[1],
        dh_TI.stride(0),
        gate_TI.stride(0),
        0 if up_TI is None else up_TI.stride(0),
        **constants,
    )
    return dgate_TI, dup_TI


def _constants(width: int, act: str, proxy: str, where: str) -> dict[str, int]:
    piece = min(1024, power_of_2(width))
    return {"I": piece, "ACT": ACTS[act], "PROXY": PROXIES[proxy], "WHERE": WHERES[where], "num_warps": 4}


def _unit_stride(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def on_host(
    gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
) -> tuple[Tensor, Tensor]:
    """The same by torch, some rows at a time."""
    wide, sharp = _wide(gate_TI), float(sharpness)
    h_TI, rows_T = gate_TI.new_empty(gate_TI.shape), gate_TI.new_empty(len(gate_TI), dtype=wide)
    for part in _parts(gate_TI):
        o = activation(gate_TI[part].to(wide), act)
        h = o if up_TI is None else o * up_TI[part]
        h_TI[part] = h
        torch.sum(proxied(h if where == "product" else o, sharp, proxy), -1, out=rows_T[part])
    return h_TI, rows_T


def grad_on_host(
    dh_TI: Tensor,
    drows_T: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor | None,
    sharpness: Tensor,
    act: str,
    proxy: str,
    where: str,
) -> tuple[Tensor, Tensor]:
    """The same by torch, some rows at a time."""
    wide, sharp = _wide(gate_TI), float(sharpness)
    dgate_TI = gate_TI.new_empty(gate_TI.shape)
    dup_TI = gate_TI.new_empty(0 if up_TI is None else gate_TI.shape)
    for part in _parts(gate_TI):
        gate, dh, up = gate_TI[part].to(wide), dh_TI[part], None if up_TI is None else up_TI[part]
        o = activation(gate, act)
        of_h = where == "product" and up is not None
        do = _push(o * up if of_h else o, sharp, proxy).mul_(drows_T[part, None])  # pyright: ignore
        if of_h:
            dup_TI[part] = do.add_(dh).mul(o)
            do.mul_(up)  # pyright: ignore
        elif up is not None:
            dup_TI[part] = o * dh
            do.addcmul_(dh.to(wide), up.to(wide))
        else:
            do.add_(dh)
        del o  # before the last temporary
        dgate_TI[part] = _activation_grad(do, gate, act)
    return dgate_TI, dup_TI


def _push(x: Tensor, sharp: float, proxy: str) -> Tensor:
    """The proxy's derivative, in new memory."""
    if proxy == "rational":
        below = x.square().add_(sharp).reciprocal_()
        return below.mul_(below * x).mul_(2 * sharp)
    return torch.ops.aten.tanh_backward(x.sign().mul_(sharp), x.mul(sharp).tanh_())


def _activation_grad(do: Tensor, x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.ops.aten.silu_backward(do, x)
    if act == "relu":
        return torch.ops.aten.threshold_backward(do, x, 0)
    return torch.ops.aten.gelu_backward(do, x, approximate="tanh" if act == "gelu_tanh" else "none")


def _parts(x_TI: Tensor) -> list[slice]:
    rows = max(1, CHUNK // x_TI.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x_TI), rows)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_forms(gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str) -> None:
    check_matrix("gate_TI", gate_TI, (None, None))
    if up_TI is not None:
        check_matrix("up_TI", up_TI, tuple(gate_TI.shape), like=gate_TI)
    if sharpness.ndim or sharpness.dtype != torch.float32 or sharpness.device != gate_TI.device:
        raise ValueError(
            f"sharpness is {sharpness.dtype} of shape {tuple(sharpness.shape)} on {sharpness.device}; expected one "
            f"float32 on {gate_TI.device}."
        )
    for name, given, known in (("act", act, ACTS), ("proxy", proxy, PROXIES), ("where", where, WHERES)):
        if given not in known:
            raise ValueError(f"{name} is {given!r}; expected one of {', '.join(known)}.")


def _check_forms_of_grad(dh_TI: Tensor, drows_T: Tensor, gate_TI: Tensor) -> None:
    check_matrix("dh_TI", dh_TI, tuple(gate_TI.shape), like=gate_TI)
    if drows_T.shape != gate_TI.shape[:1] or drows_T.dtype != _wide(gate_TI):
        raise ValueError(
            f"drows_T is {drows_T.dtype} of shape {tuple(drows_T.shape)}; expected {_wide(gate_TI)} of shape "
            f"({gate_TI.shape[0]},)."
        )


@torch.library.custom_op("lit_sparse::glu_density", mutates_args=())
def glu_density(
    gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
) -> tuple[Tensor, Tensor]:
    """Return an MLP's hidden activations, and for each token a smooth count of those that are not zero.

    Args:
        gate_TI: What the activation function is put on, (T, I), any strides.
        up_TI: What its result is multiplied with, of the same shape and dtype; None where the MLP is not gated.
        sharpness: The proxy's parameter (eps of `rational`, beta of `tanh`), one fp32 number as a tensor ().
        act: `silu`, `gelu`, `gelu_tanh` or `relu`.
        proxy: `rational` or `tanh`.
        where: What is counted: `gate_act`, the activation itself, or `product`, what the down projection reads.

    Returns:
        h (T, I) in the dtype of `gate_TI`, and the sums (T,) in fp32 (fp64 for fp64 input).

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a name is unknown.
    """
    _check_forms(gate_TI, up_TI, sharpness, act, proxy, where)
    run = launch if on_cuda(gate_TI) else on_host
    return run(gate_TI, up_TI, sharpness, act, proxy, where)


@glu_density.register_fake
def _(
    gate_TI: Tensor, up_TI: Tensor | None, sharpness: Tensor, act: str, proxy: str, where: str
) -> tuple[Tensor, Tensor]:
    _check_forms(gate_TI, up_TI, sharpness, act, proxy, where)
    return gate_TI.new_empty(gate_TI.shape), gate_TI.new_empty(gate_TI.shape[0], dtype=_wide(gate_TI))


@torch.library.custom_op("lit_sparse::glu_density_grad", mutates_args=())
def glu_density_grad(
    dh_TI: Tensor,
    drows_T: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor | None,
    sharpness: Tensor,
    act: str,
    proxy: str,
    where: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate_TI` and `up_TI`, each (T, I); the second is empty where there is no `up_TI`.

    Args:
        dh_TI: Gradient of h, of the dtype of `gate_TI`.
        drows_T: Gradient of the sums; 0 for tokens that do not count.

    Raises:
        ImportError: for CUDA tensors where Triton is missing.
        ValueError: if dtypes, devices or shapes do not go together, or a name is unknown.
    """
    _check_forms(gate_TI, up_TI, sharpness, act, proxy, where)
    _check_forms_of_grad(dh_TI, drows_T, gate_TI)
    run = launch_grad if on_cuda(gate_TI) else grad_on_host
    return run(dh_TI, drows_T, gate_TI, up_TI, sharpness, act, proxy, where)


@glu_density_grad.register_fake
def _(
    dh_TI: Tensor,
    drows_T: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor | None,
    sharpness: Tensor,
    act: str,
    proxy: str,
    where: str,
) -> tuple[Tensor, Tensor]:
    _check_forms(gate_TI, up_TI, sharpness, act, proxy, where)
    _check_forms_of_grad(dh_TI, drows_T, gate_TI)
    return gate_TI.new_empty(gate_TI.shape), gate_TI.new_empty(0 if up_TI is None else gate_TI.shape)
