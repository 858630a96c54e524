"""Hollow models: rows that are read or drawn are those of a model that was loaded whole, or it is said why not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.tiny_models import FAMILIES
from lit_sparse.modules.hollow import Hollow, build_hollow, draw_units, is_hollow
from lit_sparse.modules.loading import load_base, load_hollow
from lit_sparse.testing import tiny_encoder, tiny_llm

READ = ["Llama", "Gemma-2", "GPT-2", "GPT-J", "gpt-oss", "Mamba", "ALBERT", "BART"]
"""Tied heads, biases, positions that the constructor computes, fused experts, states, shared layers, a decoder too."""


def auto_of(name: str):
    return AutoModelForCausalLM if FAMILIES[name].task == "CausalLM" else AutoModelForSequenceClassification


def values_of(made: Hollow) -> dict[str, torch.Tensor]:
    """The values that all ranks together read, in pieces of three rows, and of the parameters that are not hollow."""
    own = dict(made.parameters())
    found = {name: parameter.detach() for name, parameter in own.items() if not is_hollow(parameter)}
    for name, rows in made._source():
        starts = range(0, len(own[name]), 3)
        whole = torch.cat([rows(start, min(start + 3, len(own[name]))) for start in starts])
        found[name] = whole.to(own[name].dtype)
    return found


def assert_same(made: Hollow, whole: nn.Module) -> None:
    got, wanted = values_of(made), dict(whole.named_parameters())
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name
    buffers = dict(made.model.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, value in whole.named_buffers():
        assert buffers[name].dtype == value.dtype
        assert torch.equal(buffers[name], value), name


@pytest.mark.parametrize("name", READ)
def test_rows_in_files_are_those_of_the_loaded_model(name, tmp_path):
    base = str(FAMILIES[name].write(tmp_path / "base"))
    whole = load_base(auto_of(name), base, torch.bfloat16, None)
    made = load_hollow(auto_of(name), base, torch.bfloat16, None)
    assert isinstance(made, Hollow), made
    hollow = [p for p in made.model.parameters() if p.numel() > 1]
    assert all(parameter.untyped_storage().nbytes() == 2 for parameter in hollow)
    assert_same(made, whole)
    if whole.can_generate():
        assert made.model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_a_missing_head_is_drawn_as_for_a_whole_model(tmp_path):
    AutoModel.from_config(tiny_encoder().config).save_pretrained(tmp_path / "bare")
    how = AutoModelForSequenceClassification, str(tmp_path / "bare"), torch.float32, None
    made = load_hollow(*how, config_options={"num_labels": 5})
    assert isinstance(made, Hollow), made
    assert_same(made, load_base(*how, config_options={"num_labels": 5}))


def test_files_of_several_parts_are_read(tmp_path):
    model = tiny_llm("llama")
    model.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    made = load_hollow(AutoModelForCausalLM, str(tmp_path / "parts"), torch.float32, None)
    assert isinstance(made, Hollow), made
    assert_same(made, model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_drawn_rows_are_those_of_a_whole_random_model(kind, tmp_path):
    tiny_llm(kind).config.save_pretrained(tmp_path)
    how = AutoModelForCausalLM, str(tmp_path / "config.json"), torch.float32, None
    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole, made = load_base(*how), load_hollow(*how)
    assert isinstance(made, Hollow), made
    assert_same(made, whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(is_hollow(parameter) for parameter in whole.parameters())
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(whole.config).named_parameters())
    for name, parameter in whole.named_parameters():  # as large as transformers draws them, and its constants
        constant = theirs[name].numel() == 1 or not theirs[name].std() > 0
        assert torch.equal(parameter, theirs[name]) if constant else 0.7 < parameter.std() / theirs[name].std() < 1.4


def test_one_unit_at_a_time_is_drawn():
    config = tiny_llm("llama").config
    model = build_hollow(AutoModelForCausalLM, config, {"dtype": torch.float32})
    filled = [sum(not is_hollow(p) for p in model.parameters()) for _ in draw_units(model, 0)]
    layer = len(list(model.model.layers[0].parameters()))
    assert filled == [layer, 2 * layer, 3 * layer, len(list(model.parameters()))]


def test_what_must_be_read_whole_says_why(tmp_path):
    reasons = {
        "OLMoE": "transformers converts model.layers.0.mlp.experts.0.down_proj.weight of its files",
        "no files": "it has no safetensors files",
        "lacking": "its files have no model.norm.weight",
        "other shape": "model.norm.weight in its files is (31,), and in the model (32,)",
    }
    FAMILIES["OLMoE"].write(tmp_path / "OLMoE")
    tiny_llm("llama").save_pretrained(tmp_path / "no files")
    for name in ("lacking", "other shape"):
        shutil.copytree(tmp_path / "no files", tmp_path / name)
        values = load_file(tmp_path / name / "model.safetensors")
        norm = values.pop("model.norm.weight")
        save_file(
            values | ({} if name == "lacking" else {"model.norm.weight": norm[1:].clone()}),
            tmp_path / name / "model.safetensors",
            {"format": "pt"},
        )
    (tmp_path / "no files" / "model.safetensors").unlink()
    for name, reason in reasons.items():
        found = load_hollow(AutoModelForCausalLM, str(tmp_path / name), torch.float32, None)
        assert isinstance(found, str), name
        assert found.startswith(reason)


def test_the_configuration_is_that_of_the_files(tmp_path):
    tiny_llm("llama").save_pretrained(tmp_path)
    made = load_hollow(AutoModelForCausalLM, str(tmp_path), torch.float32, "eager")
    assert isinstance(made, Hollow)
    whole = load_base(AutoModelForCausalLM, str(tmp_path), torch.float32, "eager")
    assert made.model.config.to_dict() == whole.config.to_dict()
    assert made.model.config._attn_implementation == "eager"
    assert AutoConfig.from_pretrained(tmp_path).architectures == made.model.config.architectures
