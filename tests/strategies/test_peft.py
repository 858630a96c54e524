"""PEFT's adapters: untrained tensors in checkpoints, starts from the base, start_from, and refusals."""

import copy
import dataclasses
from typing import ClassVar

import peft
import pytest
import torch
from peft import LoraConfig, VeloraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from benchmarks.tiny_models import FAMILIES
from lit_sparse.anatomy import experts, linears, matrix
from lit_sparse.errors import BadInput
from lit_sparse.modules import CausalLM, Classifier
from lit_sparse.optim import trainable
from lit_sparse.strategies import L2SP, PEFT, RecordImportance, UpdateStrategy, compose
from lit_sparse.strategies.base import ALONE, no_probe
from lit_sparse.testing import TINY, contract, tiny_encoder, tiny_llm

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def lora(**settings):
    return PEFT(LoraConfig(r=4, target_modules="all-linear", **settings))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4"])
def test_pissa_moves_the_largest_singular_parts_into_the_adapter(kind, how):
    model = tiny_llm(kind)
    before = {name: matrix(linear).detach().clone() for name, linear in linears(model).items()}
    lora(init_lora_weights=how, lora_alpha=8).attach(model, no_probe, ALONE)
    for name, weight in before.items():
        layer = model.get_submodule(name)
        values = torch.linalg.svdvals(weight)
        rest, adapter = matrix(layer.get_base_layer()), layer.get_delta_weight("default")
        part = adapter.t() if kind == "gpt2" else adapter
        torch.testing.assert_close(rest + part, weight, rtol=0, atol=1e-6)
        if how == "pissa":
            torch.testing.assert_close(torch.linalg.svdvals(rest)[:4], values[4:8], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_of_random_numbers_is_restored_to_the_bit(dtype):
    """The generator and the signs of singular vectors must not matter: a checkpoint may move to another device."""
    first, second = tiny_llm("llama").to(dtype), tiny_llm("llama").to(dtype)
    given, restored = (lora(init_lora_weights="pissa_niter_2") for _ in range(2))
    given.attach(first, no_probe, ALONE)
    state = copy.deepcopy(given.state_dict())
    torch.manual_seed(7)
    restored.restore(second, state, ALONE)
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    sizes = sum(value.numel() for factors in state["start"].values() for value in factors.values())
    assert sizes == sum(parameter.numel() for _, parameter in trainable(first))


def test_olora():
    contract(lambda: [lora(init_lora_weights="olora")], "llama")
    with pytest.raises(BadInput, match="olora was asked for on a Conv1D"):
        lora(init_lora_weights="olora").attach(tiny_llm("gpt2"), no_probe, ALONE)


@pytest.mark.parametrize("how", ["batch_average", "batch_average_once", "random"])
def test_velora_keeps_its_projections(how):
    contract(lambda: [lora(velora_config=VeloraConfig(num_groups=8, init_type=how))], "llama")
    first, second = tiny_llm("llama"), tiny_llm("llama")
    given, restored = (lora(velora_config=VeloraConfig(num_groups=8, init_type=how)) for _ in range(2))
    given.attach(first, no_probe, ALONE)
    ids = [torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    first.train()(input_ids=ids[0])
    restored.restore(second, copy.deepcopy(given.state_dict()), ALONE)
    name = "model.layers.1.mlp.up_proj"
    kept = first.get_submodule(name).lora_velora_embed["default"].clone()
    assert kept.any()
    assert torch.equal(second.get_submodule(name).lora_velora_embed["default"], kept)
    second.train()(input_ids=ids[1])
    stays = torch.equal(second.get_submodule(name).lora_velora_embed["default"], kept)
    assert stays == (how != "batch_average")


def test_shira_keeps_its_places():
    """Wherever they came from: here from another seed than the one that restores."""
    given, restored = (PEFT(peft.ShiraConfig(r=4, target_modules="all-linear", random_seed=seed)) for seed in (1, 2))
    first, second = tiny_llm("llama"), tiny_llm("llama")
    given.attach(first, no_probe, ALONE)
    restored.restore(second, given.state_dict(), ALONE)
    for name in linears(tiny_llm("llama")):
        ours, theirs = (model.get_submodule(name).shira_indices["default"] for model in (first, second))
        assert torch.equal(ours, theirs)


def test_the_state_of_plain_lora_has_scales_alone():
    model, update = tiny_llm("llama"), lora(lora_alpha=8)
    update.attach(model, no_probe, ALONE)
    scales = {f"base_model.model.{name}": 2.0 for name in linears(tiny_llm("llama"))}
    assert update.state_dict() == {"fixed": {}, "start": {}, "scales": scales}


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({}, "kept"),
        ({"init_lora_weights": "pissa"}, "rewritten"),
        ({"init_lora_weights": "pissa_niter_4"}, "rewritten"),
        ({"init_lora_weights": "olora"}, "rewritten"),
        ({"init_lora_weights": "orthogonal"}, "kept"),
        ({"bias": "all"}, "trained"),
    ],
    ids=str,
)
def test_base_says_what_becomes_of_its_weights(settings, base):
    model, update = tiny_llm("qwen2"), lora(**settings)
    assert update.base == base
    before = {name: matrix(linear).detach().clone() for name, linear in linears(model).items()}
    update.attach(model, no_probe, ALONE)
    same = [torch.equal(matrix(model.get_submodule(n).get_base_layer()), weight) for n, weight in before.items()]
    assert not any(same) if base == "rewritten" else all(same)
    own = [name for name, _ in trainable(model) if "lora" not in name]
    assert bool(own) == (base == "trained")


