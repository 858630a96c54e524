"""Exported folders are read alike by transformers 4 and 5: the keys written, and where 4 is installed, the logits.

The second half needs an environment with the older transformers: LIT_SPARSE_TRANSFORMERS4 is the path of its Python.

    python -m venv old && old/bin/pip install torch transformers==4.57.6 peft==0.17.1
    LIT_SPARSE_TRANSFORMERS4=old/bin/python make test ARGS=tests/export/test_compatibility.py
"""

import json
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lit_sparse.data.examples import Examples
from lit_sparse.export.compatibility import READ_BY_OLDEST, add_old_keys, make_loadable, readable_by_both
from lit_sparse.export.folder import export
from lit_sparse.runs import load_run
from tests.export.old_reader import TEXT, TOKENS
from tests.export.test_folder import METHODS, load, lora, make_base, make_run
from tests.export.test_generate import add_tokenizer

OLD = os.environ.get("LIT_SPARSE_TRANSFORMERS4")
needs_old = pytest.mark.skipif(OLD is None, reason="LIT_SPARSE_TRANSFORMERS4 names no Python with transformers 4.57.6")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LAYERS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 54321.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 4321.0},
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 5e4}


@dataclass(frozen=True)
class Family:
    """A model type, its settings beside SIZES, and what transformers 4 is to find in config.json."""

    model_type: str
    settings: dict[str, Any]
    old: dict[str, Any]


FAMILIES = {
    "llama": Family(
        "llama",
        HEADS | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, **LLAMA3}},
        {"rope_theta": 1e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "qwen2": Family(
        "qwen2",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6}},
        {"rope_theta": 1e6},
    ),
    "gemma3": Family(
        "gemma3_text",
        HEADS | {"rope_parameters": TWO_ROPES, "layer_types": LAYERS, "sliding_window": 8},
        {
            "rope_theta": 54321.0,
            "rope_local_base_freq": 4321.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "gpt-neox": Family(
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5, "rope_scaling": None},
    ),
    "stablelm": Family(
        "stablelm",
        {"num_key_value_heads": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}},
        {"rope_theta": 5e4, "partial_rotary_factor": 0.75},
    ),
    "phi3": Family(
        "phi3",
        {"num_key_value_heads": 2, "rope_parameters": LONG, "original_max_position_embeddings": 64},
        {
            "rope_theta": 5e4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
    ),
    "olmo2": Family(
        "olmo2",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "qwen3-moe": Family(
        "qwen3_moe",
        HEADS | EXPERTS | {"num_local_experts": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"num_experts": 6, "rope_theta": 5e4},
    ),
    "deepseek-v3": Family(
        "deepseek_v3",
        EXPERTS
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
        | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_theta": 5e4},
    ),
    "granite-hybrid": Family(
        "granitemoehybrid",
        {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 16}
        | {"mamba_d_state": 16, "num_local_experts": 4, "shared_intermediate_size": 32, "num_key_value_heads": 2},
        {
            "layer_types": ["mamba", "attention"] * 2,
            "time_step_limit": [0.0, torch.finfo(torch.float32).max],
        },
    ),
    "gpt2": Family("gpt2", {}, {}),
    "modernbert": Family(
        "modernbert",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "local_attention": 8, "num_labels": 3}
        | {"rope_parameters": TWO_ROPES | {"full_attention": {"rope_type": "default", "rope_theta": 5e4}}},
        {"global_rope_theta": 5e4, "local_rope_theta": 4321.0, "global_attn_every_n_layers": 2},
    ),
}
CLASSIFIERS = ("modernbert",)
UPDATES = {"smt": METHODS["smt"], "lora": lora(target_modules="all-linear"), "dora": METHODS["dora"]}


def tiny(family: Family) -> Any:
    """Return a random model of a family; the weights are large enough for the rotations to matter."""
    config = CONFIG_MAPPING[family.model_type](**SIZES | family.settings)
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if family.model_type in CLASSIFIERS else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return model


def save(model: Any, folder: Path) -> dict[str, Any]:
    """Save `model` as an export does; return config.json."""
    model.save_pretrained(folder)
    add_old_keys(folder, model.config)
    return json.loads((folder / "config.json").read_text())


def meaning(config: Any) -> dict[str, Any]:
    """Return a configuration without what says the same twice."""
    found = config.to_dict()
    if found.get("time_step_limit"):
        found["time_step_limit"] = [min(limit, torch.finfo(torch.float32).max) for limit in found["time_step_limit"]]
    return found


# ---- what is written


