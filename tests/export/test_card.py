"""A model card says what the record of its run says, in the form that the Hub reads, and nothing else."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from transformers import __version__ as transformers_version

from lit_sparse.errors import BadInput
from lit_sparse.export.card import card, dataset, license_of, loading, on_hub, read_record
from lit_sparse.export.folder import export
from lit_sparse.modules import CausalLM
from lit_sparse.strategies import UpdateStrategy
from lit_sparse.testing import tiny_llm
from lit_sparse_profiling.record import RunRecord
from lit_sparse_profiling.sections import Device, Memory, ModelSize
from tests.export.test_folder import METHODS, Run, load, logits, lora, make_run

RECORD = RunRecord(
    name="try-1",
    command="lit-sparse fit --config smt.yaml --model.lr 1e-2",
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    device=Device("cpu", "Xeon"),
    model=ModelSize("base", 2000, 17),
    settings={"model": {"lr": 0.01}, "data": {"init_args": {"train": "openai/gsm8k:test"}}, "seed_everything": 0},
    memory=Memory(3 * 2**29, "VmHWM"),
    outcome={"before": {"heldout_loss": 4.25}, "after": {"heldout_loss": 1.125, "train_loss": 1.5}},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("card")
    made = make_run(root, "llama", METHODS["smt"])
    license = "license: other\nlicense_name: gemma\nlicense_link: LICENSE"
    (made.base / "README.md").write_text(f"---\n{license}\n---\n# Base\n")
    RECORD.write(made.folder / "record.json")
    return made


def test_card_of_a_folder_says_what_the_record_says(run: Run, tmp_path: Path) -> None:
    text = (export(run.folder, output=tmp_path / "out") / "README.md").read_text()
    for said in (
        "# try-1",
        "fine-tuned by SMT, with lit-sparse",
        str(run.base),
        "| heldout loss | 4.2500 | 1.1250 |",
        "| train loss |  | 1.5000 |",
        "17 of 2,000 weights (0.85%)",
        "peak memory of the process: 1.50 GiB",
        "lit-sparse fit --config smt.yaml --model.lr 1e-2",
        "lr: 0.01",
        "torch 2.13.0, transformers 5.23.0",
        "transformers >= 4.57",
    ):
        assert said in text, said
    assert metadata_load(tmp_path / "out" / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit-sparse", "smt"],
        "datasets": ["openai/gsm8k"],
        "license": "other",
        "license_name": "gemma",
        "license_link": "LICENSE",
    }
    ModelCard(text)


def test_the_code_on_the_card_loads_the_export(run: Run, tmp_path: Path) -> None:
    for to, name in (("hf", "model"), ("delta", "base")):
        output = export(run.folder, to, tmp_path / to)  # pyright: ignore[reportArgumentType]
        text = (output / "README.md" if to == "hf" else tmp_path / "delta.md").read_text()
        code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(output)).replace("FILE", str(output))
        lines = [line for line in code.splitlines() if "okenizer = " not in line]  # the tiny base has none
        scope: dict[str, Any] = {}
        exec("\n".join(lines), scope)
        torch.testing.assert_close(logits(scope[name]), run.logits, rtol=0, atol=0)


def test_card_of_an_adapter(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llama", lora(target_modules="all-linear"))
    output = export(run.folder, "adapter")
    assert metadata_load(output / "README.md")["library_name"] == "peft"  # pyright: ignore[reportOptionalSubscript]
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(output))
    scope: dict[str, Any] = {}
    exec(code, scope)
    torch.testing.assert_close(logits(scope["model"]), run.logits, rtol=0, atol=0)


def test_a_model_trained_from_scratch_is_called_so_and_its_delta_finds_its_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    bare = tmp_path / "bare" / "config.json"
    tiny_llm("llama").config.save_pretrained(bare.parent)
    run = make_run(tmp_path, "llama", METHODS["smt"], base=str(bare))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    text = (export(run.folder) / "README.md").read_text()
    assert f"The whole model: `{bare}` with random weights (seed 3), trained from scratch by SMT, with lit-s" in text
    assert "fine-tuned" not in text
    output = export(run.folder, "delta", tmp_path / "delta")
    text = (tmp_path / "delta.md").read_text()
    assert f"The difference from its base: `{bare}` with random weights (seed 3), trained from scratch by SMT" in text
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0].replace("FILE", str(output)), scope)
    torch.testing.assert_close(logits(scope["base"]), run.logits, rtol=0, atol=0)
    assert "trained from scratch, with lit-sparse" in card("all", CausalLM(str(bare)), "delta", None)


def test_what_the_record_lacks_is_left_out(run: Run, tmp_path: Path) -> None:
    module = CausalLM(base=str(run.base))
    module.build()
    for record in (None, RunRecord(name="try-1")):
        text = card("try-1", module, "hf", record)
        assert "The whole model" in text
        assert "by full fine-tuning, with lit-sparse." in text
        for absent in ("## Results", "## Training", "before", "GiB", "None", "datasets", "base_model"):
            assert absent not in text, absent
    failed = dataclasses.replace(RECORD, status="failed", reason="The fit was interrupted.")
    assert "failed, The fit was interrupted." in card("try-1", module, "hf", failed)
    assert read_record(tmp_path) is None


def test_a_base_on_the_hub_is_linked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    module = CausalLM(base=str(run.base))
    module.build()
    monkeypatch.setattr(module, "base", "owner/base-1b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lit_sparse.export.card.cached_file", lambda *_, **__: None)
    text = card("try-1", module, "hf", RECORD)
    assert "base_model: owner/base-1b\n" in text
    assert "base_model_relation: finetune\n" in text
    assert "base_model_relation: adapter\n" in card("try-1", module, "adapter", RECORD)
    assert "https://huggingface.co/owner/base-1b" in text


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_names_on_the_hub(name: str) -> None:
    assert on_hub(name)


@pytest.mark.parametrize("name", ["demo", "minilm", "/models/base", "a/b/c", "./model", "config.json"])
def test_other_bases(name: str) -> None:
    assert not on_hub(name)


@pytest.mark.parametrize("train", ["rows.jsonl", "data/rows.parquet", ["a.txt"], None, "/data/rows"])
def test_data_that_are_not_on_the_hub_are_not_named(train: Any) -> None:
    assert dataset(dataclasses.replace(RECORD, settings={"data": {"init_args": {"train": train}}})) is None


def test_a_base_without_a_card_names_no_license(tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("# no metadata")
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert license_of(str(tmp_path)) == {}


def test_a_family_that_the_oldest_version_lacks_needs_this_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_sparse.export.card.READ_BY_OLDEST", frozenset())
    module = CausalLM(base=str(run.base))
    assert f"transformers >= {transformers_version}" in card("try-1", module, "hf", None)


def test_the_mark_and_the_weights_are_as_before(run: Run, tmp_path: Path) -> None:
    output = export(run.folder, output=tmp_path / "out")
    assert json.loads((output / "lit_sparse.json").read_text())["run"] == "try-1"
    torch.testing.assert_close(logits(load(output)), run.logits, rtol=0, atol=0)


@dataclasses.dataclass
class Own(UpdateStrategy):
    """A method of another package, with a forward pass and a format of its own."""

    leaves: ClassVar = "own_forward"

    @classmethod
    def load(cls, folder, model):
        return cls()


def test_an_adapter_of_a_method_from_elsewhere_is_loaded_from_there(tmp_path: Path) -> None:
    task = CausalLM(tiny_llm(), [Own()])
    task.build()
    text = loading(task, "adapter")
    assert f"from {Own.__module__} import Own\n" in text
    assert '\nOwn.load("FOLDER", base)\n' in text
    with pytest.raises(BadInput, match="UpdateStrategy has no format of its own"):
        UpdateStrategy.load(tmp_path, tiny_llm())
