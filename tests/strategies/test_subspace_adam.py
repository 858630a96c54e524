"""GaLore and Fira: Adam in a rotated basis, the residual and its limiter, subspaces of either side, what is refused."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM
from lit_sparse.optim import AdamW, trainable
from lit_sparse.roles import roles_of
from lit_sparse.strategies import LISA, LowRank, SubspaceAdam, Updates
from lit_sparse.strategies.subspace_adam import Projected
from lit_sparse.strategies.subspaces import Exact, Layout, Sketch, seed_of
from lit_sparse.testing import contract, tiny_llm
from tests.strategies.test_adalomo import no_group_after as no_group_after
from tests.strategies.test_updates import data, trainer

LR = 1e-2


def matrix_of(rows: int, columns: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """A gradient with falling singular values, of a rank."""
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, min(rows, columns)))[0] for side in (rows, columns))
    values = 0.5 ** torch.arange(min(rows, columns))
    values[len(values) if rank is None else rank :] = 0
    return u @ torch.diag(values) @ v.T


def optimizer_of(weight: torch.Tensor, rank: int | None = None, **fields) -> Projected:
    """The optimizer of one matrix, as the strategy sets it up."""
    update = SubspaceAdam(**{"scale": 1.0, "refresh_every": 10**6, "eps": 1e-8, **fields})
    made = Projected([{"params": [weight], "param_names": ["w"]}], LR, betas=update.betas, eps=update.eps)
    made.param_groups[0]["weight_decay"] = update.weight_decay
    made.settings, made.ranks = update, {} if rank is None else {weight: rank}
    return made


def step(optimizer, weight, grad) -> torch.Tensor:
    """Take a step; return how the weight moved, over the learning rate."""
    before = weight.detach().clone()
    weight.grad = grad.clone()
    optimizer.step()
    return (before - weight.detach()) / LR


SIDES = pytest.mark.parametrize("sides", [(12, 7), (7, 12), (9, 9)], ids=str)


# ---- the subspace


@pytest.mark.parametrize("chooser", [Sketch(), Exact()], ids=["sketch", "svd"])
@pytest.mark.parametrize("sides", [(40, 24), (24, 40), (3, 24, 40)], ids=str)
def test_a_basis_is_orthonormal_and_spans_the_leading_directions(chooser, sides):
    weight = torch.zeros(sides)
    grad = torch.stack([matrix_of(24, 40, seed=n) for n in range(3)]) if len(sides) == 3 else matrix_of(*sides)
    layout = Layout(weight)
    basis = chooser(layout, layout.view(grad), 5, 1)
    assert basis.shape == (*sides[:-2], 24, 5)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5).expand(*sides[:-2], 5, 5), rtol=0, atol=1e-5)
    exact = torch.linalg.svd(layout.view(grad), full_matrices=False)[2][..., :5, :].mT
    angles = torch.linalg.svdvals(exact.mT @ basis).clamp(max=1).acos()
    assert angles.max() < 1e-2


def test_a_sketch_depends_on_its_seed_alone_and_keeps_all_of_a_gradient_of_low_rank():
    layout, grad = Layout(torch.zeros(40, 24)), matrix_of(40, 24, rank=4)
    first, same = (Sketch()(layout, grad, 4, seed_of(0, 1, "w")) for _ in range(2))
    assert torch.equal(first, same)
    torch.testing.assert_close((grad @ first).norm(), grad.norm(), rtol=1e-5, atol=0)
    zero = [Sketch()(layout, torch.zeros(40, 24), 4, seed_of(0, 1, name)) for name in ("w", "v")]
    assert not torch.equal(*zero), "of no gradient, a subspace is drawn"
    for basis in zero:
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)
    assert len({seed_of(s, n, name) for s in (0, 1) for n in (1, 2) for name in "vw"}) == 8


@pytest.mark.parametrize("basis", ["sketch", "svd"])
def test_directions_keep_their_signs(basis):
    """Libraries choose them freely: a vector that turned around would turn the moments kept of it around."""
    bases = []
    for sign in (1, -1):
        weight = torch.nn.Parameter(torch.zeros(40, 24))
        optimizer = optimizer_of(weight, 5, basis=basis)
        step(optimizer, weight, sign * matrix_of(40, 24))
        bases.append(optimizer.state[weight]["basis"])
    torch.testing.assert_close(*bases, rtol=0, atol=1e-4)


def test_tiny_gradients_and_large_ones_have_the_same_subspace():
    layout, grad = Layout(torch.zeros(40, 24)), matrix_of(40, 24)
    bases = [Sketch()(layout, grad * size, 5, 1) for size in (1.0, 1e-15, 1e15)]
    for basis in bases[1:]:
        torch.testing.assert_close(bases[0] @ bases[0].T, basis @ basis.T, rtol=0, atol=1e-4)


# ---- the step


@SIDES
def test_galore_at_full_rank_is_adam_in_the_rotated_basis(sides):
    """To fp64's precision, over steps with one basis."""
    weight = torch.nn.Parameter(torch.randn(sides, dtype=torch.float64))
    optimizer = optimizer_of(weight, min(sides))
    layout, rotated, adam = Layout(weight), None, None
    for number in range(20):
        grad = torch.randn(sides, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        start = weight.detach().clone()
        step(optimizer, weight, grad)
        basis = optimizer.state[weight]["basis"]
        if adam is None:
            rotated = torch.nn.Parameter(layout.view(start) @ basis)
            adam = torch.optim.Adam([rotated], LR, eps=1e-8)
        rotated.grad = layout.view(grad) @ basis
        adam.step()
        torch.testing.assert_close(layout.view(weight.detach()) @ basis, rotated.detach(), rtol=1e-12, atol=1e-12)


@SIDES
def test_an_update_of_galore_has_the_rank_and_lies_in_the_span(sides):
    weight = torch.nn.Parameter(torch.zeros(sides))
    optimizer = optimizer_of(weight, 3, scale=0.25)
    update = step(optimizer, weight, matrix_of(*sides))
    values = torch.linalg.svdvals(update)
    assert values[3] < 1e-5 * values[0]
    basis, turned = optimizer.state[weight]["basis"], Layout(weight).view(update)
    torch.testing.assert_close(turned @ basis @ basis.T, turned, rtol=0, atol=1e-5)


@SIDES
def test_fira_moves_all_directions_and_is_galore_at_full_rank(sides):
    grads = [matrix_of(*sides, seed=n) for n in range(4)]
    moves = {}
    for name, rank, residual in (("fira", 3, "fira"), ("full", min(sides), "fira"), ("galore", min(sides), "none")):
        weight = torch.nn.Parameter(torch.zeros(sides))
        optimizer = optimizer_of(weight, rank, residual=residual, scale=0.25)
        moves[name] = [step(optimizer, weight, grad) for grad in grads]
    assert all(torch.linalg.matrix_rank(move) == min(sides) for move in moves["fira"])
    for ours, theirs in zip(moves["full"], moves["galore"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@SIDES
def test_fira_is_its_equations(sides):
    """Written with the matrices that the step never makes: the residual, scaled and limited as the paper has it."""
    weight = torch.nn.Parameter(torch.zeros(sides, dtype=torch.float64))
    optimizer = optimizer_of(weight, 3, residual="fira", scale=0.3, growth=1.01, weight_decay=0.1)
    m = v = last = None
    limited = []
    for number in range(1, 8):
        size = 100.0 if number == 5 else 1.0
        grad = size * torch.randn(sides, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        before = weight.detach().clone()
        step(optimizer, weight, grad)
        layout, basis = Layout(weight), optimizer.state[weight]["basis"]
        g = layout.view(grad)
        r = g @ basis
        m = 0.1 * r if m is None else 0.9 * m + 0.1 * r
        v = 0.001 * r * r if v is None else 0.999 * v + 0.001 * r * r
        unbias = (1 - 0.999**number) ** 0.5 / (1 - 0.9**number)
        n = m / (v.sqrt() + 1e-8 * (1 - 0.999**number) ** 0.5)  # without corrections, which multiply the rate
        s = (n.norm(dim=1) / (r.norm(dim=1) + 1e-8))[:, None] * (g - r @ basis.T)
        limit = 1.0 if last is None else max(float(s.norm()) / (last + 1e-8), 1.01) / 1.01
        limited.append(limit > 1)
        last = float(s.norm()) / limit
        moved = layout.view(before) * (1 - LR * 0.1) - LR * unbias * (0.3 * n @ basis.T + s / limit)
        torch.testing.assert_close(layout.view(weight.detach()), moved, rtol=1e-6, atol=1e-7)
    assert any(limited)
    assert not all(limited)


def test_a_step_without_gradient_limits_nothing_after_it():
    weight = torch.nn.Parameter(torch.zeros(12, 7))
    optimizer = optimizer_of(weight, 3, residual="fira")
    assert not step(optimizer, weight, torch.zeros(12, 7)).any()
    assert weight.isfinite().all()
    optimizer.state[weight]["step"].zero_()  # the subspace of a gradient
    update = step(optimizer, weight, matrix_of(12, 7))
    assert torch.linalg.matrix_rank(update) == 7


def test_a_clipped_norm_divides_the_projection_and_the_residual():
    moves = []
    for size, scale in ((1.0, None), (8.0, torch.tensor([8.0]))):
        weight = torch.nn.Parameter(torch.zeros(12, 7))
        optimizer = optimizer_of(weight, 3, residual="fira", eps=1e-3)
        optimizer.grad_scale = scale
        moves.append([step(optimizer, weight, size * matrix_of(12, 7, seed=n)) for n in range(2)])
    for ours, theirs in zip(*moves, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_subspaces_are_chosen_anew_when_due_and_moments_are_kept():
    weight = torch.nn.Parameter(torch.zeros(12, 7))
    optimizer = optimizer_of(weight, 3, refresh_every=2)
    bases = []
    for number in range(5):
        step(optimizer, weight, matrix_of(12, 7, seed=number))
        bases.append(optimizer.state[weight]["basis"].clone())
    assert [torch.equal(a, b) for a, b in pairwise(bases)] == [True, False, True, False]
    assert float(optimizer.state[weight]["step"]) == 5


def test_a_stack_of_matrices_is_one_matrix_after_the_other():
    grads = [torch.stack([matrix_of(12, 7, seed=n + 5 * k) for k in range(3)]) for n in range(3)]
    stack, single = torch.nn.Parameter(torch.zeros(3, 12, 7)), torch.nn.Parameter(torch.zeros(12, 7))
    ours, theirs = (optimizer_of(weight, 3, residual="fira", basis="svd") for weight in (stack, single))
    for grad in grads:
        torch.testing.assert_close(step(ours, stack, grad)[1], step(theirs, single, grad[1]), rtol=1e-4, atol=1e-4)


# ---- in a model


def sized(**fields) -> tuple:
    model, updates = tiny_llm(), Updates([SubspaceAdam(**fields)])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    for number in range(1, 3):
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(number))
        updates.step(number, optimizer, lambda ids=ids: model(input_ids=ids, labels=ids).loss)
    return model, updates, optimizer


@pytest.mark.parametrize("fields", [{}, {"rank": 3, "residual": "fira"}, {"head": True, "targets": ["q", "down"]}])
def test_the_state_has_the_bytes_of_the_formula_and_tensors_only(fields):
    model, updates, optimizer = sized(**fields)
    state = [value for own in optimizer.state.values() for value in own.values()]
    assert all(isinstance(value, torch.Tensor) for value in state)
    wanted = updates[0].optimizer_bytes(model)
    assert sum(value.nbytes for value in state if value.ndim) == wanted
    roles = roles_of(model)
    matrices = {n for n, p in trainable(model) if "basis" in optimizer.state[p]}
    if fields.get("targets"):
        assert {name.split(".")[-2] for name in matrices} == {"q_proj", "down_proj", "lm_head"}
    else:
        assert matrices == {n for n, p in trainable(model) if roles[p] == "matrix"}
        r = lambda p: fields.get("rank") or max(1, round(0.25 * min(p.shape)))  # noqa: E731
        entries = sum(r(p) * (2 * max(p.shape) + min(p.shape)) for n, p in trainable(model) if n in matrices)
        rest = sum(2 * p.numel() for n, p in trainable(model) if n not in matrices)
        assert wanted == 4 * (entries + rest)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fused_backward_is_an_unfused_one_bit_for_bit(kind, precision):
    """Through the trainer, with a tied head, two refreshes and a layer's recomputation."""
    found = []
    for fused in (False, True):
        update = SubspaceAdam(residual="fira", refresh_every=2, fused_backward=fused)
        task = CausalLM(tiny_llm(kind), [update], lr=LR, precision=precision, activation_checkpointing=True)
        trainer(4).fit(task, datamodule=data())
        found.append(dict(task.build().named_parameters()))
        assert all(p.grad is None for p in task.build().parameters())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, tiny_llm(kind).get_parameter(name)) for name, value in found[0].items())


def test_a_fused_backward_holds_a_gradient_at_a_time():
    model, updates = tiny_llm(), Updates([SubspaceAdam(fused_backward=True)])
    updates.attach(model)
    optimizer, alive, plain = updates.optimizer(LR), [], Projected.step_some

    def noting(self, group, moving):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        plain(self, group, moving)

    optimizer.step_some = noting.__get__(optimizer)
    ids = torch.randint(3, 96, (2, 12))
    updates.run_backward(model(input_ids=ids, labels=ids).loss)
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) == 1


def test_clipping_in_two_passes_is_clipping():
    found = []
    for fields, options in (({}, {"gradient_clip_val": 0.05}), ({"fused_backward": True, "two_pass_clip": 0.05}, {})):
        task = CausalLM(tiny_llm(), [SubspaceAdam(eps=1e-2, **fields)], lr=LR)
        trainer(3, **options).fit(task, datamodule=data())
        found.append(dict(task.build().named_parameters()))
    free = CausalLM(tiny_llm(), [SubspaceAdam(eps=1e-2)], lr=LR)
    trainer(3).fit(free, datamodule=data())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=1e-6)
    assert any(
        not torch.allclose(value, found[0][n], rtol=0, atol=1e-5) for n, value in free.build().named_parameters()
    )


