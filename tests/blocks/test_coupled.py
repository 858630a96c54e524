"""Blocks of S2FT: heads and channels, in all matrices that they couple."""

import pytest
import torch

from lit_sparse.anatomy import linears, matrix, role, weight_count
from lit_sparse.blocks.coupled import coupled_blocks
from lit_sparse.errors import BadInput
from lit_sparse.strategies import SMT
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import tiny_llm

ROLES = ["q", "k", "v", "o", "gate", "up", "down"]


def chosen(kind="llama", weights=8000.0, roles=ROLES, seed=0):
    model = tiny_llm(kind)
    matrices = {name: matrix(layer) for name, layer in linears(model).items() if role(name) in roles}
    return matrices, coupled_blocks(matrices, model.config, weights, seed)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_heads_and_channels_are_the_same_in_all_matrices(kind):
    """Two key-value heads of four queries: a head has two heads' rows of q and columns of o."""
    matrices, blocks = chosen(kind)
    head = {"llama": 8, "qwen2": 10}[kind]
    numbers = {}
    for name, own in blocks.items():
        by_columns = role(name) in ("o", "down")
        places = own.index[:, 1 if by_columns else 0].tolist()
        numbers.setdefault((name.rpartition(".")[0]), []).append(places)
        thickness = {"q": 2 * head, "o": 2 * head, "k": head, "v": head}.get(role(name), 1)
        rows, columns = matrices[name].shape
        assert own.size == ((rows, thickness) if by_columns else (thickness, columns))
    for group, places in numbers.items():
        assert len(places) == (4 if group.endswith("attn") else 3)
        assert all(sorted(one) == sorted(places[0]) for one in places)
    trained = sum(own.numel(matrices[name]) for name, own in blocks.items())
    assert trained <= 8000
    assert {group.rpartition(".")[2] for group in numbers} == {"self_attn", "mlp"}
    assert chosen(kind)[1].keys() == blocks.keys()
    assert any(not torch.equal(own.index, chosen(kind, seed=1)[1].get(n, own).index) for n, own in blocks.items())


def test_a_head_is_what_attention_groups():
    """The outputs of the chosen rows of v are read by the chosen columns of o, and by no others."""
    model = tiny_llm()
    _, blocks = chosen(weights=1e5 / 40, roles=["q", "k", "v", "o"])
    name = next(name for name in blocks if role(name) == "o")
    attention = model.get_submodule(name.rpartition(".")[0])
    seen = {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach().clone()))
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids)
    before = seen["x"]
    with torch.no_grad():
        for rows, _ in blocks[name.replace("o_proj", "v_proj")].slices():
            attention.v_proj.weight[rows] += 1.0
    model(input_ids=ids)
    moved = (seen["x"] != before).any(dim=(0, 1)).nonzero().flatten().tolist()
    columns = [j for _, own in blocks[name].slices() for j in range(own.start, own.stop)]
    assert moved == sorted(columns)
    assert moved


def test_what_is_no_head_and_no_channel_is_refused():
    model = tiny_llm("gpt2")
    for options, message in {
        "qkv": ({"targets": ["all"]}, "c_attn is neither; give targets"),
        "few": ({"targets": ["up", "down"], "trainable_fraction": 1e-6}, "not one fits"),
    }.values():
        with pytest.raises(BadInput, match=message):
            SMT(blocks="coupled", **options).attach(model, no_probe, ALONE)
    matrices, _ = chosen()
    with pytest.raises(BadInput, match="key-value heads; give targets without"):
        coupled_blocks(matrices, type("C", (), {"num_key_value_heads": 3})(), 1e9, 0)


def test_coupled_blocks_train_at_most_the_share():
    for kind in ("llama", "gpt2"):
        model = tiny_llm(kind)
        targets = ROLES if kind == "llama" else ["up", "down"]
        strategy = SMT(blocks="coupled", targets=targets, trainable_fraction=0.2)
        strategy.attach(model, no_probe, ALONE)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert 0.5 * 0.2 * weight_count(tiny_llm(kind)) < trained <= 0.2 * weight_count(tiny_llm(kind))
