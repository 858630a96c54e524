"""SCALE: updates of root mean square 1 a column, momentum of the head alone, and the bytes of its state."""

import pytest
import torch

from benchmarks.tiny_models import FAMILIES
from lit_sparse.errors import BadInput
from lit_sparse.roles import partition_params
from lit_sparse.strategies import SCALE, SMT, Updates
from lit_sparse.testing import tiny_llm

LR = 1e-2


def run(steps: int = 1, kind: str = "llama", model=None, **options):
    """Take steps; return the model, the weights before the last one, its gradients and the optimizer."""
    model, updates = (model or tiny_llm(kind)).train(), Updates([SCALE(**options)])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    before, grads = {}, {}
    for step in range(1, steps + 1):
        ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        updates.before_step(step, optimizer)
        optimizer.step()
        updates.after_step(step, optimizer)
        optimizer.zero_grad()
    return model, before, grads, optimizer


def names(model, role: str) -> list[str]:
    return next(group["param_names"] for group in partition_params(model) if group["role"] == role)


def test_a_row_of_a_matrix_moves_by_a_root_mean_square_of_one():
    model, before, grads, _ = run()
    for name in names(model, "matrix"):
        update = (before[name] - model.get_parameter(name).detach()) / LR
        rms = grads[name].square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(update, grads[name] / rms, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(update.square().mean(1), torch.ones(len(update)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "end"), [("GPT-2", "0.mlp.c_fc.weight"), ("gpt-oss", "0.mlp.experts.down_proj")])
def test_an_output_of_a_matrix_that_is_stored_transposed_does_too(family, end):
    model, before, grads, _ = run(model=FAMILIES[family].tiny())
    (name,) = [one for one in names(model, "matrix") if one.endswith(end)]
    update, rms = (before[name] - model.get_parameter(name).detach()) / LR, grads[name].square().mean(-2).sqrt()
    seen = rms > 1e-9  # an expert that no token reaches has no gradient
    assert seen.float().mean() > 0.5
    torch.testing.assert_close(update.square().mean(-2)[seen], torch.ones_like(rms)[seen], rtol=2e-3, atol=2e-3)


def test_a_feature_of_an_embedding_does_over_the_vocabulary():
    model, before, grads, _ = run()
    name = "model.embed_tokens.weight"
    update = (before[name] - model.get_parameter(name).detach()) / LR
    torch.testing.assert_close(update.square().mean(0), torch.ones(32), rtol=1e-3, atol=1e-3)
    assert not update[grads[name].abs().sum(1) == 0].any()  # tokens that the batch lacks


def test_the_head_has_momentum_and_vectors_have_adamw():
    model, before, _, optimizer = run(3)
    grads = [run(count)[2]["lm_head.weight"] for count in (1, 2, 3)]
    mean = torch.zeros_like(grads[0])
    for grad in grads:
        mean = 0.9 * mean + 0.1 * grad
    update = (before["lm_head.weight"] - model.lm_head.weight.detach()) / LR
    torch.testing.assert_close(update, mean / mean.square().mean(1, keepdim=True).sqrt(), rtol=2e-3, atol=2e-3)
    states = {name: set(optimizer.state[p]) for name, p in model.named_parameters()}
    assert states["lm_head.weight"] == {"step", "exp_avg"}
    assert states["model.norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert states["model.embed_tokens.weight"] == states["model.layers.0.mlp.up_proj.weight"] == {"step"}


def test_vectors_have_a_learning_rate_of_their_own():
    model, before, _, _ = run(vector_lr_factor=5.0)
    moved = before["model.norm.weight"] - model.model.norm.weight.detach()
    torch.testing.assert_close(moved.abs().max(), torch.tensor(5 * LR), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_state_bytes_are_the_formulas(kind, momentum):
    model, _, _, optimizer = run(kind=kind, momentum=momentum)
    held = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key != "step")
    strategy = SCALE(momentum=momentum)
    assert held == strategy.optimizer_bytes(model)
    head = model.get_output_embeddings().weight.numel() if kind == "llama" else 0  # others have a tied one
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.ndim < 2)
    assert held == 4 * head * (momentum > 0) + 8 * vectors


def test_scales_of_rows_do_not_matter_and_zeros_do_not_move():
    updates, model = Updates([SCALE()]), tiny_llm().train()
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    moved = []
    for factor in (1.0, 1e-9):
        grad = torch.ones(64, 32).cumsum(1) * factor
        grad[5] = 0
        weight.grad = grad
        optimizer.step()
        moved.append((before - weight.detach()) / LR)
        with torch.no_grad():
            weight.copy_(before)
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-5)
    assert not moved[0][5].any()


def test_blocks_are_normalised_and_reach_their_weights():
    model = tiny_llm().train()
    updates = Updates([SMT(blocks="random", block_size=8, num_blocks=4), SCALE()])
    updates.attach(model)
    optimizer = updates.optimizer(LR)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    blocks = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in blocks]
    updates.step(1, optimizer, lambda: model(input_ids=ids, labels=ids).loss)
    for old, new in zip(before, blocks, strict=True):
        rms = ((old - new.detach()) / LR).square().mean(-1)
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"vector_lr_factor": -1.0}]
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(BadInput, match=r"^SCALE: .*; (it|they) must be "):
        SCALE(**options)
