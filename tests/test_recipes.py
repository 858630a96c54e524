"""Each command of docs/recipes.md, planned on random weights of the same widths with few layers."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lit_sparse import cli
from lit_sparse.places import configs_folder

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^lit-sparse fit (.+)$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
SHAPES = {"meta-llama/Llama-3.2-1B": "llama-3.2-1b", "meta-llama/Llama-3.1-8B": "llama-3-8b"}
SMOLLM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
MINILM = {"model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}


def shape(base: str | None, task: str) -> dict:
    """The config.json of a base with two layers, and of the demo models where none is named."""
    if base is not None:
        config = json.loads((ROOT / "benchmarks" / "gpu" / f"{SHAPES[base]}.json").read_text())
    elif task == "classify":
        config = {**MINILM, "vocab_size": 30522, "architectures": ["BertForSequenceClassification"]}
    else:
        config = {**SMOLLM, "model_type": "llama", "vocab_size": 49152, "architectures": ["LlamaForCausalLM"]}
    return {**config, "num_hidden_layers": 2}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_can_be_planned(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    _, method, _, recipe, *rest = words
    base = rest[rest.index("--model.base") + 1] if "--model.base" in rest else None
    Path("config.json").write_text(json.dumps(shape(base, Path(recipe).stem)))
    rest = [word for word in rest if word not in ("--model.base", base)]
    few = ["--trainer.accumulate_grad_batches", "1"] if "card" in recipe else []
    status = cli.run(["plan", method, "--config", recipe, *rest, "--model.base", "config.json", "--card", "24", *few])
    told = capsys.readouterr().out
    assert status == 0
    assert f"{Path(method).stem} fits 24 GB" in told
    assert "8 ranks of DDP" in told or "eight" not in recipe


def test_every_recipe_is_a_command():
    shipped = {f"recipes/{path.name}" for path in (configs_folder() / "recipes").glob("*.yaml")}
    assert shipped == {shlex.split(command)[3] for command in COMMANDS}
    assert len(shipped) == 5
