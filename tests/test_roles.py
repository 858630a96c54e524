"""Roles of parameters: every trainable one once, tied ones once, the head by what it is."""

import pytest
import torch
from torch import nn

from benchmarks.tiny_models import FAMILIES
from lit_sparse.optim import trainable
from lit_sparse.roles import ORDER, partition_params, roles_of
from lit_sparse.testing import TINY, tiny_encoder, tiny_llm

MODELS = {**{kind: (lambda kind=kind: tiny_llm(kind)) for kind in TINY}, "encoder": tiny_encoder}


def parts(model: nn.Module, **options) -> dict[str, list[str]]:
    return {group["role"]: group["param_names"] for group in partition_params(model, **options)}


@pytest.mark.parametrize("kind", MODELS)
def test_each_trainable_parameter_is_in_one_group_once(kind):
    model = MODELS[kind]()
    next(iter(model.parameters())).requires_grad_(False)
    groups = partition_params(model)
    assert [group["role"] for group in groups] == list(ORDER)
    named = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
    assert sorted(name for name, _ in named) == sorted(name for name, _ in trainable(model))
    assert all(parameter is dict(model.named_parameters())[name] for name, parameter in named)


def test_llamas_projections_are_matrices_and_its_head_is_not():
    found = parts(tiny_llm())
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in found["matrix"]}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (found["embed"], found["head"]) == (["model.embed_tokens.weight"], ["lm_head.weight"])
    assert all("norm" in name for name in found["vector"])


def test_a_tied_head_is_an_embedding_and_counts_once():
    found = parts(tiny_llm("qwen2"))
    assert (found["embed"], found["head"]) == (["model.embed_tokens.weight"], [])
    assert any(name.endswith("q_proj.bias") for name in found["vector"])


def test_positions_are_embeddings_and_a_classifiers_head_is_a_head():
    assert parts(tiny_llm("gpt2"))["embed"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    found = parts(tiny_encoder())
    assert "classifier.weight" in found["head"]
    assert len(found["embed"]) == 3


def test_the_policy_makes_the_head_a_matrix():
    model = tiny_llm()
    found = parts(model, policy="layers_and_head")
    assert found["head"] == []
    assert found["matrix"][-1] == "lm_head.weight"


@pytest.mark.parametrize("name", ["Mamba", "LFM2"])
def test_a_filter_for_each_channel_is_a_vector(name):
    model = FAMILIES[name].tiny()
    found = parts(model)
    kernels = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    assert kernels
    assert set(kernels) <= set(found["vector"])


def test_what_is_added_to_a_layer_has_the_role_of_its_shape():
    """Factors of an adapter are matrices, its scales vectors, stacks of experts matrices."""
    model = tiny_llm()
    layer = model.model.layers[0]
    layer.down, layer.scale, layer.stack = nn.Linear(4, 2, bias=False), nn.Parameter(torch.ones(3)), nn.Linear(1, 1)
    layer.stack.weight = nn.Parameter(torch.ones(2, 3, 4))
    roles = roles_of(model)
    assert [roles[one] for one in (layer.down.weight, layer.scale, layer.stack.weight)] == [
        "matrix",
        "vector",
        "matrix",
    ]