@pytest.mark.parametrize("start", ["eva", "corda", "loftq"])
def test_data_driven_initialisations_are_refused(start):
    config = LoraConfig(target_modules="all-linear")
    config.init_lora_weights = start
    with pytest.raises(BadInput, match=f"init_lora_weights is {start}, which needs a program of PEFT's"):
        PEFT(config)


def keyed(key: str) -> LoraConfig:
    """A configuration with a key that another kind of adapter has."""
    config = LoraConfig()
    setattr(config, key, True)
    return config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM"),
            "alora_invocation_tokens finds its",
        ),
        (keyed("use_asa"), "use_asa chooses its subspaces in a call after each step"),  # AdaMSS needs scikit-learn
        (keyed("monteclora_config"), "monteclora_config adds losses of its distributions"),
        (peft.AdaLoraConfig(total_step=10, target_r=4, init_r=8), "AdaLoraConfig moves ranks between layers in a call"),
        (peft.ShadowConfig(), "ShadowConfig adds the loss of its shadow model, and PEFT"),
    ],
    ids=["alora", "adamss", "monteclora", "adalora", "shadow"],
)
def test_adapters_with_a_part_beside_their_layers_are_refused(config, says):
    with pytest.raises(BadInput, match=says):
        PEFT(config)


def test_minor_components_are_of_the_bases_weights():
    assert lora().attaches_to == "shapes"
    assert lora(init_lora_weights="mica").attaches_to == "whole"


def test_refusals_of_peft_become_one_sentence():
    with pytest.raises(BadInput, match=r"PEFT cannot put it on LlamaForCausalLM \(Target modules .*nowhere.*; give"):
        PEFT(LoraConfig(target_modules=["nowhere"])).attach(tiny_llm("llama"), no_probe, ALONE)


@dataclasses.dataclass
class Anchor(UpdateStrategy):
    """Compares with the base's weights."""

    needs: ClassVar = frozenset({"base"})


def test_a_strategy_that_needs_the_base_refuses_one_that_rewrites_it():
    assert len(compose([Anchor(), lora()])) == 2
    for pair in ([Anchor(), lora(init_lora_weights="pissa")], [lora(init_lora_weights="pissa"), Anchor()]):
        with pytest.raises(BadInput, match=r"Anchor and PEFT cannot be combined: Anchor needs .*init_lora_weights"):
            compose(pair)


# ---- going on from an earlier run


def two(config=LoraConfig, **settings):
    return PEFT(config(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}))


def written(path, module):
    """Write the checkpoint of a run of `module` that moved every trainable parameter; return their final values."""
    module.build()
    module._attach()
    ends = {}
    for name, parameter in trainable(module.model):
        parameter.data += torch.randn_like(parameter)
        ends[name] = parameter.detach().clone()
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return ends


@pytest.mark.parametrize("full", [False, True])
def test_start_from_refuses_another_configuration(full, tmp_path):
    path = tmp_path / "run.ckpt"
    ends = written(path, CausalLM(base=tiny_llm(), updates=[two()], full_checkpoints=full))
    went_on = tiny_llm()
    dataclasses.replace(two(), start_from=str(path)).attach(went_on, no_probe, ALONE)
    assert all(torch.equal(value, ends[name]) for name, value in trainable(went_on))
    for settings, sentence in (
        ({"lora_alpha": 32}, r"whose adapter has the scale 2 at .*layers\.0.*q_proj, but 8 here"),
        ({"use_rslora": True}, "has the scale 2 at .*, but 4 here"),
        ({"target_modules": ["q_proj"]}, r"that run trained .*v_proj.*, and this one does not"),
    ):
        with pytest.raises(BadInput, match=sentence):
            dataclasses.replace(two(**settings), start_from=str(path)).attach(tiny_llm(), no_probe, ALONE)


