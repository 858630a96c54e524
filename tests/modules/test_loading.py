"""Bases whose files make no model, or not the whole one: each is refused in a sentence."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
)

from lit_sparse.data.encoding import load_tokenizer
from lit_sparse.data.synthetic import vocabulary
from lit_sparse.errors import BadInput
from lit_sparse.library_errors import due_to_files
from lit_sparse.modules import loading
from lit_sparse.modules.hollow import Hollow
from lit_sparse.modules.loading import load_base, load_hollow
from lit_sparse.testing import tiny_llm

PROJECTION = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_llm("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def configure(base: Path, **fields) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(base: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors in the file of weights; None takes one away."""
    values = load_file(base / "model.safetensors") | tensors
    kept = {name: value for name, value in values.items() if value is not None}
    save_file(kept, base / "model.safetensors", {"format": "pt"})


def load(base: Path | str):
    return load_base(AutoModelForCausalLM, str(base), torch.float32, None)


# ---- weights that the files lack


def test_files_without_a_weight_are_refused(base):
    change(base, **{PROJECTION: None})
    with pytest.raises(
        BadInput, match=rf"'.*/base' lack 1 of the weights that its config.json asks for: {PROJECTION};"
    ):
        load(base)
    assert isinstance(load_hollow(AutoModelForCausalLM, str(base), torch.float32, None), str)  # then loaded whole


def test_a_configuration_of_more_layers_than_the_files_have_is_refused(base):
    configure(base, num_hidden_layers=10)
    with pytest.raises(BadInput, match=r"lack 63 of the weights .*: model\.layers\.3\.[^,]*, .* and 60 more; correct"):
        load(base)


def test_files_of_other_shapes_are_refused(base):
    configure(base, vocab_size=40)
    with pytest.raises(
        BadInput, match=r"have lm_head\.weight in the shape \(96, 32\), .* for \(40, 32\) \(2 weights differ\)"
    ):
        load(base)


def test_a_missing_language_model_head_is_refused(base):
    tiny_llm("llama").model.save_pretrained(base)
    with pytest.raises(BadInput, match=r"lack 1 of the weights .*: lm_head\.weight;"):
        load(base)


def test_a_tied_head_and_a_bare_configuration_are_no_loss(base):
    assert load(base / "config.json").num_parameters()
    model = tiny_llm("qwen2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    model = load(base)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # pyright: ignore


def test_an_encoder_without_a_pooler_gets_one_with_its_new_head(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModelForMaskedLM.from_config(BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path)
    assert not any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    how = AutoModelForSequenceClassification, str(tmp_path), torch.float32, None
    whole, made = load_base(*how), load_hollow(*how)
    assert isinstance(made, Hollow)
    assert torch.equal(made.model.classifier.weight, whole.classifier.weight)  # pyright: ignore
    change(tmp_path, **{"bert.embeddings.LayerNorm.weight": None})
    with pytest.raises(BadInput, match=r"lack 1 of the weights .*: bert\.embeddings\.LayerNorm\.weight;"):
        load_base(*how)


# ---- configurations of no model


CONFIGS = [
    {"num_attention_heads": 3},
    {"initializer_range": -1},
    {"tie_word_embeddings": "yes"},
    {"eos_token_id": [1, "x"]},
    {"rope_parameters": "x"},
    {"dtype": "float99"},
    {"num_attention_heads": 0},
]
OF_MODELS = [
    {"num_key_value_heads": 0},
    {"num_key_value_heads": 3},
    {"head_dim": 0},
    {"pad_token_id": 100000},
    {"hidden_size": -8},
    {"hidden_size": 0},
    {"num_hidden_layers": 0},
    {"vocab_size": 1},
]


@pytest.mark.parametrize("fields", [*CONFIGS, *OF_MODELS], ids=str)
@pytest.mark.parametrize("place", ["", "config.json"], ids=["folder", "bare"])
def test_a_configuration_that_makes_no_model_is_refused(base, fields, place):
    configure(base, **fields)
    for loaded in (load_base, load_hollow):
        with pytest.raises(BadInput, match="base"):
            loaded(AutoModelForCausalLM, str(base / place), torch.float32, None)


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
@pytest.mark.parametrize("read", [load_tokenizer, vocabulary])
def test_a_malformed_configuration_is_refused_by_all_that_read_it(base, read, fields):
    configure(base, **fields)
    with pytest.raises(BadInput, match="could be loaded"):
        read(str(base))


# ---- files of weights


@pytest.mark.parametrize("place", [5, "../../rows.jsonl", None])
def test_an_index_that_names_no_weights_is_refused(base, tmp_path, place):
    (tmp_path.parent / "rows.jsonl").write_text('{"text": "a"}\n')
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {PROJECTION: place}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="base"):
        load(base)


class Runs:
    """Makes a file when it is unpickled without care."""

    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize(
    "content", [pickle.dumps({"a": Runs()}, protocol=2), b"", b"\0" * 100], ids=["code", "empty", "zeros"]
)
def test_pickled_weights_are_refused_and_no_code_is_run(base, content, monkeypatch):
    monkeypatch.chdir(base)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BadInput, match="base"):
        load(base)
    assert not Path("it-ran").exists()


# ---- what is not about files


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_lack_of_memory_is_not_told_as_a_bad_base(base, monkeypatch, error):
    monkeypatch.setattr(AutoConfig, "from_pretrained", failing(error, "transformers.models.auto"))
    with pytest.raises(type(error)):
        load(base)


@pytest.mark.parametrize("error", [TypeError("ours"), ZeroDivisionError("ours"), RuntimeError("ours")])
def test_errors_of_our_own_are_not_told_as_a_bad_base(base, monkeypatch, error):
    monkeypatch.setattr(loading, "check_files", failing(error, "lit_sparse.modules.loading"))
    with pytest.raises(type(error), match="ours"):
        load(base)


def test_below_transformers_means_that_no_code_of_ours_was_called_since():
    for through, found in {"transformers.models": True, "lit_sparse.modules": False, "tests": False}.items():
        with pytest.raises(AssertionError) as met:
            calling(failing(AssertionError("no"), "torch.nn"), through)()
        assert due_to_files(met.value) is found


def failing(error: Exception, module: str):
    """A function that raises an error, in a module of this name."""
    scope = {"__name__": module, "error": error}
    exec("def fail(*_, **__):\n    raise error", scope)
    return scope["fail"]


def calling(function, module: str):
    """A function that calls another, in a module of this name."""
    scope = {"__name__": module, "function": function}
    exec("def call():\n    function()", scope)
    return scope["call"]
