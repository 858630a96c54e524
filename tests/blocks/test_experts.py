"""Blocks of fused experts against a dense training with masks, and through checkpoints and exports."""

import copy

import pytest
import torch

from benchmarks.families import Cell
from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import experts, weight_count, weight_matrix
from lit_sparse.blocks.experts import BlockExperts, chosen_blocks
from lit_sparse.calls import dummy_forward
from lit_sparse.errors import BadInput
from lit_sparse.export.delta import Delta
from lit_sparse.export.folder import export
from lit_sparse.optim import trainable
from lit_sparse.runs import load_run
from lit_sparse.strategies import SMT, Updates
from lit_sparse.strategies.base import ALONE
from lit_sparse.testing import contract

RATE = 1e-2


def loss_of(model, seed):
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def smt(mode="in_place", **options):
    return SMT(**{"targets": ["gate_up", "down"], "trainable_fraction": 0.05, "mode": mode, **options})


def attached(family, **options):
    model = FAMILIES[family].tiny().train()
    updates = Updates([smt(**options)])
    updates.attach(model, lambda steps: (loss_of(model, seed) for seed in range(steps)))
    return model, updates


def masked(family, choice):
    """The same model, in which only the chosen blocks train densely; masks by the parameter's name."""
    model = FAMILIES[family].tiny().train().requires_grad_(False)
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        parameter.data.zero_()
    for name, blocks in choice.items():
        blocks.write(weight_matrix(ones, name).detach(), torch.ones(len(blocks.index), *blocks.size))
    masks = {name: mask for name, mask in ones.named_parameters() if mask.any()}
    for name in masks:
        model.get_parameter(name).requires_grad_(True)
    return model, masks


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss", "Llama-4"])
@pytest.mark.parametrize(("mode", "size"), [("in_place", 8), ("in_place", (24, 20)), ("delta", 8), ("delta", (24, 20))])
def test_blocks_train_as_in_a_dense_run_with_masks(family, mode, size):
    """Sizes of 24 x 20 divide no matrix, so blocks at the edge of one expert must not reach into the next."""
    model, updates = attached(family, mode=mode, block_size=size)
    dense, masks = masked(family, updates._strategies[0].choice)
    # In delta mode decay would be that of the difference.
    optimizer = updates.optimizer(RATE, lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=0))
    reference = torch.optim.AdamW([p for _, p in trainable(dense)], lr=RATE, weight_decay=0)
    for step in range(1, 4):
        updates.step(step, optimizer, lambda seed=step: loss_of(model, seed))
        loss_of(dense, step).backward()
        for name, mask in masks.items():
            dense.get_parameter(name).grad.mul_(mask)
        reference.step()
        reference.zero_grad()
    updates.detach(model)
    base = FAMILIES[family].tiny()
    for name, value in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=1e-6)
    assert not all(torch.equal(model.get_parameter(name), base.get_parameter(name)) for name in masks)
    assert not any(isinstance(module, BlockExperts) for module in model.modules())


def test_the_default_optimizer_writes_experts_in_its_own_pass():
    model, updates = attached("gpt-oss")
    optimizer = updates.optimizer(RATE)
    updates.step(1, optimizer, lambda: loss_of(model, 1))
    for module in model.modules():
        for part in module.parts() if isinstance(module, BlockExperts) else ():
            assert optimizer.wrote(part.master)
            matrix = part.tensor[part.number].t()
            torch.testing.assert_close(part.blocks.read(matrix.detach()), part.master, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["in_place", "delta"])
def test_contract(mode):
    contract(lambda: [smt(mode, targets=["all"])], FAMILIES["Mixtral"].tiny())


def test_scores_are_those_of_each_expert():
    """The best block of all is chosen first, and an expert that no token reaches gets none."""
    _, updates = attached("Mixtral", num_blocks=1, block_size=8)
    (name,) = updates._strategies[0].choice
    best = {}
    fresh = FAMILIES["Mixtral"].tiny().train()
    totals = {key: torch.zeros_like(tensor.parameter) for key, tensor in experts(fresh).items()}
    for seed in range(8):
        fresh.zero_grad()
        loss_of(fresh, seed).backward()
        for key, tensor in experts(fresh).items():
            totals[key] += tensor.parameter.grad.abs()
    for key, total in totals.items():
        for number, one in enumerate(total):
            rows, columns = one.shape[0] // 8, one.shape[1] // 8
            best[f"{key}[{number}]"] = one.view(rows, 8, columns, 8).mean((1, 3)).max()
    assert name == max(best, key=lambda one: best[one])


def test_the_trained_share_counts_experts():
    model, updates = attached("Qwen3-MoE", trainable_fraction=0.02, targets=["all"], block_size=8)
    trained = sum(parameter.numel() for _, parameter in trainable(model))
    total = weight_count(FAMILIES["Qwen3-MoE"].tiny())
    assert 0.02 * total - 64 < trained <= 0.02 * total
    shares = updates._strategies[0].describe()["share"]
    counted = sum(len(blocks.index) for blocks in updates._strategies[0].choice.values())
    assert counted * 64 == trained
    assert all(0 <= share <= 1 for layer in shares.values() for share in layer.values())


def test_a_file_of_another_models_experts_is_refused(tmp_path):
    choice = tmp_path / "choice.json"
    choice.write_text('{"model.layers.0.mlp.experts.down_proj[4]": {"size": [8, 8], "index": [[0, 0]]}}')
    with pytest.raises(BadInput, match=r"down_proj\[4\], which is not among the 24 target matrices"):
        smt(blocks=str(choice)).attach(FAMILIES["Mixtral"].tiny(), lambda steps: iter(()), ALONE)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves nothing
@pytest.mark.parametrize("method", ["smt all", "smt all, delta"])
def test_a_run_resumes_exports_and_becomes_a_delta(method, tmp_path):
    family = FAMILIES["Mixtral"]
    cell = Cell(family, method, family.write(tmp_path / "base"), tmp_path)
    cell.fit_and_resume()
    cell.export()
    module, _ = load_run(cell.run)
    assert any("[" in name for name in chosen_blocks(module.build()))
    wanted, base = dummy_forward(module.build()), family.tiny()
    delta = Delta.load(export(cell.run, "delta"))
    names = {change.name for change in delta.changes}
    assert any("experts.gate_up_proj[" in name for name in names)
    assert not any(name.endswith("gate_up_proj") for name in names)  # no tensor as a whole
    delta.apply(base)
    torch.testing.assert_close(dummy_forward(base), wanted, rtol=1e-4, atol=1e-5)