def test_start_from_refuses_to_drop_trained_biases(tmp_path):
    path = tmp_path / "run.ckpt"
    written(path, CausalLM(base=tiny_llm("qwen2"), updates=[two(bias="all")]))
    with pytest.raises(BadInput, match=r"that run trained .*bias, and this one does not"):
        dataclasses.replace(two(), start_from=str(path)).attach(tiny_llm("qwen2"), no_probe, ALONE)


def test_start_from_accepts_a_run_without_scales(tmp_path):
    path = tmp_path / "run.ckpt"
    written(path, CausalLM(base=tiny_llm(), updates=[two()]))
    saved = torch.load(path)
    del saved["lit_sparse"]["updates"][0]["state"]["scales"]
    torch.save(saved, path)
    dataclasses.replace(two(), start_from=str(path)).attach(tiny_llm(), no_probe, ALONE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_classifier_goes_on_with_its_head(precision, tmp_path):
    """In fp32, also where the base that it comes from is in bf16."""
    dtype, adapter = getattr(torch, precision), two(target_modules=["query", "value"])
    ends = written(tmp_path / "run.ckpt", Classifier(tiny_encoder().to(dtype), updates=[adapter], precision=precision))
    update = dataclasses.replace(adapter, start_from=str(tmp_path / "run.ckpt"))
    second = Classifier(tiny_encoder().to(dtype), updates=[update], precision=precision)
    second.build()
    second._attach()
    assert "classifier.weight" in ends
    assert ends.keys() == dict(trainable(second.model)).keys()
    assert all(torch.equal(value, ends[name]) for name, value in trainable(second.model))


# ---- mixtures of experts, and what all-linear stands for


def all_linear_with(config, family):
    model = FAMILIES[family].tiny()
    update = PEFT(config)
    update.attach(model, no_probe, ALONE)
    return model, update


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of PEFT's own, for older checkpoints
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss", "Llama-4"])
def test_lora_on_all_linear_reaches_the_experts(family):
    names = set(experts(FAMILIES[family].tiny()))
    model, _ = all_linear_with(LoraConfig(r=2, target_modules="all-linear"), family)
    wrapped = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert sum(wrapper.parameter_name in ("gate_up_proj", "down_proj") for wrapper in wrapped) == len(names)
    assert all(not isinstance(m, LoraLayer) for m in model.modules() if type(m).__name__ == "Llama4Router")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_layers_that_peft_leaves_out_are_named():
    """It takes DeepSeek's shared experts for the routed ones, which have the same names in older checkpoints."""
    with pytest.warns(UserWarning, match=r"PEFT puts no adapter on \d+ layers of .*mlp"):
        all_linear_with(LoraConfig(r=2, target_modules="all-linear"), "DeepSeek-V3")


@pytest.mark.parametrize("config", [peft.GloraConfig, peft.ShiraConfig])
def test_an_adapter_that_cannot_reach_experts_says_so(config):
    name = config.__name__
    with pytest.raises(BadInput, match=rf"{name} with target_modules all-linear does not reach the experts of Mixtral"):
        all_linear_with(config(r=2, target_modules="all-linear"), "Mixtral")
    all_linear_with(config(r=2, target_modules=["q_proj", "v_proj"]), "Mixtral")


def test_pissa_does_not_split_experts():
    config = {"r": 2, "init_lora_weights": "pissa"}
    with pytest.raises(BadInput, match=r"init_lora_weights pissa was asked for on .*; give the names of linear"):
        all_linear_with(LoraConfig(target_modules="all-linear", **config), "gpt-oss")
    all_linear_with(LoraConfig(target_modules=["q_proj"], **config), "gpt-oss")


@pytest.mark.parametrize("update", [L2SP(), RecordImportance()])
def test_products_of_experts_are_not_penalised_or_recorded(update):
    model, _ = all_linear_with(LoraConfig(r=2, target_modules="all-linear"), "gpt-oss")
    with pytest.raises(BadInput, match=rf"{type(update).__name__}: .* adapts \w+, one parameter with several matrices"):
        update.attach(model, no_probe, ALONE)


def test_all_linear_stays_out_of_a_vision_tower():
    model, _ = all_linear_with(LoraConfig(r=2, target_modules="all-linear"), "Gemma-3 (multimodal)")
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 3 * 7
    assert all(".language_model." in name for name in adapted)