@pytest.mark.parametrize("fused", [False, True])
def test_the_contract_holds_beside_layers_drawn(fused):
    """State leaves with its layer, and the subspace of one that returns is chosen from its gradient."""
    contract(
        lambda: [
            SubspaceAdam(residual="fira", refresh_every=2, fused_backward=fused),
            LISA(active_layers=1, interval=2, sampler="cyclic"),
        ]
    )


def test_a_state_goes_through_a_file(tmp_path):
    model, updates, optimizer = sized(residual="fira")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = Updates([dataclasses.replace(updates[0])])
    other = copy.deepcopy(model)
    fresh.attach(other)
    loaded = fresh.optimizer(LR)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    pairs = zip(optimizer.state.values(), loaded.state.values(), strict=True)
    assert all(torch.equal(value, theirs[key]) for own, theirs in pairs for key, value in own.items())


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rank": 0}, "SubspaceAdam: rank is 0; give a whole number from 1 on, or a share"),
        ({"rank": 2.5}, r"SubspaceAdam: rank is 2\.5; give a whole number"),
        ({"refresh_every": 0}, "SubspaceAdam: refresh_every is 0; it must be a number of steps from 1 on"),
        ({"scale": 0.0}, r"SubspaceAdam: scale is 0\.0, growth .* scale and eps must be above 0"),
        ({"growth": 0.5}, r"growth 0\.5, .* growth 1 or more"),
        ({"betas": (0.9, 1.0)}, "SubspaceAdam: betas are .* give two numbers from 0 to below 1"),
        ({"residual": "apollo"}, "SubspaceAdam: residual is apollo and basis sketch; residual is none or fira"),
        ({"two_pass_clip": 1.0}, r"SubspaceAdam: two_pass_clip is 1\.0 and fused_backward false; give a norm above 0"),
        ({"two_pass_clip": 0.0, "fused_backward": True}, "two_pass_clip is 0.0 and fused_backward true"),
    ],
)
def test_values_out_of_range_are_refused(fields, sentence):
    with pytest.raises(BadInput, match=sentence):
        SubspaceAdam(**fields)


