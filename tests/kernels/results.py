"""Results of the kernels on their CASES: `python -m tests.kernels.results FILE` keeps it for a GPU to be held against.

With TRITON_INTERPRET=1 it is the interpreter's. Cases with bf16 are left out, whose products and roundings the
interpreter has wrong.
"""

import os
import sys

import torch
from torch import Tensor

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
    subspace_adam,
)
from lit_sparse_kernels.jit import Listed
from tests.kernels import (
    test_add_noise,
    test_block_adamw,
    test_block_delta,
    test_block_grad,
    test_glu_density,
    test_master_adamw,
    test_momentum_noise,
    test_pack_columns,
    test_subspace_adam,
)
from tests.kernels.numpys import mend_interpreter

KINDS: tuple[philox.Kind, ...] = ("rademacher", "gaussian")


def results(device: torch.device) -> list[Tensor]:
    """All results, on the CPU."""
    made: list[Tensor] = []
    for case in exact(block_grad.CASES):
        dys, x, _, size = test_block_grad.inputs(*case)
        made.append(block_grad.launch([dy.to(device) for dy in dys], x.to(device), Listed(case[4]), size))
    for case in exact(block_delta.CASES):
        base, x, delta, _, dy = test_block_delta.inputs(*case)
        base, x, delta, dy = (tensor.to(device) for tensor in (base, x, delta, dy))
        made.append(block_delta.launch(base, x, delta, Listed(case[4])))
        made.append(block_delta.launch_input_grad(dy, delta, Listed(case[4]), x.shape[1]))
    for case in exact(pack_columns.CASES):
        x, _, columns, width, to = test_pack_columns.inputs(*case)
        made.append(pack_columns.launch(x.to(device), Listed([(c,) for c in columns.tolist()]), width, to))
    for case in exact(glu_density.CASES):
        gate, up, sharpness, names, dh, drows = test_glu_density.inputs(*case)
        up = None if up is None else up.to(device)
        gate, sharpness, dh, drows = (tensor.to(device) for tensor in (gate, sharpness, dh, drows))
        made += glu_density.launch(gate, up, sharpness, *names)
        made += glu_density.launch_grad(dh, drows, gate, up, sharpness, *names)
    for case in exact(master_adamw.CASES):
        items = [moved(item, device) for item in test_master_adamw.items(*case)]
        master_adamw.launch(items, test_master_adamw.RULE)
        made += [tensor for item in items for tensor in item.moved()]
    for case in exact(block_adamw.CASES):
        parts = [part._replace(item=moved(part.item, device)) for part in test_block_adamw.parts(*case)]
        block_adamw.launch(parts, test_master_adamw.RULE)
        made += [tensor for part in parts for tensor in part.item.moved()]
    for first, count, seed, param in philox.CASES:
        made += [philox.launch(torch.tensor([first], device=device), count, seed, param, 0, kind) for kind in KINDS]
    for ranges, dtype, terms, kind in exact(add_noise.CASES):
        pieces = [
            piece._replace(out=piece.out.to(device), weight=piece.weight.to(device))
            for piece in test_add_noise.pieces(ranges, dtype)
        ]
        add_noise.launch(pieces, test_add_noise.TERMS[:terms], 0.9, kind)
        made += [piece.out for piece in pieces]
    for ranges, dtype, terms, kind, curved in exact(momentum_noise.CASES):
        given = test_momentum_noise.pieces(ranges, dtype, curved)
        there = [momentum_noise.Piece(*(None if t is None else t.to(device) for t in p[:3]), *p[3:]) for p in given]  # pyright: ignore
        rule = test_momentum_noise.RULE._replace(refresh=(0.3, 0.1)[:terms])
        momentum_noise.launch(there, test_momentum_noise.TERMS[:terms], rule, kind)
        made += [tensor for piece in there for tensor in piece[:3] if tensor is not None]
    for case in exact(subspace_adam.CASES):
        projected, m, v = (tensor.to(device) for tensor in test_subspace_adam.moments(case))
        moved_by = torch.empty_like(projected)
        subspace_adam.launch(projected, m, v, moved_by, test_subspace_adam.STEP, test_subspace_adam.RULE)
        weight, moved_to, basis, factor, grad = (tensor.to(device) for tensor in test_subspace_adam.matrices(case))
        subspace_adam.launch_back(weight, moved_to, basis, 0.1, 0.9, factor, grad)
        made += [moved_by, m, v, weight]
    return [tensor.cpu() for tensor in made]


def exact(cases: list[tuple]) -> list[tuple]:
    return [case for case in cases if torch.bfloat16 not in case]


def moved(item: master_adamw.Item, device: torch.device) -> master_adamw.Item:
    weight, grad, master, m, v = (tensor.to(device) for tensor in item.moved())
    return item._replace(
        weight=weight, grad=grad, master=weight if item.master is item.weight else master, exp_avg=m, exp_avg_sq=v
    )


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend_interpreter()
    torch.save(results(torch.device("cpu")), sys.argv[1])
