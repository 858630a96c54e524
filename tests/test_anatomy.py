"""Where things are in models of many families."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import (
    backbone,
    decoder_layers,
    experts,
    is_linear,
    linears,
    role,
    target_linears,
    unread_by_text,
    weight_count,
    weight_matrix,
)
from lit_sparse.calls import dummy_forward, uncalled
from lit_sparse.errors import BadInput


@pytest.mark.parametrize(("family", "encoder"), [("BART", "model.encoder"), ("T5", "transformer.encoder")])
def test_an_encoder_decoder_has_the_layers_of_both_stacks(family, encoder):
    model = FAMILIES[family].tiny()
    own = model.get_submodule(encoder)
    layers = decoder_layers(model)
    assert [set(layer.modules()) <= set(own.modules()) for layer in layers] == [True] * 3 + [False] * 2
    names = linears(model)
    assert {"encoder", "decoder"} == {name.split(".")[1] for name in names}
    assert dummy_forward(model).isfinite().all()  # which fails without the end of the text


@pytest.mark.parametrize("family", ["Llama-4", "Mllama"])
def test_a_base_model_is_found_where_the_prefix_names_none(family):
    kind, sizes = FAMILIES[family].model_type, FAMILIES[family].sizes["text_config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, text_config=sizes))
    assert model.base_model is model
    hidden = dummy_forward(backbone(model), "last_hidden_state")
    logits = nn.functional.linear(hidden, model.get_output_embeddings().weight)
    torch.testing.assert_close(logits, dummy_forward(model))


def test_the_text_model_of_a_multimodal_checkpoint_is_the_one_that_trains():
    model = FAMILIES["Gemma-3 (multimodal)"].tiny()
    assert len(decoder_layers(model)) == 3  # the vision tower has 2
    assert all(name.startswith("model.language_model.layers.") for name in linears(model))
    unread = set(unread_by_text(model))
    names = {name for name, parameter in model.named_parameters() if parameter in unread}
    assert {name.split(".")[1] for name in names} == {"vision_tower", "multi_modal_projector"}
    assert unread_by_text(FAMILIES["Llama"].tiny()) == []


def test_a_subclass_is_a_linear_layer_if_it_computes_as_one():
    layers = linears(FAMILIES["Falcon"].tiny())
    assert {type(layer).__name__ for layer in layers.values()} == {"FalconLinear"}
    routers = [m for m in FAMILIES["Llama-4"].tiny().modules() if type(m).__name__ == "Llama4Router"]
    assert isinstance(routers[0], nn.Linear)
    assert not is_linear(routers[0])  # it returns a pair


@pytest.mark.parametrize(("family", "transposed"), [("Mixtral", False), ("gpt-oss", True), ("Llama-4", True)])
def test_fused_experts_are_matrices(family, transposed):
    model = FAMILIES[family].tiny()
    tensors = experts(model)
    assert {role(name) for name in tensors} == {"gate_up", "down"}
    assert {tensor.transposed for tensor in tensors.values()} == {transposed}
    for name, tensor in tensors.items():
        shape = (128, 32) if role(name) == "gate_up" else (32, 64)  # (out, in)
        assert tuple(tensor.matrix(3).shape) == shape
        matrix = weight_matrix(model, f"{name}[3]")
        assert matrix is not None
        assert matrix.data_ptr() == tensor.parameter[3].data_ptr()
        assert weight_matrix(model, f"{name}[4]") is None
        assert weight_matrix(model, f"{name}_of_another[0]") is None


def test_the_number_of_weights_has_the_experts():
    model = FAMILIES["gpt-oss"].tiny()
    norms_and_biases = sum(p.numel() for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("bias"))
    assert weight_count(model) == sum(p.numel() for p in model.parameters()) - norms_and_biases
    assert 2 * sum(t.parameter.numel() for t in experts(model).values()) > weight_count(model)


def test_a_layer_whose_weight_is_read_without_a_call_is_no_target():
    model = FAMILIES["Mamba"].tiny()
    assert {name.split(".")[-1] for name in uncalled(model, linears(model))} == {"dt_proj"}
    assert not any(name.endswith("dt_proj") for name in target_linears(model, ["all"]))
    with pytest.raises(BadInput, match=r"among the targets \['dt_proj'\]; its layers have: o, qkv, x_proj"):
        target_linears(model, ["dt_proj"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj[3]", "gate_up"),
        ("model.layers.0.mlp.experts.down_proj[12]", "down"),
        ("deberta.encoder.layer.0.attention.self.query_proj", "q"),
        ("transformer.encoder.block.0.layer.1.DenseReluDense.wo", "down"),
        ("model.layers.0.self_attn.q_b_proj", "q"),
    ],
)
def test_roles(name, expected):
    assert role(name) == expected