def test_targets_are_roles_of_layers_and_not_the_names_of_factors():
    model, low_rank = tiny_llm(), LowRank(rank=4, targets=["q", "down"])
    Updates([low_rank]).attach(model)
    found = SubspaceAdam(rank=2, targets=["down"])._targeted(model)
    assert found
    assert all(".mlp.down_proj." in name for name in found)


def test_a_rank_above_a_side_and_targets_that_are_not_there_are_refused():
    updates = Updates([SubspaceAdam(rank=17)])
    updates.attach(tiny_llm())  # whose keys and values are 16 wide
    with pytest.raises(BadInput, match=r"rank is 17, but a side of model\.layers\.0\.self_attn\.k_proj\.weight has 16"):
        updates.optimizer(LR)
    with pytest.raises(BadInput, match=r"no matrix of LlamaForCausalLM is among the targets \['c_fc'\]; .* down_proj"):
        Updates([SubspaceAdam(targets=["c_fc"])]).attach(tiny_llm())
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    Updates([SubspaceAdam(targets=["c_fc"])]).attach(gpt2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"accumulate_grad_batches": 2}, r"SubspaceAdam keeps no gradients .* remove trainer\.accumulate_grad_batches"),
        ({"gradient_clip_val": 1.0}, r"SubspaceAdam keeps no gradients .* remove trainer\.gradient_clip_val"),
        ({"strategy": "ddp"}, "SubspaceAdam updates weights in the backward pass, before ddp has averaged"),
    ],
)
def test_what_a_fused_backward_cannot_honour_is_refused(options, sentence, no_group_after):
    with pytest.raises(BadInput, match=sentence):
        trainer(1, **options).fit(CausalLM(tiny_llm(), [SubspaceAdam(fused_backward=True)]), datamodule=data())


def test_parameters_outside_the_layers_take_adamw():
    """The same bits as AdamW's own."""
    plain = tiny_llm()
    adam = AdamW([p for _, p in trainable(plain)], LR, eps=1e-8, weight_decay=0.0)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    plain(input_ids=ids, labels=ids).loss.backward()
    adam.step()
    again, updates = tiny_llm(), Updates([SubspaceAdam(weight_decay=0.0, eps=1e-8)])
    updates.attach(again)
    own = updates.optimizer(LR)
    updates.step(1, own, lambda: again(input_ids=ids, labels=ids).loss)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(again.get_parameter(name), plain.get_parameter(name)), name