@pytest.mark.parametrize("name", FAMILIES)
def test_old_keys_stand_beside_new_ones(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = tiny(family)
    document = save(model, tmp_path)
    assert {key: document[key] for key in family.old} == family.old
    assert document["dtype"] == document["torch_dtype"] == "float32"


def test_transformers_5_reads_what_it_read_before() -> None:
    for model_type in sorted(READ_BY_OLDEST):
        config = CONFIG_MAPPING[model_type]()
        rope = getattr(config, "rope_parameters", None) or {}
        for part in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
            if "rope_theta" in part:
                part["rope_theta"] = 54321.0
        document = readable_by_both(config, json.loads(config.to_json_string()))
        before, after = meaning(config), meaning(type(config).from_dict(json.loads(json.dumps(document))))
        assert {key: after[key] for key in before} == before, model_type


def test_parts_of_a_configuration_have_old_keys_too(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma3"](
        text_config={**SIZES, **HEADS, "rope_parameters": TWO_ROPES, "layer_types": LAYERS}
    )
    config.save_pretrained(tmp_path)
    add_old_keys(tmp_path, config)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["text_config"]["rope_theta"] == 54321.0
    assert document["text_config"]["rope_local_base_freq"] == 4321.0
    assert "rope_theta" not in document
    assert AutoConfig.from_pretrained(tmp_path).text_config.to_dict() == config.text_config.to_dict()


def test_a_tokenizer_that_both_versions_read(tmp_path: Path) -> None:
    add_tokenizer(tmp_path / "base", chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", "<b>"]})
    tokenizer.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["extra_special_tokens"] == [
        "<a>",
        "<b>",
    ]
    make_loadable(tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<a>", "<b>"]
    assert "extra_special_tokens" not in written
    assert written["chat_template"] == tokenizer.chat_template == (tmp_path / "out" / "chat_template.jinja").read_text()
    assert not {"backend", "is_local", "local_files_only"} & written.keys()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.extra_special_tokens == ["<a>", "<b>"]
    assert (again.special_tokens_map, again.chat_template) == (tokenizer.special_tokens_map, tokenizer.chat_template)
    assert again("t5 <a> t6").keys() == tokenizer("t5 <a> t6").keys()


def test_named_templates_stand_in_both_places(tmp_path: Path) -> None:
    add_tokenizer(tmp_path, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": str(tokenizer.chat_template), "tool_use": "tools"}
    tokenizer.save_pretrained(tmp_path / "out")
    make_loadable(tmp_path / "out", tokenizer)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["chat_template"][1] == {"name": "tool_use", "template": "tools"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("to", "method"), [("hf", "smt"), ("delta", "smt"), ("adapter", "lora")])
def test_files_have_the_mode_of_new_files(to: Any, method: str, tmp_path: Path) -> None:
    add_tokenizer(make_base(tmp_path / "base", "llama"), chat=True)
    run = make_run(tmp_path, "llama", UPDATES[method])
    previous = os.umask(0o027)
    try:
        output = export(run.folder, to)
        Examples.of([]).save(tmp_path / "cache" / "examples.npz")
    finally:
        os.umask(previous)
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in [*files, tmp_path / "cache" / "examples.npz"]} == {0o640}


# ---- what the older version reads

EXPORTS = [("hf", "smt"), ("adapter", "lora"), ("adapter", "dora")]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders that the older transformers has read, with the logits of this one beside them."""
    root = tmp_path_factory.mktemp("read")
    for name, family in FAMILIES.items():
        model = tiny(family)
        save(model, root / name)
        with torch.no_grad():
            torch.save(model(input_ids=torch.tensor([TOKENS])).logits, root / name / "new.pt")
    for to, method in EXPORTS:
        folder = root / f"run-{method}"
        model = tiny(FAMILIES["llama"])
        save(model, folder / "base")
        add_tokenizer(folder / "base", chat=True)
        run = make_run(folder, "llama", UPDATES[method])
        export(run.folder, to, root / f"{to}-{method}")  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            module, _ = load_run(run.folder)
            torch.save(module.build()(input_ids=torch.tensor([TOKENS])).logits, root / f"{to}-{method}" / "new.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    folders = [root / name for name in (*FAMILIES, *(f"{to}-{method}" for to, method in EXPORTS))]
    script = Path(__file__).with_name("old_reader.py")
    done = subprocess.run([str(OLD), script, *folders], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@needs_old
@pytest.mark.parametrize("name", [*FAMILIES, *(f"{to}-{method}" for to, method in EXPORTS)])
def test_the_older_version_computes_the_same(name: str, read: Path) -> None:
    assert json.loads((read / name / "old.json").read_text())["transformers"].startswith("4.57.")
    expected, found = torch.load(read / name / "new.pt"), load_file(read / name / "old.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_old
def test_the_older_version_speaks_the_same(read: Path) -> None:
    folder = read / "hf-smt"
    found, tokenizer = json.loads((folder / "old.json").read_text()), AutoTokenizer.from_pretrained(folder)
    assert found["ids"] == tokenizer(TEXT)["input_ids"]
    assert found["keys"] == sorted(tokenizer(TEXT))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "t5"}], tokenize=False)
    model = load(folder)
    assert found["chat"] == chat
    assert found["ends"] == [tokenizer.eos_token, model.generation_config.eos_token_id]
    inputs = tokenizer(TEXT, return_tensors="pt")
    assert found["text"] == model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
